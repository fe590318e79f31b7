"""The runs of a sweep: which belong together, how their settings are named, how they stand.

A setting is all that was chosen but the seed; over several seeds there are means, never the best.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from statistics import fmean, median
from typing import Any, Final, Literal, get_args

from explorer.compare import Summary, summarise
from explorer.data import Snapshot, is_control
from explorer.pooled import Pair, pooled
from explorer.settings import (
    SETTINGS,
    SHAPE,
    in_order,
    learning_rate,
    rate_text,
    schedule_shape,
    sendable,
    settings,
)
from trainer.config import ScheduleName
from trainer.controls import control_of, controls_by_parent
from trainer.evidence import Evidence, holm
from trainer.grid import word
from trainer.ranking import reason
from trainer.runlog import Run

Reference = Literal["boundary", "control"]

RATE: Final = "Learning rate"
LAYERS: Final = "Layers"
SCHEDULE: Final = "Schedule"
SEED: Final = "Seed"
_FURTHER: Final = ("views", "early_stop", "pool", "precision")
OF_SCHEDULE: Final = (SCHEDULE, *(name.replace("_", " ").capitalize() for name in SHAPE))
_NAMED: Final = {RATE: "lr", LAYERS: "unfreeze", SCHEDULE: "name"}  # as trainer.grid names them
REFERENCES: Final[Mapping[Reference, str]] = {"boundary": "the boundary", "control": "its control"}


# --- groups -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Runs that can be held against each other: a sweep, or all finetunes of one trunk.

    `id` stays the same for ever, `title` holds what users typed. `missing` members of the sweep
    are not there: trained in an earlier sweep, or not yet. `archived` ones were left out.
    """

    id: str
    title: str
    members: tuple[str, ...]
    missing: int = 0
    archived: int = 0


def groups(snapshot: Snapshot) -> list[Group]:
    """All groups of at least two runs, controls not counted, the newest first.

    Of a sweep and its trunk the sweep comes first, unless some of its members are elsewhere.
    """
    sweeps: defaultdict[str, list[Run]] = defaultdict(list)
    trunks: defaultdict[str, list[Run]] = defaultdict(list)
    for run in snapshot.runs.values():
        if name := _sweep(run).get("id"):
            sweeps[str(name)].append(run)
        if run.parent_run_id and finetunes(run):
            photos = str(run.info.get("dataset", {}).get("fingerprint", ""))
            trunks[f"{run.parent_run_id}.{photos[:8]}"].append(run)
    found = [_of_sweep(snapshot, name, runs) for name, runs in sweeps.items()]
    found += [_of_trunk(snapshot, name, runs) for name, runs in trunks.items()]
    place = {name: number for number, name in enumerate(snapshot.runs)}
    several = [group for group in found if len(group.members) > 1]
    return sorted(several, key=lambda group: _newness(group, place), reverse=True)


def _newness(group: Group, place: Mapping[str, int]) -> tuple[int, int]:
    of_trunk = "." in group.id
    return place[group.members[-1]], 1 if of_trunk else 2 * (group.missing == 0)


def _of_sweep(snapshot: Snapshot, name: str, runs: Sequence[Run]) -> Group:
    planned = _sweep(runs[0]).get("of")
    day = datetime.fromtimestamp(runs[0].info.get("started", 0.0), UTC).date()
    said = f"{_sweep(runs[0]).get('name') or name}, {day}"
    missing = max(0, planned - len(runs)) if isinstance(planned, int) else 0
    return _group(snapshot, name, said, [run for run in runs if not is_control(run)], missing)


def _of_trunk(snapshot: Snapshot, name: str, runs: Sequence[Run]) -> Group:
    parent = runs[0].parent_run_id or ""
    said = f"All finetunes of {snapshot.labels.get(parent, parent)}"
    return _group(snapshot, name, said, runs, 0)


def _group(snapshot: Snapshot, name: str, said: str, runs: Sequence[Run], missing: int) -> Group:
    current = set(snapshot.current)
    members = tuple(run.run_id for run in runs if run.run_id in current)
    title = f"{said}, {len(members)} runs"
    return Group(name, title, members, missing, len(runs) - len(members))


def _sweep(run: Run) -> Mapping[str, Any]:
    entry = run.info.get("sweep")
    return entry if isinstance(entry, dict) else {}


def finetunes(run: Run) -> bool:
    """Whether it is a finetune run, also before its phase has begun."""
    return run.boundary is not None or run.info.get("config", {}).get("phase") == "finetune"


# --- members ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A run of the group, its settings as text, and its control with what that reached."""

    run: Run
    summary: Summary
    settings: Mapping[str, str]
    rate: float | None
    control: Run | None
    control_acc: float | None

    @property
    def counts(self) -> bool:
        """Whether it has a result; what a failed or interrupted run had reached is none."""
        return self.summary.status in ("done", "running") and self.summary.best_acc is not None

    @cached_property
    def state(self) -> str:
        """What to say instead of its result, or beside it; "" for a run that is done."""
        if self.summary.status == "done":
            return "" if self.counts else "no result"
        if self.summary.status == "failed" and reason(self.run).startswith("The loss became"):
            return "diverged"
        return self.summary.status

    def value(self, against: Reference | None) -> float | None:
        """The change against a reference, or without one the best accuracy; a fraction."""
        if against == "boundary":
            return self.summary.change
        if against == "control":
            known = self.summary.best_acc is not None and self.control_acc is not None
            return self.summary.best_acc - self.control_acc if known else None  # type: ignore[operator]
        return self.summary.best_acc

    def pair(self, against: Reference) -> Pair | None:
        """Where the predictions are that show the change."""
        if against == "boundary":
            return self.run.predictions("before"), self.run.predictions("after")
        if self.control is None:
            return None
        return self.control.predictions("after"), self.run.predictions("after")


def members(snapshot: Snapshot, run_ids: Iterable[str]) -> list[Member]:
    """The runs of a group; those that are controls or not there are left out."""
    # Only these can be a control, and there are few.
    controls = controls_by_parent(run for run in snapshot.runs.values() if is_control(run))
    runs = [snapshot.runs[name] for name in run_ids if name in snapshot.runs]
    return [
        member_of(run, snapshot.labels[run.run_id], control_of(run, controls))
        for run in runs
        if not is_control(run)
    ]


def member_of(run: Run, label: str, control: Run | None) -> Member:
    """One run with its settings; `control` as trainer.controls.control_of finds it."""
    return Member(
        run=run,
        summary=summarise(run, label),
        settings=_settings(run),
        rate=learning_rate(run),
        control=control,
        control_acc=None if control is None else summarise(control, "").best_acc,
    )


def _settings(run: Run) -> dict[str, str]:
    """As explorer.settings has them, and what else a sweep or a hand may have varied."""
    config = run.info.get("config", {})
    schedule = config.get("schedule")
    schedule = schedule if isinstance(schedule, dict) else {}
    used = schedule_shape(schedule)
    further = {name: _text(config.get(name)) for name in _FURTHER}
    own = {
        RATE: rate_text(learning_rate(run)),
        LAYERS: _text(config.get("unfreeze")) if finetunes(run) else "",
        SCHEDULE: _text(schedule.get("name")),
    }
    named = {name.replace("_", " ").capitalize(): text for name, text in (used | further).items()}
    return settings(run) | own | named


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else sendable(str(value))


def varied(found: Sequence[Member]) -> list[str]:
    """The names of the settings in which the members differ, learning rate and layers first."""
    names = dict.fromkeys((*SETTINGS, *OF_SCHEDULE, *(k for m in found for k in m.settings)))
    values = {name: {one.settings.get(name, "") for one in found} - {""} for name in names}
    return [name for name in names if len(values[name]) > 1]


def label(member: Member, names: Iterable[str]) -> str:
    """The member's settings of these names in words: `lr 1e-4, 20 layers, cosine`."""
    known = [(name, member.settings.get(name, "")) for name in names]
    return ", ".join(_word(name, value) for name, value in known if value)


def _word(name: str, value: str) -> str:
    return word(_NAMED.get(name, name.lower()), value)


def ordered(found: Sequence[Member], name: str) -> list[str]:
    """The values of a setting in their order: rates by size, layers by how much they free."""
    values = {one.settings.get(name, "") for one in found}
    if name == RATE:
        rates = {one.settings[RATE]: one.rate or 0.0 for one in found}
        return sorted(values, key=lambda value: rates[value])
    if name == SCHEDULE:
        known = [str(each) for each in get_args(ScheduleName)]
        return [each for each in known if each in values] + sorted(values - set(known))
    if name != LAYERS:
        return in_order(list(values))
    freed: defaultdict[str, list[int]] = defaultdict(list)
    for one in found:
        freed[one.settings[LAYERS]].append(_trained(one.run))
    # The numbers 1 to 5 free the same: then the smaller number comes first.
    rank = {value: place for place, value in enumerate(in_order(list(values)))}
    return sorted(values, key=lambda value: (median(freed[value]), rank[value]))


def _trained(run: Run) -> int:
    """How many parameters its last phase trains; 0 where that is not known."""
    phases = run.info.get("phases") or [{}]
    number = phases[-1].get("trainable_params")
    return number if isinstance(number, int) else 0


# --- standings --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """Members that belong together: one setting, one cell, one schedule.

    `change` and `accuracy` are means over those that count, as fractions; without a reference the
    change is the accuracy. `evidence` needs the predictions of all that count, and these done.
    """

    members: tuple[Member, ...]
    against: Reference | None

    @cached_property
    def counted(self) -> tuple[Member, ...]:
        return tuple(m for m in self.members if m.counts and m.value(self.against) is not None)

    @property
    def changes(self) -> list[float]:
        return [value for m in self.counted if (value := m.value(self.against)) is not None]

    @property
    def change(self) -> float | None:
        return fmean(self.changes) if self.counted else None

    @property
    def accuracies(self) -> list[float]:
        return [m.summary.best_acc for m in self.counted if m.summary.best_acc is not None]

    @property
    def rank(self) -> tuple[float, float]:
        """As trainer.ranking: the mean accuracy, then the mean loss."""
        return fmean(self.accuracies), -fmean(_best_loss(member) for member in self.counted)

    @cached_property
    def evidence(self) -> Evidence | None:
        if self.against is None or any(m.summary.status != "done" for m in self.counted):
            return None
        pairs = [m.pair(self.against) for m in self.counted]
        return pooled([pair for pair in pairs if pair is not None])

    @property
    def state(self) -> str:
        """What to say of those that are not done, such as `diverged` or `1 of 2 running`."""
        tally = Counter(member.state for member in self.members)
        if len(tally) == 1:
            return next(iter(tally))
        total = len(self.members)
        return ", ".join(f"{tally[kind]} of {total} {kind}" for kind in sorted(tally) if kind)


def _best_loss(member: Member) -> float:
    """Of the epoch that is kept, not the lowest."""
    epoch = member.summary.best_epoch
    return next((r.val_loss for r in member.run.epochs[::-1] if r.epoch == epoch), math.inf)


def standings(
    found: Sequence[Member], key: Callable[[Member], object], against: Reference | None
) -> list[Standing]:
    """The members grouped by a key, in the order in which the keys first appear."""
    parts: defaultdict[object, list[Member]] = defaultdict(list)
    for member in found:
        parts[key(member)].append(member)
    return [Standing(tuple(part), against) for part in parts.values()]


def adjusted_p(found: Sequence[Standing]) -> list[float]:
    """The p of each, adjusted for how many there are; NaN where there is no evidence."""
    known = [index for index, one in enumerate(found) if one.evidence is not None]
    p = holm([one.evidence.p for one in found if one.evidence is not None])
    values = dict(zip(known, p, strict=True))
    return [values.get(index, math.nan) for index in range(len(found))]

"""Everything that is shown of runs that differ in their settings, as frames and words."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final, Literal

import numpy as np
import pandas as pd

from explorer.data import Snapshot
from explorer.sweep_members import (
    LAYERS,
    OF_SCHEDULE,
    RATE,
    REFERENCES,
    SCHEDULE,
    SEED,
    Member,
    Reference,
    Standing,
    adjusted_p,
    finetunes,
    label,
    member_of,
    members,
    ordered,
    standings,
    varied,
)
from explorer.sweep_words import details, headline, p_text
from trainer.evidence import SIGNIFICANT, Evidence, points
from trainer.runlog import Run

Split = Literal["", "Schedule", "Seed"]

CHANGE: Final = "Change against"  # how the title of every change begins
NO_EVIDENCE: Final = "no evidence"


@dataclass(frozen=True)
class Section:
    """Everything that is shown of a group, all frames ready for explorer.sweep_charts.

    `against` None: transfer runs, which have no boundary, so accuracies stand for changes. Values
    in frames are points or percent. `row` names the rows of the heatmap, "" for a single one.
    `balanced`: each schedule was tried with the same other settings.
    """

    against: Reference | None
    settings: tuple[str, ...]
    row: str
    cells: pd.DataFrame
    schedules: pd.DataFrame
    schedule_means: pd.DataFrame
    balanced: bool
    curves: pd.DataFrame
    lines: pd.DataFrame
    ranking: pd.DataFrame
    headline: str
    details: tuple[str, ...]


def section(
    snapshot: Snapshot,
    run_ids: Iterable[str],
    against: Reference = "boundary",
    split: Split = "",
) -> Section:
    """What a group of runs shows; `split` gives each schedule or seed a heatmap of its own.

    Where nothing is known frames are empty, and charts of them are not to be drawn.
    """
    found = members(snapshot, run_ids)
    reference = against if any(finetunes(one.run) for one in found) else None
    names = varied(found)
    row = _row(found, names, split)
    ranked = _ranked(found, names, reference)
    return Section(
        against=reference,
        settings=tuple(names),
        row=row,
        cells=_cells(found, row, split, reference),
        schedules=_schedules(found, names, reference),
        schedule_means=_schedule_means(found, reference),
        balanced=_balanced(found),
        curves=_curves(found),
        lines=_lines(found, names, reference),
        ranking=_ranking(found, ranked, names, reference),
        headline=headline(ranked, names, reference),
        details=tuple(details(ranked, reference)),
    )


def measure(against: Reference | None) -> str:
    """What the values of a section are, as the title of an axis or a legend."""
    if against is None:
        return "Best accuracy (%)"
    return f"{CHANGE} {REFERENCES[against]} (points)"


def _hundredfold(value: float | None) -> float:
    return math.nan if value is None else 100 * value


def _shown(value: float | None, against: Reference | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if against is None else points(value)


# --- the heatmap ------------------------------------------------------------------------------


def _row(found: Sequence[Member], names: Sequence[str], split: Split) -> str:
    """What the rows of the heatmap stand for; transfer runs have no layers."""
    if any(one.settings[LAYERS] for one in found):
        return LAYERS
    return next((name for name in names if name not in (RATE, SEED, split)), "")


def _cells(
    found: Sequence[Member], row: str, split: Split, against: Reference | None
) -> pd.DataFrame:
    """One row for each cell that has runs: map (the split's value), rate, row, x and y (places on
    the axes), cell (its name in words), value (NaN without a result), text, state, beyond (better,
    worse, NO_EVIDENCE, or "" where there are no predictions), runs, range, interval, p (adjusted
    for the cells), run_ids."""
    names = [split or "none", row or "none", RATE]  # "none": no member has such a setting
    order = {n: {v: i for i, v in enumerate(ordered(found, n))} for n in names}

    def place(member: Member) -> tuple[int, ...]:
        return tuple(order[name][member.settings.get(name, "")] for name in names)

    of_cells = standings(sorted(found, key=place), place, against)
    rows = []
    for one, p in zip(of_cells, adjusted_p(of_cells), strict=True):
        _, y, x = place(one.members[0])
        rows.append(_cell(one, p, row, split) | {"x": x, "y": y})
    return pd.DataFrame(rows)


def _cell(one: Standing, p: float, row: str, split: Split) -> dict[str, Any]:
    first, evidence = one.members[0], one.evidence
    beyond = _beyond(evidence, p)
    return {
        "map": label(first, [split]) or ("none" if split else ""),
        "rate": first.settings[RATE] or "unknown",
        "row": first.settings.get(row, "") or ("none" if row else ""),
        "cell": label(first, (RATE, row, split)) or "all runs",
        "value": _hundredfold(one.change),
        "text": _shown(one.change, one.against) + ("*" if beyond in ("better", "worse") else ""),
        "state": one.state,
        "beyond": beyond,
        "runs": len(one.members),
        "range": _range(one),
        "interval": _interval(evidence),
        "p": p_text(p),
        "run_ids": tuple(member.run.run_id for member in one.members),
    }


def _beyond(evidence: Evidence | None, p: float) -> str:
    if evidence is None:
        return ""
    if not p < SIGNIFICANT:
        return NO_EVIDENCE
    return "better" if evidence.change > 0 else "worse"


def _range(one: Standing) -> str:
    changes = one.changes
    if len(changes) < 2:
        return ""
    return f"{_shown(min(changes), one.against)} to {_shown(max(changes), one.against)}"


def _interval(evidence: Evidence | None) -> str:
    return "" if evidence is None else f"{points(evidence.low)} to {points(evidence.high)}"


# --- schedules --------------------------------------------------------------------------------


def _schedule(member: Member, names: Sequence[str]) -> str:
    own = [name for name in OF_SCHEDULE if name == SCHEDULE or name in names]
    return label(member, own) or "unknown"


def _by_schedule(found: Sequence[Member]) -> list[tuple[str, list[Member]]]:
    """The members with a result by schedule, in the order in which these are named."""
    names = varied(found)
    order = ordered(found, SCHEDULE)
    parts: defaultdict[str, list[Member]] = defaultdict(list)
    for one in sorted(found, key=lambda one: order.index(one.settings[SCHEDULE])):
        if one.counts:
            parts[_schedule(one, names)].append(one)
    return list(parts.items())


def _schedules(
    found: Sequence[Member], names: Sequence[str], against: Reference | None
) -> pd.DataFrame:
    """One row for each run with a result: schedule, run, settings, value, place (0 to 1, to draw
    runs with equal values apart)."""
    others = [name for name in names if name not in OF_SCHEDULE]
    rows = [
        (schedule, one.summary.label, label(one, others), _hundredfold(one.value(against)), place)
        for schedule, part in _by_schedule(found)
        for place, one in zip(np.linspace(0, 1, len(part)), part, strict=True)
    ]
    frame = pd.DataFrame(rows, columns=["schedule", "run", "settings", "value", "place"])
    return frame.dropna(subset=["value"])


def _schedule_means(found: Sequence[Member], against: Reference | None) -> pd.DataFrame:
    """One row for each schedule: value, low, high (NaN without evidence), text, interval, runs."""
    rows = []
    for name, part in _by_schedule(found):
        one = Standing(tuple(part), against)
        known = one.evidence
        low, high = (known.low, known.high) if known else (None, None)
        values = (_hundredfold(one.change), _hundredfold(low), _hundredfold(high))
        rows.append((name, *values, _shown(one.change, against), _interval(known), len(part)))
    columns = ["schedule", "value", "low", "high", "text", "interval", "runs"]
    return pd.DataFrame(rows, columns=columns).dropna(subset=["value"])


def _balanced(found: Sequence[Member]) -> bool:
    """Whether each schedule was tried with the same other settings."""
    tried = [sorted(map(_other_settings, part)) for _, part in _by_schedule(found)]
    return all(one == tried[0] for one in tried)


def _other_settings(member: Member) -> list[tuple[str, str]]:
    return sorted((k, v) for k, v in member.settings.items() if k not in OF_SCHEDULE)


def _curves(found: Sequence[Member]) -> pd.DataFrame:
    """The mean validation accuracy by epoch of the phase for each schedule, as far as all of its
    runs go: schedule, epoch, accuracy (fraction), runs."""
    rows = []
    for schedule, part in _by_schedule(found):
        curves = [_accuracies(one) for one in part]
        common = sorted(set.intersection(*(set(curve) for curve in curves)))
        rows += [(schedule, x, fmean(curve[x] for curve in curves), len(curves)) for x in common]
    return pd.DataFrame(rows, columns=["schedule", "epoch", "accuracy", "runs"])


def _accuracies(member: Member) -> dict[int, float]:
    phase = member.run.phase
    return {
        record.phase_epoch: record.val_acc
        for record in member.run.epochs
        if record.phase == phase and not math.isnan(record.val_acc)
    }


# --- parallel coordinates ---------------------------------------------------------------------


def _lines(
    found: Sequence[Member], names: Sequence[str], against: Reference | None
) -> pd.DataFrame:
    """One row for each run and axis, the axes being the settings that vary and then the result:
    run_id, run, settings, axis, number (of the axis), place (0 to 1), tick (its text and place),
    value (the result), said (the result in words)."""
    counted = [one for one in found if one.value(against) is not None and one.counts]
    counted.sort(key=lambda one: one.value(against) or 0.0)
    axes = [_axis(counted, name) for name in names if counted] + [_result_axis(counted, against)]
    titles = [*names, measure(against)]
    rows = [
        {
            "run_id": one.run.run_id,
            "run": one.summary.label,
            "settings": label(one, names),
            "axis": title,
            "number": number,
            **axes[number][index],
            "value": _hundredfold(one.value(against)),
            "said": _shown(one.value(against), against),
        }
        for index, one in enumerate(counted)
        for number, title in enumerate(titles)
    ]
    columns = [
        "run_id",
        "run",
        "settings",
        "axis",
        "number",
        "tick",
        "at",
        "place",
        "value",
        "said",
    ]
    return pd.DataFrame(rows, columns=columns)


def _axis(counted: Sequence[Member], name: str) -> list[dict[str, Any]]:
    """Values at equal distances. Runs that share one lie beside each other, the best on the right,
    so that their lines can be told apart."""
    values = [one.settings.get(name, "") for one in counted]
    order = ordered(counted, name)
    share = len(order)
    spread = 0.6 / share
    places = []
    for index, value in enumerate(values):
        among = (index + 0.5) / len(values) - 0.5  # by result: the runs are sorted by it
        at = (order.index(value) + 0.5) / share
        places.append({"tick": value or "off", "at": at, "place": at + spread * among})
    return places


def _result_axis(counted: Sequence[Member], against: Reference | None) -> list[dict[str, Any]]:
    values = [one.value(against) or 0.0 for one in counted]
    low, high = min(values, default=0.0), max(values, default=0.0)
    ticks = np.linspace(low, high, 5) if high > low else np.array([low])
    places = []
    for value in values:
        at = 0.04 + 0.92 * ((value - low) / (high - low) if high > low else 0.5)
        near = float(ticks[np.argmin(np.abs(ticks - value))])
        mark = 0.04 + 0.92 * ((near - low) / (high - low) if high > low else 0.5)
        places.append({"tick": _shown(near, against), "at": mark, "place": at})
    return places


# --- the ranking ------------------------------------------------------------------------------


def _ranked(
    found: Sequence[Member], names: Sequence[str], against: Reference | None
) -> list[Standing]:
    """The settings with at least one run that is done, best first."""
    telling = [name for name in names if name != SEED]
    done = [one for one in found if one.summary.status == "done"]
    of_settings = standings(done, lambda one: label(one, telling), against)
    return sorted((one for one in of_settings if one.counted), key=lambda s: s.rank, reverse=True)


def _ranking(
    found: Sequence[Member],
    ranked: Sequence[Standing],
    names: Sequence[str],
    against: Reference | None,
) -> pd.DataFrame:
    """One row for each setting, best first, and one for the controls: accuracies in percent,
    changes in points, `run_ids` of what is in it."""
    telling = [name for name in names if name != SEED]
    planned = Counter(label(member, telling) for member in found)
    rows = []
    for place, (one, p) in enumerate(zip(ranked, adjusted_p(ranked), strict=True), start=1):
        name = label(one.members[0], telling)
        done = f"{len(one.counted)} of {planned[name]}"
        rows.append({"Place": place, "Setting": name or "all runs", "Done": done} | _row_of(one, p))
    controls = {one.control.run_id: one.control for one in found if one.control is not None}
    if controls and against is not None:
        rows.append(_control_row(list(controls.values()), against))
    columns = ["Place", "Setting", "Done", "Best accuracy", "Change", "95% interval", "p"]
    columns += ["Beyond chance", "Fixed", "Broken", "Spread", "run_ids"]
    frame = pd.DataFrame(rows, columns=columns)
    whole = dict.fromkeys(("Place", "Fixed", "Broken"), "Int64")
    return frame.astype(whole).sort_values("Best accuracy", ascending=False, kind="stable")


def _row_of(one: Standing, p: float) -> dict[str, Any]:
    evidence = one.evidence
    several = len(one.counted) > 1
    return {
        "Best accuracy": 100 * fmean(one.accuracies),
        "Change": _hundredfold(one.change) if one.against else math.nan,
        "95% interval": _interval(evidence),
        "p": p_text(p),
        "Beyond chance": _beyond(evidence, p),
        "Fixed": evidence.fixed if evidence else None,
        "Broken": evidence.broken if evidence else None,
        "Spread": 100 * (max(one.accuracies) - min(one.accuracies)) if several else math.nan,
        "run_ids": tuple(member.run.run_id for member in one.members),
    }


def _control_row(controls: Sequence[Run], against: Reference) -> dict[str, Any]:
    found = [member_of(run, "", None) for run in controls]
    row = _row_of(Standing(tuple(found), "boundary"), math.nan)
    if against == "control":
        row["Change"] = 0.0
    own = {"95% interval": "", "Beyond chance": "", "Fixed": None, "Broken": None}
    name = "control: the head alone"
    return row | own | {"Place": None, "Setting": name, "Done": f"{len(found)} of {len(found)}"}

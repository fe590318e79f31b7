"""What a sweep found: its members ranked, beside their control, and what that does not show."""

from __future__ import annotations

import itertools
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Final

from trainer.cli import inert
from trainer.config import Config
from trainer.grid import Plan, batches_of
from trainer.runlog import Run
from trainer.schema import METRICS_JSONL, EpochRecord

_NO_VALUE: Final = "–"


@dataclass(frozen=True)
class Outcome:
    """A member that is done: its best epoch since unfreezing, beside its epoch 0."""

    config: Config
    run_id: str
    best: EpochRecord
    boundary: EpochRecord | None

    @property
    def gain(self) -> float | None:
        """Change of validation accuracy against the boundary, in points."""
        return None if self.boundary is None else _points(self.best, self.boundary)


@dataclass(frozen=True)
class Standing:
    """The members that differ in their seed only, as one line of the ranking.

    `over_control` holds, for each seed whose control is done too, the difference of the best
    validation accuracies in points. Accuracies are fractions.
    """

    group: str
    control: bool
    planned: int
    outcomes: tuple[Outcome, ...]
    over_control: tuple[float, ...]

    @property
    def accuracies(self) -> tuple[float, ...]:
        return tuple(outcome.best.val_acc for outcome in self.outcomes)

    @property
    def loss(self) -> float:
        return fmean(outcome.best.val_loss for outcome in self.outcomes)

    @property
    def rank(self) -> tuple[float, float]:
        """`EpochRecord.rank` of the means over the seeds."""
        return fmean(self.accuracies), -self.loss

    @property
    def gain(self) -> float | None:
        gains = [outcome.gain for outcome in self.outcomes if outcome.gain is not None]
        return fmean(gains) if gains else None

    @property
    def spread(self) -> float:
        """Between the best and the worst seed, in points."""
        return (max(self.accuracies) - min(self.accuracies)) * 100


def standings(whole: Plan, runs: Mapping[int, Run]) -> list[Standing]:
    """The groups with at least one member done, best first. `runs` by index in the plan."""
    places = whole.info.places
    found = {index: outcome(whole.configs[index], run) for index, run in runs.items()}
    outcomes = {index: one for index, one in found.items() if one is not None}
    controls = {
        batches_of(one.config): one.best for index, one in outcomes.items() if places[index].control
    }
    rows = []
    for group in dict.fromkeys(place.group for place in places):
        indices = [index for index, place in enumerate(places) if place.group == group]
        done = tuple(outcomes[index] for index in indices if index in outcomes)
        is_control = places[indices[0]].control
        over = tuple(
            _points(one.best, controls[batches])
            for one in done
            if not is_control and (batches := batches_of(one.config)) in controls
        )
        if done:
            rows.append(Standing(group, is_control, len(indices), done, over))
    return sorted(rows, key=lambda row: row.rank, reverse=True)


def outcome(config: Config, run: Run) -> Outcome | None:
    """None for a member that is not done, or whose log cannot be read."""
    trained = [epoch for epoch in run.epochs if epoch.phase_epoch >= 1]
    if run.status != "done" or not trained:
        return None
    boundary = next((epoch for epoch in run.epochs if epoch.phase_epoch == 0), None)
    return Outcome(config, run.run_id, max(trained, key=lambda epoch: epoch.rank), boundary)


def _points(one: EpochRecord, other: EpochRecord) -> float:
    return (one.val_acc - other.val_acc) * 100


def ranking(whole: Plan, runs: Mapping[int, Run]) -> str:
    """What the user sees at the end: the ranking, what failed, what it means, and what next."""
    rows = standings(whole, runs)
    parts = [_ranking_table(whole, rows), *_legend(whole, rows)] if rows else []
    parts += _failures(whole, runs)
    if _different_photos(runs.values()):
        parts.append(
            "Warning: the members were not all trained on the same photos, so their figures cannot "
            "be compared; --again trains all anew."
        )
    return "\n".join([*parts, verdict(rows), *_next(rows)])


def _next(rows: Sequence[Standing]) -> list[str]:
    ranked = [row for row in rows if not row.control]
    if not ranked:
        return []
    best = max(ranked[0].outcomes, key=lambda one: one.best.rank)
    return [
        "Compare the runs:  streamlit run streamlit_app.py",
        f"Export the best:   python -m export {best.run_id}",
    ]


def _ranking_table(whole: Plan, rows: Sequence[Standing]) -> str:
    places = itertools.count(1)
    finetune = whole.configs[0].phase == "finetune"
    lines = [_ranking_row(row, "*" if row.control else str(next(places)), finetune) for row in rows]
    return table(lines, left=("member", "status"))


def _ranking_row(row: Standing, place: str, finetune: bool) -> dict[str, str]:
    accuracies, several = row.accuracies, row.planned > 1
    epochs = sorted({outcome.best.phase_epoch for outcome in row.outcomes})
    deviation = f"{stdev(accuracies) * 100:.2f}" if len(accuracies) > 1 else _NO_VALUE
    over_control = fmean(row.over_control) if row.over_control else None
    all_done = len(accuracies) == row.planned
    return {
        "place": place,
        "member": row.group,
        "val acc": f"{fmean(accuracies):.2%}",
        "min…max": f"{min(accuracies):.2%}…{max(accuracies):.2%}" if several else "",
        "sd": deviation if several else "",
        "seeds": str(len(accuracies)) if several else "",
        "epoch": str(epochs[0]) if len(epochs) == 1 else f"{epochs[0]}…{epochs[-1]}",
        "since boundary": _signed(row.gain) if finetune else "",
        "over control": _signed(over_control) if finetune else "",
        "loss": f"{row.loss:.4f}" if row.loss < 1000 else f"{row.loss:.3g}",
        "status": "done" if all_done else f"{len(accuracies)} of {row.planned} done",
    }


def _signed(points: float | None) -> str:
    return _NO_VALUE if points is None else f"{points:+.2f}"


def _legend(whole: Plan, rows: Sequence[Standing]) -> list[str]:
    lines = []
    if any(row.control for row in rows):
        epochs = count(whole.configs[-1].epochs, "further epoch")
        lines.append(f"* the control: {epochs} of the head, everything else still frozen")
    if whole.configs[0].phase == "finetune":
        lines.append(
            "epoch: the best since unfreezing; since boundary, over control: points of val acc"
        )
    if any(row.planned > 1 for row in rows):
        lines.append("over several seeds: means; sd: standard deviation, in points")
    return lines


def _failures(whole: Plan, runs: Mapping[int, Run]) -> list[str]:
    return [
        f"{'unreadable' if run.status == 'done' else run.status}: "
        f"{inert(f'{whole.labels[index]}: {reason(run)}')} ({run.run_id})"
        for index, run in sorted(runs.items())
        if outcome(whole.configs[index], run) is None
    ]


def reason(run: Run) -> str:
    """Why a run stopped, in one line, from the last "stop" event of its metrics.jsonl."""
    said: object = None
    path = run.path / METRICS_JSONL
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue  # torn or damaged, which is no reason to hide the ranking
        if isinstance(event, dict) and event.get("event") == "stop":
            said = event.get("reason")
    return str(said or run.problem or "no reason was logged").splitlines()[0]


def _different_photos(runs: Iterable[Run]) -> bool:
    """Among the runs that came as far as reading them."""
    return len({run.info.get("dataset", {}).get("fingerprint") for run in runs} - {None}) > 1


def verdict(rows: Sequence[Standing]) -> str:
    """What the ranking says of the best member, and what it cannot say."""
    ranked = [row for row in rows if not row.control]
    if not ranked:
        return "No member is done: there is nothing to rank."
    best = ranked[0]
    finetune = best.outcomes[0].config.phase == "finetune"
    lead = f"Best: {inert(best.group)} with {fmean(best.accuracies):.2%}"
    rival = _control_of(best, rows) if finetune else next(iter(ranked[1:]), None)
    if rival is None and finetune:
        return f"{lead}; its control is not done, so nothing says whether unfreezing helped."
    if rival is None:
        return f"{lead}."
    points = fmean(best.over_control) if finetune else (best.rank[0] - rival.rank[0]) * 100
    points = round(points, 6)  # two equal means can differ by 1e-15
    seeds = min(len(best.outcomes), len(rival.outcomes))
    said = _against(points, "control" if finetune else "next")
    return f"{lead}, {said} {_doubt(points, max(best.spread, rival.spread), seeds, len(ranked))}"


def _control_of(best: Standing, rows: Sequence[Standing]) -> Standing | None:
    """The control on the same batches."""
    batches = {batches_of(one.config) for one in best.outcomes}
    for row in rows:
        if row.control and batches & {batches_of(one.config) for one in row.outcomes}:
            return row
    return None


def _against(points: float, rival: str) -> str:
    if points > 0:
        return f"{points:.2f} points above the {rival}."
    if rival == "next":
        return "no better than the next."
    where = f"{-points:.2f} points below" if points else "no better than"
    return f"{where} the control: unfreezing did not help here."


def _doubt(points: float, spread: float, seeds: int, candidates: int) -> str:
    """`points` and `spread` (between the best and the worst seed) in points of accuracy."""
    lucky = points > 0 and candidates > 1
    chance = f", and the best of {candidates} looks good by chance" if lucky else ""
    if seeds == 1:
        return f"One seed cannot tell a gain from noise{chance}: repeat it with --seed 0 1 2."
    if abs(points) <= round(spread, 6):
        return f"That is within the spread of the seeds ({spread:.2f} points){chance}."
    return f"The spread of the seeds is {spread:.2f} points."


# --- text -------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, str]], left: Container[str] = ()) -> str:
    """Aligned columns under their names; those in which no row has anything are left out."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = [
        "  ".join(
            row[name].ljust(widths[name]) if name in left else row[name].rjust(widths[name])
            for name in names
        )
        for row in ({name: name for name in names}, *rows)
    ]
    return "\n".join(inert(line.rstrip()) for line in lines)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

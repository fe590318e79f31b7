"""What is known of runs, from their predictions: against their boundary, against their control."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from explorer.data import Snapshot
from trainer.controls import control_of, controls_by_parent
from trainer.evidence import (
    Evidence,
    EvidenceError,
    Predictions,
    compare,
    holm,
    load_predictions,
    sentence,
)
from trainer.runlog import Run, Stamp, stamp


@dataclass(frozen=True)
class Findings:
    """What is known of one finetune run: against its boundary and against its control. A text says
    why there is no evidence; None: nothing to compare."""

    boundary: Evidence | str | None
    control: Evidence | str | None


def findings(snapshot: Snapshot, selected: Iterable[str]) -> dict[str, Findings]:
    """Of the finetune runs among the selected ones, by run id."""
    runs = [snapshot.runs[name] for name in selected if name in snapshot.runs]
    controls = controls_by_parent(snapshot.runs.values())
    return {
        run.run_id: Findings(
            _between(run.predictions("before"), run.predictions("after")),
            None if (other := control_of(run, controls)) is None else _against(other, run),
        )
        for run in runs
        if run.phase == "finetune"
    }


def _against(control: Run, run: Run) -> Evidence | str | None:
    return _between(control.predictions("after"), run.predictions("after"))


def _between(before: Path, after: Path) -> Evidence | str | None:
    stamps = stamp(before), stamp(after)
    if None in stamps:
        return None
    return _compared(before, stamps[0], after, stamps[1])


@functools.lru_cache(maxsize=16_384)  # two for each run: a folder of 8,000 is still known
def _compared(before: Path, before_stamp: Stamp, after: Path, after_stamp: Stamp) -> Evidence | str:
    try:
        return compare(_loaded(before, before_stamp), _loaded(after, after_stamp))
    except EvidenceError as error:
        return str(error)


# A run's predictions are compared twice, and those of one control with many runs in turn.
@functools.lru_cache(maxsize=4)
def _loaded(path: Path, _: Stamp) -> Predictions:
    return load_predictions(path)


def adjusted(found: Mapping[str, Findings]) -> dict[str, float]:
    """The p-value of each run against its boundary, adjusted for the number of runs."""
    known = {n: one.boundary for n, one in found.items() if isinstance(one.boundary, Evidence)}
    return dict(zip(known, holm([evidence.p for evidence in known.values()]), strict=True))


def evidence_lines(found: Mapping[str, Findings]) -> dict[str, list[str]]:
    """What to say beside the verdict of each run, by run id."""
    by_boundary = adjusted(found)
    controls = {n: one.control for n, one in found.items() if isinstance(one.control, Evidence)}
    p = holm([evidence.p for evidence in controls.values()])
    by_control = dict(zip(controls, p, strict=True))
    return {
        name: [
            *_line("Against its boundary", one.boundary, by_boundary.get(name)),
            *_line("Against its control, the head alone", one.control, by_control.get(name)),
        ]
        for name, one in found.items()
    }


def _line(what: str, evidence: Evidence | str | None, adjusted: float | None) -> list[str]:
    if isinstance(evidence, Evidence) and adjusted is not None:
        return [f"{what}: {sentence(evidence, adjusted)}."]
    return [f"{what}: {evidence}"] if isinstance(evidence, str) else []

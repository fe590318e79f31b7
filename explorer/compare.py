"""The numbers of each run and what they say about unfreezing, in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from explorer.data import Snapshot, dataset_size, is_control
from trainer.evidence import digits as decimals
from trainer.evidence import points
from trainer.runlog import Run


@dataclass(frozen=True)
class Summary:
    """What a run's last phase reached. Accuracies and `change` are fractions, not percent.

    `best_acc` and `best_epoch` are of the epoch of highest rank among those that trained, the one
    whose checkpoint was kept; `best_loss` is the lowest of any. A `direct` run has one evaluation.
    `boundary_acc` and `change` are None for a run without a finetune phase that is no control, and
    `change` also until its first epoch is there.
    """

    run_id: str
    label: str
    phase: str
    status: str
    epochs: int
    control: bool = False
    best_acc: float | None = None
    best_epoch: int | None = None
    best_phase_epoch: int | None = None
    best_loss: float | None = None
    boundary_acc: float | None = None
    change: float | None = None
    seconds: float = 0.0
    val_photos: int | None = None


def summarise(run: Run, label: str) -> Summary:
    """The summary of one run, from its epoch records."""
    phase = run.phase or ""
    records = [record for record in run.epochs if record.phase == phase]
    trained = [record for record in records if record.phase_epoch > 0]
    known = [record for record in trained or records if not math.isnan(record.val_acc)]
    best = max(known, key=lambda record: record.rank, default=None)
    start = next((record for record in records if record.phase_epoch == 0), None)
    control = is_control(run)
    boundary = start.val_acc if start and (phase == "finetune" or control) else None
    boundary = None if boundary is None or math.isnan(boundary) else boundary
    losses = [record.val_loss for record in trained or records]
    return Summary(
        run_id=run.run_id,
        label=label,
        phase=phase,
        status=run.status,
        epochs=len(trained),
        control=control,
        best_acc=best.val_acc if best else None,
        best_epoch=best.epoch if best else None,
        best_phase_epoch=best.phase_epoch if best else None,
        best_loss=min((loss for loss in losses if not math.isnan(loss)), default=None),
        boundary_acc=boundary,
        change=best.val_acc - boundary if best and trained and boundary is not None else None,
        seconds=sum(record.seconds for record in run.epochs),
        val_photos=dataset_size(run, "val"),
    )


def summaries(snapshot: Snapshot, selected: Sequence[str]) -> list[Summary]:
    """The summaries of the selected runs, in their order."""
    return [
        summarise(snapshot.runs[name], snapshot.labels[name])
        for name in selected
        if name in snapshot.runs
    ]


def verdict(summary: Summary) -> str:
    """One sentence on what unfreezing did, or a control without it; empty for any other run."""
    if summary.phase != "finetune" and not summary.control:
        return ""
    if summary.boundary_acc is None:
        return "No evaluation before the first step is recorded, so there is nothing to compare."
    if summary.change is None or summary.best_acc is None:
        waiting = "still running" if summary.status == "running" else f"status {summary.status}"
        what = "No further epoch" if summary.control else "No epoch after unfreezing"
        return f"{what} yet ({waiting}); it starts from {summary.boundary_acc:.1%}."
    digits = decimals(summary.change)
    # No-break spaces: a line that ends with the arrow is hard to read.
    reached = f"{summary.boundary_acc:.{digits}%}\u00a0→\u00a0{summary.best_acc:.{digits}%}"
    what = "with the head alone (control)" if summary.control else "after unfreezing"
    where = f"epoch {summary.best_phase_epoch} of {summary.epochs} {what}"
    if summary.change > 0:
        text = f"{points(summary.change)} points at {where} ({reached})"
    elif summary.change == 0:
        text = f"No gain: {where} only equals the boundary, {summary.boundary_acc:.1%}"
    else:
        text = f"{points(summary.change)} points even at its best, {where} ({reached})"
    return f"{text}, so far." if summary.status == "running" else f"{text}."


def resolution(rows: Sequence[Summary]) -> str:
    """How coarse the comparison is: what one validation photo weighs; empty where unknown."""
    sizes = sorted({row.val_photos for row in rows if row.val_photos})
    if not sizes:
        return ""
    if len(sizes) > 1:
        return "These runs were validated on different numbers of photos: compare with care."
    return f"{sizes[0]:,} validation photos, so one photo is {100 / sizes[0]:.2g} points."


def table(rows: Sequence[Summary]) -> pd.DataFrame:
    """The numbers for display: accuracies in percent, the change in points, time in seconds."""
    return pd.DataFrame(
        {
            "Run": [row.label for row in rows],
            "Phase": [row.phase for row in rows],
            "Status": [row.status for row in rows],
            "Best accuracy": _hundredfold([row.best_acc for row in rows]),
            "At epoch": pd.array([row.best_epoch for row in rows], dtype="Int64"),
            "After unfreezing": pd.array(
                [row.best_phase_epoch if row.boundary_acc is not None else None for row in rows],
                dtype="Int64",
            ),
            "At the boundary": _hundredfold([row.boundary_acc for row in rows]),
            "Change": _hundredfold([row.change for row in rows]),
            "Best loss": pd.Series([row.best_loss for row in rows], dtype="float64"),
            "Time": pd.Series([row.seconds for row in rows], dtype="float64"),
        }
    )


def group_table(rows: Sequence[Summary], groups: Mapping[str, str]) -> pd.DataFrame:
    """Runs that differ only in their seed as one row each: means, and the range of the change."""
    frame = pd.DataFrame(
        {
            "Settings": [groups[row.run_id] for row in rows],
            "best": _hundredfold([row.best_acc for row in rows]),
            "change": _hundredfold([row.change for row in rows]),
            "loss": pd.Series([row.best_loss for row in rows], dtype="float64"),
        }
    )
    means = frame.groupby("Settings", sort=False).agg(
        Runs=("best", "size"),
        mean=("best", "mean"),
        change=("change", "mean"),
        lowest=("change", "min"),
        highest=("change", "max"),
        loss=("loss", "mean"),
    )
    names = {
        "mean": "Best accuracy",
        "change": "Change",
        "lowest": "Lowest change",
        "highest": "Highest change",
        "loss": "Best loss",
    }
    return means.rename(columns=names).reset_index()


def _hundredfold(fractions: Sequence[float | None]) -> pd.Series[float]:
    return 100 * pd.Series(list(fractions), dtype="float64")

"""All models that were exported, as a table. Knows neither Streamlit nor torch."""

from __future__ import annotations

from typing import Any, Final

import pandas as pd

from explorer.data import Snapshot
from explorer.figures import Figures, figures_or_reason
from explorer.mirror import Known, known
from explorer.shipped import model_path, parity_path
from export.metadata import Which
from export.precision import PRECISIONS, Precision
from trainer.runlog import Run

_BOTH: Final[tuple[Which, Which]] = ("after", "before")
_COLUMNS: Final = (
    *("Run", "Checkpoint", "Precision", "Same class", "Accuracy", "Against PyTorch"),
    *("Largest |Δlogit|", "Size", "Written"),
)


def checkpoint_name(run: Run, which: Which) -> str:
    if which == "before":
        return "before unfreezing"
    return "after unfreezing" if run.boundary is not None else f"after {run.phase}"


def exported_table(snapshot: Snapshot) -> pd.DataFrame:
    """One row for each model, newest first, with the figures of its parity.json where these can be
    read: agreement and accuracy in percent, accuracy against PyTorch in points, size in MB, time in
    UTC."""
    rows = [
        (found.written, _row(snapshot, run, which, precision, found))
        for run in snapshot.runs.values()
        for which in _BOTH
        for precision in PRECISIONS
        if (found := known(model_path(run, which, precision))) is not None
    ]
    rows.sort(key=lambda row: -row[0])
    return pd.DataFrame([row for _, row in rows], columns=list(_COLUMNS))


def _row(
    snapshot: Snapshot, run: Run, which: Which, precision: Precision, found: Known
) -> dict[str, Any]:
    figures = figures_or_reason(parity_path(run, which, precision))
    parity = figures.parity if isinstance(figures, Figures) else None
    return {
        "Run": snapshot.labels[run.run_id],
        "Checkpoint": checkpoint_name(run, which),
        "Precision": precision,
        "Same class": 100 * parity.top1_agreement if parity else None,
        "Accuracy": 100 * parity.accuracy if parity else None,
        "Against PyTorch": -100 * parity.loss if parity else None,
        "Largest |Δlogit|": parity.max_abs_logit_difference if parity else None,
        "Size": found.size / 1e6,
        "Written": pd.Timestamp(found.written, unit="s", tz="UTC"),
    }

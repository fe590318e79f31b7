"""All runs as one table: what they were trained with, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pandas as pd

from explorer.compare import Summary, points, summaries
from explorer.data import Snapshot
from explorer.evidence import Evidence, Findings
from trainer.runlog import Run

# Of these, a column that says the same of every run is folded away.
SETTINGS: Final = (
    "Data",
    "Network",
    "Recipe",
    "Phase",
    "From",
    "Layers",
    "Learning rate",
    "Schedule",
    "Augmentation",
    "Optimizer",
    "Batch",
    "Seed",
    "Status",
)
_REST: Final = tuple(name for name in SETTINGS if name not in ("Phase", "Status"))
RESULTS: Final = (
    "Best accuracy",
    "At epoch",
    "Change",
    "95% interval",
    "Curve",
    "Best loss",
    "Time",
    "Memory",
)
# Named by the flag that sets them, with what counts as off.
_AUGMENTATIONS: Final = {
    "brightness": 0,
    "contrast": 1,
    "rotation": 0,
    "crop_from": None,
    "noise": 0,
}


def overview(snapshot: Snapshot, found: Mapping[str, Findings]) -> pd.DataFrame:
    """One row for each run, newest first, indexed by run id.

    Accuracies in percent, the change and its interval in points, time in seconds, memory in MB;
    "Curve" holds the validation accuracies of all epochs, in percent.
    """
    names = snapshot.newest_first
    rows = [
        _settings(snapshot, snapshot.runs[row.run_id]) | _results(row, snapshot, found)
        for row in summaries(snapshot, names)
    ]
    order = ["Run", "Phase", "Status", *RESULTS[:5], *_REST, *RESULTS[5:]]
    return pd.DataFrame(rows, index=pd.Index(names, name="run_id"), columns=order)


def _settings(snapshot: Snapshot, run: Run) -> dict[str, Any]:
    config, parent = run.info.get("config", {}), run.parent_run_id
    trained = run.phase in ("transfer", "finetune", "scratch")
    return {
        "Run": snapshot.labels[run.run_id],
        "Data": run.info.get("dataset", {}).get("name"),
        "Network": _of(run, "model", "arch"),
        "Recipe": _name(run.info.get("recipe")),
        "Phase": run.phase,
        "From": snapshot.labels.get(parent, parent) if parent else None,
        "Layers": _text(config.get("unfreeze")) if run.phase == "finetune" else None,
        "Learning rate": _number(config.get("lr")) if trained else None,
        "Schedule": _of(run, "config", "schedule", "name") if trained else None,
        "Augmentation": _augmentation(config.get("augmentation")),
        "Optimizer": _text(config.get("optimizer")) if trained else None,
        "Batch": _text(config.get("batch_size")),
        "Seed": _text(config.get("seed")),
        "Status": run.status,
    }


def _results(row: Summary, snapshot: Snapshot, found: Mapping[str, Findings]) -> dict[str, Any]:
    run = snapshot.runs[row.run_id]
    against = found[row.run_id].boundary if row.run_id in found else None
    known = against if isinstance(against, Evidence) else None
    return {
        "Best accuracy": _percent(row.best_acc),
        "At epoch": row.best_epoch,
        "Change": _percent(row.change),
        "95% interval": f"{points(known.low)} to {points(known.high)}" if known else None,
        "Best loss": row.best_loss,
        "Time": row.seconds,
        "Memory": max((e.peak_memory_bytes for e in run.epochs), default=0) / 1e6 or None,
        "Curve": [100 * epoch.val_acc for epoch in run.epochs],
    }


def folded(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """The table without the settings that are the same in every row, and these with their value.

    What no run has is left out altogether.
    """
    same = [name for name in SETTINGS if len(frame) > 1 and frame[name].nunique(dropna=False) == 1]
    empty = [name for name in SETTINGS if frame[name].isna().all()]
    values = {name: str(frame[name].iloc[0]) for name in same if name not in empty}
    return frame.drop(columns={*same, *empty}), values


def search(frame: pd.DataFrame, text: str) -> pd.DataFrame:
    """The rows in which every word of `text` occurs, in the name or in any setting."""
    columns = ["Run", *SETTINGS]
    content = frame[columns].astype("string").fillna("").agg(" ".join, axis=1).str.lower()
    hits = pd.Series(True, index=frame.index)
    for word in text.lower().split():
        hits &= content.str.contains(word, regex=False)
    return frame[hits]


def _augmentation(settings: Any) -> str | None:
    if not isinstance(settings, Mapping):
        return None
    used = [
        f"{name.replace('_', ' ')} {settings[name]}"
        for name, off in _AUGMENTATIONS.items()
        if settings.get(name, off) != off
    ]
    return ", ".join(used) or "none"


def _of(run: Run, *path: str) -> str | None:
    value: Any = run.info
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return _text(value)


def _name(recipe: Any) -> str | None:
    return _text(recipe.get("name")) if isinstance(recipe, Mapping) else _text(recipe)


def _text(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int | float) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def constants_line(values: Mapping[str, str]) -> str:
    """What all runs have in common, in one line; empty where that is nothing."""
    if not values:
        return ""
    return "All: " + ", ".join(f"{name.lower()} {value}" for name, value in values.items())


def selected_ids(frame: pd.DataFrame, rows: Sequence[int]) -> list[str]:
    """The ids of the rows at these places; places that are not there are left out."""
    return [str(frame.index[row]) for row in rows if 0 <= row < len(frame)]

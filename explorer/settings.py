"""What runs were trained with, as text: to tell them apart, group them, and name their curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pandas as pd

from explorer.data import Snapshot, is_control
from trainer.runlog import Run

SETTINGS: Final = (
    "Learning rate",
    "Layers",
    "Schedule",
    "Seed",
    "Augmentation",
    "Optimizer",
    "Batch",
    "Epochs",
    "Network",
    "Data",
)
BEFORE: Final = "before unfreezing"  # what a trunk shows in place of a setting
_HEAD: Final = "head"
# Named by the flag that sets them, with what counts as off.
_AUGMENTATIONS: Final = {
    "brightness": 0,
    "contrast": 1,
    "rotation": 0,
    "crop_from": None,
    "noise": 0,
}


def settings(run: Run) -> dict[str, str]:
    """The run's settings by the names of SETTINGS; "" for what its last phase did not use or its
    log does not say."""
    config = run.info.get("config", {})
    trained = run.phase in ("transfer", "finetune", "scratch")
    layers = _text(config.get("unfreeze")) if run.phase == "finetune" else ""
    return {
        "Learning rate": _text(config.get("lr")) if trained else "",
        "Layers": _HEAD if is_control(run) else layers,
        "Schedule": _text(_in(config, "schedule", "name")) if trained else "",
        "Seed": _text(config.get("seed")),
        "Augmentation": augmentation(config.get("augmentation")),
        "Optimizer": _text(config.get("optimizer")) if trained else "",
        "Batch": _text(config.get("batch_size")),
        "Epochs": _text(config.get("epochs")) if trained else "",
        "Network": _text(_in(run.info, "model", "arch")),
        "Data": _text(_in(run.info, "dataset", "name")),
    }


def varied(snapshot: Snapshot, selected: Sequence[str]) -> list[str]:
    """The settings in which the selected runs differ."""
    values = [settings(snapshot.runs[name]) for name in selected if name in snapshot.runs]
    return [name for name in SETTINGS if len({one[name] for one in values}) > 1]


def with_settings(frame: pd.DataFrame, snapshot: Snapshot) -> pd.DataFrame:
    """The frame of explorer.data.epochs_frame with a column for each setting; trunks say BEFORE."""
    known = {name: settings(snapshot.runs[name]) for name in frame["run_id"].unique()}
    trunk = frame["role"] == "trunk"
    columns = {
        name: frame["run_id"].map({run: values[name] or "none" for run, values in known.items()})
        for name in SETTINGS
    }
    return frame.assign(**{name: column.mask(trunk, BEFORE) for name, column in columns.items()})


def without_seed(snapshot: Snapshot, selected: Sequence[str]) -> dict[str, str]:
    """For each selected run the name of its group: runs that differ in nothing but the seed."""
    telling = [name for name in varied(snapshot, selected) if name != "Seed"]
    names: dict[str, str] = {}
    for run_id in selected:
        if run_id in snapshot.runs:
            values = settings(snapshot.runs[run_id])
            parts = [_named(name, values[name]) for name in telling if values[name]]
            names[run_id] = ", ".join(parts) or "all runs"
    return names


def _named(setting: str, value: str) -> str:
    if setting == "Learning rate":
        return f"lr {value}"
    if setting == "Layers":
        return "head alone" if value == _HEAD else f"layers {value}"
    return value if setting in ("Schedule", "Data", "Network") else f"{setting.lower()} {value}"


def in_order(values: Sequence[str]) -> list[str]:
    """Values as a legend lists them: numbers by size, then words."""
    return sorted(set(values), key=lambda value: (_number(value), value))


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return float("inf")


def augmentation(chosen: Any) -> str:
    """The augmentations that are on, named by their flags; "none" where all are off."""
    if not isinstance(chosen, Mapping):
        return ""
    used = [
        f"{name.replace('_', ' ')} {chosen[name]}"
        for name, off in _AUGMENTATIONS.items()
        if chosen.get(name, off) != off
    ]
    return ", ".join(used) or "none"


def _in(content: Any, *path: str) -> Any:
    for name in path:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, str | int) else ""

"""What runs were trained with, as text: to tell them apart, group them, and name their curves."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, get_args

import numpy as np
import pandas as pd

from explorer.data import Snapshot, is_control
from trainer.config import ScheduleName
from trainer.grid import word
from trainer.runlog import Run

SETTINGS: Final = (
    "Learning rate",
    "Layers",
    "Schedule",
    "Seed",
    "Augmentation",
    "Optimizer",
    "Label smoothing",
    "Class weights",
    "Layer decay",
    "Gradual",
    "Batch",
    "Epochs",
    "Network",
    "Data",
)
# What a schedule has besides its name: the schedules that use it, and what counts as off.
SHAPE: Final[Mapping[str, tuple[tuple[ScheduleName, ...], float | None]]] = {
    "decay": (("exponential",), None),
    "drop": (("step",), None),
    "epochs_drop": (("step",), None),
    "warmup": (get_args(ScheduleName), 0),
}
_WORDS: Final = {"Learning rate": "lr", "Layers": "unfreeze", "Schedule": "name"}
BEFORE: Final = "before unfreezing"  # what a trunk shows in place of a setting
_HEAD: Final = "head"
_LONGEST: Final = 200
OFF: Final = "off"
# What is off unless asked for, by its name in run.json and the value that is off.
SWITCHES: Final = {
    "Label smoothing": ("label_smoothing", 0),
    "Class weights": ("class_weights", OFF),
    "Layer decay": ("layer_decay", 1),
    "Gradual": ("gradual", None),
}
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
        "Learning rate": rate_text(learning_rate(run)) if trained else "",
        "Layers": _HEAD if is_control(run) else layers,
        "Schedule": _schedule(config.get("schedule")) if trained else "",
        "Seed": _text(config.get("seed")),
        "Augmentation": augmentation(config.get("augmentation")),
        "Optimizer": _text(config.get("optimizer")) if trained else "",
        **{name: _switch(run, *switch) for name, switch in SWITCHES.items()},
        "Batch": _text(config.get("batch_size")),
        "Epochs": _text(config.get("epochs")) if trained else "",
        "Network": _text(_in(run.info, "model", "arch")),
        "Data": _text(_in(run.info, "dataset", "name")),
    }


def _switch(run: Run, name: str, off: Any) -> str:
    value = run.info.get("config", {}).get(name, off)
    if value == off:
        return "" if "imported" in run.info else OFF
    return _text(value)


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
    if setting == "Layers" and value == _HEAD:
        return "head alone"
    return (
        value
        if setting in ("Data", "Network")
        else word(_WORDS.get(setting, setting.lower()), value)
    )


def in_order(values: Sequence[str]) -> list[str]:
    """Values as a legend lists them: numbers by size, then words."""
    return sorted(set(values), key=lambda value: (_number(value), value))


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return float("inf")


def _schedule(chosen: Any) -> str:
    """Its name with what shapes it: `exponential 0.3`, `step 0.5 every 10, warmup 2`."""
    if not isinstance(chosen, Mapping):
        return ""
    shape = schedule_shape(chosen)
    said = _text(chosen.get("name"))
    said += f" {shape['decay']}" if "decay" in shape else ""
    said += f" {shape['drop']} every {shape.get('epochs_drop')}" if "drop" in shape else ""
    return said + (f", warmup {shape['warmup']}" if "warmup" in shape else "")


def schedule_shape(chosen: Mapping[str, Any]) -> dict[str, str]:
    """What a schedule has besides its name and really uses."""
    return {
        name: _text(chosen.get(name))
        for name, (users, off) in SHAPE.items()
        if chosen.get("name") in users and chosen.get(name) not in (None, off)
    }


def learning_rate(run: Run) -> float | None:
    """The learning rate of the run's last phase; None where its run.json does not say."""
    value = run.info.get("config", {}).get("lr")
    known = isinstance(value, int | float) and 0 < value <= sys.float_info.max
    return float(value) if known else None


def rate_text(rate: float | None) -> str:
    """A learning rate in the shortest form that names it exactly: 0.0001 -> "1e-4"."""
    return "" if rate is None else np.format_float_scientific(rate, trim="-", exp_digits=1)


def augmentation(chosen: Any) -> str:
    """The augmentations that are on, named by their flags; "none" where all are off."""
    if not isinstance(chosen, Mapping):
        return ""
    used = [
        f"{name.replace('_', ' ')} {sendable(str(chosen[name])[:_LONGEST])}"
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
    return sendable(str(value)[:_LONGEST]) if isinstance(value, str | int) else ""


def sendable(text: str) -> str:
    """Names of folders may hold bytes that are no text, which no browser can be sent."""
    return text.encode(errors="replace").decode()

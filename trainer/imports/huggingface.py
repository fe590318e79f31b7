"""Hugging Face's trainer_state.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

from trainer.imports.logs import MAX_EPOCH, LogError, Point, finite

STATE_JSON: Final = "trainer_state.json"
MAX_BYTES: Final = 64 * 2**20
_COUNTS: Final = ("epoch", "step")


def read_state(path: Path) -> tuple[list[Point], dict[str, Any]]:
    """The log history as points with epochs, and the settings that the file tells.

    The epoch of an entry is the one in which it was logged: 0.5 and 1.0 are the first. Raises
    LogError for any other content.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LogError(f"it is not valid JSON ({error}).") from error
    history = content.get("log_history") if isinstance(content, dict) else None
    if not isinstance(history, list):
        raise LogError("it has no list log_history, so it is not Hugging Face's trainer state.")
    points = [point for entry in history if isinstance(entry, dict) for point in _points(entry)]
    batch = finite(content.get("train_batch_size"))
    return points, {} if math.isnan(batch) else {"batch_size": int(batch)}


def _points(entry: dict[Any, Any]) -> list[Point]:
    progress, step = finite(entry.get("epoch")), finite(entry.get("step"))
    # "train_runtime" marks the summary at the end, whose train_loss is the mean of all epochs.
    if math.isnan(progress) or math.isnan(step) or "train_runtime" in entry:
        return []
    if not 0 <= progress <= MAX_EPOCH:
        raise LogError(f"the epoch {progress:g} in its log_history is not plausible.")
    epoch = math.ceil(progress - 0.005)  # older versions round to two digits
    numbers = {str(name): finite(value) for name, value in entry.items() if name not in _COUNTS}
    return [
        Point(name, step, value, epoch) for name, value in numbers.items() if not math.isnan(value)
    ]

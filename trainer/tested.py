"""What a run reached on its test split: the figure that a report may quote (no torch)."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from trainer.files import read_bounded, write_atomically
from trainer.runlog import Run, RunError
from trainer.schema import TEST_JSON


@dataclass(frozen=True)
class Tested:
    """Measured once, at the end, with the best checkpoint. `accuracy`, `top5` and `macro_f1` are
    fractions, `loss` is the mean cross-entropy, `epoch` that of the checkpoint."""

    photos: int
    accuracy: float
    loss: float
    top5: float
    macro_f1: float
    epoch: int
    checkpoint_sha256: str


def read_tested(run: Run) -> Tested | None:
    """None where the run was not tested. Raises RunError where its test.json is damaged."""
    path = run.path / TEST_JSON
    try:
        content = json.loads(read_bounded(path))
        return Tested(**{name: _value(content[name], kind) for name, kind in _KINDS.items()})
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise RunError(f"{path} is damaged. Delete it, and test the run again.") from error


_KINDS = {field.name: str(field.type) for field in dataclasses.fields(Tested)}


def _value(value: Any, kind: str) -> Any:
    if kind == "str" and isinstance(value, str):
        return value
    if type(value) is int and kind in ("int", "float") and value >= 0:
        return value
    if type(value) is float and kind == "float" and 0 <= value < math.inf:
        return value
    raise ValueError(kind)


def write_tested(run: Run, tested: Tested) -> None:
    """Write test.json into the run's folder. Raises RunError."""
    path = run.path / TEST_JSON
    try:
        write_atomically(path, json.dumps(dataclasses.asdict(tested), indent=2).encode())
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror}.") from error

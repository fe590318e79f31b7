"""Lightning's hparams.yaml: the few settings that Thaw shows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from trainer.files import read_bounded

HPARAMS_YAML: Final = "hparams.yaml"
_MAX_BYTES: Final = 2**16  # larger ones take PyYAML seconds
_NOTHING: Final = ("", "~", "null")
_NAMES: Final = {
    "lr": ("lr", "learning_rate"),
    "batch_size": ("batch_size", "train_batch_size"),
    "optimizer": ("optimizer", "optim", "optimizer_name"),
}


def read_hparams(folder: Path) -> dict[str, Any]:
    """Learning rate, batch size and optimizer where hparams.yaml in `folder` tells them; nothing
    where there is no such file or it cannot be read, as a log is worth having without it."""
    import yaml  # type: ignore[import-untyped]

    try:
        text = read_bounded(folder / HPARAMS_YAML, _MAX_BYTES).decode()
        # Takes every value for text, whatever a file asks for: no Python object is made, no number
        # of a million digits, and no mapping that grows with each one that it is merged from.
        content = yaml.load(text, yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(content, dict):
        return {}
    found: dict[str, Any] = {}
    for name, spellings in _NAMES.items():
        value = next((content[spelling] for spelling in spellings if spelling in content), None)
        known = _text(value) if name == "optimizer" else _number(value)
        if known is not None:
            found[name] = int(known) if name == "batch_size" else known
    return found


def _text(value: Any) -> str | None:
    return value[:40] if isinstance(value, str) and value not in _NOTHING else None


def _number(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None

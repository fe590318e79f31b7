"""Lightning's hparams.yaml: the few settings that Thaw shows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

HPARAMS_YAML: Final = "hparams.yaml"
_MAX_BYTES: Final = 2**18  # larger ones take PyYAML seconds
_NAMES: Final = {
    "lr": ("lr", "learning_rate"),
    "batch_size": ("batch_size", "train_batch_size"),
    "optimizer": ("optimizer", "optim", "optimizer_name"),
}


def read_hparams(folder: Path) -> dict[str, Any]:
    """Learning rate, batch size and optimizer where hparams.yaml in `folder` tells them; nothing
    where there is no such file or it cannot be read, as a log is worth having without it."""
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Takes no Python object that a file asks for, and reads the rest all the same."""

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    path = folder / HPARAMS_YAML
    try:
        if path.stat().st_size > _MAX_BYTES:
            return {}
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
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
    return value[:40] if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    # YAML 1.1 takes 1e-3 for text.
    try:
        number = float(value) if isinstance(value, (int, float, str)) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number > 0 else None

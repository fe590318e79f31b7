"""What a parity.json says of an exported model. Knows neither Streamlit nor torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from export.precision import PRECISIONS, Parity, Precision
from trainer.files import read_bounded
from trainer.schema import ThawError


class FiguresError(ThawError):
    """A parity.json that cannot be read."""


@dataclass(frozen=True)
class Figures:
    """What was measured, and of which files; `kept_layers` are those of an int8 model that compute
    in float32."""

    parity: Parity
    checkpoint_sha256: str
    onnx_sha256: str
    kept_layers: tuple[str, ...]
    versions: Mapping[str, str]

    @property
    def allowed(self) -> bool:
        """Whether what was measured is allowed, by the rule of the export."""
        return self.parity.passed and self.parity.photos > 0


def read_figures(path: Path) -> Figures:
    """Read a parity.json. Raises FiguresError where a figure is not there or is none."""
    try:
        content = json.loads(read_bounded(path).decode())
        parity = Parity(**_values(Parity, content))
        return Figures(parity, **_values(Figures, content))
    except OSError as error:
        raise FiguresError(f"{path.name} cannot be read: {error.strerror}.") from error
    except KeyError as error:
        raise FiguresError(
            f"{path.name} is damaged or of an older Thaw: it has no {error.args[0]}."
        ) from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise FiguresError(f"{path.name} is damaged or was changed by hand.") from error


def figures_or_reason(path: Path) -> Figures | str:
    """The same, or why it cannot be read."""
    if not path.exists():
        return f"{path.name} is not there, so nothing says how equal the model is."
    try:
        return read_figures(path)
    except FiguresError as error:
        return str(error)


def _values(kind: type[Parity | Figures], content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of this dataclass; KeyError, ValueError or TypeError where one is not as it
    should be."""
    readers = {field.name: _READERS.get(str(field.type)) for field in dataclasses.fields(kind)}
    return {name: read(content[name]) for name, read in readers.items() if read}


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _list(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError
    return tuple(map(_text, value))


def _texts(value: Any) -> dict[str, str]:
    return {_text(name): _text(text) for name, text in dict(value).items()}


def _precision(value: Any) -> Precision:
    if value not in PRECISIONS:
        raise ValueError
    return cast(Precision, value)


_READERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "int": _count,
    "float": _number,
    "str": _text,
    "tuple[str, ...]": _list,
    "Mapping[str, str]": _texts,
    "Precision": _precision,
}

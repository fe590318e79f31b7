"""What a model that was exported is worth: is it the file that was compared with PyTorch?

Knows neither Streamlit nor torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

import pandas as pd

from explorer.data import Snapshot
from export.metadata import ModelFileError, ModelMetadata, Which, file_name
from trainer.runlog import Run, RunError, checkpoint_path
from trainer.schema import MODEL_ONNX, PARITY_JSON, ThawError

Verdict = Literal["proven", "outdated", "unproven"]

_BOTH: Final[tuple[Which, Which]] = ("after", "before")
_COLUMNS: Final = ("Run", "Checkpoint", "Same class", "Largest |Δlogit|", "Size", "Written")


class FiguresError(ThawError):
    """A parity.json that cannot be read."""


@dataclass(frozen=True)
class Figures:
    """What parity.json says: first what was measured (see export.parity), then of which files."""

    photos: int
    photos_missing: int
    max_abs_logit_difference: float
    max_abs_probability_difference: float
    max_abs_batch_difference: float
    max_abs_logit: float
    tolerance: float
    top1_agreement: float
    ties: int
    provider: str
    checkpoint_sha256: str
    onnx_sha256: str
    versions: Mapping[str, str]

    @property
    def measured(self) -> dict[str, Any]:
        about_files = ("checkpoint_sha256", "onnx_sha256", "versions")
        return {name: value for name, value in asdict(self).items() if name not in about_files}

    @property
    def equal(self) -> bool:
        """Whether every difference lies within what is allowed, by the rule of the export."""
        differences = (
            self.max_abs_logit_difference,
            self.max_abs_probability_difference,
            self.max_abs_batch_difference,
        )
        return max(differences) <= self.tolerance and self.top1_agreement == 1 and self.photos > 0


@dataclass(frozen=True)
class Shipped:
    """A model as it lies in the run's folder: size in bytes, `written` in seconds since the epoch.

    `doubts` say why it does not count as equal to what PyTorch computed; `checkpoint` whether the
    checkpoint it was made from is still the same.
    """

    path: Path
    size: int
    written: float
    sha256: str
    figures: Figures | None
    about: ModelMetadata | None
    doubts: tuple[str, ...]
    checkpoint: Literal["same", "changed", "gone"]

    @property
    def verdict(self) -> Verdict:
        if self.doubts:
            return "unproven"
        return "outdated" if self.checkpoint == "changed" else "proven"


def model_path(run: Run, which: Which) -> Path:
    """Where `python -m export` writes the model."""
    return run.path / file_name(MODEL_ONNX, which)


def parity_path(run: Run, which: Which) -> Path:
    """Where `python -m export` writes what it measured."""
    return run.path / file_name(PARITY_JSON, which)


def checkpoint_or_reason(run: Run, which: Which) -> Path | str:
    """The checkpoint to export, or why there is none."""
    try:
        return checkpoint_path(run, which)
    except RunError as error:
        return str(error)


def shipped(run: Run, which: Which) -> Shipped | None:
    """What was exported of this checkpoint; None where nothing was.

    Raises ModelFileError where the model or the checkpoint cannot be read.
    """
    path = model_path(run, which)
    if not path.is_file():
        return None
    try:
        status = path.stat()
        sha256, about = _content(path, (status.st_mtime_ns, status.st_size))
        figures = _figures_or_reason(parity_path(run, which))
        doubts = _doubts(run, which, sha256, about, figures)
        known = figures if isinstance(figures, Figures) else None
        checkpoint = _checkpoint(checkpoint_or_reason(run, which), known)
    except OSError as error:
        raise ModelFileError(f"{error.filename} cannot be read: {error.strerror}.") from error
    inside = about if isinstance(about, ModelMetadata) else None
    return Shipped(path, status.st_size, status.st_mtime, sha256, known, inside, doubts, checkpoint)


def _doubts(
    run: Run, which: Which, sha256: str, about: ModelMetadata | str, figures: Figures | str
) -> tuple[str, ...]:
    model, parity = file_name(MODEL_ONNX, which), file_name(PARITY_JSON, which)
    if isinstance(about, str):
        return (f"{model} is damaged: {about}",)
    if isinstance(figures, str):
        return (figures,)
    if figures.onnx_sha256 != sha256:
        return (f"{model} is not the file that was measured: {parity} has another SHA-256.",)
    found = []
    if figures.measured != {name: about.parity.get(name) for name in figures.measured}:
        found.append(f"{parity} does not hold the figures that {model} holds of itself.")
    if not figures.equal:
        found.append(f"The figures in {parity} are not within what is allowed.")
    if (about.run_id, about.checkpoint) != (run.run_id, which):
        found.append(f"{model} was made from run {about.run_id}, {about.checkpoint} unfreezing.")
    return tuple(found)


def _checkpoint(path: Path | str, figures: Figures | None) -> Literal["same", "changed", "gone"]:
    if isinstance(path, str):
        return "gone"
    status = path.stat()
    now = _sha256(path, (status.st_mtime_ns, status.st_size))
    return "same" if figures is None or figures.checkpoint_sha256 == now else "changed"


@functools.lru_cache(maxsize=256)
def _sha256(path: Path, stamp: tuple[int, int]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=64)
def _content(path: Path, stamp: tuple[int, int]) -> tuple[str, ModelMetadata | str]:
    """The SHA-256 of a model, and what it says of itself or why that cannot be read."""
    import onnx

    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        model = onnx.ModelProto.FromString(content)
    except Exception:  # the exception differs between protobuf's implementations
        return sha256, "it is not an ONNX file, or only a part of one."
    try:
        props = {entry.key: entry.value for entry in model.metadata_props}
        return sha256, ModelMetadata.from_props(props)
    except ThawError as error:
        return sha256, str(error)


def _figures_or_reason(path: Path) -> Figures | str:
    if not path.exists():
        return f"{path.name} is not there, so nothing says how equal the model is."
    try:
        return read_figures(path)
    except FiguresError as error:
        return str(error)


def read_figures(path: Path) -> Figures:
    """Read a parity.json. Raises FiguresError where a figure is not there or is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Figures(**{name: _READERS[kind](content[name]) for name, kind in _KINDS.items()})
    except OSError as error:
        raise FiguresError(f"{path.name} cannot be read: {error.strerror}.") from error
    except KeyError as error:
        raise FiguresError(f"{path.name} is damaged: it has no {error.args[0]}.") from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise FiguresError(f"{path.name} is damaged or was changed by hand.") from error


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


def _texts(value: Any) -> dict[str, str]:
    return {_text(name): _text(text) for name, text in dict(value).items()}


_KINDS: Final = {field.name: str(field.type) for field in fields(Figures)}
_READERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "int": _count,
    "float": _number,
    "str": _text,
    "Mapping[str, str]": _texts,
}


# --- in words ---------------------------------------------------------------------------------


def small(difference: float) -> str:
    """A difference to two digits, such as 3.1e-06."""
    return f"{difference:.1e}" if difference else "0"


def meaning(model: Shipped, figures: Figures) -> str:
    """What was found, in plain words, of a model without doubts."""
    tied = f" ({figures.ties:,} of them tied in PyTorch itself)" if figures.ties else ""
    gone = f" {figures.photos_missing:,} more photos are gone." if figures.photos_missing else ""
    return (
        f"{model.path.name}, computed by {figures.provider}, gave the same class as PyTorch on all "
        f"{figures.photos:,} validation photos compared{tied}. No logit was off by more than "
        f"{small(figures.max_abs_logit_difference)}; rounding alone may reach "
        f"{small(figures.tolerance)}.{gone}"
    )


def measured_as(run: Run, about: ModelMetadata) -> str:
    """The validation accuracy of the checkpoint inside a model; empty where the run's log does not
    hold it."""
    found = [record.val_acc for record in run.epochs if record.epoch == about.epoch]
    if not found or math.isnan(found[-1]):
        return ""
    return f"Its checkpoint, of epoch {about.epoch}, was measured at {found[-1]:.2%} accuracy."


def snippet(model: Path) -> str:
    """Python that classifies photos with this model."""
    return (
        "from pathlib import Path\n"
        "from export.classifier import Classifier\n"
        f"classifier = Classifier.load(Path({str(model)!r}))\n"
        'for result in classifier.classify(Path("PHOTOS").glob("*.jpg")):\n'
        "    print(result.photo, result.error or result.top[0])"
    )


def checkpoint_name(run: Run, which: Which) -> str:
    if which == "before":
        return "before unfreezing"
    return "after unfreezing" if run.boundary is not None else f"after {run.phase}"


def exported_table(snapshot: Snapshot) -> pd.DataFrame:
    """One row for each model, newest first, with the figures of its parity.json where these can be
    read: agreement in percent, size in MB, time in UTC."""
    rows = [
        (status.st_mtime, _row(snapshot, run, which, status))
        for run in snapshot.runs.values()
        for which in _BOTH
        if (status := _status(model_path(run, which))) is not None
    ]
    rows.sort(key=lambda row: -row[0])
    return pd.DataFrame([row for _, row in rows], columns=list(_COLUMNS))


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _row(snapshot: Snapshot, run: Run, which: Which, status: os.stat_result) -> dict[str, Any]:
    figures = _figures_or_reason(parity_path(run, which))
    known = figures if isinstance(figures, Figures) else None
    return {
        "Run": snapshot.labels[run.run_id],
        "Checkpoint": checkpoint_name(run, which),
        "Same class": 100 * known.top1_agreement if known else None,
        "Largest |Δlogit|": known.max_abs_logit_difference if known else None,
        "Size": status.st_size / 1e6,
        "Written": pd.Timestamp(status.st_mtime, unit="s", tz="UTC"),
    }

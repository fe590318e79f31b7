"""What a log of another tool holds: epochs on one axis, and where one fit follows another.

Standard library only. The words: a fit is one call of a tool's training loop; two fits may have
written into one folder or file, and then their epochs continue on one axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from trainer.schema import ThawError

Format = Literal["tensorboard", "keras-csv", "lightning", "fastai", "huggingface"]
Field = Literal[
    "train_loss", "train_acc", "val_loss", "val_acc", "val_top5", "val_macro_f1", "lr", "seconds"
]
FORMATS: Final[tuple[Format, ...]] = (
    "tensorboard",
    "keras-csv",
    "lightning",
    "fastai",
    "huggingface",
)
TITLES: Final[dict[Format, str]] = {
    "tensorboard": "TensorBoard",
    "keras-csv": "Keras CSVLogger",
    "lightning": "Lightning",
    "fastai": "fastai",
    "huggingface": "Hugging Face",
}
MAX_EPOCH: Final = 100_000
_ACCURACIES: Final = ("train_acc", "val_acc", "val_top5")
_ROUNDING: Final = 1e-6


class LogError(ThawError):
    """A log that cannot be read, found or joined."""


@dataclass(frozen=True)
class Point:
    """One value as a tool wrote it. `step` is the tool's own count, `epoch` the epoch from 1 on (0:
    before any step) where the tool says it, `time` seconds since the Unix epoch (NaN: unknown),
    `part` the file, or the stretch of one, that it was written in."""

    tag: str
    step: float
    value: float
    epoch: int | None = None
    time: float = math.nan
    part: int = 0


@dataclass(frozen=True)
class Sample:
    """A point whose meaning and epoch are known."""

    field: Field
    step: float
    epoch: int
    value: float
    time: float
    part: int


@dataclass(frozen=True)
class LoggedEpoch:
    """One epoch of a log, counted from 1 (0: before any step). What the log does not hold is NaN.
    Accuracies are fractions; `time` is when it ended."""

    epoch: int
    train_loss: float = math.nan
    train_acc: float = math.nan
    val_loss: float = math.nan
    val_acc: float = math.nan
    val_top5: float = math.nan
    val_macro_f1: float = math.nan
    lr: float = math.nan
    seconds: float = math.nan
    time: float = math.nan


@dataclass(frozen=True)
class Log:
    """A log that was read. `seams` are the epochs after which another fit began, `files` the files
    that its numbers came from with their SHA-256, `config` the settings that it tells."""

    path: Path
    name: str
    format: Format
    files: Mapping[Path, str]
    epochs: tuple[LoggedEpoch, ...] = field(repr=False)
    seams: tuple[int, ...]
    started: float
    config: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def last_epoch(self) -> int:
        return self.epochs[-1].epoch

    @property
    def best(self) -> LoggedEpoch | None:
        """The epoch of highest validation accuracy; None where none was logged."""
        known = [epoch for epoch in self.epochs if not math.isnan(epoch.val_acc)]
        return max(known, key=lambda epoch: epoch.val_acc, default=None)


def finite(value: Any) -> float:
    """A number as a float; NaN for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def as_fractions(samples: Sequence[Sample]) -> tuple[list[Sample], list[str]]:
    """Accuracies in percent divided by 100, with a note. Raises LogError for what is no accuracy.

    All accuracies of a log count as percent where one of them is above 1.
    """
    values = [sample.value for sample in samples if sample.field in _ACCURACIES]
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low < -_ROUNDING or high > 100 + _ROUNDING:
        raise LogError(
            f"an accuracy of {low if low < 0 else high:g} is neither a fraction nor percent. "
            "Name the right one with --accuracy TAG."
        )
    percent = high > 1 + _ROUNDING
    scale, top = (0.01, 100.0) if percent else (1.0, 1.0)
    scaled = [
        replace(sample, value=scale * min(max(sample.value, 0.0), top))
        if sample.field in _ACCURACIES
        else sample
        for sample in samples
    ]
    return scaled, ["Its accuracies are percent: divided by 100."] if percent else []


def assemble(samples: Iterable[Sample]) -> tuple[tuple[LoggedEpoch, ...], tuple[int, ...]]:
    """The epochs of all fits on one axis, and the epochs after which another fit began.

    A fit that counts from the start again, or repeats the last epoch (`initial_epoch=
    history.epoch[-1]`), continues after the last epoch. One that begins in the midst of what is
    there went on from an earlier epoch: what was logged after that no longer counts, as in
    TensorBoard. `samples` are in the order in which they were written.
    """
    epochs: dict[int, LoggedEpoch] = {}
    seams: list[int] = []
    shift = began = ended = 0
    for fit in _fits(samples):
        if epochs:
            fit = [sample for sample in fit if sample.epoch > 0]
            first = min(sample.epoch for sample in fit)
            if first <= began or first == ended:
                shift = max(epochs) + 1 - first
            epochs = {number: one for number, one in epochs.items() if number < first + shift}
            seams.append(first + shift - 1)
        began, ended = (choose(sample.epoch for sample in fit) for choose in (min, max))
        epochs |= _epochs(fit, shift)
    return tuple(epochs[number] for number in sorted(epochs)), tuple(seams)


def _fits(samples: Iterable[Sample]) -> list[list[Sample]]:
    """A field that goes back to a lower step, or on in another part, begins another fit; a step
    that comes twice (a last evaluation of the best epoch) counts once."""
    fits: list[list[Sample]] = [[]]
    last: dict[Field, Sample] = {}
    for sample in samples:
        before = last.get(sample.field)
        if before is not None:
            back = sample.step < before.step and sample.field != "lr"
            if back or sample.part != before.part:
                fits.append([])
                last = {}
            elif sample.step == before.step:
                continue
        last[sample.field] = sample
        fits[-1].append(sample)
    return [fit for fit in fits if any(sample.epoch > 0 for sample in fit)]


def _epochs(fit: Sequence[Sample], shift: int) -> dict[int, LoggedEpoch]:
    values: dict[int, dict[Field, list[float]]] = {}
    times: dict[int, float] = {}
    for sample in fit:
        at = sample.epoch + shift
        values.setdefault(at, {}).setdefault(sample.field, []).append(sample.value)
        if not math.isnan(sample.time):
            times[at] = max(sample.time, times.get(at, sample.time))
    found: dict[int, LoggedEpoch] = {}
    for at, fields in sorted(values.items()):
        taken: dict[str, float] = {name: _of_epoch(name, seen) for name, seen in fields.items()}
        duration = {"seconds": times.get(at, math.nan) - times.get(at - 1, math.nan)}
        if not duration["seconds"] >= 0:
            duration = {}
        found[at] = LoggedEpoch(at, time=times.get(at, math.nan), **(duration | taken))
    return found


def _of_epoch(name: Field, values: Sequence[float]) -> float:
    """What was logged within an epoch: the mean of training, the first rate, else the last."""
    if name in ("train_loss", "train_acc"):
        return math.fsum(values) / len(values)
    return values[0 if name == "lr" else -1]

"""Is a change of accuracy more than chance? From the predictions that runs save for each photo.

Needs numpy, never torch.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from trainer.files import open_regular
from trainer.schema import ThawError

_CONFIDENCE: Final = 0.95
SIGNIFICANT: Final = 1 - _CONFIDENCE
MOST_BYTES: Final = 1_000_000_000  # the logits of 250,000 photos and 1,000 classes
FEW: Final = 30  # photos; a share of fewer says little


class EvidenceError(ThawError):
    """Predictions that cannot be read or compared."""


@dataclass(frozen=True)
class Predictions:
    """The class predicted for each validation photo: file names, and int64 arrays [N]."""

    files: tuple[str, ...]
    labels: NDArray[np.int64] = field(repr=False)
    predicted: NDArray[np.int64] = field(repr=False)


@dataclass(frozen=True)
class Evidence:
    """Two networks on the same photos. `fixed` photos only the second one has right, `broken` only
    the first. `low` to `high` is the 95% interval of `change`, fractions of the photos; `p` is the
    probability of so uneven a division of fixed and broken if neither network were better."""

    photos: int
    fixed: int
    broken: int
    low: float
    high: float
    p: float

    @property
    def change(self) -> float:
        return (self.fixed - self.broken) / self.photos


def load_predictions(path: Path) -> Predictions:
    """Read what a run saved. Raises EvidenceError with the reason."""
    files, labels, logits = load_logits(path)
    return Predictions(files, labels, logits.argmax(axis=1))


def load_logits(path: Path) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.floating]]:
    """What a run saved: file names, labels [N] and logits [N, classes]. Raises EvidenceError with
    the reason."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MOST_BYTES:
            raise EvidenceError(f"unpacked they have {size / 1e9:,.1f} GB")
        with np.load(path, allow_pickle=False) as content:
            logits, labels, files = (content[name] for name in ("logits", "labels", "files"))
    except Exception as error:  # damaged archives and arrays raise a dozen kinds
        raise EvidenceError(f"The predictions {path} cannot be read: {error}") from error
    if problem := _problem(logits, labels, files):
        raise EvidenceError(f"The predictions {path} are damaged: {problem}.")
    return tuple(map(str, files.tolist())), labels.astype(np.int64), logits


def _problem(logits: NDArray[Any], labels: NDArray[Any], files: NDArray[Any]) -> str:
    shapes = logits.ndim == 2 and labels.ndim == files.ndim == 1 and logits.size > 0
    if not shapes or not len(logits) == len(labels) == len(files):
        return "their parts do not fit"
    if logits.dtype.kind != "f" or labels.dtype.kind not in "iu" or files.dtype.kind != "U":
        return "their parts have the wrong type"
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        return "labels outside the classes"
    return ""


def compare(before: Predictions, after: Predictions) -> Evidence:
    """Paired by photo: a bootstrap interval over photos, and McNemar's exact test.

    Raises EvidenceError where the photos or their classes differ.
    """
    order = _order(before.files, after.files)
    if not np.array_equal(before.labels[order], after.labels):
        raise EvidenceError("Their photos have different classes.")
    right_before = before.predicted[order] == after.labels
    right_after = after.predicted == after.labels
    fixed = int(np.sum(right_after & ~right_before))
    broken = int(np.sum(right_before & ~right_after))
    low, high = interval(
        np.array([1, -1, 0]), np.array([fixed, broken, len(order) - fixed - broken])
    )
    return Evidence(len(order), fixed, broken, low, high, mcnemar(fixed, broken))


def _order(before: tuple[str, ...], after: tuple[str, ...]) -> NDArray[np.int64]:
    """The rows of `before` in the order of `after`."""
    if before == after:
        return np.arange(len(after))
    place = {file: row for row, file in enumerate(before)}
    if place.keys() != set(after) or len(before) != len(after):
        raise EvidenceError("They were validated on different photos.")
    return np.array([place[file] for file in after])


def interval(values: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of a mean over photos, of which `counts[i]` have the
    whole number `values[i]`; of infinitely many resamples.

    None is drawn: the characteristic function of a sum over resampled photos is that of one photo
    to the power of their number, and its Fourier transform is the chance of each sum.
    """
    photos, total = int(counts.sum()), int(counts @ values)
    # Further from its mean, by Bernstein's inequality, a sum has a chance of less than 1e-12.
    reach = 1 + 12 * math.isqrt(int(counts @ values**2)) + 52 * int(np.abs(values).max())
    angles = np.arange(reach + 1) * (np.pi / reach)
    one_photo = np.exp(1j * np.outer(angles, values - total / photos)) @ (counts / photos)
    chances = np.roll(np.fft.irfft(np.conj(one_photo) ** photos, 2 * reach), reach)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.searchsorted(np.cumsum(chances), [tail, 1 - tail]) - reach + total
    return float(low / photos), float(high / photos)


def mcnemar(fixed: int, broken: int) -> float:
    """Two-sided exact p: how often fair coins would divide the photos at least as unevenly."""
    tosses = fixed + broken

    def probability(heads: int) -> float:
        ways = math.lgamma(tosses + 1) - math.lgamma(heads + 1) - math.lgamma(tosses - heads + 1)
        return math.exp(ways - tosses * math.log(2))

    return min(1.0, 2 * math.fsum(map(probability, range(min(fixed, broken) + 1))))


def holm(p: Sequence[float]) -> list[float]:
    """The p-values adjusted for how many there are (Holm 1979): the best of many proves nothing."""
    adjusted, least = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = least
    return adjusted


def points(fraction: float) -> str:
    """A difference of accuracies as signed percentage points: 0.004 -> "+0.4"."""
    text = f"{100 * fraction:+.{digits(fraction)}f}"
    return "0.0" if float(text) == 0 else text.replace("-", "\u2212")


def digits(change: float) -> int:
    """How many digits behind the point a change in points needs."""
    # With thousands of validation photos a gain of 0.08 points is real; don't print it as 0.1.
    return 2 if 0 < abs(change) < 0.001 else 1


def sentence(evidence: Evidence, adjusted: float) -> str:
    """The evidence in one line: interval, counts, and what follows from them."""
    interval = f"95% interval {points(evidence.low)} to {points(evidence.high)}"
    counts = f"fixed {evidence.fixed:,}, broke {evidence.broken:,}"
    return (
        f"{points(evidence.change)} points, {interval}; {counts}: {_conclusion(evidence, adjusted)}"
    )


def _conclusion(evidence: Evidence, adjusted: float) -> str:
    p = f"p {'< 0.001' if adjusted < 0.001 else f'= {adjusted:.2g}'}"
    if adjusted >= SIGNIFICANT:
        return f"no evidence of a difference ({p})"
    return f"{'better' if evidence.change > 0 else 'worse'}, beyond chance ({p})"

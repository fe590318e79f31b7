"""Evidence on several pairs of networks at once, such as the same setting with several seeds.

Each pair counts the same photos, so photos are resampled and not pairs of networks: what differs
between seeds is shown as their spread, not as part of the interval.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.evidence import Evidence, EvidenceError, interval, load_predictions
from trainer.runlog import Stamp, stamp

Pair = tuple[Path, Path]  # the predictions before and after

_Stamped = tuple[Path, Stamp]


def pooled(pairs: Sequence[Pair]) -> Evidence | None:
    """The mean change over the pairs, with `fixed`, `broken` and `photos` summed over them.

    For one pair this is `explorer.evidence.compare`. None without pairs, and where predictions
    are missing, damaged, or of different photos.
    """
    stamped = tuple(((one, stamp(one)), (two, stamp(two))) for one, two in pairs)
    known = all(written is not None for pair in stamped for _, written in pair)
    return _pooled(stamped) if pairs and known else None


def sign_flip(differences: NDArray[np.int64]) -> float:
    """Two-sided exact p: how often a sum of these whole numbers is at least as far from zero when
    fair coins set their signs. With 1 and -1 alone it is McNemar's test."""
    weights, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    chances = np.ones(1)  # of each sum of the weights whose sign is positive
    for weight, count in zip(weights.tolist(), counts.tolist(), strict=True):
        positive = np.zeros(weight * count + 1)
        positive[::weight] = _coins(count)
        chances = np.convolve(chances, positive)
    most = len(chances) - 1
    reached = (most + abs(int(differences.sum()))) // 2
    return min(1.0, 2 * math.fsum(chances[reached:]))


def _coins(tosses: int) -> NDArray[np.float64]:
    """The chances of 0 to `tosses` heads."""
    logs = np.array([math.lgamma(heads + 1) for heads in range(tosses + 1)])
    return np.exp(logs[-1] - logs - logs[::-1] - tosses * math.log(2))


@functools.lru_cache(maxsize=4096)
def _pooled(pairs: tuple[tuple[_Stamped, _Stamped], ...]) -> Evidence | None:
    try:
        loaded = [(_right(*one), _right(*two)) for one, two in pairs]
    except EvidenceError:
        return None
    if len({photos for pair in loaded for photos, _ in pair}) > 1:
        return None
    changes = [(before, after) for (_, before), (_, after) in loaded]
    fixed = sum(int(np.sum(after & ~before)) for before, after in changes)
    broken = sum(int(np.sum(before & ~after)) for before, after in changes)
    total = np.sum([after.astype(np.int64) - before for before, after in changes], axis=0)
    most = len(pairs)
    low, high = interval(
        np.arange(-most, most + 1), np.bincount(total + most, minlength=2 * most + 1)
    )
    photos = len(total) * most
    return Evidence(photos, fixed, broken, low / most, high / most, sign_flip(total))


@functools.lru_cache(maxsize=4096)
def _right(path: Path, _: Stamp) -> tuple[str, NDArray[np.bool_]]:
    """Whether each photo is right, in the order of the photos' names; and which photos they are."""
    found = load_predictions(path)
    order = np.argsort(np.array(found.files))
    labels = found.labels[order]
    photos = hashlib.sha256("\0".join(sorted(found.files)).encode() + labels.tobytes())
    return photos.hexdigest(), found.predicted[order] == labels

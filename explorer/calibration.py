"""Can the confidence of a network be trusted? Of the validation photos, before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from explorer.changed import Change, Names, Scored
from trainer.evidence import FEW, points

BINS: Final = 10
_Z95: Final = 1.959964  # a normal distribution lies within this many sigma to 95%


@dataclass(frozen=True)
class Calibration:
    """Whether a network is as often right as it is sure. `ece` is the expected calibration error
    of Guo et al. 2017, `nll` the mean negative log-likelihood in nats."""

    accuracy: float
    confidence: float
    ece: float
    nll: float


def reliability(of: Scored, bins: int = BINS) -> pd.DataFrame:
    """One row for each of `bins` equal steps of confidence (above `low`, up to `high`): n, and the
    mean confidence and accuracy of its photos with the 95% interval of that accuracy (Wilson), NaN
    where there are none."""
    edges = np.linspace(0, 1, bins + 1)
    place = np.digitize(of.confidence, edges[1:-1], right=True)
    n = pd.Series(np.bincount(place, minlength=bins))
    sure = np.bincount(place, weights=of.confidence, minlength=bins)
    right = np.bincount(place, weights=of.right, minlength=bins)
    accuracy = right / n
    lower, upper = _wilson(accuracy, n)
    return pd.DataFrame(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "n": n,
            "confidence": sure / n,
            "accuracy": accuracy,
            "lower": lower,
            "upper": upper,
        }
    )


def _wilson(share: pd.Series[float], n: pd.Series[int]) -> tuple[pd.Series, pd.Series]:
    """Wilson's 95% interval of a share of n: unlike the usual one it never leaves 0 to 1."""
    spread = _Z95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = np.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return (centre - half).clip(lower=0), (centre + half).clip(upper=1)


def calibration(of: Scored, bins: int = BINS) -> Calibration:
    """ECE is the sum over the bins of n / N times |accuracy - mean confidence|."""
    rows = reliability(of, bins)
    gaps = rows["n"] * (rows["accuracy"] - rows["confidence"]).abs()
    return Calibration(
        accuracy=of.accuracy,
        confidence=float(np.mean(of.confidence)),
        ece=float(gaps.sum() / rows["n"].sum()),
        nll=float(-np.mean(of.true_log)),
    )


def calibration_lines(change: Change, names: Names) -> list[str]:
    """How sure both networks are against how often they are right, in plain words."""
    lines = []
    for name, of in zip(names, (change.before, change.after), strict=True):
        found = calibration(of)
        gap = found.confidence - found.accuracy
        side = "over" if gap > 0 else "under"
        lines.append(
            f"{name}: mean confidence {found.confidence:.1%} for an accuracy of "
            f"{found.accuracy:.1%} ({side}-confident by {points(abs(gap)).lstrip('+')} points); "
            f"expected calibration error {found.ece:.1%}, negative log-likelihood {found.nll:.3f}."
        )
    return lines


def few_photos(change: Change) -> str:
    """A warning where the bins of `reliability` hold too few photos to read much from them."""
    counts = pd.concat([reliability(change.before)["n"], reliability(change.after)["n"]])
    counts = counts[counts > 0]
    few = int((counts < FEW).sum())
    if few == 0:
        return ""
    return (
        f"{few} of {len(counts)} points stand for fewer than {FEW} photos: chance alone moves "
        "them, and it makes the calibration error larger than it is."
    )

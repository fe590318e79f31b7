"""Photos that look the same: a perceptual hash, and the near pairs among many hashes (numpy).

The hash is the well-known one (pHash): of the grey photo at 32 x 32 pixels the 8 x 8 lowest
frequencies, a bit for each: above their median or not. Scaled, recompressed and recoloured copies
differ in few bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Chosen by looking at pairs of the photographs of flowers: up to 6 bits all are copies, at 10 two
# of three are not, at 12 hardly any is.
MOST_BITS: Final = 6
# Small dark photos of different road signs come as near as that; their greys do not.
_LEAST_CORRELATION: Final = 0.85
# Grey levels: what is flatter has nothing but noise to compare.
_FLAT: Final = 3.0
# Above this the photos are frames or drawings, of which a hash tells nothing.
MOST_PAIRS: Final = 500_000

_SIDE: Final = 32
_LOW: Final = 8
_COSINES: Final = np.cos(
    np.pi * (np.arange(_SIDE)[None, :] + 0.5) * np.arange(_LOW)[:, None] / _SIDE
)

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Print:
    """What is kept of how a photo looks: 64 bits, and its greys, uint8 [16, 16]."""

    bits: int
    greys: NDArray[np.uint8]


def fingerprint(image: Image.Image) -> Print | None:
    """Of an RGB image of any size; None where it is too flat to be compared."""
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    grey = np.asarray(small, np.float64)
    if grey.std() < _FLAT:
        return None
    low = (_COSINES @ grey @ _COSINES.T).ravel()
    # The first is the brightness, far above all others.
    bits = np.packbits(low > np.median(low[1:])).view(">u8")[0]
    half = grey.reshape(_SIDE // 2, 2, _SIDE // 2, 2).mean(axis=(1, 3))
    return Print(int(bits), half.round().astype(np.uint8))


def near_pairs(prints: list[Print]) -> list[tuple[int, int, int]] | None:
    """Pairs that look the same: (i, j, differing bits), i < j, sorted; None above MOST_PAIRS."""
    hashes = np.array([one.bits for one in prints], np.uint64)
    different, place = np.unique(hashes, return_inverse=True)
    found = _near(different, MOST_BITS)
    if found is None:
        return None
    order = np.argsort(place, kind="stable")
    counts = np.bincount(place, minlength=len(different))
    members = np.split(order, np.cumsum(counts)[:-1])
    first, second = found
    within = int((counts * (counts - 1) // 2).sum())
    if within + int((counts[first] * counts[second]).sum()) > MOST_PAIRS:
        return None
    # Few hashes have several photos, so these loops are short.
    pairs = [(i, j) for group in members for n, i in enumerate(group) for j in group[n + 1 :]]
    for a, b in zip(first, second, strict=True):
        pairs += [(i, j) for i in members[a] for j in members[b]]
    return _verified(prints, hashes, pairs)


def _verified(
    prints: list[Print], hashes: NDArray[np.uint64], pairs: list[tuple[int, int]]
) -> list[tuple[int, int, int]]:
    if not pairs:
        return []
    greys = np.stack([one.greys.ravel() for one in prints]).astype(np.float32)
    greys -= greys.mean(axis=1, keepdims=True)
    greys /= np.linalg.norm(greys, axis=1, keepdims=True) + 1e-6
    kept = []
    for i, j in sorted((int(min(pair)), int(max(pair))) for pair in pairs):
        if greys[i] @ greys[j] > _LEAST_CORRELATION:
            kept.append((i, j, int(np.bitwise_count(hashes[i] ^ hashes[j]))))
    return kept


def _near(hashes: NDArray[np.uint64], within: int) -> tuple[Indices, Indices] | None:
    """Pairs of different hashes that differ in at most `within` bits, each once.

    Cut into `within` + 1 bands, two such hashes agree in one band or more. So only hashes that
    agree in a band are compared: 100,000 photos take a second instead of ten.
    """
    edges = np.linspace(0, 64, within + 2).astype(np.uint64)
    found = [np.empty(0, np.int64)]
    for low, high in pairwise(edges):
        band = (hashes >> low) & ((np.uint64(1) << (high - low)) - np.uint64(1))
        order = np.argsort(band, kind="stable")
        for near in _near_in_band(band[order], hashes[order], within):
            pair = np.sort(order[near], axis=0)
            found.append(pair[0] * len(hashes) + pair[1])
            if sum(map(len, found)) > (within + 1) * MOST_PAIRS:
                return None
    codes = np.unique(np.concatenate(found))
    return codes // max(1, len(hashes)), codes % max(1, len(hashes))


def _near_in_band(
    band: NDArray[np.uint64], hashes: NDArray[np.uint64], within: int
) -> list[Indices]:
    """Of sorted bands: int64 [2, n] for each distance in the order, as far as any are equal."""
    found = []
    first, step = np.arange(len(band)), 0
    while len(first):
        step += 1
        first = first[first + step < len(band)]
        first = first[band[first + step] == band[first]]
        near = first[np.bitwise_count(hashes[first] ^ hashes[first + step]) <= within]
        if len(near):
            found.append(np.stack([near, near + step]))
    return found

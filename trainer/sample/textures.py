"""Random numbers, colours, noise, and the way between images and arrays of floats."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Rng = np.random.Generator
Colour = tuple[int, int, int]
Point = tuple[float, float]
Floats = NDArray[np.float32]


def generator(name: str) -> Rng:
    """The random numbers of that name, the same in every process."""
    key = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "little")))


def chance(rng: Rng, probability: float) -> bool:
    return bool(rng.random() < probability)


def pick(rng: Rng, palette: Sequence[Colour]) -> Colour:
    """One of the colours, a little off: more in brightness than in hue."""
    base = palette[int(rng.integers(len(palette)))]
    return shade(base, rng.normal(1, 0.09), rng.normal(0, 4, 3).tolist())


def shade(colour: Colour, factor: float, offset: Iterable[float] = (0, 0, 0)) -> Colour:
    r, g, b = (min(255, max(0, round(c * factor + o))) for c, o in zip(colour, offset, strict=True))
    return r, g, b


def noise(rng: Rng, width: int, height: int, cell: float, octaves: int = 3) -> Floats:
    """Smooth fractal noise [height, width] around 0, about -1 to 1, with blobs of `cell` pixels."""
    total = np.zeros((height, width), dtype=np.float32)
    weight = 0.6
    for _ in range(octaves):
        grid = (max(2, math.ceil(height / cell) + 1), max(2, math.ceil(width / cell) + 1))
        values = Image.fromarray(rng.uniform(-1, 1, grid).astype(np.float32))
        total += weight * np.asarray(values.resize((width, height), Image.Resampling.BICUBIC))
        weight, cell = weight * 0.55, max(1.0, cell / 2.2)
    return total


def to_floats(image: Image.Image) -> Floats:
    """RGB as [height, width, 3] in 0..1."""
    pixels = np.array(image, dtype=np.float32)
    pixels *= np.float32(1 / 255)
    return pixels


def to_image(pixels: Floats) -> Image.Image:
    """Inverse of `to_floats`; values outside 0..1 are clipped."""
    scaled = pixels * np.float32(255)
    scaled += np.float32(0.5)
    np.clip(scaled, 0, 255, out=scaled)
    return Image.fromarray(scaled.astype(np.uint8))

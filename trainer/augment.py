"""Random views of photos: every view is fixed by (seed, photo, view number) and by nothing else."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from trainer.config import Augmentation

# On the CPU a batch is worked through in parts that stay in its caches: a third less time than a
# whole batch of 32 at once.
_PHOTOS_PER_THREAD: Final = 2
_QUANTILES: Final = 1 << 16


def view_generator(seed: int, photo: str, view: int) -> np.random.Generator:
    """A counter-based generator (Philox) keyed by (seed, photo) and positioned at the view."""
    name = photo.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=16, salt=seed.to_bytes(8, "little")).digest()
    key = np.frombuffer(digest, np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, view]))


@dataclass(frozen=True)
class _Draws:
    """What chance decided for N photos.

    Tensors are float32 [N, 1, 1, 1] on the photos' device: the shift in pixel units, the factor,
    and the angle's cosine and sine. `left` and `top` are the corner of the window.
    """

    brightness: Tensor
    contrast: Tensor
    cos: Tensor
    sin: Tensor
    left: list[int]
    top: list[int]

    def __getitem__(self, part: slice) -> _Draws:
        return _Draws(
            self.brightness[part],
            self.contrast[part],
            self.cos[part],
            self.sin[part],
            self.left[part],
            self.top[part],
        )


def _draws(uniform: Tensor, augmentation: Augmentation, spare: int, device: torch.device) -> _Draws:
    """`uniform` is float64 [N, 5] in 0..1, `spare` the pixels a window can move by.

    In double precision, since float32 functions round differently with the place in a batch.
    """
    signed = uniform * 2 - 1
    random_color = augmentation.color == "random"
    strength = signed[:, :2] if random_color else torch.ones_like(signed[:, :2])
    angle = signed[:, 2] * augmentation.rotation * 2 * math.pi

    def on_device(values: Tensor) -> Tensor:
        return values.to(device, torch.float32).view(-1, 1, 1, 1)

    return _Draws(
        brightness=on_device(strength[:, 0] * augmentation.brightness * 255),
        contrast=on_device(augmentation.contrast ** strength[:, 1]),
        cos=on_device(angle.cos()),
        sin=on_device(angle.sin()),
        left=(uniform[:, 3] * (spare + 1)).long().tolist(),
        top=(uniform[:, 4] * (spare + 1)).long().tolist(),
    )


def augment(
    photos: Tensor,
    names: Sequence[str],
    augmentation: Augmentation,
    crop: int,
    seed: int,
    view: int,
) -> Tensor:
    """One view of each photo: uint8 [N, S, S, 3] -> float32 [N, crop, crop, 3] in 0..255.

    In order: random crop, rotation (bilinear, edges reflected), brightness, contrast around each
    photo's channel means, noise, clamping to 0..255. `names` identify the photos.
    """
    generators = [view_generator(seed, name, view) for name in names]
    # All five numbers are drawn even where one is not used: switching one augmentation on or off
    # then leaves the others as they were, so that comparisons stay paired.
    uniform = torch.from_numpy(np.stack([g.random(5, dtype=np.float32) for g in generators]))
    spare = photos.shape[1] - crop
    draws = _draws(uniform.double(), augmentation, spare, photos.device)
    shape = (len(photos), 3, crop, crop)
    noise = _noise(generators, shape, augmentation.noise) if augmentation.noise > 0 else None
    views = torch.empty(shape, device=photos.device) if noise is None else noise.to(photos.device)
    for part in _parts(photos):
        planes = _adjust(_crop(photos[part], draws[part], crop), draws[part], augmentation)
        if noise is not None:
            planes += views[part]
        torch.clamp(planes, 0, 255, out=views[part])
    return views.permute(0, 2, 3, 1)


def _parts(photos: Tensor) -> Iterator[slice]:
    on_cpu = photos.device.type == "cpu"
    size = _PHOTOS_PER_THREAD * torch.get_num_threads() if on_cpu else len(photos)
    return (slice(start, start + size) for start in range(0, len(photos), size))


def _crop(photos: Tensor, draws: _Draws, crop: int) -> Tensor:
    """uint8 [N, S, S, 3] -> uint8 [N, crop, crop, 3]."""
    if photos.shape[1] == crop:
        return photos
    windows = zip(photos, draws.left, draws.top, strict=True)
    return torch.stack([p[y : y + crop, x : x + crop] for p, x, y in windows])


def _adjust(photos: Tensor, draws: _Draws, augmentation: Augmentation) -> Tensor:
    """Rotation, brightness and contrast: uint8 [N, H, W, 3] -> new float32 planes [N, 3, H, W]."""
    planes = photos.permute(0, 3, 1, 2).to(torch.float32)
    if augmentation.rotation > 0:
        planes = _rotate(planes, draws)
    planes = planes.contiguous()
    shift = draws.brightness
    if augmentation.contrast != 1:
        # (x + b - m) * c + m with the mean m of x + b, as one product and one sum.
        shift = shift + planes.mean(dim=(2, 3), keepdim=True) * (1 - draws.contrast)
        planes *= draws.contrast
    if augmentation.contrast != 1 or augmentation.brightness > 0:
        planes += shift
    return planes


def _rotate(planes: Tensor, draws: _Draws) -> Tensor:
    """Each photo around its centre by its angle: float32 [N, 3, S, S] -> the same, contiguous."""
    side = planes.shape[-1]
    x = (torch.arange(side, device=planes.device) * 2 + 1) / side - 1  # -1 to 1 across the photo
    y = x[:, None]
    grid = planes.new_empty(len(planes), 2, side, side)
    torch.sub(draws.cos * x, draws.sin * y, out=grid[:, :1])
    torch.add(draws.sin * x, draws.cos * y, out=grid[:, 1:])
    places = grid.permute(0, 2, 3, 1)
    return functional.grid_sample(planes, places, padding_mode="reflection", align_corners=False)


def _noise(
    generators: Sequence[np.random.Generator], shape: tuple[int, ...], deviation: float
) -> Tensor:
    """Normal noise, float32 of the given shape [N, ...]; row i depends on generator i alone.

    Every number is one of 65,536 equally likely values, the quantiles of the normal distribution.
    The mean is 0 and the standard deviation `deviation`, but the tails end at 4.3 deviations. No
    pixel shows the difference from exact normal numbers, which take four times as long.
    """
    noise = torch.empty(shape)
    rows = noise.view(len(noise), -1).numpy()
    values = _normal_quantiles() * np.float32(deviation)
    threads = torch.get_num_threads()

    def fill(thread: int) -> None:
        for number in range(thread, len(rows), threads):
            bits = generators[number].bit_generator
            words = bits.random_raw(-(-rows[number].size // 4)).view(np.uint16)
            # Mode "raise" would fill a buffer first.
            np.take(values, words[: rows[number].size], out=rows[number], mode="clip")

    # numpy releases the interpreter lock in both steps.
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, range(threads)))
    return noise


@functools.cache
def _normal_quantiles() -> NDArray[np.float32]:
    """The middles of 65,536 equally likely parts of the normal distribution, of variance 1."""
    middles = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    values = torch.special.ndtri(middles)
    return (values / values.square().mean().sqrt()).to(torch.float32).numpy()

"""Random views of photos: every view is fixed by (seed, photo, view number) and by nothing else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainer.config import Augmentation


def view_generator(seed: int, photo: str, view: int) -> np.random.Generator:
    """A counter-based generator (Philox) keyed by (seed, photo) and positioned at the view."""
    name = photo.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=16, salt=seed.to_bytes(8, "little")).digest()
    key = np.frombuffer(digest, np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, view]))


@dataclass(frozen=True)
class _Draws:
    """What chance decided for one batch: float32 [N] each, noise [N, crop, crop, 3] or None."""

    brightness: Tensor
    contrast: Tensor
    angle: Tensor
    left: Tensor
    top: Tensor
    noise: Tensor | None


def _draw(
    augmentation: Augmentation, crop: int, names: Sequence[str], seed: int, view: int
) -> _Draws:
    generators = [view_generator(seed, name, view) for name in names]
    # All five numbers are drawn even where one is not used: switching one augmentation on or off
    # then leaves the others as they were, so that comparisons stay paired.
    uniform = torch.from_numpy(np.stack([g.random(5, dtype=np.float32) for g in generators]))
    signed = uniform * 2 - 1
    random_color = augmentation.color == "random"
    strength = signed[:, :2] if random_color else torch.ones_like(signed[:, :2])
    noise = None
    if augmentation.noise > 0:
        shape = (crop, crop, 3)
        grains = [g.standard_normal(shape, dtype=np.float32) for g in generators]
        noise = torch.from_numpy(np.stack(grains)) * augmentation.noise
    return _Draws(
        brightness=strength[:, 0] * augmentation.brightness * 255,
        contrast=augmentation.contrast ** strength[:, 1],
        angle=signed[:, 2] * augmentation.rotation * 2 * math.pi,
        left=uniform[:, 3],
        top=uniform[:, 4],
        noise=noise,
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
    draws = _draw(augmentation, crop, names, seed, view)
    views = _crop(photos, draws, crop).to(torch.float32)
    if augmentation.rotation > 0:
        views = _rotate(views, draws.angle.to(views.device))
    brightness, contrast = (
        value.to(views.device).view(-1, 1, 1, 1) for value in (draws.brightness, draws.contrast)
    )
    views = views + brightness
    mean = views.mean(dim=(1, 2), keepdim=True)
    views = (views - mean) * contrast + mean
    if draws.noise is not None:
        views = views + draws.noise.to(views.device)
    return views.clamp_(0, 255)


def _crop(photos: Tensor, draws: _Draws, crop: int) -> Tensor:
    spare = photos.shape[1] - crop
    if spare == 0:
        return photos
    lefts = (draws.left * (spare + 1)).long().tolist()
    tops = (draws.top * (spare + 1)).long().tolist()
    windows = zip(photos, lefts, tops, strict=True)
    return torch.stack([p[y : y + crop, x : x + crop] for p, x, y in windows])


def _rotate(views: Tensor, angle: Tensor) -> Tensor:
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    matrices = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    planes = views.permute(0, 3, 1, 2)
    grid = functional.affine_grid(matrices, list(planes.shape), align_corners=False)
    turned = functional.grid_sample(planes, grid, padding_mode="reflection", align_corners=False)
    return turned.permute(0, 2, 3, 1)

"""Views: random in distribution, fixed by (seed, photo, view number)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.augment import augment, view_generator
from trainer.config import Augmentation, ConfigError

ALL = Augmentation(brightness=0.3, contrast=2.0, rotation=0.02, crop_from=40, noise=0.6)


def batch(count: int = 4, side: int = 40) -> Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(60, 190, (count, side, side, 3), dtype=np.uint8))


def names(count: int = 4) -> list[str]:
    return [f"class/{number}.jpg" for number in range(count)]


def view(augmentation: Augmentation, photos: Tensor | None = None, **changes: int) -> Tensor:
    photos = batch() if photos is None else photos
    crop = 32 if augmentation.crop_from else photos.shape[1]
    options = {"crop": crop, "seed": 1, "view": 1} | changes
    return augment(photos, names(len(photos)), augmentation, **options)


def smooth(count: int = 3, side: int = 40) -> Tensor:
    """Photos of gentle waves, each its own: rounded coordinates hardly show on them."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [
        100 + 40 * torch.sin(x / (4 + n) + channel) + 40 * torch.cos(y / (6 - channel) + n)
        for n in range(count)
        for channel in range(3)
    ]
    return torch.stack(waves).view(count, 3, side, side).permute(0, 2, 3, 1).to(torch.uint8)


def plain(photo: Tensor, name: str, augmentation: Augmentation, crop: int) -> Tensor:
    """One photo's view as the docstrings say, noise left out, pixel by pixel in float64."""
    uniform = view_generator(1, name, 1).random(5, dtype=np.float32).astype(np.float64)
    brightness, contrast, angle = uniform[:3] * 2 - 1
    left, top = (int(u * (photo.shape[0] - crop + 1)) for u in uniform[3:])
    pixels = photo[top : top + crop, left : left + crop].numpy().astype(np.float64)
    pixels = turned(pixels, angle * augmentation.rotation * 2 * math.pi)
    pixels = pixels + brightness * augmentation.brightness * 255
    mean = pixels.mean(axis=(0, 1))
    pixels = (pixels - mean) * augmentation.contrast**contrast + mean
    return torch.from_numpy(pixels.clip(0, 255).astype(np.float32))


def turned(pixels: np.ndarray, angle: float) -> np.ndarray:
    side = len(pixels)
    centre = (side - 1) / 2
    result = np.empty_like(pixels)
    for y, x in np.ndindex(side, side):
        across, down = x - centre, y - centre
        u = reflected(centre + across * math.cos(angle) - down * math.sin(angle), side)
        v = reflected(centre + across * math.sin(angle) + down * math.cos(angle), side)
        i, j = min(int(v), side - 2), min(int(u), side - 2)
        upper = pixels[i, j] * (1 - (u - j)) + pixels[i, j + 1] * (u - j)
        lower = pixels[i + 1, j] * (1 - (u - j)) + pixels[i + 1, j + 1] * (u - j)
        result[y, x] = upper * (1 - (v - i)) + lower * (v - i)
    return result


def reflected(place: float, side: int) -> float:
    """Mirrored at the outer edges of the first and last pixel, then held between their centres."""
    inside = side - abs(side - abs(place + 0.5)) - 0.5
    return min(max(inside, 0.0), side - 1.0)


def grains(number: int = 1) -> Tensor:
    """Noise of deviation 1 on grey photos: [6, 160, 160, 3], 460,800 numbers."""
    grey = torch.full((6, 160, 160, 3), 128, dtype=torch.uint8)
    return view(Augmentation(noise=1), grey, view=number) - 128


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(brightness=0.3),
        Augmentation(contrast=2.0),
        Augmentation(rotation=0.02),
        Augmentation(rotation=0.5),
        Augmentation(crop_from=40),
        Augmentation(brightness=0.3, contrast=2.0, rotation=0.02, crop_from=40),
        Augmentation(brightness=0.9, contrast=3.0, rotation=0.1),
    ],
)
def test_views_equal_a_plain_implementation(augmentation: Augmentation) -> None:
    photos = smooth()
    crop = 32 if augmentation.crop_from else 40
    expected = [
        plain(photo, name, augmentation, crop) for photo, name in zip(photos, names(3), strict=True)
    ]
    assert (view(augmentation, photos) - torch.stack(expected)).abs().max() < 1e-3


def test_a_view_is_repeatable_and_leaves_the_photos_alone() -> None:
    photos = batch()
    views = view(ALL, photos)
    assert views.shape == (4, 32, 32, 3)
    assert views.dtype == torch.float32
    assert torch.equal(views, view(ALL, photos))
    assert torch.equal(photos, batch())


@pytest.mark.parametrize("crop", [32, 39, 40])  # 39: a number of grains that 4 does not divide
def test_a_view_is_the_same_alone_and_in_a_batch(crop: int) -> None:
    whole = augment(batch(9), names(9), ALL, crop, 1, 1)
    for row in range(9):
        alone = augment(batch(9)[row : row + 1], names(9)[row : row + 1], ALL, crop, 1, 1)
        assert torch.equal(whole[row : row + 1], alone)


def test_a_view_does_not_depend_on_the_number_of_threads() -> None:
    threads, views = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            views.append(view(ALL, batch(9)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*views)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graphics_card_makes_the_same_views() -> None:
    there = augment(smooth().cuda(), names(3), ALL, 32, 1, 1)
    assert there.is_cuda
    assert (there.cpu() - view(ALL, smooth())).abs().max() < 1e-3


@pytest.mark.parametrize("change", [{"seed": 2}, {"view": 2}])
def test_seed_and_view_number_change_the_view(change: dict[str, int]) -> None:
    assert not torch.allclose(view(ALL), view(ALL, **change), atol=1)


def test_photos_of_one_batch_are_drawn_apart() -> None:
    same = batch(1).expand(4, -1, -1, -1)
    shifts = view(Augmentation(brightness=0.3), same).mean(dim=(1, 2, 3))
    assert len({round(float(shift), 3) for shift in shifts}) == 4


def test_switching_one_augmentation_off_leaves_the_others_as_drawn() -> None:
    both = view(Augmentation(brightness=0.1, noise=0.5))
    brightness = view(Augmentation(brightness=0.1))
    noise = view(Augmentation(noise=0.5)) - batch()
    assert torch.allclose(both, brightness + noise, atol=1e-3)
    assert noise.std() > 0.4


def test_brightness_shifts_by_at_most_its_delta() -> None:
    shifts = torch.cat(
        [
            (view(Augmentation(brightness=0.2), view=n) - batch()).mean(dim=(1, 2, 3))
            for n in range(50)
        ]
    )
    assert float(shifts.abs().max()) <= 0.2 * 255 + 1e-3
    assert float(shifts.min()) < -0.1 * 255
    assert float(shifts.max()) > 0.1 * 255


def test_contrast_keeps_the_mean_and_scales_around_it() -> None:
    photos = batch()
    changed = view(Augmentation(contrast=1.2), photos)
    assert torch.allclose(changed.mean(dim=(1, 2)), photos.float().mean(dim=(1, 2)), atol=0.1)
    ratio = changed.std(dim=(1, 2, 3)) / photos.float().std(dim=(1, 2, 3))
    assert bool(((ratio > 1 / 1.21) & (ratio < 1.21)).all())


def test_fixed_color_gives_every_photo_the_full_strength() -> None:
    shift = view(Augmentation(brightness=0.1, color="fixed")) - batch()
    assert torch.allclose(shift, torch.full_like(shift, 25.5), atol=1e-3)


def test_rotation_turns_around_the_centre() -> None:
    photo = torch.zeros(1, 41, 41, 3, dtype=torch.uint8)
    photo[0, 20, 36] = 255  # to the right of the centre
    turned = view(Augmentation(rotation=0.25), photo)[0, :, :, 0]
    y, x = divmod(int(turned.argmax()), 41)
    assert abs(((y - 20) ** 2 + (x - 20) ** 2) ** 0.5 - 16) < 1.5
    assert (y, x) != (20, 36)


def test_crop_is_a_window_of_the_photo() -> None:
    photos = batch()
    cropped = view(Augmentation(crop_from=40), photos)
    windows = photos.float().unfold(1, 32, 1).unfold(2, 32, 1)  # [N, 9, 9, 3, 32, 32]
    found = (windows.permute(0, 1, 2, 4, 5, 3) == cropped[:, None, None]).all(dim=(3, 4, 5))
    assert bool(found.any(dim=2).any(dim=1).all())


def test_noise_has_the_stated_deviation_in_pixel_units() -> None:
    grains = view(Augmentation(noise=3.0)) - batch()
    assert float(grains.std()) == pytest.approx(3.0, rel=0.05)


def test_noise_is_normal() -> None:
    values = grains().flatten().double().sort().values
    count = len(values)
    assert abs(float(values.mean())) < 4 / count**0.5
    assert float(values.std()) == pytest.approx(1, abs=4 / (2 * count) ** 0.5)
    # Kolmogorov's distance; a normal sample exceeds this once in a thousand times.
    expected = (torch.arange(count) + 0.5) / count
    assert float((torch.special.ndtr(values) - expected).abs().max()) < 1.95 / count**0.5
    assert 4 < float(values.abs().max()) < 4.4


def test_noise_is_not_correlated() -> None:
    noise = grains()
    assert abs(correlation(noise, grains(2))) < 0.01  # views
    assert abs(correlation(noise[:-1], noise[1:])) < 0.01  # photos
    assert abs(correlation(noise[:, :-1], noise[:, 1:])) < 0.01  # one below the other
    assert abs(correlation(noise[:, :, :-1], noise[:, :, 1:])) < 0.01  # side by side
    assert abs(correlation(noise[..., :-1], noise[..., 1:])) < 0.01  # channels


def test_values_stay_in_range() -> None:
    photos = torch.randint(0, 256, (4, 40, 40, 3), dtype=torch.uint8)
    strong = view(Augmentation(brightness=0.5, contrast=3, noise=30), photos)
    assert float(strong.min()) >= 0
    assert float(strong.max()) <= 255


@pytest.mark.parametrize(
    "bad", [{"brightness": 2}, {"contrast": 0.5}, {"rotation": 0.6}, {"noise": -1}, {"color": "x"}]
)
def test_nonsense_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(bad))}"):
        Augmentation(**bad)  # type: ignore[arg-type]

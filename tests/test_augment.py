"""Views: random in distribution, fixed by (seed, photo, view number)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.augment import augment
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


def test_a_view_is_repeatable_and_independent_of_its_batch() -> None:
    whole = view(ALL)
    assert whole.shape == (4, 32, 32, 3)
    assert torch.equal(whole, view(ALL))
    alone = augment(batch()[2:3], names()[2:3], ALL, 32, 1, 1)
    assert torch.allclose(whole[2:3], alone, atol=1e-3)


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
    assert (both - brightness).abs().max() < 5  # noise only


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

"""One preprocessing: what every part of Thaw sees of a photo."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.models import EfficientNet_B0_Weights

from tests.conftest import draw_photo, shared
from trainer.model import InputNormalize
from trainer.preprocess import MAX_PIXELS, PhotoError, load_photo, open_photo, to_array
from trainer.schema import Preprocess, ThawError

PREPROCESS = Preprocess()


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def test_the_same_photo_gives_the_same_bytes_from_path_and_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    draw_photo(path, (200, 0, 0), 1)
    one, two = load_photo(path, PREPROCESS), load_photo(io.BytesIO(path.read_bytes()), PREPROCESS)
    assert one.shape == (224, 224, 3)
    assert one.dtype == np.uint8
    assert one.tobytes() == two.tobytes()


def test_close_to_torchvisions_own_transform(tmp_path: Path) -> None:
    """EfficientNet-B0's published weights expect torchvision's transform."""
    import torch

    path = tmp_path / "a.jpg"
    draw_photo(path, (200, 0, 0), 1)
    theirs = EfficientNet_B0_Weights.DEFAULT.transforms()(Image.open(path).convert("RGB"))
    ours = InputNormalize(PREPROCESS)(torch.tensor(load_photo(path, PREPROCESS))[None])[0]
    # The photo is noise, so a shift of one pixel would differ by 1; rounding differs by a level.
    assert float((ours - theirs).abs().mean()) < 0.02


def test_exif_orientation_is_applied() -> None:
    upright = Image.new("RGB", (300, 200), "blue")
    upright.paste("red", (0, 0, 150, 200))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = open_photo(encode(upright.rotate(180), exif=exif))
    assert turned.getpixel((10, 10)) == (255, 0, 0)


def test_transparency_lies_over_white_and_16_bit_grey_is_scaled() -> None:
    assert open_photo(encode(Image.new("RGBA", (20, 20), (0, 0, 0, 0)))).getpixel((5, 5)) == (
        255,
        255,
        255,
    )
    deep = Image.fromarray(np.full((20, 20), 0x8000, np.uint16))
    assert open_photo(encode(deep)).getpixel((5, 5)) == (128, 128, 128)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    array = load_photo(encode(Image.new(mode, (300, 260)), kind), PREPROCESS)
    assert array.shape == (224, 224, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 2), (224, 224), (223, 4000)])
def test_any_shape_of_photo(size: tuple[int, int]) -> None:
    assert to_array(Image.new("RGB", size), PREPROCESS).shape == (224, 224, 3)


def test_the_centre_is_kept() -> None:
    image = Image.new("RGB", (448, 256), "black")
    image.paste("white", (112, 0, 336, 256))
    assert to_array(image, PREPROCESS).min() > 200


def test_a_bomb_is_refused_before_decoding() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    bomb = encode(Image.new("1", (side, side)))
    with pytest.raises(PhotoError, match="more than the limit"):
        open_photo(bomb)


@pytest.mark.parametrize("content", [b"", b"not a photo", b"\xff\xd8\xff\xe0junk"])
def test_what_is_no_photo_says_so(content: bytes) -> None:
    with pytest.raises(PhotoError):
        open_photo(io.BytesIO(content))


def test_a_cut_off_photo_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    draw_photo(path, (1, 2, 3), 1)
    with pytest.raises(PhotoError, match="truncated"):
        open_photo(io.BytesIO(path.read_bytes()[:2000]))


def test_damaged_files_raise_photo_errors_only() -> None:
    for path in sorted(shared("malformed").rglob("*"))[::9]:
        if path.is_file():
            try:
                load_photo(path, PREPROCESS)
            except PhotoError as error:
                assert str(error)


def test_preprocess_survives_json() -> None:
    assert Preprocess.from_dict(PREPROCESS.to_dict()) == PREPROCESS
    with pytest.raises(ThawError):
        Preprocess.from_dict({"resize": 256})
    with pytest.raises(ThawError):
        Preprocess(resize=200, crop=224)

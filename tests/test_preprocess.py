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
from trainer.preprocess import (
    MAX_PIXELS,
    PhotoError,
    load_photo,
    open_photo,
    side_to_decode,
    to_array,
)
from trainer.schema import Preprocess, ThawError

PREPROCESS = Preprocess()


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def scene(width: int, height: int) -> Image.Image:
    """Like a photograph: soft shapes of all sizes, down to a few pixels, without sharp edges."""
    rng = np.random.default_rng(0)
    total = np.full((height, width), 128.0)
    for side in (4, 16, 64, 256):
        shapes = Image.fromarray(rng.normal(0, 60 / side**0.5, (side, side)).astype(np.float32))
        total += np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC))
    grey = Image.fromarray(total.clip(0, 255).astype(np.uint8))
    return Image.merge(
        "RGB", [grey, grey.rotate(180), grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    )


def decoded_whole(file: io.BytesIO) -> np.ndarray:
    return to_array(open_photo(file), PREPROCESS)


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


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((1000, 800), (250, 200)),
        ((401, 601), (201, 301)),  # rounded up
        ((256, 600), (128, 300)),
        ((255, 600), (255, 600)),
        ((160, 2000), (160, 2000)),  # it is the shorter side that counts
        ((2400, 2400), (300, 300)),  # libjpeg goes no further than 1/8
    ],
)
def test_a_large_jpeg_is_decoded_at_reduced_size(
    size: tuple[int, int], decoded: tuple[int, int]
) -> None:
    file = encode(Image.new("RGB", size, "teal"), "JPEG")
    assert open_photo(file, at_least=128).size == decoded
    file.seek(0)
    assert open_photo(file).size == size


def test_load_photo_asks_for_twice_the_side(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spy(image: Image.Image, preprocess: Preprocess) -> object:
        sizes.append(image.size)
        return to_array(image, preprocess)

    monkeypatch.setattr("trainer.preprocess.to_array", spy)
    assert side_to_decode(Preprocess(resize=300)) == 600
    load_photo(encode(scene(2400, 1800), "JPEG"), Preprocess(resize=300))
    assert sizes == [(1200, 900)]


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("RGB", (4000, 3000)),
        ("RGB", (1025, 1537)),
        ("L", (1600, 1200)),
        ("CMYK", (1600, 1200)),
    ],
)
def test_decoding_at_reduced_size_hardly_changes_the_photo(
    mode: str, size: tuple[int, int]
) -> None:
    file = encode(scene(*size).convert(mode), "JPEG", quality=90)
    whole = decoded_whole(file)
    file.seek(0)
    difference = np.abs(load_photo(file, PREPROCESS).astype(int) - whole)
    assert difference.mean() < 1
    assert whole.std() > 10  # there is something to see


def test_a_photo_decoded_at_reduced_size_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    upright = scene(1500, 2000)
    lying = encode(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=90)
    assert open_photo(lying, at_least=512).size == (750, 1000)
    lying.seek(0)
    expected = to_array(upright, PREPROCESS).astype(int)
    assert np.abs(load_photo(lying, PREPROCESS) - expected).mean() < 2


@pytest.mark.parametrize("size", [(1023, 1024), (512, 9000), (320, 240), (1, 1)])
def test_small_photos_are_decoded_as_they_are(size: tuple[int, int]) -> None:
    file = encode(scene(*size), "JPEG")
    whole = decoded_whole(file)
    file.seek(0)
    assert load_photo(file, PREPROCESS).tobytes() == whole.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_other_formats_are_decoded_as_they_are(kind: str) -> None:
    file = encode(scene(1200, 1100), kind)
    whole = decoded_whole(file)
    file.seek(0)
    assert load_photo(file, PREPROCESS).tobytes() == whole.tobytes()


def test_the_limit_of_pixels_is_that_of_the_file() -> None:
    side = int(MAX_PIXELS**0.5) + 8
    bomb = encode(Image.new("L", (side, side)), "JPEG")
    with pytest.raises(PhotoError, match=f"{side}x{side} pixels are more than the limit"):
        open_photo(bomb, at_least=1)


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

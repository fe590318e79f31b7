"""From a photo file to a uint8 array, in one place for every part of Thaw (Pillow + numpy)."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import numpy as np
from numpy.typing import NDArray

# Imported by name: PIL.Image would otherwise load the plugins of all formats, wanted or not.
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin
from PIL.ExifTags import Base

from trainer import intake
from trainer.intake import MAX_PIXELS as MAX_PIXELS
from trainer.intake import PhotoError as PhotoError
from trainer.intake import read_photo
from trainer.schema import Preprocess

Photo = NDArray[np.uint8]

# By their content, whatever a file is called. Pillow knows forty more: most have no photos, some
# are decoded in Python or by another program (EPS), and each is one more decoder to attack.
FORMATS: Final = (
    "JPEG",
    "PNG",
    WebPImagePlugin.WebPImageFile.format,
    "GIF",
    "BMP",
    TiffImagePlugin.TiffImageFile.format,
    "PPM",
)
_KINDS: Final = "JPEG, PNG, WebP, GIF, BMP, TIFF or PPM"
PHOTO_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
)
# In pixels, so that none takes more than a GiB. What is decoded at reduced size takes little, while
# libwebp holds two canvases and two copies of them.
_LARGEST: Final = {"JPEG": MAX_PIXELS, "MPO": MAX_PIXELS, "WEBP": 40_000_000}
_LARGEST_OTHER: Final = 64_000_000
_LONGEST_SIDE: Final = 65_535  # that of GIF and JPEG; each row takes memory of its own
# Of decoders that Pillow has in Python: a second.
_LARGEST_SLOW: Final = 500_000
# How far a photo that was decoded at reduced size is still resized: as in Pillow's Image.thumbnail,
# "very close to fair resampling".
_REDUCING_GAP: Final = 2
_BAND: Final = 4_000_000  # pixels

_RESAMPLING: Final = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# What to do to an image that is stored with this EXIF orientation.
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow has to say is raised, and told by us. Not within `catch_warnings`, which several
# threads must not use at a time.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def is_photo(path: Path) -> bool:
    """Whether the file name has a suffix of a photo format (any case)."""
    return path.suffix.lower() in PHOTO_SUFFIXES


def open_photo(source: Path | IO[bytes], at_least: int | None = None) -> Image.Image:
    """Decode a photo, upright and RGB.

    EXIF orientation is applied, transparency is laid over white, 16-bit greys are scaled to 8 bits,
    and of an animation the first frame is taken. Raises PhotoError with the reason otherwise, also
    where decoding would take too much time or memory.

    Where the caller needs no more than `at_least` pixels of the shorter side, a JPEG that has twice
    as many or more is decoded at 1/2, 1/4 or 1/8 of its size, the smallest that still has them.
    Its sides are then rounded up, so they are at most one pixel too long.
    """
    try:
        image = _opened(source)
        if at_least is not None:
            image.draft(None, (at_least, at_least))  # does nothing unless it is a JPEG
        image.load()
        return upright_rgb(image)
    except PhotoError:
        raise
    except MemoryError:
        raise PhotoError("not enough memory to decode it") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise PhotoError(f"{type(error).__name__}: {error}") from error


def photo_size(source: Path | IO[bytes]) -> tuple[int, int]:
    """Width and height in pixels as they are stored; nothing is decoded. Raises PhotoError."""
    try:
        return _opened(source).size
    except PhotoError:
        raise
    except Exception as error:  # as above
        raise PhotoError(f"{type(error).__name__}: {error}") from error


def _opened(source: Path | IO[bytes]) -> ImageFile.ImageFile:
    """The image, nothing of it decoded. Raises PhotoError, and what Pillow raises."""
    if isinstance(source, Path):
        content = read_photo(source)
    else:
        source.seek(0)
        content = source.read(intake.MAX_BYTES + 1)
    intake.check(content)
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise PhotoError(f"not an image in a format that Thaw reads ({_KINDS})") from None
    _check_size(image, content)
    return image


def _check_size(image: ImageFile.ImageFile, content: bytes) -> None:
    width, height = image.size
    # With four colours libjpeg keeps a third more, and Pillow makes a copy in three.
    four = image.mode == "CMYK"
    largest = _LARGEST_OTHER if four else _LARGEST.get(image.format or "", _LARGEST_OTHER)
    if any(tile.codec_name in Image.DECODERS for tile in image.tile):
        # Decoded in Python, which also takes its time for bytes that make no pixel.
        largest = 0 if len(content) > 4 * _LARGEST_SLOW else _LARGEST_SLOW
    if width * height > largest:
        raise PhotoError(
            f"{width}x{height} pixels are more than the limit of {largest:,} for this kind of "
            f"{image.format}"
        )
    if max(width, height) > _LONGEST_SIDE:
        raise PhotoError(f"{width}x{height} pixels: a side is above the limit of {_LONGEST_SIDE:,}")
    scans = intake.scans(content)
    if width * height * scans > intake.MAX_SCANNED:
        raise PhotoError(f"a JPEG that goes over its {width}x{height} pixels {scans:,} times")


def upright_rgb(image: Image.Image) -> Image.Image:
    """What `open_photo` makes of a decoded image; damaged pixel data raises what Pillow raises."""
    image.load()
    turn = _turn(image)
    rgb = _to_rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
        rgb.info.clear()  # or whoever sees it next would turn it again
    return rgb


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(Base.Orientation, 1))
    except Exception:  # damaged EXIF must not cost the photo
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    # 16-bit greys: Pillow's own conversion clips at 255 instead of scaling.
    whole_numbers = image.mode.startswith("I")
    deep = whole_numbers and any(np.asarray(band).max() > 255 for _, band in _bands(image))
    rgb = Image.new("RGB", image.size)
    for top, band in _bands(image):
        rgb.paste(_flattened(_to_grey(band, deep) if whole_numbers else band), (0, top))
    return rgb


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in pieces from top to bottom, which take little memory in between."""
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _to_grey(image: Image.Image, deep: bool) -> Image.Image:
    values = np.asarray(image)
    return Image.fromarray((values >> 8 if deep else values).clip(0, 255).astype(np.uint8))


def _flattened(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def to_array(image: Image.Image, preprocess: Preprocess) -> Photo:
    """Resize the shorter side, crop the centre.

    `image` is RGB. Returns uint8 [crop, crop, 3]. The same photo gives the same bytes everywhere.
    """
    width, height = image.size
    scale = preprocess.resize / min(width, height)
    size = (
        max(preprocess.resize, round(width * scale)),
        max(preprocess.resize, round(height * scale)),
    )
    left, top = ((side - preprocess.crop) // 2 for side in size)
    # Resizing only the source box of the crop keeps a 1 x 10,000 strip from becoming a huge image.
    box = (
        left * width / size[0],
        top * height / size[1],
        (left + preprocess.crop) * width / size[0],
        (top + preprocess.crop) * height / size[1],
    )
    resampling = _RESAMPLING[preprocess.interpolation]
    resized = image.resize((preprocess.crop, preprocess.crop), resampling, box=box)
    return np.asarray(resized, dtype=np.uint8)


def side_to_decode(preprocess: Preprocess) -> int:
    """The shorter side in pixels that `to_array` should start from: `open_photo`'s `at_least`."""
    return _REDUCING_GAP * preprocess.resize


def load_photo(source: Path | IO[bytes], preprocess: Preprocess) -> Photo:
    """Decode and preprocess one photo: uint8 [crop, crop, 3]. Raises PhotoError."""
    return to_array(open_photo(source, side_to_decode(preprocess)), preprocess)

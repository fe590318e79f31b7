"""From a photo file to a uint8 array, in one place for every part of Thaw (Pillow + numpy)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.schema import Preprocess, ThawError

Photo = NDArray[np.uint8]

PHOTO_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
)
# Above this a decoded photo needs over 300 MB; cameras stay well below it.
MAX_PIXELS: Final = 100_000_000
# How far a photo that was decoded at reduced size is still resized: as in Pillow's Image.thumbnail,
# "very close to fair resampling".
_REDUCING_GAP: Final = 2

_RESAMPLING: Final = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class PhotoError(ThawError):
    """A file that cannot be read as a photo; the message is the reason, without the path."""


def is_photo(path: Path) -> bool:
    """Whether the file name has a suffix of a photo format (any case)."""
    return path.suffix.lower() in PHOTO_SUFFIXES


def open_photo(source: Path | IO[bytes], at_least: int | None = None) -> Image.Image:
    """Decode a photo, upright and RGB.

    EXIF orientation is applied, transparency is laid over white, 16-bit greys are scaled to 8 bits,
    and of an animation the first frame is taken. Raises PhotoError with the reason otherwise.

    Where the caller needs no more than `at_least` pixels of the shorter side, a JPEG that has twice
    as many or more is decoded at 1/2, 1/4 or 1/8 of its size, the smallest that still has them.
    Its sides are then rounded up, so they are at most one pixel too long.
    """
    try:
        with warnings.catch_warnings():
            # We bound the size ourselves; Pillow's other warnings concern damaged metadata only.
            warnings.simplefilter("ignore")
            with Image.open(source) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise PhotoError(
                        f"{width}x{height} pixels are more than the limit of {MAX_PIXELS:,}"
                    )
                if at_least is not None:
                    image.draft(None, (at_least, at_least))  # does nothing unless it is a JPEG
                image.load()
                return upright_rgb(image)
    except PhotoError:
        raise
    except UnidentifiedImageError:
        raise PhotoError("not an image in a format that Pillow reads") from None
    except MemoryError:
        raise PhotoError("not enough memory to decode it") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise PhotoError(f"{type(error).__name__}: {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """What `open_photo` makes of a decoded image; damaged pixel data raises what Pillow raises."""
    return _to_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF must not cost the photo
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit greys: Pillow's own conversion clips at 255 instead of scaling.
        values = np.asarray(image).astype(np.int64)
        if values.max(initial=0) > 255:
            values = values >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
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

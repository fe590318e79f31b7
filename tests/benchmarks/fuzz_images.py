"""Feed damaged photos to the one function that reads photos, for some minutes.

python -m tests.benchmarks.fuzz_images --minutes 10 --seed 1 [--corpus DIR]... [--keep DIR]

Each case is a photo of a format that Thaw reads, or a file of a corpus, with bits flipped, bytes
replaced, a part cut out, doubled or taken from another file, or other sides in its header; the
checksums of a PNG are made right again, or nothing behind them would ever be reached. A case fails
where `load_photo` or `photo_size` raises anything but a PhotoError, takes more than 5 seconds or 1
GiB, or ends the process. Case N of a seed is always the same; --keep writes those that fail to a
folder. The exit status is 1 where any has failed.
"""

from __future__ import annotations

import copy
import io
import random
import re
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from tests.benchmarks.fuzzing import Fuzzer, damaged, fuzz, parser
from trainer.preprocess import PhotoError, load_photo, photo_size
from trainer.schema import Preprocess

_PREPROCESS: Final = Preprocess(resize=72, crop=64)


# --- what is damaged ----------------------------------------------------------------------------


def photos() -> list[bytes]:
    """A photo of every kind, small, so that a change hits its header as often as its pixels."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (37, 53, 3), np.uint8))
    grey, clear = rgb.convert("L"), rgb.convert("RGBA")
    clear.putalpha(grey)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "A camera", 72.0
    frames = {"save_all": True, "append_images": [rgb.rotate(90 * n) for n in (1, 2)]}
    deep = Image.fromarray(rng.integers(0, 65536, (37, 53), np.uint16))
    kinds: list[tuple[Image.Image, str, dict[str, object]]] = [
        (rgb, "JPEG", {"exif": exif, "icc_profile": b"icc" * 99, "comment": b"said"}),
        (rgb, "JPEG", {"progressive": True, "subsampling": 0}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (grey, "JPEG", {"restart_marker_blocks": 1}),
        (rgb, "MPO", frames),
        (rgb, "PNG", {"exif": exif}),
        (clear, "PNG", frames),
        (clear.convert("LA"), "PNG", {}),
        (rgb.quantize(16), "PNG", {"transparency": 3}),
        (deep, "PNG", {}),
        (grey.convert("1"), "PNG", {}),
        (rgb.quantize(64), "GIF", {**frames, "comment": b"said", "transparency": 1}),
        (grey, "GIF", {"interlace": 1}),
        (rgb, "WEBP", {"exif": exif}),
        (clear, "WEBP", {"lossless": True}),
        (clear, "WEBP", frames),
        *((rgb.convert(mode), "BMP", {}) for mode in ("RGB", "P", "L", "1")),
        (clear, "BMP", {}),
        *((rgb, "TIFF", {"compression": how, "exif": exif}) for how in _COMPRESSIONS),
        (rgb.convert("CMYK"), "TIFF", {"compression": "tiff_lzw"}),
        (grey.convert("1"), "TIFF", {"compression": "group4"}),
        (deep, "TIFF", {}),
        (grey.convert("F"), "TIFF", {"compression": "tiff_adobe_deflate"}),
        (rgb, "TIFF", frames),
        (rgb.convert("YCbCr"), "TIFF", {"compression": "jpeg"}),
        *((image, "PPM", {}) for image in (rgb, grey, grey.convert("1"), deep, grey.convert("F"))),
    ]
    made = [_content(*kind) for kind in kinds]
    return [*made, b"P6 9 7 200\n" + bytes(range(189)), _run_length_bmp()]


_COMPRESSIONS: Final = (None, "tiff_lzw", "tiff_deflate", "packbits", "lzma", "zstd")


def _content(image: Image.Image, kind: str, options: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    image, options = copy.deepcopy((image, options))  # saving leaves traces on an image
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _run_length_bmp() -> bytes:
    rows = b"\x05\x01\x00\x03\x01\x02\x03\x00\x00\x00" * 9 + b"\x00\x02\x08\x00\x00\x01"
    head = struct.pack("<IiiHHIIiiII", 40, 8, 10, 1, 8, 1, len(rows), 0, 0, 256, 0)
    start = 14 + len(head) + 1024
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + head + bytes(1024) + rows


def corpus(folders: Sequence[Path]) -> list[bytes]:
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    return [file.read_bytes()[: 1 << 20] for file in files]


# --- the run ------------------------------------------------------------------------------------


def make(rng: random.Random, own: Sequence[bytes], files: Sequence[bytes]) -> bytes:
    """A damaged photo, half of the time one of our own: most of a corpus is of other formats."""
    everything = [*own, *files]
    content = damaged(rng, rng.choice(rng.choice((own, everything))), everything)
    return _mended(content) if content.startswith(b"\x89PNG") and rng.random() < 0.9 else content


def _mended(png: bytes) -> bytes:
    content, place = bytearray(png), 8
    while (end := place + 8 + int.from_bytes(content[place : place + 4])) + 4 <= len(content):
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[place + 4 : end]))
        place = end + 4
    return bytes(content)


def read(content: bytes) -> str:
    """What comes of it: `read`, or the reason why not, without its numbers."""
    try:
        photo_size(io.BytesIO(content))
        photo = load_photo(io.BytesIO(content), _PREPROCESS)
    except PhotoError as error:
        return re.sub(r"\d[\d,]*|b'.*'|\(.*", "N", str(error))[:70]
    assert photo.shape == (_PREPROCESS.crop, _PREPROCESS.crop, 3)
    return "read"


def main() -> int:
    flags = parser(__doc__)
    flags.add_argument("--corpus", type=Path, action="append", default=[], metavar="DIR")
    args = flags.parse_args()
    own, files = photos(), corpus(args.corpus)
    fuzzer = Fuzzer(lambda rng: make(rng, own, files), read)
    return 1 if fuzz(fuzzer, args.seed, args.minutes, args.keep) else 0


if __name__ == "__main__":
    sys.exit(main())

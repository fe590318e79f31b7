"""What is refused of a photo's file before Pillow opens it (standard library only).

A file says in a few bytes how much work it wants done. Pillow bounds the pixels of a photo and
what its compressed texts unpack to, but it reads headers in Python, a byte or an entry at a time,
and libjpeg goes over a photo as often as the file has scans. So these are counted first, and what
no camera and no program writes is refused: minutes of work, or gigabytes, for a file of kilobytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from trainer.cli import inert
from trainer.files import read_bounded
from trainer.schema import ThawError

MAX_BYTES: Final = 200_000_000
# Cameras stay well below it.
MAX_PIXELS: Final = 100_000_000
MAX_SCANNED: Final = 2_000_000_000  # pixels times scans of a JPEG: 2 seconds of a core
# Beyond what cameras and programs write by a factor of ten or more.
_MOST_SEGMENTS: Final = 1_000  # of a JPEG before its first scan
_MOST_EXIF: Final = 4_000_000
_MOST_BLOCKS: Final = 100_000  # chunks of a PNG, blocks of a GIF before its first frame
_MOST_TAGS: Final = 4_096  # of a TIFF
_MOST_STRIPS: Final = 100_000  # values of one tag that are no text
_MOST_JUNK: Final = 65_536  # bytes between the parts of a header
_LONGEST_REASON: Final = 200

# Of JPEG: the marker of a scan, and those that the length of their segment follows.
_SCAN: Final = 0xDA
_WITH_LENGTH: Final = frozenset({*range(0xC0, 0xF0), 0xFE} - {0xC8, *range(0xD0, 0xDA)})
# Of TIFF: where strips and tiles begin, their sides, types that are read as a whole, and the bytes
# of a value of each type.
_OFFSETS: Final = (273, 324)
_TILE_WIDTH: Final = 322
_TILE_LENGTH: Final = 323
_TEXT: Final = (1, 2, 6, 7)
_WIDTHS: Final = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), start=1)) | {
    16: 8,
    17: 8,
    18: 8,
}


class PhotoError(ThawError):
    """A file that cannot be read as a photo; the message is the reason, without the path."""

    def __init__(self, reason: str) -> None:
        # It may quote the file: nothing in it can act on a terminal, or fill the screen.
        super().__init__(inert(reason)[:_LONGEST_REASON])


def read_photo(path: Path) -> bytes:
    """What a photo's file holds. Raises PhotoError with the reason."""
    try:
        return read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise PhotoError(error.strerror or str(error)) from error


def check(content: bytes) -> None:
    """Raise PhotoError for a file whose header is too costly to read. What is merely damaged, or
    no photo at all, passes: Pillow says so."""
    if len(content) > MAX_BYTES:
        raise PhotoError(f"a file of more than {MAX_BYTES // 10**6} MB")
    if content.startswith(b"\xff\xd8\xff"):
        _check_jpeg(content)
    elif content.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(content)
    elif content.startswith(b"GIF8"):
        _check_gif(content)
    elif content[:2] in (b"II", b"MM"):
        _check_tiff(content)
    elif re.match(rb"P[0-9fy]", content):
        _check_ppm(content)


def scans(content: bytes) -> int:
    """How often a JPEG goes over its pixels, thumbnails included; 1 for any other format."""
    if not content.startswith(b"\xff\xd8\xff"):
        return 1
    return max(1, content.count(b"\xff\xda"))  # compressed pixels never hold these two bytes


def _check_jpeg(content: bytes) -> None:
    """Segments as Pillow walks them, up to the first scan."""
    place, segments, junk, exif = 2, 0, 0, 0
    while (start := content.find(b"\xff", place)) >= 0:
        after = start + 1
        while content[after : after + 1] == b"\xff" and after - start <= _MOST_JUNK:
            after += 1
        code = content[after] if after < len(content) else _SCAN
        if code == _SCAN:
            return
        segments += 1
        junk += after - 1 - place
        place = after + 1
        if code in _WITH_LENGTH:
            size = max(2, int.from_bytes(content[place : place + 2]))
            exif += size if content.startswith(b"Exif", place + 2) else 0
            place += size
        if segments > _MOST_SEGMENTS or junk > _MOST_JUNK or exif > _MOST_EXIF:
            raise _too_long(f"{segments:,} parts, {exif:,} bytes of EXIF, {junk:,} of no meaning")


def _check_png(content: bytes) -> None:
    place, chunks = 8, 0
    while place < len(content):
        chunks += 1
        if chunks > _MOST_BLOCKS:
            raise PhotoError(f"it has more than {_MOST_BLOCKS:,} chunks")
        place += 12 + int.from_bytes(content[place : place + 4])


def _check_gif(content: bytes) -> None:
    """Blocks as Pillow walks them, up to the first frame."""
    flags = content[10] if len(content) > 10 else 0
    place, blocks = 13 + (6 << (flags & 7) if flags & 128 else 0), 0
    while place < len(content) and content[place] not in b",;":
        extension = content[place] == ord("!")
        place += 2 if extension else 1
        blocks += 1
        while extension and blocks <= _MOST_BLOCKS and content[place : place + 1] > b"\0":
            place += 1 + content[place]
            blocks += 1
        place += 1 if extension else 0
        if blocks > _MOST_BLOCKS:
            raise _too_long(f"more than {_MOST_BLOCKS:,} blocks")


def _check_tiff(content: bytes) -> None:
    tile = {_TILE_WIDTH: 1, _TILE_LENGTH: 1}
    for tag, kind, count, value in _tags(content):
        there = count * _WIDTHS.get(kind, 0) <= len(content)
        if there and count > _MOST_STRIPS and (kind not in _TEXT or tag in _OFFSETS):
            raise _too_long(f"a tag with {count:,} values")
        if tag in tile:
            tile[tag] = max(tile[tag], value)
    width, height = tile.values()
    if width * height > MAX_PIXELS:
        raise PhotoError(
            f"its tiles of {width:,}x{height:,} pixels are more than the limit of {MAX_PIXELS:,}"
        )


def _tags(content: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Tag, type, number of values, and the value where there is one, of the first page."""
    order: Literal["little", "big"] = "little" if content[:2] == b"II" else "big"
    size, head, entry = (8, 8, 20) if 43 in content[2:4] else (4, 2, 12)

    def number(place: int, length: int) -> int:
        return int.from_bytes(content[place : place + length], order)

    start = number(size, size)
    entries = number(start, head)
    if entries > _MOST_TAGS:
        raise _too_long(f"{entries:,} tags")
    for place in range(start + head, min(start + head + entry * entries, len(content)), entry):
        kind = number(place + 2, 2)
        count = number(place + 4, size)
        yield number(place, 2), kind, count, number(place + 4 + size, _WIDTHS.get(kind, 0))


def _check_ppm(content: bytes) -> None:
    if content[:2] in (b"P1", b"P2", b"P3"):
        raise PhotoError("a PPM image in text; save it as binary (P6)")
    head = re.sub(rb"#[^\r\n]*", b"", content[:_MOST_JUNK])
    if len(content) > _MOST_JUNK and len(head.split(None, 4)) < 4:
        raise _too_long(f"more than {_MOST_JUNK:,} bytes")


def _too_long(what: str) -> PhotoError:
    return PhotoError(f"its header is too long: {what}")

"""Files that ask for minutes or gigabytes, or are no photo: refused with a reason, one by one.

Each is made here; `tests/benchmarks/fuzz_images.py` looks for more.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from explorer.desk import Desk, Ready, Upload
from tests.benchmarks import fuzz_images
from tests.conftest import draw_photo, shared, takes_less
from tests.test_classify import Fixed
from trainer import intake
from trainer.__main__ import main
from trainer.preprocess import PhotoError, load_photo, open_photo, photo_size
from trainer.schema import Preprocess

SMALL = Preprocess(resize=36, crop=32)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(width: int, height: int, before: bytes = b"") -> bytes:
    """RGB; its pixels are there only if it is small."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(bytes(min(10_000, (3 * width + 1) * height)))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg(before: bytes = b"") -> bytes:
    content = encode(Image.new("RGB", (40, 30), "teal"), "JPEG")
    return content[:2] + before + content[2:]


def four_colours(width: int, height: int) -> bytes:
    """A JPEG in CMYK that says to be so large."""
    content = encode(Image.new("CMYK", (40, 30)), "JPEG", progressive=True)
    return content.replace(struct.pack(">HH", 30, 40), struct.pack(">HH", height, width), 1)


def segment(marker: int, content: bytes = b"") -> bytes:
    return struct.pack(">BBH", 255, marker, len(content) + 2) + content


def many_scans() -> bytes:
    content = encode(Image.new("RGB", (1000, 1000), "teal"), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * 2000 + content[-2:]


def gif(width: int = 8, height: int = 8, before: bytes = b"", frames: int = 1) -> bytes:
    image = encode(Image.new("L", (8, 8)), "GIF")
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0)
    return head + before + image[image.index(b",\0\0") : -1] * frames + b";"


def webp(width: int, height: int) -> bytes:
    """Of other sides than its pixels have."""
    content = encode(Image.new("RGB", (8, 8)), "WEBP", lossless=True)
    return content[:21] + struct.pack("<I", width - 1 | (height - 1) << 14) + content[25:]


Tag = tuple[int, int, int, int]  # tag, type, count, value


def tiff(*more: Tag, tail: bytes = b"", width: int = 4, height: int = 4) -> bytes:
    """Grey, uncompressed, one strip, unless a tag says otherwise."""
    start = 2000
    tags = {256: (256, 4, 1, width), 257: (257, 4, 1, height), 258: (258, 3, 1, 8)}
    tags |= {259: (259, 3, 1, 1), 262: (262, 3, 1, 1), 273: (273, 4, 1, start)}
    tags |= {278: (278, 4, 1, height), 279: (279, 4, 1, width * height)}
    tags |= {tag[0]: tag for tag in more}
    entries = b"".join(struct.pack("<HHII", *tags[number]) for number in sorted(tags))
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return (b"II*\0\x08\0\0\0" + directory).ljust(start, b"\0") + bytes(16) + tail


def run_length_bmp(side: int, rows: bytes) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(rows), 0, 0, 256, 0)
    start = 14 + len(head) + 1024
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + head + bytes(1024) + rows


# What it is, with what Pillow alone took for it: seconds, or memory.
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a PNG of 2 GB of pixels": (lambda: png(25_000, 25_000), "DecompressionBombError"),
    "a PNG of 81 megapixels": (lambda: png(9_000, 9_000), "81,000,000|9000x9000 pixels"),
    "a PNG a pixel wide": (lambda: png(1, 60_000_000), "a side is above the limit"),
    "a PNG of 200,000 chunks": (
        lambda: png(8, 8, chunk(b"teSt", b"") * 200_000),
        "more than 100,000 chunks",
    ),
    "a PNG whose profile unpacks to 50 MB": (
        lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000)))),
        "too large",
    ),
    "a JPEG of 2,000 scans": (many_scans, "goes over its 1000x1000 pixels 2,0.. times"),
    "a JPEG of 81 megapixels in four colours": (
        lambda: four_colours(9_000, 9_000),
        "9000x9000 pixels are more than the limit of 64,000,000",
    ),
    "a JPEG that begins with 1 MB of padding": (lambda: jpeg(b"\xff" * 1_000_000), "too long"),
    "a JPEG with 1 MB of junk": (lambda: jpeg(segment(0xFE) + b"a" * 1_000_000), "too long"),
    "a JPEG of 100,000 comments": (lambda: jpeg(segment(0xFE) * 100_000), "too long: 1,001 parts"),
    "a JPEG of 5 MB of EXIF": (
        lambda: jpeg(segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 80),
        "bytes of EXIF",
    ),
    "a GIF of 65,535 x 65,535 pixels": (lambda: gif(65_535, 65_535), "DecompressionBombError"),
    "a GIF of 300,000 comments": (
        lambda: gif(before=b"!\xfe" + b"\x01a" * 300_000 + b"\0"),
        "more than 100,000 blocks",
    ),
    "a TIFF of 300,000 strips": (
        lambda: tiff((273, 4, 300_000, 2000), tail=bytes(1_200_000), height=300_000),
        "a tag with 300,000 values",
    ),
    "a TIFF of 300,000 strips as bytes": (
        lambda: tiff((273, 1, 300_000, 2000), tail=bytes(300_000)),
        "a tag with 300,000 values",
    ),
    "a BigTIFF of 50,000 tags": (
        lambda: b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 50_000) + bytes(1_000_000),
        "too long: 50,000 tags",
    ),
    "a TIFF of 4 x 4 pixels in a tile of 900 million": (
        lambda: tiff((259, 3, 1, 5), (322, 4, 1, 30_000), (323, 4, 1, 30_000), (324, 4, 1, 2000)),
        "its tiles of 30,000x30,000",
    ),
    "a TIFF of 81 megapixels": (lambda: tiff(width=9_000, height=9_000), "9000x9000 pixels"),
    "a WebP of 54 megapixels": (lambda: webp(16_000, 3_400), "40,000,000 for this kind of WEBP"),
    "a PPM in text": (lambda: b"P3\n9 9\n255\n" + b"#\n" * 500_000, "in text"),
    "a PPM with a comment of 1 MB": (
        lambda: b"P6\n#" + b"a" * 1_000_000 + b"\n1 1\n255\nabc",
        "its header is too long",
    ),
    "a PPM decoded in Python": (
        lambda: b"P6\n1000 1000\n254\n" + bytes(3_000_000),
        "1000x1000 pixels are more than the limit of (0|500,000)",
    ),
    "a BMP decoded in Python": (
        lambda: run_length_bmp(9_000, b"\x01\0\0\0" * 9_000),
        "9000x9000 pixels are more than the limit of 500,000",
    ),
    "a small BMP with 3 MB that say nothing": (
        lambda: run_length_bmp(100, b"\xff\0" * 1_500_000),
        "more than the limit of 0",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_asks_for_too_much_is_refused_before_it_is_decoded(name: str) -> None:
    make, reason = BOMBS[name]
    content = make()

    def is_refused() -> None:
        for ask in (open_photo, photo_size):
            with pytest.raises(PhotoError, match=reason):
                ask(io.BytesIO(content))

    assert takes_less(1, is_refused)


FRAMES = [Image.new("RGB", (9, 9), (n, n, n)) for n in range(0, 250, 5)]
HARMLESS: dict[str, Callable[[], bytes]] = {
    "a GIF of 20,000 frames": lambda: gif(frames=20_000),
    "an APNG": lambda: encode(FRAMES[0], "PNG", save_all=True, append_images=FRAMES),
    "an animated WebP": lambda: encode(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES),
    "a TIFF of 50 pages": lambda: encode(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES),
    "a PNG with 5 MB of text": lambda: png(8, 8, chunk(b"tEXt", b"a\0" + b"b" * 5_000_000)),
    "a PNG with texts that unpack to 30 MB": lambda: png(
        8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 30
    ),
    "a JPEG with a profile of 2 MB": lambda: encode(FRAMES[0], "JPEG", icc_profile=bytes(2 << 20)),
    "a JPEG whose EXIF names more than it holds": lambda: jpeg(
        segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 5000) + bytes(60_000))
    ),
    "a TIFF with a tag of 4 billion values that are not there": lambda: tiff(
        (50_000, 4, 2**32 - 1, 100)
    ),
    "a small PPM decoded in Python": lambda: b"P6\n9 7\n200\n" + bytes(189),
    "a small run-length BMP": lambda: run_length_bmp(8, b"\x08\x01\0\0" * 8 + b"\0\x01"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_looks_dangerous_is_read(name: str) -> None:
    content = HARMLESS[name]()
    assert load_photo(io.BytesIO(content), SMALL).shape == (32, 32, 3)
    assert takes_less(2, lambda: load_photo(io.BytesIO(content), SMALL))


@pytest.mark.parametrize(
    "kind", ["AVIF", "BLP", "DDS", "EPS", "ICNS", "ICO", "IM", "JPEG2000", "PCX", "QOI", "SGI"]
)
def test_other_formats_are_not_opened_whatever_the_file_is_called(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EPS would be handed to Ghostscript."""

    def refuse(*_: object) -> None:
        raise AssertionError("another program was asked")

    monkeypatch.setattr("subprocess.check_call", refuse)
    image = Image.new("P" if kind == "BLP" else "RGB", (16, 16))
    (tmp_path / "photo.jpg").write_bytes(encode(image, kind))
    with pytest.raises(PhotoError, match="not an image in a format that Thaw reads"):
        open_photo(tmp_path / "photo.jpg")


def test_no_photo_takes_more_than_a_gib() -> None:
    """Transparency, 16 bits and EXIF each used to cost a further copy or two: 24 bytes a pixel."""
    peak = Path("/proc/self/clear_refs")
    if not os.access(peak, os.W_OK):
        pytest.skip("needs Linux to measure memory")
    exif = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 3, 1, 6) + bytes(4)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4000, 3000, 8, 6, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(3000 * 16_001), 1))
    content = b"\x89PNG\r\n\x1a\n" + head + chunk(b"eXIf", exif) + rows + chunk(b"IEND", b"")
    peak.write_text("5")
    before = _memory("VmRSS")
    assert open_photo(io.BytesIO(content)).size == (3000, 4000)
    # 64 megapixels may take what is left for them, bands of 4 megapixels included.
    assert _memory("VmHWM") - before < 12_000_000 * 12 + 4_000_000 * 24


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "side"), [("RGB", 9_999), ("CMYK", 8_000)])
def test_the_largest_jpegs_take_less_than_a_gib(mode: str, side: int) -> None:
    """Progressive ones, of which libjpeg keeps all coefficients, decoded whole and turned."""
    peak = Path("/proc/self/clear_refs")
    if not os.access(peak, os.W_OK):
        pytest.skip("needs Linux to measure memory")
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new(mode, (side, side))
    content = encode(image, "JPEG", progressive=True, subsampling=0, quality=90, exif=exif)
    del image
    peak.write_text("5")
    before = _memory("VmRSS")
    assert open_photo(io.BytesIO(content)).size == (side, side)
    more = _memory("VmHWM") - before
    print(f"{mode}, {side}x{side}: {more / 2**20:,.0f} MiB more")
    assert more < 1 << 30


def _memory(name: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])


def test_reasons_cannot_act_and_are_short() -> None:
    error = PhotoError("\x1b[2J\u202e" + "x" * 10_000)
    assert str(error).isprintable()
    assert len(str(error)) <= 200


def test_several_threads_leave_the_warnings_as_they_were() -> None:
    """`catch_warnings` in threads that overlap silences the whole process for good."""
    before = list(warnings.filters)
    content = encode(Image.new("RGB", (300, 300)), "JPEG")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: load_photo(io.BytesIO(content), SMALL), range(200)))
    assert warnings.filters == before


def test_a_photo_is_turned_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(Image.new("RGB", (30, 20)), "PNG", exif=exif)
    turned = open_photo(io.BytesIO(content))
    assert turned.size == (20, 30)
    assert turned.getexif().get(0x0112, 1) == 1


# --- a batch of them ----------------------------------------------------------------------------


def test_the_fuzzer_finds_nothing_in_a_second() -> None:
    own = fuzz_images.photos()
    assert [fuzz_images.read(photo) for photo in own] == ["read"] * len(own)
    for number in range(100):
        fuzz_images.read(fuzz_images.make(random.Random(number), own, []))


@pytest.fixture
def bad(tmp_path: Path) -> tuple[Path, int]:
    """A data folder of two classes with 6 photos, and files that are none in both."""
    count = 0
    for label in ("one", "two"):
        for number in range(3):
            draw_photo(tmp_path / "data" / label / f"{number}.jpg", (200, 9, 9), number)
    bad = tmp_path / "data" / "one"
    for name in ("a PNG of 81 megapixels", "a JPEG of 2,000 scans", "a PPM in text"):
        (bad / f"{name}.png").write_bytes(BOMBS[name][0]())
        count += 1
    for name, content in {"empty": b"", "text": b"<svg/>", "half": jpeg()[:300]}.items():
        (bad / f"{name}.jpg").write_bytes(content)
        count += 1
    os.mkfifo(bad / "pipe.jpg")
    (bad / "endless.jpg").symlink_to("/dev/zero")
    with (bad / "huge.jpg").open("wb") as file:
        file.truncate(intake.MAX_BYTES + 1)
    return tmp_path / "data", count + 3


def test_the_trainers_scan_names_each(
    bad: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    data, count = bad
    assert main(["data", str(data), "--json"]) == 0
    broken = json.loads(capsys.readouterr().out)["broken"]
    assert len(broken) == count
    assert all(one["reason"] and "\n" not in one["reason"] for one in broken)
    reasons = {Path(one["file"]).name: one["reason"] for one in broken}
    assert reasons["pipe.jpg"] == reasons["endless.jpg"] == "not a file, but a pipe or a device"
    assert reasons["huge.jpg"] == "a file of more than 200 MB"


def test_the_app_names_each() -> None:
    made = {name: make() for name, (make, _) in list(BOMBS.items())[:4]}
    uploads = [Upload(name, f"{name}.jpg", content) for name, content in made.items()]
    good = Upload("good", "good.jpg", jpeg())
    desk, ready = Desk(), [Ready("before", "Before", Fixed(1, 0, 0), "stamp")]
    list(desk.work([*uploads, good], ready))
    assert all(desk.row(upload, ready).error for upload in uploads)
    assert desk.row(good, ready).predictions["before"].label


@pytest.mark.slow
def test_the_whole_corpus_of_malformed_files() -> None:
    """At most 5 s and 1 GiB a file, and nothing but photos and reasons; `-s` shows the most."""
    taken: list[tuple[bool, float, int]] = []
    for path in sorted(shared("malformed").rglob("*")):
        if path.is_file():
            Path("/proc/self/clear_refs").write_text("5")
            before, started = _memory("VmRSS"), time.perf_counter()
            try:
                assert load_photo(path, SMALL).shape == (32, 32, 3)
                is_read = True
            except PhotoError as error:
                assert str(error)
                is_read = False
            seconds, memory = time.perf_counter() - started, _memory("VmHWM") - before
            assert seconds < 5
            assert memory < 1 << 30
            taken.append((is_read, seconds, memory))
    are_read, seconds, memories = zip(*taken, strict=True)
    print(f"\n{sum(are_read)} of {len(taken)} read, slowest {max(seconds):.2f} s", end=", ")
    print(f"at most {max(memories) / 2**20:.0f} MiB more")


def test_a_photo_of_16_bits_is_scaled_in_every_band() -> None:
    """Dark at the top, so that the first band alone would pass for 8 bits."""
    values = np.zeros((3000, 3000), np.uint16)
    values[-1] = 0xFFFF
    grey = open_photo(io.BytesIO(encode(Image.fromarray(values), "TIFF")))
    assert grey.getpixel((0, 0)) == (0, 0, 0)
    assert grey.getpixel((0, 2999)) == (255, 255, 255)


def test_text_of_a_png_may_not_grow_without_end() -> None:
    """Pillow's own limit, which Thaw relies on."""
    assert PngImagePlugin.MAX_TEXT_CHUNK <= 1 << 20
    assert PngImagePlugin.MAX_TEXT_MEMORY <= 64 << 20

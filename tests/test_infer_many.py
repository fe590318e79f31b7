"""Thousands of photos, a tenth of them bad: every one of them is in the output, once."""

from __future__ import annotations

import csv
import io
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.to_onnx import export_run
from tests.tiny_run import CLASSES, make_run

ROOT = Path(__file__).resolve().parents[1]
MOST = 1024  # MB that the process may use
# The command line, and then what it used at most; getrusage would count what its parent used too.
WATCHED = """
import sys
from pathlib import Path
from export.infer import main
status = main(sys.argv[1:])
used = Path("/proc/self/status").read_text().split("VmHWM:")[1].split("\\n")[0]
print(used, file=sys.stderr)
sys.exit(status)
"""


def bad(content: bytes, kind: int, rng: random.Random) -> bytes:
    """A photo spoiled in one of the ways in which downloads are."""
    place = rng.randrange(2, len(content) - 2)
    huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\2\0\0\0"
    ways = (
        b"",
        content[: len(content) // 3],
        b"<html>404 Not Found</html>",
        bytes(len(content)),
        content[:2] + bytes(rng.randrange(256) for _ in content[2:]),
        b"GIF89a" + content[6:],
        huge + content,
        content[: min(place, 20)],
    )
    return ways[kind % len(ways)]


def write_photos(root: Path, count: int) -> set[Path]:
    """`count` small photos in 50 folders, every tenth of them bad; returns these."""
    rng = random.Random(0)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 6, 6, 3), np.uint8)
    spoiled = set()
    for number in range(count):
        path = root / f"{number % 50:02}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(pixels[number]).resize((48, 40)).save(buffer, "JPEG")
        content = buffer.getvalue()
        if number % 10 == 0:
            content = bad(content, number // 10, rng)
            spoiled.add(path)
        path.write_bytes(content)
    return spoiled


@pytest.mark.slow
def test_none_of_5000_photos_is_missing(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    export_run(make_run(tmp_path), output=model)
    photos = tmp_path / "photos"
    spoiled = write_photos(photos, 5000)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(model), str(photos), "--csv", "--top", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - started
    most = int(done.stderr.split()[-2]) / 1024
    print(f"5000 photos, {len(spoiled)} bad: {seconds:.1f} s, at most {most:.0f} MB")
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    names = Counter(row["file"] for row in rows)
    assert set(names.values()) == {1}
    everywhere = {str(path) for path in photos.rglob("*.jpg")}
    assert set(names) == everywhere
    assert len(everywhere) == 5000
    failed = {row["file"] for row in rows if row["error"]}
    assert failed == {str(path) for path in spoiled}
    assert {row["label"] for row in rows if not row["error"]} <= set(CLASSES)
    assert most < MOST

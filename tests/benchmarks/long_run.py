"""Whether a run of thousands of epochs stays level: time, memory, files, and the app.

    python -m tests.benchmarks.long_run [--epochs 2000] [--every 100] [--augment] [--keep DIR]

Trains the small CNN on photos that it draws itself, in a process of its own, with an empty cache,
and looks at it after every so many epochs: seconds an epoch, resident memory, threads, open files,
and the bytes of log, TensorBoard events and cache. Then a process like the app reads the run when
it had so many epochs: whole, again, and after one epoch more, and draws the chart of Compare.
`--augment` gives every epoch a view of its own, so that the cache has a file for each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from explorer.charts import overlay
from explorer.data import Library, epochs_frame, lineage
from explorer.overview import Overview
from trainer.schema import METRICS_JSONL, RUN_JSON

ROOT: Final = Path(__file__).resolve().parents[2]
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def draw_photos(root: Path, photos: int = 12) -> Path:
    """Two classes that are hard to tell apart, so that the best epoch comes late."""
    rng = np.random.default_rng(0)
    for label in range(2):
        for number in range(photos):
            pixels = rng.normal(120 + 8 * label, 60, (40, 40, 3)).clip(0, 255).astype(np.uint8)
            path = root / "ab"[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


def start(work: Path, epochs: int, augment: bool) -> subprocess.Popen[bytes]:
    flags = ["--phase", "transfer", "--arch", "cnn10", "--weights", "none", "--size", "32"]
    flags += ["--data", str(draw_photos(work / "data")), "--runs-dir", str(work / "runs")]
    flags += ["--epochs", str(epochs), "--cache-dir", str(work / "cache"), "--device", "cpu"]
    flags += ["--brightness", "0.1"] if augment else []
    command = [sys.executable, "-m", "trainer", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def watch(process: subprocess.Popen[bytes], work: Path, every: int) -> Iterator[dict[str, Any]]:
    """What there is to see of the process after every so many epochs, until it ends."""
    wanted, began = 0, time.monotonic()
    while process.poll() is None:
        time.sleep(0.02)
        lines = [line for line in _log(work).splitlines() if b'"event": "epoch"' in line]
        if len(lines) <= wanted:
            continue
        seconds = [json.loads(line)["seconds"] for line in lines[-every:]]
        yield {
            "epoch": len(lines) - 1,
            "ms": 1000 * statistics.median(seconds),
            "wall": time.monotonic() - began,
            **_process(process.pid),
            **_files(work),
        }
        wanted += every


def _log(work: Path) -> bytes:
    logs = list((work / "runs").glob(f"*/{METRICS_JSONL}"))
    return logs[0].read_bytes() if logs else b""


def _process(pid: int) -> dict[str, float]:
    try:
        proc = Path(f"/proc/{pid}")
        resident = int((proc / "statm").read_text().split()[1]) * _PAGE / 1e6
        threads = len(list((proc / "task").iterdir()))
        return {"memory": resident, "threads": threads, "open": len(list((proc / "fd").iterdir()))}
    except OSError:  # it has just ended
        return {"memory": 0, "threads": 0, "open": 0}


def _files(work: Path) -> dict[str, float]:
    def total(*patterns: str) -> float:
        return sum(path.stat().st_size for p in patterns for path in work.glob(p)) / 1e3

    return {
        "log": total(f"runs/*/{METRICS_JSONL}"),
        "events": total("runs/*/events.*"),
        "cache": total("cache/rows/*.rows"),
        "cached": len(list(work.glob("cache/rows/*.rows"))),
    }


# --- the app ------------------------------------------------------------------------------------


def read_as_app(run: Path, work: Path, epochs: int) -> dict[str, float]:
    """Milliseconds, and kilobytes of the chart, of a run that has so many epochs."""
    lines = (run / METRICS_JSONL).read_bytes().splitlines(keepends=True)
    shown = work / f"shown-{epochs}" / run.name
    shown.mkdir(parents=True)
    (shown / RUN_JSON).write_bytes((run / RUN_JSON).read_bytes())
    log, kept = shown / METRICS_JSONL, lines[: epochs + 2]  # "phase" and epoch 0 come first
    log.write_bytes(b"".join(kept))
    library, overview = Library(shown.parent), Overview()
    figures = {"first": _ms(library.snapshot), "again": _ms(library.snapshot)}
    with log.open("ab") as file:
        file.write(lines[epochs + 2])
    figures["one more"] = _ms(library.snapshot)
    snapshot = library.snapshot()
    assert len(snapshot.runs[run.name].epochs) == epochs + 2
    frame = epochs_frame(snapshot, lineage(snapshot, [run.name])[0])
    figures["overview"] = _ms(lambda: overview.frame(snapshot))
    figures["chart"] = _ms(lambda: overlay(frame, "accuracy", "total").to_json())
    figures["chart KB"] = len(overlay(frame, "accuracy", "total").to_json()) / 1e3
    return figures


def _ms(do: Any) -> float:
    started = time.perf_counter()
    do()
    return 1000 * (time.perf_counter() - started)


# --- tables -------------------------------------------------------------------------------------


def show(rows: list[dict[str, Any]]) -> None:
    print(f"| {' | '.join(rows[0])} |")
    print("|" + " ---: |" * len(rows[0]))
    for row in rows:
        cells = [
            f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--augment", action="store_true")
    parser.add_argument("--keep", type=Path, help="an empty folder to work in, kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="thaw-") as name:
        work = arguments.keep or Path(name)
        process = start(work, arguments.epochs, arguments.augment)
        try:
            seen = list(watch(process, work, arguments.every))
        finally:
            process.kill()
        if process.wait() != 0:
            raise SystemExit("The training failed.")
        print("ms of an epoch (median), wall in s, memory in MB, log, events and cache in KB")
        show(seen)
        (run,) = (work / "runs").iterdir()
        tenths = [arguments.epochs * part // 10 for part in (1, 2, 5)] + [arguments.epochs - 1]
        read_as_app(run, work, 1)  # imports and the first chart cost once
        print("\nthe app: ms, and KB of one chart")
        show([{"epochs": epochs, **read_as_app(run, work, epochs)} for epochs in tenths])


if __name__ == "__main__":
    main()

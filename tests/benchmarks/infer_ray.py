"""Classifying a folder: the default engine against Ray with 1 and 2 workers.

    python -m tests.benchmarks.infer_ray MODEL PHOTOS [--rounds 3] [--workers 1,2]

MODEL is a model.onnx and PHOTOS a folder, of some thousand photos or what is measured is mostly how
Ray starts. All in turn, A B C A B C, each in fresh processes; medians. Two rates: over the whole
command, its start included, and while photos are classified (of Ray: from the first part that is
written to the last). A worker has one core, the default engine has all.

Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from export.infer import find_photos
from tests.browser.conftest import ROOT

Rates = tuple[float, float]  # over the whole command, while photos are classified


def main() -> int:
    parser = argparse.ArgumentParser(description="The default engine against Ray.")
    parser.add_argument("model", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", default="1,2")
    args = parser.parse_args()
    photos = len(find_photos([args.photos]))
    command = [sys.executable, "-m", "export.infer", str(args.model), str(args.photos)]
    contestants: dict[str, Callable[[], Rates]] = {"local": partial(_local, command, photos)}
    for workers in map(int, args.workers.split(",")):
        name = f"ray, {workers} worker{'s' * (workers > 1)}"
        contestants[name] = partial(_on_ray, command, photos, workers)
    found: dict[str, list[Rates]] = {name: [] for name in contestants}
    for _ in range(args.rounds):
        for name, work in contestants.items():
            found[name].append(work())
    print(f"{photos} photos, {args.rounds} rounds\n")
    print("| engine | photos/s, with its start | photos/s | against local |")
    print("|---|---:|---:|---:|")
    base = statistics.median(rate for _, rate in found["local"])
    for name, rates in found.items():
        whole, alone = (statistics.median(some) for some in zip(*rates, strict=True))
        print(f"| {name} | {whole:.1f} | {alone:.1f} | {alone / base:.2f} |")
    return 0


def _local(command: list[str], photos: int) -> Rates:
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--device", "cpu", "--csv"], cwd=ROOT, capture_output=True, text=True
    )
    whole = time.perf_counter() - started
    found = re.search(r"([\d.]+) images/s", done.stderr)
    if found is None:
        raise SystemExit(done.stderr)
    return photos / whole, float(found[1])


def _on_ray(command: list[str], photos: int, workers: int) -> Rates:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        flags = ["--device", "cpu", "--engine", "ray", "--workers", str(workers), "--out", str(out)]
        started = time.perf_counter()
        done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
        whole = time.perf_counter() - started
        if done.returncode == 2:
            raise SystemExit(done.stderr)
        parts = sorted(out.glob("part-*"), key=lambda part: part.stat().st_mtime_ns)
        if len(parts) <= workers:
            raise SystemExit("too few photos: every worker needs some parts")
        # The first part of each worker is not counted: it came after the start.
        rows = sum(pq.read_metadata(part).num_rows for part in parts[workers:])
        times = [part.stat().st_mtime_ns / 1e9 for part in (parts[workers - 1], parts[-1])]
    return photos / whole, rows / (times[1] - times[0])


if __name__ == "__main__":
    sys.exit(main())

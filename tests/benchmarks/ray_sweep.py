"""A sweep on Ray, two tasks of one core each, against the same sweep in one process on both cores.

    python -m tests.benchmarks.ray_sweep --data DIR --weights FILE [--limit 60] [--epochs 5]
        [--rounds 3]

Two seeds of three learning rates and the controls, EfficientNet-B0, top 20 layers, all photos
decoded and every frozen activation computed anew in each run; the parent is trained once before.
The two take turns. Prints a Markdown table: medians of the seconds that the command took, Ray's own
start and end included.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from trainer.runlog import list_runs

_ENGINES: Final[Mapping[str, Sequence[str]]] = {
    "local, one process": (),
    "Ray, two tasks of one core": ("--engine", "ray", "--worker-cpus", "1"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--limit", default="60")
    parser.add_argument("--epochs", default="5")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    common = ["--data", given.data, "--limit", given.limit, "--epochs", given.epochs]
    seconds: dict[str, list[float]] = {name: [] for name in _ENGINES}
    with tempfile.TemporaryDirectory() as scratch:
        parent = _parent(Path(scratch) / "parent", [*common, "--weights", given.weights])
        for _ in range(given.rounds):
            for name, flags in _ENGINES.items():
                seconds[name].append(_sweep(parent, [*common, *flags]))
                print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr)
    print(_table(seconds))


def _parent(folder: Path, flags: Sequence[str]) -> Path:
    places = ["--runs-dir", str(folder), "--cache-dir", str(folder / "cache")]
    _run(["--phase", "transfer", *flags, *places])
    (run,) = list_runs(folder)
    return run.path


def _sweep(parent: Path, flags: Sequence[str]) -> float:
    """In a runs folder and with a cache of its own; the cache must not know the photos."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = Path(scratch) / "runs"
        shutil.copytree(parent, runs / parent.name)
        places = ["--runs-dir", str(runs), "--cache-dir", str(runs / "cache")]
        grid = ["--lr", "1e-5", "1e-4", "3e-4", "--unfreeze", "20", "--seed", "0", "1"]
        started = time.perf_counter()
        _run(["sweep", "--from", parent.name, *flags, *places, *grid])
        return time.perf_counter() - started


def _run(words: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "trainer", *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def _table(seconds: Mapping[str, Sequence[float]]) -> str:
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    first = next(iter(medians.values()))
    lines = ["| engine | s (median) | least, most | ratio |", "| --- | --- | --- | --- |"]
    for name, found in seconds.items():
        spread = f"{min(found):.1f}, {max(found):.1f}"
        lines.append(f"| {name} | {medians[name]:.1f} | {spread} | {medians[name] / first:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

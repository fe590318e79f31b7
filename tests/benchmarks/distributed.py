"""One training by several processes with a thread each, against one process with as many threads.

    python -m tests.benchmarks.distributed --data DIR --weights FILE
        [--arch NAME] [--processes 2] [--limit 60] [--epochs 4] [--batch-size 32] [--rounds 3]

The same cores, the same batches and views, from one trunk that is trained before the clock starts,
each run with an empty cache of its own; in turn, A B A B. Seconds of an epoch are those in the log,
without the first, in which ranks meet and buffers are made; validation is in them, start-up is not:
that is in the wall seconds of the whole command. Efficiency is the one process's time over the
other's: 1 would be nothing lost. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trainer.runlog import Run, list_runs

_VIEWS: Final = ("--rotation", "0.05", "--brightness", "0.1", "--noise", "2")
_CASES: Final = {
    "transfer, exact views": ("--phase", "transfer", *_VIEWS),
    "finetune top 20, exact views": ("--phase", "finetune", "--unfreeze", "20", *_VIEWS),
    "finetune top 20, no augmentation": ("--phase", "finetune", "--unfreeze", "20"),
    "finetune all, exact views": ("--phase", "finetune", "--unfreeze", "all", *_VIEWS),
}


@dataclass(frozen=True)
class Taken:
    """Seconds of an epoch, of the whole command, and the last epoch's validation loss."""

    epoch: float
    wall: float
    loss: float


def train(flags: list[str], processes: int, threads: int, folder: Path) -> tuple[Run, float]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "trainer", *flags]
    given = {"OMP_NUM_THREADS": str(threads), "THAW_CACHE": str(folder / "cache")}
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--runs-dir", str(folder / "runs")],
        env=os.environ | given,
        capture_output=True,
        text=True,
    )
    wall = time.perf_counter() - started
    if done.returncode != 0:
        sys.exit(done.stderr)
    return list_runs(folder / "runs")[-1], wall


def taken(flags: list[str], processes: int, threads: int) -> Taken:
    with tempfile.TemporaryDirectory(prefix="thaw-") as folder:
        run, wall = train(flags, processes, threads, Path(folder))
    later = [record.seconds for record in run.epochs if record.phase_epoch > 1]
    return Taken(statistics.median(later), wall, run.epochs[-1].val_loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--arch", default="efficientnet_b0")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", default="60", help="photos of each class")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", default="32")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    if asked.epochs < 2:
        parser.error("--epochs: 2 or more, since the first is not counted")
    data = ["--data", asked.data, "--limit", asked.limit, "--device", "cpu"]
    load = os.getloadavg()[0]
    many = asked.processes
    print(
        f"{asked.arch}, batches of {asked.batch_size} in all, {asked.limit} photos a class, medians"
        f" of {asked.rounds} rounds, load average {load:.1f} before.\n\n"
        f"| | 1 process, {many} threads: s an epoch (wall) | {many} processes, 1 thread each | "
        "efficiency | range over rounds | val loss |\n| --- | --- | --- | --- | --- | --- |"
    )
    with tempfile.TemporaryDirectory(prefix="thaw-trunk-") as folder:
        start = [*data, "--arch", asked.arch, "--weights", asked.weights]
        trunk, _ = train(["--phase", "transfer", "--epochs", "1", *start], 1, many, Path(folder))
        for name, flags in _CASES.items():
            origin = ["--from", str(trunk.path)] if "finetune" in flags else start[-4:]
            command = [*flags, *data, *origin, "--epochs", str(asked.epochs)]
            command += ["--batch-size", asked.batch_size]
            pairs = [
                (taken(command, 1, many), taken(command, many, 1)) for _ in range(asked.rounds)
            ]
            print(_row(name, pairs), flush=True)


def _row(name: str, pairs: list[tuple[Taken, Taken]]) -> str:
    ratios = [one.epoch / several.epoch for one, several in pairs]
    cells = [
        f"{statistics.median(each.epoch for each in side):.2f} "
        f"({statistics.median(each.wall for each in side):.0f})"
        for side in zip(*pairs, strict=True)
    ]
    losses = " / ".join(f"{side.loss:.4f}" for side in pairs[-1])
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"| {' | '.join([name, *cells, f'{statistics.median(ratios):.2f}', spread, losses])} |"


if __name__ == "__main__":
    main()

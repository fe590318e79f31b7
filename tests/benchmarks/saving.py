"""What it costs to keep a run from being lost: checkpoint and journal, beside an epoch of training.

    python -m tests.benchmarks.saving [--data DIR] [--arch efficientnet_b0] [--limit 8] [--epochs 6]

Trains the head, the top 20 layers and everything (random weights, the embedded sample unless there
is `--data`) with the trainer's own loop, and times each file that it writes. The journal is written
after every epoch, a checkpoint every 30 seconds and at the end: the share of an epoch depends on
how many photos it has, the milliseconds do not. Prints a Markdown table of medians.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from trainer import phase
from trainer.__main__ import main as train
from trainer.cache import format_size
from trainer.journal import Journal
from trainer.process import prepare_process
from trainer.runlog import list_runs

_CASES: Final = {
    "head": ("--phase", "transfer"),
    "top 20 layers": ("--phase", "finetune", "--unfreeze", "20"),
    "all": ("--phase", "finetune", "--unfreeze", "all"),
}


@contextlib.contextmanager
def timed() -> Iterator[dict[str, list[tuple[float, int]]]]:
    """Seconds and bytes of each checkpoint and journal that is written meanwhile."""
    found: dict[str, list[tuple[float, int]]] = {"checkpoint": [], "journal": []}

    def noting(
        kind: str, write: Callable[..., Any], written: Callable[..., Path]
    ) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            began = time.perf_counter()
            result = write(*given)
            taken = time.perf_counter() - began
            found[kind].append((taken, written(*given).stat().st_size))
            return result

        return call

    def journal_file(journal: Journal, entry: Any) -> Path:
        return journal._paths[entry.last.epoch % 2]

    checkpoint = noting("checkpoint", phase.save_checkpoint, lambda path, _: Path(path))
    with (
        patch.object(phase, "save_checkpoint", checkpoint),
        patch.object(Journal, "write", noting("journal", Journal.write, journal_file)),
    ):
        yield found


def measured(name: str, flags: list[str], runs: Path) -> str:
    with timed() as found, contextlib.redirect_stdout(io.StringIO()):
        if train([*flags, "--runs-dir", str(runs)]) != 0:
            sys.exit("The training failed: see above.")
    epochs = [epoch.seconds for epoch in list_runs(runs)[-1].epochs if epoch.phase_epoch > 0]
    cells = [name, f"{statistics.median(epochs):.2f}"]
    for writes in found.values():
        seconds, size = (statistics.median(values) for values in zip(*writes, strict=True))
        cells.append(f"{seconds * 1000:.1f} ms, {format_size(size)} ({len(writes)})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data")
    parser.add_argument("--arch", default="efficientnet_b0")
    parser.add_argument("--limit", default="8", help="photos of each class")
    parser.add_argument("--epochs", default="6")
    asked = parser.parse_args()
    prepare_process()
    load = os.getloadavg()[0]
    print(f"{asked.arch}, medians (of how many), load average {load:.1f} before.\n")
    print("| trained | s an epoch | checkpoint | journal |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="thaw-") as folder:
        runs = Path(folder, "runs")
        flags = ["--limit", asked.limit, "--cache-dir", str(Path(folder, "cache"))]
        flags += ["--epochs", asked.epochs, "--device", "cpu"]
        flags += ["--data", asked.data] if asked.data else []
        for name, (phase_flag, chosen, *rest) in _CASES.items():
            arch = ["--arch", asked.arch, "--weights", "none"] if chosen == "transfer" else []
            print(measured(name, [phase_flag, chosen, *rest, *flags, *arch], runs), flush=True)


if __name__ == "__main__":
    main()

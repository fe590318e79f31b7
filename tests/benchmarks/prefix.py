"""What computing the frozen part once saves: default against `--no-cache`.

    python -m tests.benchmarks.prefix [--pairs 2] [--limit 20] [--epochs 10]

Alternates fresh processes A B A B. Each trains EfficientNet-B0 (random weights: the work is the
same) on a part of the embedded sample, both phases, and reports the seconds from the first
evaluation's start to the last checkpoint, the frozen part included. Prints medians, the ratio and
the largest difference of any logged loss.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from trainer.runlog import Run, list_runs


def train(runs_dir: Path, flags: list[str]) -> list[Run]:
    """Transfer and finetune in one command; returns both runs."""
    command = [sys.executable, "-m", "trainer", "--phase", "finetune", "--weights", "none"]
    command += ["--lr", "1e-4", "--runs-dir", str(runs_dir), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return list_runs(runs_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    common = ["--limit", str(arguments.limit), "--epochs", str(arguments.epochs)]
    seconds: dict[str, list[tuple[float, ...]]] = {"once": [], "anew": []}
    losses: dict[str, list[float]] = {}
    for _ in range(arguments.pairs):
        for name, extra in (("once", []), ("anew", ["--no-cache"])):
            with tempfile.TemporaryDirectory() as folder:
                runs = train(Path(folder), [*common, *extra])
            seconds[name].append(tuple(sum(e.seconds for e in run.epochs) for run in runs))
            losses[name] = [e.val_loss for run in runs for e in run.epochs]
    medians = {
        name: [statistics.median(values) for values in zip(*pairs, strict=True)]
        for name, pairs in seconds.items()
    }
    difference = max(abs(a - b) for a, b in zip(losses["once"], losses["anew"], strict=True))
    result = {
        "seconds (transfer, finetune)": medians,
        "ratio": [b / a for a, b in zip(medians["once"], medians["anew"], strict=True)],
        "largest difference of a validation loss": difference,
        "all": seconds,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

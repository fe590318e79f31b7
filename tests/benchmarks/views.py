"""What fewer views cost: validation accuracy and time for V = 1, 2, 5, 10 and exact.

    python -m tests.benchmarks.views --data DIR --weights FILE
        [--limit 100] [--transfer-epochs 12] [--finetune-epochs 10] [--seeds 5] [--lr 1e-4]

For each seed both phases with all augmentations for every V, from the same split and the same
weights; differences to exact are paired by seed. All runs of a seed share one cache, so that the
whole takes not much longer than exact alone. Seconds are therefore not those of the runs: they are
what each V takes with an empty cache, from one more run of the first seed (`--no-times` leaves it
out).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.against_peers import _photos, run, say
from tests.benchmarks.peers.job import Job
from trainer.runlog import Run, list_runs

VIEWS: Final = ("1", "2", "5", "10", "exact")


def train(arguments: argparse.Namespace, views: str, seed: int, folder: Path) -> dict[str, float]:
    """Both phases once, with the cache in `folder`: seconds, and accuracies in percent."""
    job = Job(arguments.data, Path(), arguments.weights, augment=True)
    with tempfile.TemporaryDirectory(prefix="views-") as runs:
        command = [sys.executable, "-m", "trainer", "--phase", "finetune", "--views", views]
        command += ["--data", str(job.data), "--weights", str(job.weights), *_photos(job)]
        command += ["--limit", str(arguments.limit), "--seed", str(seed), "--device", "cpu"]
        command += ["--transfer-epochs", str(arguments.transfer_epochs), "--lr", arguments.lr]
        command += ["--epochs", str(arguments.finetune_epochs)]
        figures, _ = run([*command, "--runs-dir", runs, "--cache-dir", str(folder)])
        transfer, finetune = list_runs(Path(runs))
    return {
        "wall": figures["wall"],
        "transfer": transfer.epochs[-1].val_acc * 100,
        "last": finetune.epochs[-1].val_acc * 100,
        "best": _best(finetune),
        "loss": finetune.epochs[-1].val_loss,
    }


def _best(run: Run) -> float:
    return max(run.epochs[1:], key=lambda epoch: epoch.rank).val_acc * 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--transfer-epochs", type=int, default=12)
    parser.add_argument("--finetune-epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lr", default="1e-4")
    parser.add_argument("--no-times", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {views: [] for views in VIEWS}
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory(prefix="cache-") as cache:
            for views in reversed(VIEWS):
                found[views].append(train(arguments, views, seed, Path(cache)))
                say(f"seed {seed}, views {views}: {found[views][-1]}")
    seconds: dict[str, float] = {}
    for views in () if arguments.no_times else VIEWS:
        with tempfile.TemporaryDirectory(prefix="cache-") as cache:
            seconds[views] = train(arguments, views, 0, Path(cache))["wall"]
            say(f"views {views}: {seconds[views]:.1f} s")
    print(table(found, seconds))
    print(json.dumps({"runs": found, "seconds": seconds, "load": os.getloadavg()}))


def table(found: dict[str, list[dict[str, float]]], seconds: dict[str, float]) -> str:
    """Means over the seeds, and the paired difference to exact with its standard error."""
    lines = [
        "| views | after transfer | last of finetune | to exact | best of finetune | to exact "
        "| last loss | s |",
        "|" + " --- |" * 8,
    ]
    for views, runs in found.items():
        cells = [views, _mean(runs, "transfer"), _mean(runs, "last"), _paired(found, views, "last")]
        cells += [_mean(runs, "best"), _paired(found, views, "best")]
        cells += [f"{statistics.fmean(r['loss'] for r in runs):.3f}"]
        cells += [f"{seconds[views]:.0f}" if views in seconds else "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(runs: list[dict[str, float]], name: str) -> str:
    return f"{statistics.fmean(run[name] for run in runs):.2f}%"


def _paired(found: dict[str, list[dict[str, float]]], views: str, name: str) -> str:
    if views == "exact":
        return "–"
    pairs: Any = zip(found[views], found["exact"], strict=True)
    differences = [one[name] - exact[name] for one, exact in pairs]
    mean = f"{statistics.fmean(differences):+.2f}"
    if len(differences) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(differences) / len(differences) ** 0.5:.2f}"


if __name__ == "__main__":
    main()

"""The sweep of the Oregon lab in one command, against seven runs of a plain PyTorch loop.

    python -m tests.benchmarks.sweep --data DIR --weights FILE --peers-python PY
        [--limit 100] [--epochs 20] [--settings 1,NHWC] [--rounds 1]

Six pairs of learning rate and layers, and the control, all augmentations, from one trunk that is
trained before the clock starts. Thaw's cache holds the decoded photos and nothing else. The plain
loop runs once each with the top unfrozen, with everything unfrozen, and with nothing unfrozen; its
seven runs are five of the first kind and one of each other. See against_peers.py for the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Final

from tests.benchmarks.against_peers import (
    Case,
    _parse_settings,
    make_job,
    run,
    run_peer,
    say,
    thaw_command,
)
from tests.benchmarks.peers.job import Job
from trainer.runlog import list_runs

_PAIRS: Final = ("1e-10:20", "1e-8:20", "1e-6:20", "1e-4:20", "1e-8:10")
_EVERYTHING: Final = "1e-6:all"


def trunk(job: Job, folder: Path) -> str:
    """A short transfer run to start from; leaves no cached view that the sweep uses."""
    short = dataclasses.replace(job, augment=False)
    run(thaw_command(short, folder, ["--phase", "transfer", "--epochs", "1"]))
    (parent,) = list_runs(folder / "runs")
    return parent.run_id


def sweep(job: Job, pairs: tuple[str, ...]) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="thaw-") as name:
        folder = Path(name)
        parent = trunk(job, folder)
        what = ["sweep", "--from", parent, "--epochs", str(job.finetune_epochs), "--pairs", *pairs]
        first, _ = run(thaw_command(job, folder, what))
        again, _ = run(thaw_command(job, folder, [*what, "--again"]))
    return {"wall": first["wall"], "cpu": first["cpu"], "again": again["wall"]}


def plain(job: Job, python: str) -> dict[str, float]:
    """Wall seconds of one run of each kind."""
    kinds = {
        "top": dataclasses.replace(job, transfer_epochs=0),
        "all": dataclasses.replace(job, transfer_epochs=0, unfreeze="all"),
        "control": dataclasses.replace(job, transfer_epochs=job.finetune_epochs, finetune_epochs=0),
    }
    return {kind: run_peer(python, "plain", asked)["wall"] for kind, asked in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--peers-python", required=True)
    parser.add_argument("--limit", type=int, default=100, help="photos of each class")
    parser.add_argument("--epochs", dest="finetune_epochs", type=int, default=20)
    parser.add_argument("--settings", type=_parse_settings, default="1,NHWC")
    parser.add_argument("--rounds", type=int, default=1)
    parser.set_defaults(transfer_epochs=1, scale=1, seed=0, untuned=False, augment=True)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        job = make_job(arguments, Case(1, 20, augment=True), Path(folder))
        job = dataclasses.replace(job, **arguments.settings[""])
        photos = len(job.photos("train"))
        for _ in range(arguments.rounds):
            measured = {
                "seven": sweep(job, (*_PAIRS, _EVERYTHING)),
                "six": sweep(job, _PAIRS),
                "plain": plain(job, arguments.peers_python),
            }
            for name, figures in measured.items():
                for kind, value in figures.items():
                    seconds.setdefault(f"{name} {kind}", []).append(value)
                    say(f"{name} {kind}: {value:.1f} s")
    print(report({name: statistics.median(values) for name, values in seconds.items()}))
    print(f"\nLoad average: {load:.2f} at the start, {os.getloadavg()[0]:.2f} at the end.")
    print(json.dumps({"seconds": seconds, "photos": photos}))


def report(seconds: dict[str, float]) -> str:
    """A table of the sweep with and without the member that unfreezes everything."""
    six = 5 * seconds["plain top"] + seconds["plain control"]
    rows = (
        ("seven runs, one with everything unfrozen", six + seconds["plain all"], "seven"),
        ("six runs, without that one", six, "six"),
    )
    lines = ["| | plain loop s | Thaw s | ratio | again s | ratio |", "|" + " --- |" * 6]
    for name, peer, key in rows:
        wall, again = seconds[f"{key} wall"], seconds[f"{key} again"]
        cells = [name, f"{peer:.0f}", f"{wall:.0f}", f"{peer / wall:.1f}"]
        lines.append(f"| {' | '.join([*cells, f'{again:.0f}', f'{peer / again:.1f}'])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

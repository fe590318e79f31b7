"""What unfreezing did, over seeds: `python -m tests.benchmarks.unfreezing RUNS_DIR [RUNS_DIR ...]`.

For the finetune runs in these folders, grouped by their settings without the seed: the change
against the boundary and against the control, each with its 95% interval over photos and its p (all
seeds together), and how far the weights moved. The best of N epochs beats the boundary by chance
alone; the control, which had as many epochs with the head only, tells how much of it that is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from explorer.conclusions import moved, percent
from explorer.pooled import pooled
from explorer.settings import rate_text
from explorer.sweep_words import p_text
from trainer.controls import control_of, controls_by_parent
from trainer.evidence import points
from trainer.runlog import Run, list_runs

_HEAD = ("optimizer", "batch", "rate", "schedule", "layers", "seeds", "before", "after")
_MORE = ("vs boundary", "vs control (95%)", "p", "weights moved", "changed at all")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs_dirs", nargs="+", type=Path, metavar="RUNS_DIR")
    folders = parser.parse_args(argv).runs_dirs
    pairs = [pair for folder in folders for pair in with_controls(list_runs(folder))]
    groups: dict[tuple[str, ...], list[tuple[Run, Run | None]]] = {}
    for run, control in pairs:
        groups.setdefault(_setting(run.info["config"]), []).append((run, control))
    print(f"| {' | '.join((*_HEAD, *_MORE))} |\n|{' --- |' * len((*_HEAD, *_MORE))}")
    for setting, members in groups.items():
        print(f"| {' | '.join((*setting, *_figures(members)))} |")


def with_controls(runs: Sequence[Run]) -> Iterable[tuple[Run, Run | None]]:
    controls = controls_by_parent(runs)
    for run in runs:
        if run.phase == "finetune" and run.status == "done":
            yield run, control_of(run, controls)


def _setting(config: dict[str, Any]) -> tuple[str, ...]:
    asked = (config["optimizer"], str(config["batch_size"]), rate_text(config["lr"]))
    return (*asked, config["schedule"]["name"], config["unfreeze"])


def _figures(members: Sequence[tuple[Run, Run | None]]) -> list[str]:
    runs = [run for run, _ in members]
    before = fmean(run.epochs[0].val_acc for run in runs)
    after = fmean(max(e.rank for e in run.epochs[1:])[0] for run in runs)
    against = pooled([(run.predictions("before"), run.predictions("after")) for run in runs])
    beside = pooled(
        [
            (control.predictions("after"), run.predictions("after"))
            for run, control in members
            if control
        ]
    )
    shift = [found for run in runs if (found := moved(run)) is not None]
    return [
        str(len(runs)),
        f"{before:.2%}",
        f"{after:.2%}",
        points(against.change) if against else "–",
        f"{points(beside.change)} ({points(beside.low)} to {points(beside.high)})"
        if beside
        else "–",
        p_text(beside.p) if beside else "–",
        percent(fmean(relative for relative, _ in shift)) if shift else "–",
        f"{fmean(changed for _, changed in shift):.1%}" if shift else "–",
    ]


if __name__ == "__main__":
    main()

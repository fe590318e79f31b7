"""`python -m trainer track RUN`: a run that is there already, sent to MLflow (no torch)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from trainer.cli import guarded, inert
from trainer.ranking import count
from trainer.runlog import Run, RunError, find_run, list_runs
from trainer.track import Mirror

_ALL: Final = "all"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer track",
        description="Send what MLflow has not of these runs: settings, every epoch, files, the "
        "best checkpoint. What --track mlflow does while a run is trained; given again it sends "
        "nothing twice.",
        epilog="MLFLOW_TRACKING_URI says where, such as http://127.0.0.1:5000, and "
        'MLFLOW_EXPERIMENT_NAME under which name ("thaw").',
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run id, a unique part of it, or its folder; `all` for all in the runs folder",
    )
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: runs"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 where a run cannot be read or sent."""
    return guarded(lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    runs = _chosen(args.runs_dir, args.runs)
    mirror = Mirror()
    print(f"To {inert(mirror.where)}:")
    for run in runs:
        sent = mirror.send(run.path)
        print(f"  {inert(run.run_id)}: {count(sent, 'epoch')} sent, {len(run.epochs)} in all")
    return 0


def _chosen(runs_dir: Path, references: list[str]) -> list[Run]:
    if _ALL not in references:
        return [find_run(runs_dir, reference) for reference in references]
    found = [run for run in list_runs(runs_dir) if run.info]
    if not found:
        raise RunError(f"There are no runs in {runs_dir}. Name another with --runs-dir.")
    return found

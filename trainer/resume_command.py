"""`python -m trainer --resume RUN|auto`: an interrupted run goes on, as its run.json says."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Final

from trainer.__main__ import add_cache, told
from trainer.cli import guarded, inert
from trainer.config import Config, ConfigError
from trainer.process import prepare_process
from trainer.reproduce import follow_up, resolved
from trainer.runlog import Run, RunError, find_run, is_being_written, list_runs, read_run

_AUTO: Final = "auto"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Go on with an interrupted run. Its settings are those in its run.json.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--resume",
        required=True,
        metavar="RUN|auto",
        help="id or folder of the run; auto: the newest that was interrupted",
    )
    parser.add_argument("--runs-dir", type=Path, metavar="DIR", help="(runs)")
    add_cache(parser)
    return parser


def main(argv: list[str]) -> int:
    """The command line; returns the exit status: 0 done, 2 for a mistake of the user's."""
    return guarded(lambda: _main(argv))


def _main(argv: list[str]) -> int:
    arguments, others = build_parser().parse_known_args(argv)
    if others:
        raise ConfigError(
            f"{others[0]}: a run goes on with the settings in its run.json. Beside --resume give "
            "only --runs-dir, --no-cache, --cache-dir and --cache-limit."
        )
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    runs_dir, reference = given.pop("runs_dir", Config.runs_dir), given.pop("resume")
    prepare_process()
    from trainer.ranks import from_first, joined  # imports torch

    def find() -> Run:
        return _newest(runs_dir) if reference == _AUTO else find_run(runs_dir, reference)

    with joined():
        run = from_first(find)
        return told(runs_dir, lambda: go_on(run, given))


def go_on(run: Run, given: dict[str, Any]) -> Run:
    """Train a run to the end of what was asked for: of a trunk also the finetune phase it is for.
    `given` are settings of this time. Raises ThawError."""
    from trainer.fit import finetune_after, go_on_with  # imports torch
    from trainer.ranks import from_first

    if run.status != "done":
        config = from_first(lambda: _checked(run))
        print(f"Going on with run {inert(run.run_id)}.")
        run = go_on_with(run, dataclasses.replace(config, **given))
    elif not from_first(lambda: is_pending(run, list_runs(run.path.parent))):
        raise RunError(f"Run {run.run_id} is done: there is nothing to go on with.")
    run, then = from_first(lambda: _what_follows(read_run(run.path)))
    if then is None:
        return run
    print(f"Transfer run {inert(run.run_id)} is done; the finetune phase that it is for follows.")
    return finetune_after(run, dataclasses.replace(then, **given))


def _checked(run: Run) -> Config:
    """Its settings, as they have to be given today."""
    _check(run)
    return resolved(run)


def _what_follows(run: Run) -> tuple[Run, Config | None]:
    done = (then := follow_up(run)) is None or _has_child(run, list_runs(run.path.parent))
    return run, None if done else then


def _newest(runs_dir: Path) -> Run:
    runs = list_runs(runs_dir)
    for run in reversed(runs):
        if run.status == "interrupted" or is_pending(run, runs):
            return run
    raise RunError(
        f"No interrupted run in {runs_dir}: there is nothing to go on with. Name another folder "
        "with --runs-dir."
    )


def is_pending(run: Run, runs: list[Run]) -> bool:
    """Whether it is a finished trunk whose finetune phase has not begun."""
    return run.status == "done" and "then" in run.info and not _has_child(run, runs)


def _has_child(run: Run, runs: list[Run]) -> bool:
    return any(other.parent_run_id == run.run_id for other in runs)


def _check(run: Run) -> None:
    if is_being_written(run):
        raise RunError(f"Run {run.run_id} is being trained by another process.")
    sweep = run.info.get("sweep")
    if isinstance(sweep, dict):
        raise RunError(
            f"Run {run.run_id} belongs to the sweep {sweep.get('name')}: give the command that "
            "began the sweep once more, and all its members go on."
        )

"""`python -m trainer run RECIPE`: an experiment of several trainings, and its table."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from trainer.__main__ import config_of, stop_on_signals
from trainer.cli import guarded, inert
from trainer.config import Config
from trainer.experiment import Experiment, Stage, find_experiment
from trainer.files import write_atomically
from trainer.grid import SWEPT, Request, grid
from trainer.process import prepare_process
from trainer.recipe import build_sweep_parser
from trainer.results import Row, Table, data_of, entry, markdown, row, text, to_csv, write_table
from trainer.run_writer import check_writable
from trainer.runlog import Run, RunError
from trainer.sweep import Engine, train_all

# What may be said beside a recipe: where, how much, how fast. The rest is the experiment.
_CHOICES: Final = (
    *("data", "limit", "split_file", "split_seed", "val_fraction", "group_by", "strict"),
    "exclude_file",
    *("arch", "weights", "epochs", "transfer_epochs", "batch_size", "seed", "views", "device"),
    "precision",
    *("cache", "cache_dir", "cache_limit", "runs_dir", "track"),
)
_EPILOG: Final = """\
examples:
  python -m trainer run oregon-finetune-sweep --data DIR
  python -m trainer run signs-transfer-modes --limit 20 --epochs 1     a try at a reduced size
  python -m trainer run my-experiment.toml
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer run",
        description="Run an experiment of several trainings from its recipe, test each run once on "
        "the test photos where the data has some, and write the table of results. The same command "
        "goes on where it was interrupted, and trains nothing twice.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a name that `python -m trainer recipes` lists, or FILE.toml",
    )
    group = parser.add_argument_group("instead of what the recipe says, in all of its stages")
    for action in build_sweep_parser()._actions:
        if action.dest in _CHOICES:
            group._add_action(action)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 1 where a run failed, 2 for a mistake of
    the user's, 130 when interrupted."""
    stop_on_signals()
    return guarded(lambda: _run(vars(build_parser().parse_args(argv))))


def _run(given: dict[str, Any]) -> int:
    experiment = find_experiment(given.pop("recipe"))
    asked = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None
    }
    experiment = experiment.with_settings(asked)
    prepare_process()
    return run_experiment(experiment)


def run_experiment(experiment: Experiment) -> int:
    """All stages in order, then the table, printed and written into the runs folder.

    Returns 0, or 1 where a run failed. Raises ThawError.
    """
    first = experiment.stages[0]
    runs_dir = Path(first.settings.get("runs_dir", Config.runs_dir))
    check_writable(runs_dir)
    done: dict[str, Run] = {}
    rows: list[Row] = []
    failed, data = False, ""
    try:
        for number, stage in enumerate(experiment.stages, 1):
            where = f"stage {number} of {len(experiment.stages)}"
            print(f"\n{inert(experiment.name)}, {where}: {inert(stage.name)}")
            if (instead := stage.settings.get("stand_in_for")) is not None:
                data = stage.settings["data"]
                print(f"Note: {inert(str(data))} stands in for the data of the recipe, {instead}.")
            for label, run in _train(experiment, stage, done):
                failed = failed or run.status != "done"
                if run.status == "done":
                    done[stage.name] = run
                    _test(run)
                    known = entry(label, run, experiment.published(stage, run))
                    rows.append(row(known, run))
                    data = data_of(run, stage.settings.get("stand_in_for"))
            _write(experiment, rows, data, runs_dir)
    except (KeyboardInterrupt, SystemExit):
        print("The same command goes on where this experiment was interrupted.")
        raise
    _report(experiment, rows, data, runs_dir)
    return 1 if failed else 0


def _train(experiment: Experiment, stage: Stage, done: dict[str, Run]) -> Iterator[tuple[str, Run]]:
    """The runs of a stage with their names in the table."""
    settings = dict(stage.settings) | {"recipe": f"{experiment.name}/{stage.name}"}
    if stage.parent is not None:
        if stage.parent not in done:
            raise RunError(f"Stage {stage.name} starts from {stage.parent}, which has failed.")
        settings["parent"] = done[stage.parent].run_id
    if stage.is_sweep:
        members = grid(settings)
        request = Request(members, f"{experiment.name}-{stage.name}")
        whole, runs = train_all(request, Engine())
        for index, run in sorted(runs.items()):
            yield f"{stage.name}: {whole.labels[index]}", run
    else:
        yield stage.name, _alone(settings, f"{experiment.name}-{stage.name}")


def _alone(settings: dict[str, Any], run_name: str) -> Run:
    from trainer.fit import fit  # imports torch

    plain = {
        name: value[0] if name in SWEPT and isinstance(value, tuple) else value
        for name, value in settings.items()
    }
    return fit(config_of({"run_name": run_name, **plain}), go_on=True, once=True)


def _test(run: Run) -> None:
    from trainer.evaluate import test_run

    if run.info["dataset"]["counts"].get("test"):
        tested = test_run(run)
        print(f"Test photos: {tested.accuracy:.2%} of {tested.photos:,}, loss {tested.loss:.4f}")


def _write(experiment: Experiment, rows: list[Row], data: str, runs_dir: Path) -> None:
    """The table so far: as Markdown, as CSV, and for the explorer."""
    table = Table(experiment.name, experiment.title, data, tuple(row.entry for row in rows))
    try:
        for path, content in _texts(experiment, rows, runs_dir):
            write_atomically(path, content.encode())
        write_table(runs_dir, table)
    except OSError as error:
        raise RunError(f"Cannot write the table into {runs_dir}: {error.strerror}.") from error


def _texts(experiment: Experiment, rows: list[Row], runs_dir: Path) -> Iterator[tuple[Path, str]]:
    for suffix, content in ((".md", markdown(rows)), (".csv", to_csv(rows))):
        yield runs_dir / f"{experiment.name}{suffix}", content


def _report(experiment: Experiment, rows: list[Row], data: str, runs_dir: Path) -> None:
    if not rows:
        print("No run was finished, so there is no table.")
        return
    print(f"\n{inert(experiment.title)}\nData: {inert(data)}\n\n{text(rows)}")
    for path, _ in _texts(experiment, rows, runs_dir):
        print(f"written: {inert(str(path))}")
    print("Compare the runs:  streamlit run streamlit_app.py")

"""`python -m trainer import`: the training logs of other tools become runs on the same charts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from trainer.cli import guarded, inert
from trainer.imports.find import Skipped
from trainer.imports.logs import FORMATS, Log, LogError
from trainer.imports.plan import ONE_PHASE, NewRun, alone, family, halves
from trainer.imports.read import read_all
from trainer.imports.write import absolute, without_known, write
from trainer.runlog import Run, find_run, list_runs

_SHOWN: Final = 40
_EPILOG: Final = """\
examples:
  python -m trainer import logs/                     every log in the folder, one run each
  python -m trainer import logs/frozen --then logs/unfrozen-1e-7 logs/unfrozen-1e-8
                                                     a transfer phase and two finetunes of it
  python -m trainer import logs/both --boundary 50   both phases in one log, unfrozen after epoch 50
  python -m trainer import logs/more --from frozen   one more finetune of a run that is here
formats, recognised by themselves:
  TensorBoard event folders (Keras's train/ and validation/ become one run), Keras CSVLogger,
  Lightning metrics.csv with hparams.yaml, fastai CSVLogger, Hugging Face trainer_state.json
Numbers that a log does not hold stay empty. Accuracies above 1 are taken for percent.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer import",
        description="Turn the training logs of other tools into runs, to compare them on the same "
        "charts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="log file or folder")
    _add_phases(parser.add_argument_group("phases"))
    _add_reading(parser.add_argument_group("reading"))
    _add_runs(parser.add_argument_group("runs"))
    return parser


def _add_phases(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--then",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="logs of the finetune phase that started from the one log at PATH",
    )
    group.add_argument(
        "--from", dest="parent", metavar="RUN", help="the logs at PATH are finetunes of this run"
    )
    group.add_argument(
        "--boundary",
        type=int,
        metavar="EPOCH",
        help="the epoch, counted from 1, after which layers were unfrozen: divides a log that "
        "holds both phases; with --then and --from where the finetunes started (the last)",
    )
    group.add_argument(
        "--phase",
        choices=ONE_PHASE,
        help="what a log is that holds one phase (transfer)",
    )


def _add_reading(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="(auto)")
    group.add_argument(
        "--accuracy",
        metavar="TAG",
        help="the tag or column of the validation accuracy, where its name tells nothing; none: "
        "import a log without accuracy",
    )


def _add_runs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--run-name",
        nargs="+",
        metavar="S",
        help="part of the run's folder name, one for each log in the order in which they are "
        "listed (the name of its folder)",
    )
    group.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="(runs)")
    group.add_argument("--again", action="store_true", help="also what is imported already")
    group.add_argument("--dry-run", action="store_true", help="list the runs, write nothing")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 a mistake of the user's."""
    return guarded(lambda: _run(build_parser().parse_args(argv)))


def _run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    runs: list[Run] = list_runs(arguments.runs_dir)
    first, then, skipped = _read(arguments, runs)
    planned, unplanned = _plan(arguments, first, then)
    skipped += unplanned
    if not planned:
        raise LogError("\n".join(["There is nothing to import.", *map(_line, skipped[:_SHOWN])]))
    dry = arguments.dry_run
    ids = [new.name for new in planned] if dry else write(arguments.runs_dir, planned)
    for name, new in zip(ids, planned, strict=True):
        print(f"{'would import' if dry else 'imported'}  {inert(name)}")
        for text in (describe(new), *new.log.notes):
            print(f"    {inert(text)}")
    for one in skipped[:_SHOWN]:
        print(f"skipped  {inert(_line(one))}")
    if len(skipped) > _SHOWN:
        print(f"skipped  {len(skipped) - _SHOWN} more")
    if not dry:
        print("Compare the runs:  streamlit run streamlit_app.py")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.then and arguments.parent:
        raise LogError("--then names the transfer phase by PATH, --from by run: give one of them.")
    if arguments.phase and (arguments.then or arguments.parent or arguments.boundary):
        raise LogError(
            "--phase is for logs that hold one phase; --then, --from and --boundary say which "
            "phase is which."
        )


def _read(
    arguments: argparse.Namespace, runs: Sequence[Run]
) -> tuple[tuple[Log, ...], tuple[Log, ...], list[Skipped]]:
    """The logs at PATH, those after --then, and what is skipped."""
    wanted = None if arguments.format == "auto" else arguments.format
    found = [
        read_all(paths, wanted, arguments.accuracy)
        for paths in (arguments.paths, arguments.then)
        if paths
    ]
    first, *others = (tuple(map(absolute, one.logs)) for one in found)
    then = others[0] if others else ()
    named = iter(_named((*first, *then), arguments.run_name))
    first, then = tuple(next(named) for _ in first), tuple(next(named) for _ in then)
    skipped = [entry for one in found for entry in one.skipped]
    kept, known = without_known((*first, *then), [] if arguments.again else runs)
    if then and first and first[0] not in kept:
        raise LogError(f"{_line(known[0])} To join finetunes to that run, use --from.")
    first = tuple(log for log in first if log in kept)
    then = tuple(log for log in then if log in kept)
    return first, then, skipped + list(known)


def _named(logs: Sequence[Log], names: Sequence[str] | None) -> list[Log]:
    if names is None:
        return list(logs)
    if len(names) != len(logs):
        listed = ", ".join(log.name for log in logs[:_SHOWN])
        raise LogError(
            f"--run-name: {len(names)} names for {len(logs)} logs. The logs are: {listed}."
        )
    return [replace(log, name=name) for log, name in zip(logs, names, strict=True)]


def _plan(
    arguments: argparse.Namespace, first: Sequence[Log], then: Sequence[Log]
) -> tuple[list[NewRun], list[Skipped]]:
    """The runs to write, and the logs that do not fit in with the reason."""
    if arguments.then:
        if len(first) != 1:
            listed = ", ".join(str(log.path) for log in first[:_SHOWN])
            raise LogError(
                f"Before --then there must be one log, the transfer phase; there are {len(first)}: "
                f"{listed}."
            )
        trunk = alone(first[0], "transfer")
        return ([trunk, *family(trunk, then, arguments.boundary)] if then else []), []
    if arguments.parent:
        parent = find_run(arguments.runs_dir, arguments.parent)
        return list(family(parent, first, arguments.boundary)), []
    if arguments.boundary is not None:
        return each(first, lambda log: halves(log, arguments.boundary))
    return each(first, lambda log: (alone(log, arguments.phase),))


def each(
    logs: Sequence[Log], plan: Callable[[Log], tuple[NewRun, ...]]
) -> tuple[list[NewRun], list[Skipped]]:
    """Plan each log by itself; one that cannot be is skipped with the reason."""
    planned: list[NewRun] = []
    skipped: list[Skipped] = []
    for log in logs:
        try:
            planned += plan(log)
        except LogError as error:
            skipped.append(Skipped(log.path, str(error)))
    return planned, skipped


def _line(skipped: Skipped) -> str:
    return f"{skipped.path}: {skipped.reason}"


def describe(new: NewRun) -> str:
    """What a run will hold: phase, epochs, and the accuracies around the boundary."""
    judged = [record for record in new.trained if not math.isnan(record.val_acc)]
    epochs = len(new.trained)
    text = f"{new.phase}, {epochs} {'epoch' if epochs == 1 else 'epochs'}"
    if new.parent is not None:
        text += f" after epoch {new.first_epoch}"
        start = new.records[0]
        if start.phase_epoch == 0 and not math.isnan(start.val_acc):
            text += f" (accuracy {start.val_acc:.4f} there)"
    if not judged:
        return f"{text}, no validation accuracy"
    best = max(judged, key=lambda record: record.rank)
    text += f", best accuracy {best.val_acc:.4f} at epoch {best.epoch}"
    return f"{text}, last {judged[-1].val_acc:.4f}"

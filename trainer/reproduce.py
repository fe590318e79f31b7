"""The command line that trains a run again, from what its run.json says (no torch)."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from trainer.__main__ import build_parser
from trainer.config import DEFAULT_LR, SAMPLE, Augmentation, Config, Schedule
from trainer.runlog import Run
from trainer.schedule import learning_rate
from trainer.schema import CHECKPOINTS, RUN_JSON, ThawError

_NOT_FILES: Final = (None, SAMPLE, "imagenet", "none")


class ReproduceError(ThawError):
    """A run that no command trains again: says what is missing."""


def command(run: Run) -> str:
    """The command that trains this run alone, quoted for a shell, a flag on each line: only what is
    not a default.

    It names the parent and the runs folder where they are now. Raises ReproduceError where the run
    was not trained by this program, or what it was trained from is not there any more.
    """
    line = " \\\n  ".join(["python -m trainer", *map(shlex.join, flags(resolved(run)))])
    if line != line.encode(errors="replace").decode():
        raise ReproduceError(
            f"Run {run.run_id} was trained with a folder or file whose name is no text, which "
            "cannot be typed. Rename it, and give it as the name is then."
        )
    return line


def flags(config: Config) -> Iterator[list[str]]:
    """What `trainer.__main__.parse` makes this config of: the words of each flag."""
    values, defaults = _flat(config), _flat(Config(config.phase))
    for action in build_parser()._actions:
        name = action.dest
        if name in values and (action.required or values[name] != defaults[name]):
            yield _words(action, values[name])


def _flat(config: Config) -> dict[str, Any]:
    """By the names of the flags, so without schedule and augmentation as such."""
    return vars(config) | vars(config.schedule) | vars(config.augmentation)


def _words(action: argparse.Action, value: Any) -> list[str]:
    flag = action.option_strings[-1]
    if action.nargs == 0:
        return [flag]
    text = str(value)
    if isinstance(value, tuple):
        text = ",".join(map(str, value)) or "linear"
    # What begins with a dash would be taken for another flag.
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


# --- what run.json says -------------------------------------------------------------------------


def resolved(run: Run) -> Config:
    """The run's settings as they have to be given today. Raises ReproduceError."""
    config = recorded(run)
    root = run.info.get("dataset", {}).get("root")
    if config.data not in (None, SAMPLE) and isinstance(root, str):
        config = dataclasses.replace(config, data=root)  # however the folder was named then
    config = dataclasses.replace(config, runs_dir=run.path.parent)
    if config.phase != "finetune":
        config = dataclasses.replace(config, unfreeze=Config.unfreeze)
    if run.parent_run_id is not None:
        config = _from_parent(config, run)
    _check_files(config)
    return config


def recorded(run: Run) -> Config:
    """The run's settings as run.json holds them. Raises ReproduceError."""
    given = run.info.get("config", {})
    if "imported" in run.info or given.get("phase") is None:
        raise ReproduceError(
            f"Run {run.run_id} was trained by another program, and only its log was imported. "
            "Train it again with that program."
        )
    return _config(run, given)


def follow_up(run: Run) -> Config | None:
    """The settings of the finetune phase that a trunk was trained for; None where it was wanted for
    itself. Raises ReproduceError."""
    then, root = run.info.get("then"), run.info.get("dataset", {}).get("root")
    if not isinstance(then, Mapping):
        return None
    config = dataclasses.replace(_config(run, then), runs_dir=run.path.parent)
    if config.data not in (None, SAMPLE) and isinstance(root, str):
        config = dataclasses.replace(config, data=root)
    _check_files(config)
    return config


def _config(run: Run, settings: Mapping[str, Any]) -> Config:
    given = {name: value for name, value in settings.items() if value is not None}
    paths = dict.fromkeys(("split_file", "exclude_file", "cache_dir", "runs_dir"), Path)
    kinds = {**paths, "head": tuple}
    try:
        if given.get("lr") == DEFAULT_LR.get(given["phase"]):
            given.pop("lr", None)
        given |= {name: kind(given[name]) for name, kind in kinds.items() if name in given}
        given["schedule"] = Schedule(**given.get("schedule", {}))
        given["augmentation"] = Augmentation(**given.get("augmentation", {}))
        return Config(**given)
    except (TypeError, ValueError, ThawError) as error:
        raise ReproduceError(
            f"The settings in {run.path / RUN_JSON} are not those of this version of Thaw "
            f"({error}). Use the version that trained the run."
        ) from error


def _from_parent(config: Config, run: Run) -> Config:
    """Without what the parent decides, and without a rate where that was the parent's."""
    config = dataclasses.replace(
        config,
        parent=_parent(config, run),
        arch=None,
        weights=Config.weights,
        transfer_epochs=None,
        transfer_lr=None,
    )
    if config.phase != "transfer":
        return config
    # With a rate the head trains further from the start of the schedule, without one it goes on
    # where the parent's schedule ended.
    if _starts_anew(config, run):
        return dataclasses.replace(config, lr=config.learning_rate)
    return dataclasses.replace(config, lr=None, schedule=Schedule())


def _starts_anew(config: Config, run: Run) -> bool:
    """Whether the rates that were logged are those of a schedule from its start."""
    return all(
        math.isclose(
            record.lr_head,
            learning_rate(
                config.schedule,
                config.learning_rate,
                max(0, record.phase_epoch - 1),
                config.epochs,
            ),
        )
        for record in run.epochs
    )


def _parent(config: Config, run: Run) -> str:
    """The run to start from: its id where it is beside this run, else its path."""
    beside, name = run.path.parent, str(run.parent_run_id)
    if _can_start(run, beside / name):
        return name
    if config.parent is not None and _can_start(run, Path(config.parent)):
        return config.parent
    raise ReproduceError(
        f"The run started from {name}, whose last epoch is not in {beside} any more. Train a "
        "transfer run like that one first, and start from it with --from."
    )


def _can_start(run: Run, parent: Path) -> bool:
    kept = run.info.get("parent_checkpoint")
    file = kept.get("file") if isinstance(kept, Mapping) else None
    return (parent / RUN_JSON).is_file() and (parent / CHECKPOINTS / f"{file}").is_file()


def _check_files(config: Config) -> None:
    for value, what in (
        (config.data, "photos"),
        (config.split_file, "split"),
        (config.exclude_file, "exclusions"),
        (config.weights, "weights"),
    ):
        if value not in _NOT_FILES and not _exists(str(value)):
            raise ReproduceError(
                f"The {what} that the run was trained with are not at {value} any more. Put them "
                "back there to train it again."
            )


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except RuntimeError:  # the home folder of a user who is not known here
        return False

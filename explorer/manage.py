"""What changes runs on disk from the explorer: archiving and deleting. Knows no Streamlit."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from explorer.access import may_write
from explorer.annotations import load_annotation, save_annotation
from explorer.data import Snapshot
from trainer.runlog import Run, RunError, is_being_written, run_folders

# Readers take no folder for a run whose name begins with a dot.
_DELETED: Final = ".deleted-"


def archive(run: Run, archived: bool) -> None:
    """Hide a run from the lists, or show it again. Raises RunError where that cannot be saved."""
    save_annotation(run.path, replace(load_annotation(run.path), archived=archived))


def bytes_on_disk(folder: Path) -> int:
    """How many bytes the files in a folder hold; what cannot be read counts nothing."""
    total = 0
    for where, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += Path(where, name).lstat().st_size
    return total


def left_without_parent(snapshot: Snapshot, gone: Collection[str]) -> list[str]:
    """The runs that start from one of these and are not among them, oldest first."""
    return [
        name
        for name, run in snapshot.runs.items()
        if run.parent_run_id in gone and name not in gone
    ]


def delete(runs_dir: Path, names: Iterable[str]) -> list[str]:
    """Delete runs for good; returns what there is to say of those for which that failed.

    Only folders that lie in `runs_dir` themselves: nothing behind a link is touched. Neither is a
    run that is being written. Raises ReadOnlyError.
    """
    may_write("Deleting")
    _remove_leftovers(runs_dir)
    folders = {path.name: path for path in run_folders(runs_dir)}
    problems = []
    for name in names:
        try:
            if name not in folders:
                raise RunError(f"There is no run {name} in {runs_dir} any more.")
            _delete(folders[name])
        except RunError as error:
            problems.append(str(error))
    return problems


def _delete(path: Path) -> None:
    if path.is_symlink():
        raise RunError(
            f"{path} is a link to {path.resolve()}. Thaw deletes only what is in the runs folder "
            "itself; remove the link yourself."
        )
    if is_being_written(Run(path, {})):
        raise _in_progress(path)
    # Renamed first: what a crash leaves behind is then no run.
    hidden = path.with_name(f"{_DELETED}{secrets.token_hex(4)}-{path.name}")
    try:
        path.rename(hidden)
    except OSError as error:
        raise RunError(f"Cannot delete {path}: {error.strerror}.") from error
    if is_being_written(Run(hidden, {})):  # somebody went on with it just now
        hidden.rename(path)
        raise _in_progress(path)
    _remove(hidden)


def _in_progress(path: Path) -> RunError:
    return RunError(f"{path} is being written: stop the training first, then delete the run.")


def _remove(hidden: Path) -> None:
    try:
        shutil.rmtree(hidden)
    except OSError as error:
        raise RunError(
            f"The run is no longer listed, but not all of its files could be removed: "
            f"{error.strerror} ({error.filename}). Remove the folder {hidden} yourself."
        ) from error


def _remove_leftovers(runs_dir: Path) -> None:
    """What an explorer that was killed while it deleted left behind."""
    for hidden in runs_dir.glob(f"{_DELETED}????????-*"):
        if not is_being_written(Run(hidden, {})):
            shutil.rmtree(hidden, ignore_errors=True)

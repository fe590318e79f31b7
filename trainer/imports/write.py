"""Planned runs -> folders in the runs folder, all of them or none; and what is there already."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from trainer.imports.find import Skipped
from trainer.imports.logs import Log, LogError
from trainer.imports.plan import NewRun
from trainer.run_writer import RunWriter, check_writable
from trainer.runlog import Run
from trainer.schema import PhaseRecord


def holder(runs: Iterable[Run], log: Log) -> Run | None:
    """The run that holds this log already: one of the same content, else of the same path."""
    imported = [(run, said) for run in runs if isinstance(said := run.info.get("imported"), dict)]
    digests = set(log.files.values())
    same = [run for run, said in imported if digests & _digests(said)]
    path = str(log.path)
    there = [run for run, said in imported if said.get("path") == path and log.path.is_absolute()]
    return next(iter([*same, *there]), None)


def _digests(imported: Mapping[str, object]) -> set[str]:
    files = imported.get("files")
    entries = files if isinstance(files, list) else []
    found = (entry.get("sha256") for entry in entries if isinstance(entry, dict))
    return {digest for digest in found if isinstance(digest, str)}


def without_known(
    logs: Sequence[Log], runs: Sequence[Run]
) -> tuple[tuple[Log, ...], tuple[Skipped, ...]]:
    """The logs that no run holds, each content once, and the others with the reason."""
    kept: list[Log] = []
    skipped: list[Skipped] = []
    for log in logs:
        run = holder(runs, log)
        twin = next((one for one in kept if {*one.files.values()} & {*log.files.values()}), None)
        if run is not None:
            reason = f"run {run.run_id} holds it already (--again imports it once more)."
            skipped.append(Skipped(log.path, reason))
        elif twin is not None:
            skipped.append(Skipped(log.path, f"the same files as {twin.path}."))
        else:
            kept.append(log)
    return tuple(kept), tuple(skipped)


def write(runs_dir: Path, planned: Sequence[NewRun]) -> list[str]:
    """Write the runs, parents first as they are listed; returns their ids in this order.

    Raises LogError or RunError, and leaves nothing behind then.
    """
    check_writable(runs_dir)
    folders: list[Path] = []
    written: list[tuple[NewRun, str]] = []
    try:
        for new in planned:
            ids = [run_id for other, run_id in written if other is new.parent]
            parent = new.parent.run_id if isinstance(new.parent, Run) else next(iter(ids), None)
            writer = RunWriter.create(runs_dir, new.name, new.info(parent))
            folders.append(writer.path)
            written.append((new, writer.run_id))
            _fill(writer, new)
    except BaseException as error:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            reason = f"Cannot write to the runs folder {runs_dir}: {error.strerror}."
            raise LogError(f"{reason} Nothing was imported.") from error
        raise
    return [run_id for _, run_id in written]


def _fill(writer: RunWriter, new: NewRun) -> None:
    writer.start_phase(PhaseRecord(new.phase, new.first_epoch, None, (), 0))
    for record in new.records:
        writer.imported_epoch(record)
    writer.end_phase(new.last_epoch)
    for note in new.log.notes:
        writer.note(note)
    writer.close("done", f"imported from {new.log.path}")
    ended = [record.time for record in new.records if not math.isnan(record.time)]
    writer.update(ended=max(ended, default=new.log.started))


def absolute(log: Log) -> Log:
    """The log with absolute paths, as a run remembers them."""
    files = {path.absolute(): digest for path, digest in log.files.items()}
    return replace(log, path=log.path.absolute(), files=files)

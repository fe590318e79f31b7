"""Where logs are: paths -> candidates, each the files of what may be one log."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from trainer.imports.huggingface import STATE_JSON
from trainer.imports.logs import Format, LogError
from trainer.imports.tables import table_format
from trainer.schema import METRICS_JSONL, RUN_JSON

MAX_ENTRIES: Final = 20_000
_EVENTS: Final = "tfevents"
# Folders that a tool makes for a part of its photos; the log is the folder above.
_STREAMS: Final = ("train", "training", "validation", "valid", "val", "eval")
# What says nothing about a log, so that its name goes on with the folder above.
_PLAIN: Final = re.compile(
    r"logs?|lightning_logs|tensorboard|tb|runs?|version_\d+|checkpoint-\d+|metrics|history"
    r"|training|training_log|results|trainer_state|\d*",
    re.IGNORECASE,
)
_STAMP: Final = re.compile(r"[-_]\d{10}(\.\d+)?$")
_LONGEST: Final = 60
_VERSION: Final = re.compile(r"version_\d+")
_CHECKPOINT: Final = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Candidate:
    """The files of what may be one log, each with the stream (`train`, `validation`, "") that its
    folder names. `path` is what a user would point at: a folder of event files, or one file."""

    path: Path
    name: str
    format: Format
    files: tuple[tuple[str, Path], ...]


@dataclass(frozen=True)
class Skipped:
    """A file or folder that is not imported, and why."""

    path: Path
    reason: str


def find(
    path: Path, wanted: Format | None = None
) -> tuple[tuple[Candidate, ...], tuple[Skipped, ...]]:
    """The logs in a folder and all folders in it, or in one file; what is none is listed too.

    `wanted` looks for one format only. Raises LogError where there is nothing, or no log.
    """
    try:
        if not path.exists():
            raise LogError(f"{path}: there is no such file or folder.")
        files, skipped = _files(path)
    except OSError as error:
        raise LogError(f"{path} cannot be read: {error.strerror}.") from error
    events = [file for file in files if _EVENTS in file.name]
    candidates = [*_event_logs(events, path), *_states(files, path, skipped)]
    candidates += _tables(files, path, wanted, skipped)
    fitting = [one for one in candidates if wanted in (None, one.format)]
    if not fitting and not (skipped and path.is_dir()):
        raise LogError(_nothing(path, wanted, skipped))
    return tuple(sorted(_told_apart(fitting, path), key=lambda one: one.path)), tuple(skipped)


def _told_apart(candidates: Sequence[Candidate], root: Path) -> Iterator[Candidate]:
    """With the time stamps that Keras users put into names, where only these differ."""
    taken = Counter(one.name for one in candidates)
    for one in candidates:
        unique = taken[one.name] == 1
        yield one if unique else replace(one, name=name_of(one.path, root, stamped=True))


def _nothing(path: Path, wanted: Format | None, skipped: Sequence[Skipped]) -> str:
    if skipped:
        return f"{path}: {skipped[0].reason}"
    what = "a log" if wanted is None else f"a log of the format {wanted}"
    return (
        f"{path}: holds nothing that Thaw knows as {what}. It looks for TensorBoard event files, "
        "CSV files with a column named epoch (Keras CSVLogger, Lightning metrics.csv, fastai) and "
        "Hugging Face's trainer_state.json."
    )


def _files(path: Path) -> tuple[list[Path], list[Skipped]]:
    """All files at a path, without hidden folders, links and the runs that are Thaw's own."""
    if not path.is_dir():
        if not path.is_file():
            raise LogError(f"{path}: is neither a file nor a folder.")
        return [path], []
    files: list[Path] = []
    skipped: list[Skipped] = []
    seen = 0
    for folder, folders, names in os.walk(path):
        seen += len(folders) + len(names)
        if seen > MAX_ENTRIES:
            raise LogError(
                f"{path}: holds more than {MAX_ENTRIES:,} files and folders. Point at the folder "
                "of the logs alone."
            )
        here = Path(folder)
        if RUN_JSON in names and METRICS_JSONL in names:
            skipped.append(Skipped(here, "it is a run of Thaw: copy it into the runs folder."))
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        regular = (here / name for name in sorted(names))
        files += [file for file in regular if file.is_file() and not file.is_symlink()]
    return files, skipped


def _event_logs(files: Iterable[Path], root: Path) -> Iterator[Candidate]:
    logs: dict[Path, list[tuple[str, Path]]] = {}
    for file in files:
        folder = file.absolute().parent
        stream = folder.name.lower() if folder.name.lower() in _STREAMS else ""
        # What was pointed at is shown as it was typed, as long as it lies there.
        shown = file.parent.parent if stream and file.parent.name else file.parent
        logs.setdefault(shown, []).append((stream, file))
    for path, found in logs.items():
        yield Candidate(path, name_of(path, root), "tensorboard", tuple(found))


def _states(files: Iterable[Path], root: Path, skipped: list[Skipped]) -> Iterator[Candidate]:
    """One candidate for each training: its checkpoints hold earlier states of the same file."""
    trainings: dict[Path, list[Path]] = {}
    for file in files:
        if file.name == STATE_JSON:
            within = file.parent.parent if _CHECKPOINT.fullmatch(file.parent.name) else file.parent
            trainings.setdefault(within, []).append(file)
    for states in trainings.values():
        *earlier, last = sorted(states, key=_progress)
        skipped += [Skipped(one, f"an earlier state of {last}.") for one in earlier]
        yield Candidate(last, name_of(last, root), "huggingface", (("", last),))


def _progress(state: Path) -> float:
    checkpoint = _CHECKPOINT.fullmatch(state.parent.name)
    return int(checkpoint[1]) if checkpoint else float("inf")


def _tables(
    files: Iterable[Path], root: Path, wanted: Format | None, skipped: list[Skipped]
) -> Iterator[Candidate]:
    for file in files:
        if file.suffix.lower() != ".csv" and not (file == root and wanted in _TABLES):
            continue
        kind = table_format(file)
        if kind is not None and wanted in _TABLES:
            kind = wanted
        if kind is None:
            skipped.append(Skipped(file, "a CSV file without a column named epoch is no log."))
        else:
            yield Candidate(file, name_of(file, root), kind, (("", file),))


_TABLES: Final[tuple[Format, ...]] = ("keras-csv", "lightning", "fastai")


def name_of(path: Path, root: Path, stamped: bool = False) -> str:
    """What to call a log: its place below the folder that was pointed at, without what says
    nothing; at least one telling word. `stamped` keeps the time at the end of a name."""
    path, root = path.absolute(), root.absolute()
    below = path.relative_to(root).parts if path != root and path.is_relative_to(root) else ()
    parts = list(below) or [path.name]
    above = list(path.parts[1 : len(path.parts) - len(parts)])
    parts[-1] = Path(parts[-1]).stem if path.suffix in (".csv", ".json") else parts[-1]
    if not stamped:
        parts = [_STAMP.sub("", part) for part in parts]
    while above and all(map(_PLAIN.fullmatch, parts)):
        parts.insert(0, above.pop())
    telling = [part for part in parts if not _PLAIN.fullmatch(part)]
    telling += filter(_VERSION.fullmatch, parts)
    # A run's folder takes 60 characters of it, and the last ones tell most.
    while len(telling) > 1 and len(" ".join(telling)) > _LONGEST:
        del telling[0]
    return " ".join(telling)


def check_size(path: Path, limit: int) -> None:
    """Raise LogError for a file that is too large to be a log."""
    size = path.stat().st_size
    if size > limit:
        raise LogError(
            f"{path.name} has {size / 2**20:,.0f} MB; Thaw reads such files up to "
            f"{limit // 2**20} MB."
        )

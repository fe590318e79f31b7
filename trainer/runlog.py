"""Runs on disk: list, read, follow (standard library only); trainer.run_writer writes them.

A run is a folder `runs/<run_id>/` with run.json (what it is) and metrics.jsonl (what happened, one
JSON object a line, append-only). Readers accept a run that is being written: a torn last line, an
unknown event or a newer schema never raises out of `list_runs`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Final, Literal, get_args

from trainer.files import lock, open_regular, read_bounded
from trainer.schema import (
    CHECKPOINTS,
    EPOCH_FIELDS,
    LATEST_TIME,
    METRICS_JSONL,
    MODEL_ONNX,
    PHASES,
    PREDICTIONS,
    RUN_JSON,
    SCHEMA_VERSION,
    EpochRecord,
    Status,
    ThawError,
)

RUN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VALUES: Final = operator.itemgetter(*EPOCH_FIELDS)
_NONE_BEFORE_ANY_STEP: Final = ("train_loss", "train_acc")
_COUNTS: Final = operator.itemgetter(
    "epoch", "phase_epoch", "trainable_params", "peak_memory_bytes"
)
_LARGEST_COUNT: Final = 2**63 - 1  # what a column of whole numbers holds


class RunError(ThawError):
    """A run folder that cannot be read or written."""


@dataclass(frozen=True)
class Run:
    """A run as read from disk; `problem` says what could not be read, if anything."""

    path: Path
    info: Mapping[str, Any]
    epochs: tuple[EpochRecord, ...] = field(default=(), repr=False)
    problem: str | None = None

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def parent_run_id(self) -> str | None:
        return self.info.get("parent_run_id")

    @property
    def status(self) -> Status:
        said: Status = self.info.get("status", "failed")
        return said if said in get_args(Status) else "failed"

    @property
    def phase(self) -> str | None:
        """The last phase that was started."""
        phases = self.info.get("phases") or []
        return phases[-1]["name"] if phases else None

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.info.get("classes", ()))

    @property
    def boundary(self) -> int | None:
        """The epoch after which layers were unfrozen (the finetune phase's epoch 0), or None."""
        for phase in self.info.get("phases") or []:
            if phase["name"] == "finetune":
                return int(phase["first_epoch"])
        return None

    @property
    def onnx(self) -> Path | None:
        path = self.path / MODEL_ONNX
        return path if path.is_file() else None

    def checkpoint(self, name: str) -> Path:
        """`name` is `<phase>-best` or `<phase>-last`."""
        return self.path / CHECKPOINTS / f"{name}.pt"

    def predictions(self, name: str) -> Path:
        """`name` is `before` or `after`."""
        return self.path / PREDICTIONS / f"{name}.npz"


Stamp = tuple[int, int, int] | None


def stamp(path: Path) -> Stamp:
    """Changes whenever a file is written or replaced; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    # The time of the last change of any kind, because that of the last write can be set back.
    return status.st_ino, status.st_ctime_ns, status.st_size


class RunReader:
    """Reads one run folder again and again: run.json when it has changed, and of a metrics.jsonl
    that only grew no more than what is new."""

    def __init__(self, path: Path, let_go: Callable[[Path], bool] | None = None) -> None:
        """`let_go` says of a log whether nobody writes it any more; by default its lock does."""
        self._let_go = let_go or _is_let_go
        self._run = Run(path, {})
        self._info_file, self._log_file = path / RUN_JSON, path / METRICS_JSONL
        self._stamps: list[Stamp] = [(-1, -1, -1), (-1, -1, -1)]
        self._info: dict[str, Any] | RunError = {}
        self._log = _Log()
        self._problem: str | None = None
        self._was_let_go = False

    def read(self) -> Run:
        """The run as it is now, the same object as before where nothing has changed.

        Raises RunError with the reason when run.json cannot be used.
        """
        run = self.read_or_explain()
        if isinstance(self._info, RunError):
            raise RunError(str(self._info))
        return run

    def read_or_explain(self) -> Run:
        """`read`, but an unreadable run comes back empty, with `problem` saying why."""
        # First run.json: when that says the run is done, its log is complete.
        changed = self._info_changed() | self._let_go_changed()
        if self._log_changed() or changed:
            if isinstance(self._info, RunError):
                self._run = Run(self._run.path, {}, problem=str(self._info))
            else:
                info = self._info | {"status": "interrupted"} if self._was_let_go else self._info
                self._run = Run(self._run.path, info, self._log.epochs, self._problem)
        return self._run

    def _let_go_changed(self) -> bool:
        """Whether the run says that it is running while nobody writes it: it was killed."""
        before, ended = self._was_let_go, False
        self._was_let_go = self._says_running() and self._let_go(self._log_file)
        if self._was_let_go and not before:
            # A writer says how the run has ended before it lets go, maybe just now.
            ended = self._info_changed()
            self._was_let_go = self._says_running()
        return ended or self._was_let_go != before

    def _says_running(self) -> bool:
        return not isinstance(self._info, RunError) and self._info.get("status") == "running"

    def _info_changed(self) -> bool:
        if not self._changed(0, self._info_file):
            return False
        try:
            self._info = _read_info(self._info_file)
        except RunError as error:
            self._info = error
        return True

    def _log_changed(self) -> bool:
        if not self._changed(1, self._log_file):
            return False
        self._log, self._problem = _read_log(self._log_file, self._log)
        return True

    def _changed(self, which: int, file: Path) -> bool:
        # Stamped before it is read: what is written in between shows the next time.
        before, self._stamps[which] = self._stamps[which], stamp(file)
        return self._stamps[which] != before


def read_run(path: Path) -> Run:
    """Read one run folder. Raises RunError with the reason when run.json cannot be used."""
    return RunReader(path).read()


def run_folders(runs_dir: Path) -> list[Path]:
    """The folders under `runs_dir` that hold a run, readable or not, sorted by name.

    None where there is no such folder; raises RunError where it cannot be read.
    """
    try:
        names = sorted(filter(RUN_ID.fullmatch, os.listdir(runs_dir)))  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunError(f"The runs folder {runs_dir} cannot be read: {error.strerror}.") from error
    return [path for name in names if _holds_run(path := runs_dir / name)]


def _holds_run(path: Path) -> bool:
    try:
        (path / RUN_JSON).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # one that cannot be read, which reading it will say
    return True


def list_runs(runs_dir: Path) -> list[Run]:
    """All runs under `runs_dir`, oldest first; an unreadable one has `problem` and no epochs."""
    runs = [RunReader(path).read_or_explain() for path in run_folders(runs_dir)]
    return sorted(runs, key=lambda run: run.info.get("started", 0.0))


def find_run(runs_dir: Path, reference: str) -> Run:
    """The run named by its id, a unique part of its id, or its path. Raises RunError."""
    as_path = Path(reference)
    if (as_path / RUN_JSON).is_file():
        return read_run(as_path)
    if not runs_dir.is_dir():
        raise RunError(f"There is no runs folder at {runs_dir}; name another with --runs-dir.")
    names = [path.name for path in run_folders(runs_dir)]
    if reference in names:
        return read_run(runs_dir / reference)
    matches = [name for name in names if reference in name]
    if len(matches) == 1:
        return read_run(runs_dir / matches[0])
    if matches:
        raise RunError(f"{reference!r} matches several runs: {', '.join(matches)}. Name one.")
    raise RunError(
        f"No run {reference!r} in {runs_dir}. It holds: {', '.join(names) or 'no runs at all'}."
    )


def is_being_written(run: Run) -> bool:
    """Whether a process writes the run now, whatever its status says: one that was killed leaves
    the status "running" behind."""
    try:
        with open_regular(run.path / METRICS_JSONL) as file:
            return not lock(file, fcntl.LOCK_SH)
    except OSError:
        return False


def _is_let_go(log: Path) -> bool:
    """Whether the process that wrote a log is gone; False also where that cannot be known."""
    try:
        with open_regular(log) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def follow(path: Path) -> Iterator[EpochRecord | None]:
    """Yield epoch records as they are appended, None whenever there is nothing new yet.

    Ends when the run's status is no longer "running". The caller decides how long to wait.
    """
    reader, seen = RunReader(path), 0
    while True:
        run = reader.read()
        yield from run.epochs[seen:]
        if len(run.epochs) == seen:
            if run.status != "running":
                return
            yield None
        seen = len(run.epochs)


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(read_bounded(path).decode())
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(info, dict):
        raise RunError(f"{path} must hold a JSON object.")
    version = info.get("schema_version")
    if not isinstance(version, int):
        raise RunError(f"{path} has no schema_version: it was not written by Thaw.")
    if version > SCHEMA_VERSION:
        raise RunError(
            f"{path} was written by a newer Thaw (schema {version}, this one reads up to "
            f"{SCHEMA_VERSION}). Update Thaw to see it."
        )
    _check_info(path, info)
    return info


def _check_info(path: Path, info: Mapping[str, Any]) -> None:
    phases = info.get("phases", [])
    sound = isinstance(phases, list) and all(
        isinstance(phase, dict)
        and phase.get("name") in PHASES
        and _is_count(phase.get("first_epoch"))
        for phase in phases
    )
    classes = info.get("classes", [])
    sound = sound and isinstance(classes, list) and all(isinstance(c, str) for c in classes)
    started = info.get("started", 0.0)
    sound = sound and _is_finite(started) and 0 <= started < LATEST_TIME
    sound = sound and isinstance(info.get("config", {}), dict)
    sound = sound and isinstance(info.get("dataset", {}), dict)
    sound = sound and isinstance(info.get("parent_run_id"), (str, type(None)))
    sound = sound and RUN_ID.fullmatch(info.get("parent_run_id") or "none") is not None
    if not sound:
        raise RunError(f"{path} is damaged: a field has the wrong type.")


_MARK_BYTES: Final = 256  # a line ends with its time, so no other log ends with the same bytes
_NAMED_LINES: Final = 5
LONGEST_LOG: Final = 200_000_000  # 400,000 epochs


@dataclass(frozen=True)
class _Log:
    """What has been read of a metrics.jsonl, and how to go on: `end` is the offset behind the last
    complete line, `mark` holds the bytes before it, `size` (a torn last line included) and `inode`
    are those of the file then. `damaged` numbers the first lines that were left out."""

    epochs: tuple[EpochRecord, ...] = ()
    damaged: tuple[int, ...] = ()
    lines: int = 0
    end: int = 0
    mark: bytes = b""
    size: int = 0
    inode: int = 0

    def read_on(self, file: FileIO) -> _Log:
        """The log as it is now. Where it only grew, only what is new is read; where a run that goes
        on has dropped lines, or another file has taken its place, all."""
        inode = os.fstat(file.fileno()).st_ino
        known = self if inode == self.inode and self._grew(file) else _Log(inode=inode)
        if os.fstat(file.fileno()).st_size - known.end > LONGEST_LOG:
            raise OSError(errno.EFBIG, f"more than {LONGEST_LOG // 10**6} MB are new in it")
        file.seek(known.end)
        return known._and(file.readall())

    def _grew(self, file: FileIO) -> bool:
        if os.fstat(file.fileno()).st_size <= self.size:
            return False
        file.seek(self.end - len(self.mark))
        return file.read(len(self.mark)) == self.mark

    def _and(self, content: bytes) -> _Log:
        epochs: list[EpochRecord] = []
        damaged: list[int] = []
        # What follows the last newline is empty or a line that is still being written.
        *lines, torn = content.split(b"\n")
        for number, line in enumerate(lines, start=self.lines + 1):
            try:
                event = json.loads(line)
                if event.get("event") == "epoch":
                    epochs.append(_epoch(event))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                damaged.append(number)
        complete = len(content) - len(torn)
        return _Log(
            (*self.epochs, *epochs),
            (*self.damaged, *damaged)[:_NAMED_LINES],
            self.lines + len(lines),
            self.end + complete,
            (self.mark + content[:complete])[-_MARK_BYTES:],
            self.end + len(content),
            self.inode,
        )


def _read_log(path: Path, known: _Log) -> tuple[_Log, str | None]:
    """Go on reading a log; also returns what could not be read."""
    try:
        with open_regular(path) as file:
            log = known.read_on(file)
    except FileNotFoundError:
        return _Log(), None  # a run that has just been created
    except OSError as error:
        return _Log(), f"{path} cannot be read: {error.strerror}."
    lines = list(log.damaged)
    return log, f"{path}: unreadable lines {lines} were left out." if lines else None


def _epoch(event: Mapping[str, Any]) -> EpochRecord:
    phase, *values = _VALUES(event)
    if phase not in PHASES:
        raise ValueError(phase)
    if not all(_is_count(value) for value in _COUNTS(event)):
        raise ValueError("counts are whole numbers")
    if not _all_finite(values):
        values = [_value(*one) for one in zip(EPOCH_FIELDS[1:], values, strict=True)]
    return EpochRecord(phase, *values)


def _all_finite(values: Sequence[Any]) -> bool:
    """False also where that is not sure. A look at each value would take as long as the JSON."""
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def _value(name: str, value: Any) -> Any:
    if _is_finite(value):
        return value
    if value is not None:
        raise ValueError(name)
    return None if name in _NONE_BEFORE_ANY_STEP else math.nan


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_COUNT


def _is_finite(value: Any) -> bool:
    # Compared, because math.isfinite refuses whole numbers that are too large for a float.
    limit = sys.float_info.max
    return isinstance(value, (int, float)) and -limit <= value <= limit


def checkpoint_path(
    run: Run,
    which: Literal["before", "after"],
    is_there: Callable[[Path], bool] = Path.is_file,
) -> Path:
    """The checkpoint from before unfreezing, or the best after it.

    "after" is the best checkpoint of the run's last phase. "before" is the one that the finetune
    phase started from: the parent's, at the boundary. Raises RunError with the reason and remedy.
    """
    if which == "after":
        path = run.checkpoint(f"{run.phase}-best")
    elif run.boundary is None:
        raise RunError(
            f"Run {run.run_id} has no finetune phase, so there is no 'before'; use 'after'."
        )
    else:
        path = run.path.parent / (run.parent_run_id or "none") / CHECKPOINTS / _parent_file(run)
    if not is_there(path):
        raise RunError(
            f"The checkpoint {path} is not there: the run has not written it, or it was deleted."
        )
    return path


def _parent_file(run: Run) -> str:
    said = run.info.get("parent_checkpoint")
    name = said.get("file") if isinstance(said, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"[a-z]+-(best|last)\.pt", name):
        raise RunError(f"{run.path / RUN_JSON} does not name the parent's checkpoint.")
    return name

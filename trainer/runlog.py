"""Runs on disk: create, append, read, follow (standard library only).

A run is a folder `runs/<run_id>/` with run.json (what it is) and metrics.jsonl (what happened, one
JSON object a line, append-only). Readers accept a run that is being written: a torn last line, an
unknown event or a newer schema never raises out of `list_runs`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import math
import operator
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import IO, Any, Final, Literal, get_args

from trainer.files import open_regular, read_bounded
from trainer.schema import (
    CHECKPOINTS,
    EPOCH_FIELDS,
    METRICS_JSONL,
    MODEL_ONNX,
    PHASES,
    PREDICTIONS,
    RUN_JSON,
    SCHEMA_VERSION,
    EpochRecord,
    Phase,
    PhaseRecord,
    Status,
    ThawError,
    Unfreezing,
)

_RUN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Nobody but the run's own writer writes here.
_OWN_FOLDERS: Final = (CHECKPOINTS, PREDICTIONS)
_VALUES: Final = operator.itemgetter(*EPOCH_FIELDS)
_NONE_BEFORE_ANY_STEP: Final = ("train_loss", "train_acc")
_TEMPORARY: Final = ".tmp"
# Writing a file takes seconds; after this nobody is writing it any more.
_ABANDONED_SECONDS: Final = 3600.0
# The disk is full, or the share of it that a user or a process may have.
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A reader that looks whether a run is written holds the lock for an instant.
_LOCK_SECONDS: Final = 0.3
_WHOLE_NUMBERS: Final = ("epoch", "phase_epoch", "trainable_params", "peak_memory_bytes")


class RunError(ThawError):
    """A run folder that cannot be read or written."""


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` whole or leave it as it was, also through a crash or a full disk.

    Raises OSError, on a full disk saying how much space is left.
    """
    try:
        _replace(path, content)
    except OSError as error:
        raise said_with_space(error, path) from error


def said_with_space(error: OSError, path: Path) -> OSError:
    """The error as it is, or where the disk of `path` is full, with what is left in its text."""
    if error.errno not in _FULL:
        return error
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return error
    space = f"{error.strerror}, {free / 1e6:,.1f} MB are free in {path.parent}"
    return OSError(error.errno, space, str(path))


def _replace(path: Path, content: bytes) -> None:
    remove_temporary(path.parent, glob.escape(path.name), _ABANDONED_SECONDS)
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY
    )
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp's 0600 would hide the run from a shared explorer
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_temporary(folder: Path, name: str, age: float) -> None:
    """Remove what processes left behind that were killed while they wrote `folder`/`name`; `age`
    in seconds is how long nobody may have touched it. `name` is a pattern."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f".{name}.*{_TEMPORARY}"):
            if time.time() - path.stat().st_mtime >= age:
                path.unlink(missing_ok=True)


# --- writing ----------------------------------------------------------------------------------


class RunWriter:
    """Writes one run; the only writer of its folder.

    `info` is the content of run.json; change it with `update`, which saves it at once.
    """

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path = path
        self.info = info
        try:
            # Unbuffered: of a line that cannot be written nothing is left to be written later.
            self._metrics = (path / METRICS_JSONL).open("ab", buffering=0)
        except OSError as error:
            raise _not_written(path / METRICS_JSONL, error) from error
        self._log = os.fstat(self._metrics.fileno())
        try:
            if not _lock_patiently(self._metrics):
                raise RunError(f"Run {path.name} is being written by another process.")
            self._save()
        except BaseException:
            self._metrics.close()
            raise

    @property
    def run_id(self) -> str:
        return self.path.name

    @classmethod
    def create(cls, runs_dir: Path, name: str, info: Mapping[str, Any]) -> RunWriter:
        """Make a new folder `<date>-<time>-<name>` under `runs_dir`; never reuses one.

        Raises RunError when the folder cannot be written.
        """
        stem = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{_slug(name)}"
        return cls._begin(_new_folder(runs_dir, stem), info)

    @classmethod
    def begin_again(cls, run: Run, info: Mapping[str, Any]) -> RunWriter:
        """As `create`, in the folder of a run that was stopped before anything was kept of it.

        Raises RunError while another process writes it.
        """
        writer = cls._begin(run.path, info)
        os.truncate(run.path / METRICS_JSONL, 0)
        writer._remove_temporary()
        return writer

    @classmethod
    def _begin(cls, path: Path, info: Mapping[str, Any]) -> RunWriter:
        for folder in _OWN_FOLDERS:
            try:
                (path / folder).mkdir(exist_ok=True)
            except OSError as error:
                raise _not_written(path / folder, error) from error
        head = {
            "schema_version": SCHEMA_VERSION,
            "run_id": path.name,
            **_running(),
            "started": time.time(),
            "phases": [],
        }
        return cls(path, head | dict(info))

    @classmethod
    def reopen(cls, run: Run, last_epoch: int) -> RunWriter:
        """Go on with a run after its epoch `last_epoch`; what it logged after that is dropped.

        Raises RunError while another process writes it.
        """
        writer = cls(run.path, {**run.info, **_running()})
        writer._remove_temporary()
        log = run.path / METRICS_JSONL
        os.truncate(log, _end_of_epoch(log.read_bytes(), last_epoch))
        writer.note(f"Resumed after epoch {last_epoch}.")
        return writer

    def checkpoint(self, name: str) -> Path:
        """`name` is `<phase>-best` or `<phase>-last`."""
        return self._folder(CHECKPOINTS) / f"{name}.pt"

    def predictions(self, name: str) -> Path:
        """`name` is `before` or `after`."""
        return self._folder(PREDICTIONS) / f"{name}.npz"

    def _folder(self, name: str) -> Path:
        """A folder of the run; made again where somebody has removed it meanwhile."""
        self.check_there()
        path = self.path / name
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise _not_written(path, error) from error
        return path

    def _remove_temporary(self) -> None:
        """What an earlier writer of this run left behind that was killed."""
        remove_temporary(self.path, RUN_JSON, age=-math.inf)
        for folder in _OWN_FOLDERS:
            remove_temporary(self.path / folder, "*", age=-math.inf)

    def update(self, **changes: Any) -> None:
        self.info.update(changes)
        self._save()

    def start_phase(self, phase: PhaseRecord) -> None:
        self.update(phases=[*self.info["phases"], phase.to_dict()])
        self._append(
            {
                "event": "phase",
                "phase": phase.name,
                "epoch": phase.first_epoch,
                "trainable_params": phase.trainable_params,
                "time": time.time(),
            }
        )

    def unfreeze(self, phase: Phase, unfreezing: Unfreezing) -> None:
        """Further layers train from here on, as the phase's record says they will."""
        self._append(
            {
                "event": "unfreeze",
                "phase": phase,
                "epoch": unfreezing.epoch,
                "trainable_params": unfreezing.trainable_params,
                "time": time.time(),
            }
        )

    def end_phase(self, last_epoch: int) -> None:
        *earlier, phase = self.info["phases"]
        self.update(phases=[*earlier, phase | {"last_epoch": last_epoch}])

    def epoch(self, record: EpochRecord) -> None:
        self._append(record.to_dict())

    def imported_epoch(self, record: EpochRecord) -> None:
        """As `epoch`, but a NaN says that the imported log does not hold this number."""
        values = record.to_dict().items()
        self._append({name: None if value != value else value for name, value in values})

    def note(self, text: str) -> None:
        self._append({"event": "note", "text": text, "time": time.time()})

    def close(self, status: Status, reason: str | None = None) -> None:
        """Write the "stop" event and the final status."""
        try:
            self._append({"event": "stop", "status": status, "reason": reason, "time": time.time()})
            self.update(status=status, ended=time.time())
        finally:
            self._metrics.close()  # last: who finds the lock open may rely on the status

    def check_there(self) -> None:
        """Raise RunError where somebody has deleted or moved the run's folder: a log that is open
        takes every line without an error then, and loses it."""
        try:
            there = os.path.samestat((self.path / METRICS_JSONL).stat(), self._log)
        except OSError:
            there = False
        if not there:
            raise RunError(
                f"The run folder {self.path} was deleted or moved while the run was trained, so "
                "nothing more can be recorded. Where it was moved, move it back and go on with "
                "--resume; where it was deleted, train again."
            )

    def _append(self, event: Mapping[str, Any]) -> None:
        self.check_there()
        # allow_nan=False: a non-finite loss must stop the run, not write a line nobody can parse.
        line = json.dumps(event, allow_nan=False).encode() + b"\n"
        end = os.fstat(self._metrics.fileno()).st_size
        try:
            while line:
                line = line[self._metrics.write(line) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._metrics.fileno(), end)
            raise _not_written(self.path / METRICS_JSONL, error) from error

    def _save(self) -> None:
        self.check_there()
        text = json.dumps(self.info, indent=2, allow_nan=False)
        try:
            write_atomically(self.path / RUN_JSON, text.encode())
        except OSError as error:
            raise _not_written(self.path / RUN_JSON, error) from error


def _not_written(path: Path, error: OSError) -> RunError:
    return RunError(f"Cannot write {path}: {said_with_space(error, path).strerror}.")


def _running() -> dict[str, Any]:
    return {"status": "running", "pid": os.getpid(), "ended": None}


def _lock_patiently(file: IO[bytes]) -> bool:
    """Lock it for writing; whether nobody else writes it."""
    until = time.monotonic() + _LOCK_SECONDS
    while not _lock(file, fcntl.LOCK_EX):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def _lock(file: IO[bytes], kind: int) -> bool:
    """Whether nobody else holds a lock against it. A lock ends with its process, however that
    ends; on a file system without locks nobody ever holds one."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def is_being_written(run: Run) -> bool:
    """Whether a process writes the run now, whatever its status says: one that was killed leaves
    the status "running" behind."""
    try:
        with open_regular(run.path / METRICS_JSONL) as file:
            return not _lock(file, fcntl.LOCK_SH)
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


def _end_of_epoch(content: bytes, epoch: int) -> int:
    """The offset behind the line of an epoch in a log."""
    end, offset = 0, 0
    for line in content.splitlines(keepends=True):
        offset += len(line)
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "epoch":
            if event.get("epoch", epoch) > epoch:
                break
            end = offset
    return end


def check_writable(runs_dir: Path) -> None:
    """Raise RunError where no run folder can be made; changes nothing."""
    existing = next(
        path for path in (runs_dir.absolute(), *runs_dir.absolute().parents) if path.exists()
    )
    if not existing.is_dir():
        raise _cannot_write(runs_dir, f"{existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _cannot_write(runs_dir, f"no permission to write to {existing}")


def _cannot_write(runs_dir: Path, reason: str | None) -> RunError:
    return RunError(
        f"Cannot write to the runs folder {runs_dir}: {reason}. Choose another with --runs-dir."
    )


def _new_folder(runs_dir: Path, stem: str) -> Path:
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 1000):
            path = runs_dir / (stem if attempt == 1 else f"{stem}-{attempt}")
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
    except OSError as error:
        raise _cannot_write(runs_dir, error.strerror) from error
    raise RunError(f"{runs_dir} already holds 999 runs named {stem}; choose another --run-name.")


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60] or "run"


# --- reading ----------------------------------------------------------------------------------


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

    def __init__(self, path: Path) -> None:
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
        self._was_let_go = self._says_running() and _is_let_go(self._log_file)
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
        names = sorted(filter(_RUN_ID.fullmatch, os.listdir(runs_dir)))  # noqa: PTH208
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
        and isinstance(phase.get("first_epoch"), int)
        and _is_finite(phase["first_epoch"])
        for phase in phases
    )
    classes = info.get("classes", [])
    sound = sound and isinstance(classes, list) and all(isinstance(c, str) for c in classes)
    sound = sound and _is_finite(info.get("started", 0.0))
    sound = sound and isinstance(info.get("config", {}), dict)
    sound = sound and isinstance(info.get("dataset", {}), dict)
    sound = sound and isinstance(info.get("parent_run_id"), (str, type(None)))
    sound = sound and _RUN_ID.fullmatch(info.get("parent_run_id") or "none") is not None
    if not sound:
        raise RunError(f"{path} is damaged: a field has the wrong type.")


_MARK_BYTES: Final = 256  # a line ends with its time, so no other log ends with the same bytes
_NAMED_LINES: Final = 5
_LONGEST_LOG: Final = 200_000_000  # 400,000 epochs


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
        if os.fstat(file.fileno()).st_size - known.end > _LONGEST_LOG:
            raise OSError(errno.EFBIG, f"more than {_LONGEST_LOG // 10**6} MB are new in it")
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
    if value is not None or name in _WHOLE_NUMBERS:
        raise ValueError(name)
    return None if name in _NONE_BEFORE_ANY_STEP else math.nan


def _is_finite(value: Any) -> bool:
    # Compared, because math.isfinite refuses whole numbers that are too large for a float.
    limit = sys.float_info.max
    return isinstance(value, (int, float)) and -limit <= value <= limit


def checkpoint_path(run: Run, which: Literal["before", "after"]) -> Path:
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
    if not path.is_file():
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

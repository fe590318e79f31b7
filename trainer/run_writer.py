"""Write a run on disk (standard library only): its folder, run.json and metrics.jsonl.

metrics.jsonl is append-only, but that a run which goes on drops what it logged after its last
checkpoint. trainer.runlog reads runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

from trainer.files import lock, remove_temporary, said_with_space, write_atomically
from trainer.runlog import Run, RunError
from trainer.schema import (
    CHECKPOINTS,
    METRICS_JSONL,
    PREDICTIONS,
    RUN_JSON,
    SCHEMA_VERSION,
    EpochRecord,
    Phase,
    PhaseRecord,
    Status,
    Unfreezing,
)

# Nobody but the run's own writer writes here.
_OWN_FOLDERS: Final = (CHECKPOINTS, PREDICTIONS)
# A reader that looks whether a run is written holds the lock for an instant.
_LOCK_SECONDS: Final = 0.3


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
    while not lock(file, fcntl.LOCK_EX):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
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

"""An export as a process that the page watches. Knows neither Streamlit nor torch."""

from __future__ import annotations

import codecs
import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import export
from explorer.access import may_write
from export.metadata import Which
from export.precision import Precision
from trainer.runlog import Run
from trainer.schema import ThawError

State = Literal["running", "done", "refused", "failed", "cancelled"]

_LINES: Final = 100
_LONGEST: Final = 4000
_TERMINAL: Final = (24, 100)  # rows and columns; without a width tqdm draws no counts
_ERROR: Final = "error: "
# The bars of the export: what each is called in a terminal, and here.
_STEPS: Final = {
    "calibrating": "Calibrating on training photos: {:,} of {:,}",
    "choosing layers": "Choosing what stays in float32: tried {:,} of at most {:,}",
    "comparing with PyTorch": "Comparing with PyTorch: {:,} of {:,} photos",
}
_BAR: Final = re.compile(rf"({'|'.join(_STEPS)}): [^\r\n]*?(\d+)/(\d+) \[")
# How export.parity says that a model was measured and is not as equal as its precision demands.
_REFUSED: Final = "was not written"
_MEMORY: Final = (
    "The system does this when its memory is used up. Close other programs, then export again."
)
_UNFORESEEN: Final = "Thaw did not foresee this. The command, typed in a terminal, says more."
_REMEDIES: Final = {
    "--data DIR": "On this page the new place goes into the field for photos that have moved.",
    "No space left": "Make room on the disk of the runs folder, then export again.",
    "--precision": "On this page the precision is chosen above.",
}
# Makes the terminal it is given the one that controls it, so that the process ends with it, and
# becomes the command. In Python and not in Popen's preexec_fn, which may lock up where there are
# threads. Whoever starts the app with nohup does not mean the export to outlive it.
_LAUNCH: Final = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class ExportingError(ThawError):
    """An export that cannot be started."""


def command(
    run: Run, which: Which, data: Path | None, runs_dir: Path, precision: Precision = "fp32"
) -> list[str]:
    """What a user would type to export this checkpoint; `data` is where the photos are now."""
    words = ["python", "-m", "export", run.run_id]
    words += ["--checkpoint", which] if which == "before" else []
    words += ["--precision", precision] if precision != "fp32" else []
    words += ["--data", str(data)] if data else []
    return words + (["--runs-dir", str(runs_dir)] if runs_dir != Path("runs") else [])


def runnable(typed: Sequence[str]) -> list[str]:
    """The same for this Python. -P: a folder `export` where the app was started is not ours."""
    return [sys.executable, "-P", *typed[1:]]


@dataclass(frozen=True)
class Step:
    """A part of the work: what it does, in words, and the fraction that is done."""

    text: str
    done: float


@dataclass(frozen=True)
class Report:
    """A job at one moment. `step` is what it is at, None before the first that can be counted.
    `message` says why a job failed or its model was refused, in words that may hold any name;
    `remedy` what to do."""

    state: State
    seconds: float
    step: Step | None = None
    message: str = ""
    remedy: str = ""


class Job:
    """A command in a process of its own, which ends with the app however that ends.

    It gets a terminal of its own: only there does it show its progress, and the system hangs the
    terminal up when the app is gone. Raises ExportingError where no process can be started.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._screen = _Screen()
        self._started = time.monotonic()
        self._seconds: float | None = None
        self._cancelled = False
        try:
            self._process, terminal = _launch(command)
        except OSError as error:
            raise ExportingError(f"No process can be started: {error.strerror}.") from error
        threading.Thread(target=self._follow, args=(terminal,), daemon=True).start()

    def cancel(self) -> None:
        """End the process. A model is written whole at the very end, so none is left half done."""
        self._cancelled = True
        self._process.terminate()

    def report(self) -> Report:
        if self._seconds is None:
            return Report("running", time.monotonic() - self._started, self._screen.step)
        status = self._process.returncode
        if status == 0:
            return Report("done", self._seconds)
        if self._cancelled:
            return Report("cancelled", self._seconds)
        message, remedy = _explained(status, self._screen.lines)
        refused = status == 2 and _REFUSED in message
        return Report("refused" if refused else "failed", self._seconds, None, message, remedy)

    def _follow(self, terminal: int) -> None:
        try:
            while chunk := os.read(terminal, 65536):
                self._screen.feed(chunk)
        except OSError:
            pass  # how Linux says that the other side was closed
        finally:
            os.close(terminal)
        self._process.wait()
        self._seconds = time.monotonic() - self._started  # last: from now on it has ended


def _launch(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], int]:
    """The process, and our side of its terminal."""
    ours, theirs = os.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", *_TERMINAL, 0, 0))
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCH, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=_environment(),
            start_new_session=True,
        )
    except OSError:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    return process, ours


def _environment() -> dict[str, str]:
    """Thaw's own folder comes first among the packages, wherever the app was started."""
    places = [str(Path(str(export.__file__)).resolve().parents[1])]
    places += filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONPATH": os.pathsep.join(places), "PYTHONIOENCODING": "utf-8"}


class _Screen:
    """The last lines of a terminal's output. A carriage return begins a line anew."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._unfinished = ""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    @property
    def lines(self) -> list[str]:
        return [*self._lines, *filter(None, [_overwritten(self._unfinished)])]

    def feed(self, chunk: bytes) -> None:
        text = self._unfinished + self._decode(chunk)
        for name, done, total in _BAR.findall(text)[-1:]:
            words = _STEPS[name].format(int(done), int(total))
            self.step = Step(words, int(done) / max(int(total), 1))
        *complete, unfinished = text.split("\n")
        self._lines.extend(filter(None, map(_overwritten, complete)))
        self._unfinished = unfinished[-_LONGEST:]


def _overwritten(line: str) -> str:
    """What is left of a line: what came after its last carriage return."""
    shown = [part for part in line.split("\r") if part.strip()]
    return shown[-1].rstrip()[-_LONGEST:] if shown else ""


def _explained(status: int, lines: Sequence[str]) -> tuple[str, str]:
    """Why a process ended with this status, and what to do about it."""
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"{-status}"
        killed = -status == signal.SIGKILL
        return f"The process was ended from outside ({name}).", _MEMORY if killed else ""
    last = next((n for n in reversed(range(len(lines))) if lines[n].startswith(_ERROR)), None)
    if status != 2 or last is None:
        return (lines or ["It said nothing."])[-1], _UNFORESEEN
    message = "\n".join(lines[last:]).removeprefix(_ERROR)
    return message, next((says for sign, says in _REMEDIES.items() if sign in message), "")


class Jobs:
    """At most one job for each model file; shared by all sessions."""

    def __init__(self) -> None:
        self._jobs: dict[Path, Job] = {}
        self._lock = threading.Lock()

    def of(self, model: Path) -> Job | None:
        """The newest job that writes this file, ended or not."""
        return self._jobs.get(model.absolute())

    def start(self, model: Path, command: Sequence[str]) -> Job:
        """The job that writes this file: a new one, or the one that is at it. Raises
        ExportingError, ReadOnlyError."""
        may_write("An export")
        with self._lock:
            job = self.of(model)
            if job is None or job.report().state != "running":
                job = self._jobs[model.absolute()] = Job(command)
            return job

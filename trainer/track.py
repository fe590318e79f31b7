"""`--track mlflow`: a run's log, sent to MLflow as it is written. No torch; MLflow when it is used.

What is on disk is the truth, and MLflow a copy of it: each look at a run sends what is missing
there, be it a moment after an epoch, at the end, or by `python -m trainer track`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shlex
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from trainer.cache import say
from trainer.cli import inert
from trainer.grid import NOT_TRAINING
from trainer.runlog import Run, RunError, RunReader
from trainer.schema import CHECKPOINTS, METRICS_JSONL, RUN_JSON, EpochRecord, Status, ThawError
from trainer.tested import read_tested

_EXPERIMENT: Final = "thaw"
_LOOK_SECONDS: Final = 2.0
_AGAIN_SECONDS: Final = 30.0
_ENOUGH: Final = 2
# Of MLflow's, for a server that is away or slow, so that no training waits for minutes at its end.
_DEFAULTS: Final = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_LONGEST_PARAM: Final = 6000
_MOST_METRICS: Final = 1000  # in one request
_MOST_PARAMS: Final = 100
_METRICS: Final = (
    *("train_loss", "train_acc", "val_loss", "val_acc", "val_top5", "val_macro_f1"),
    *("lr_head", "lr_backbone", "trainable_params", "seconds", "images_per_second"),
    "peak_memory_bytes",
)
# Small ones, sent each time: all of them together replace what was sent before.
_FILES: Final = (RUN_JSON, METRICS_JSONL, "test.json", "parity*.json", "model-card*.md")
_STATUS: Final[Mapping[Status, str]] = {
    "running": "RUNNING",
    "done": "FINISHED",
    "interrupted": "KILLED",
    "failed": "FAILED",
}
_KEY: Final = "thaw.key"
_SENT: Final = "thaw.checkpoint_sha256"
_PARENT: Final = "mlflow.parentRunId"
_CREDENTIALS: Final = re.compile(r"(?<=://)[^/@\s]*@")


class TrackError(ThawError):
    """MLflow that is not installed, or that takes nothing."""


def check_tracker(track: str | None) -> None:
    """Raise TrackError where what is to track a run is not installed."""
    if track is not None and find_spec("mlflow") is None:
        raise TrackError(
            "--track mlflow: MLflow is not installed. Install its client: pip install -r "
            "requirements-mlflow.txt"
        )


# --- while a run is trained ---------------------------------------------------------------------


class _Tracker:
    """Sends the runs that it follows from a thread of its own; whatever fails, training goes on."""

    def __init__(self) -> None:
        self._followed: list[Path] = []
        self._mirror: Mirror | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, daemon=True)
        self._said = self._gave_up = ""

    def follow(self, path: Path) -> None:
        self._followed.append(path)
        if not self._thread.is_alive():
            self._thread.start()

    def _keep_up(self) -> None:
        pause = _LOOK_SECONDS
        while not self._stop.wait(pause):
            problem = self._send(False)
            pause = _AGAIN_SECONDS if problem else _LOOK_SECONDS
            if self._stop.is_set():
                self._gave_up = problem  # just now: asking again would only take as long again
            elif problem and not self._said:
                self._said = problem
                say(f"{problem} Training goes on; what is missing is sent at the end.")

    def _send(self, ended: bool) -> str:
        """Send what is new of all runs; why that failed, if it did."""
        problem, failed = "", 0
        try:
            mirror = self._mirror = self._mirror or Mirror()
        except TrackError as error:
            return str(error)
        for path in list(self._followed):
            try:
                mirror.send(path, ended)
                failed = 0
            except TrackError as error:
                problem, failed = str(error), failed + 1
            if failed == _ENOUGH:  # it is not this one run
                break
        return problem

    def finish(self) -> None:
        """Send all that is missing of runs that have ended."""
        if not self._followed:
            return
        self._stop.set()
        self._thread.join()
        if problem := self._gave_up or self._send(True):
            runs_dir = self._followed[0].parent
            names = [path.name for path in self._followed]
            words = ["python", "-m", "trainer", "track", *names, "--runs-dir", str(runs_dir)]
            why = "MLflow has not taken all." if problem == self._said else problem
            say(f"{why} To send what is missing later: {inert(shlex.join(words))}")


_active: _Tracker | None = None


@contextlib.contextmanager
def tracking(track: str | None) -> Iterator[None]:
    """Meanwhile runs can be followed; at its end they have ended, and all of them is sent."""
    global _active
    if track is None:
        yield
        return
    tracker = _active = _Tracker()
    try:
        yield
    finally:
        _active = None
        tracker.finish()


def follow(path: Path) -> None:
    """Track the run in this folder from now on, where tracking is on."""
    if _active is not None:
        _active.follow(path)


# --- what is sent -------------------------------------------------------------------------------


@dataclass
class _Copy:
    """A run in MLflow: its id there, and what of it is there already, metrics by their steps."""

    id: str
    steps: dict[str, set[int]]
    params: dict[str, str]
    tags: dict[str, str]
    reader: RunReader
    last: Run | None = field(default=None, repr=False)


class Mirror:
    """Sends runs to MLflow, each once, however often; everything here raises TrackError.

    Where it is says $MLFLOW_TRACKING_URI, in which experiment $MLFLOW_EXPERIMENT_NAME ("thaw").
    """

    def __init__(self) -> None:
        check_tracker("mlflow")
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        self._copies: dict[Path, _Copy] = {}
        self._opening: set[Path] = set()
        self._experiment = ""
        self._where = "MLflow"
        with self._explained():
            mlflow = import_module("mlflow")
            logging.getLogger("mlflow").setLevel(logging.WARNING)
            self._entities = import_module("mlflow.entities")
            self._where = f"MLflow at {_CREDENTIALS.sub('', mlflow.get_tracking_uri())}"
            self._client = mlflow.MlflowClient()
            self._experiment = self._find_experiment()

    @property
    def where(self) -> str:
        link = "/#/experiments/" if "http" in self._where else ", experiment "
        return f"{self._where}{link}{self._experiment}"

    def send(self, path: Path, ended: bool = True) -> int:
        """Send what MLflow has not of a run; returns how many epochs that were.

        With `ended` also its files and how it ended, unless it is still being trained.
        """
        with self._explained():
            copy = self._copies.get(path) or self._opened(path)
            run = copy.reader.read()
            if run is copy.last and not ended:
                return 0
            sent = self._send_log(copy, run)
            if ended and run.status != "running":
                self._send_end(copy, run)
            copy.last = run
            return sent

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ThawError as error:
            raise TrackError(str(error)) from error
        except Exception as error:  # of MLflow, its stores, the network: a dozen libraries
            raise TrackError(f"{self._where} does not take the runs: {_said(error)}.") from error

    def _find_experiment(self) -> str:
        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _EXPERIMENT
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except Exception:
                found = self._client.get_experiment_by_name(name)
                if found is None:  # or another process has just made it
                    raise
        return str(found.experiment_id)

    # --- a run there ----------------------------------------------------------------------------

    def _opened(self, path: Path) -> _Copy:
        """The run's copy: the one that is there, found by its key, or a new one."""
        self._opening.add(path)
        try:
            self._copies[path] = self._found_or_made(RunReader(path))
        finally:
            self._opening.discard(path)
        return self._copies[path]

    def _found_or_made(self, reader: RunReader) -> _Copy:
        run = reader.read()
        key = _key(run)
        asked = f"tags.`{_KEY}` = '{key}'"
        there = self._client.search_runs([self._experiment], asked, max_results=1)
        if there:
            data, run_id = there[0].data, there[0].info.run_id
            steps = {name: self._steps_of(run_id, name) for name in data.metrics}
            self._client.update_run(run_id, status=_STATUS[run.status])
            return _Copy(run_id, steps, dict(data.params), dict(data.tags), reader)
        tags = {_KEY: key} | _tags(run) | self._parent_of(run)
        started = int(1000 * run.info.get("started", time.time()))
        made = self._client.create_run(self._experiment, started, tags, run.run_id)
        return _Copy(made.info.run_id, {}, {}, tags, reader)

    def _steps_of(self, run_id: str, name: str) -> set[int]:
        return {metric.step for metric in self._client.get_metric_history(run_id, name)}

    def _parent_of(self, run: Run) -> dict[str, str]:
        """The tag by which MLflow shows a run under another: under the one it started from."""
        parent = run.path.parent / (run.parent_run_id or "none")
        # A hand-edited run.json could name itself its own ancestor.
        if parent in self._opening or not (parent / RUN_JSON).is_file():
            return {}
        try:
            if parent not in self._copies:
                self.send(parent)
        except TrackError as error:
            if isinstance(error.__cause__, RunError):  # a parent that cannot be read
                return {}
            raise
        return {_PARENT: self._copies[parent].id}

    # --- what is sent of it ---------------------------------------------------------------------

    def _send_log(self, copy: _Copy, run: Run) -> int:
        """Settings, tags and epochs that are not there."""
        params = {k: v for k, v in _params(run).items() if k not in copy.params}
        tags = {k: v for k, v in _tags(run).items() if copy.tags.get(k) != v}
        metrics = [
            self._entities.Metric(name, float(value), int(1000 * record.time), record.epoch)
            for record in run.epochs
            for name, value in _values(record)
            if record.epoch not in copy.steps.get(name, ())
        ]
        pairs = [self._entities.Param(*item) for item in params.items()]
        marks = [self._entities.RunTag(*item) for item in tags.items()]
        for start in range(0, max(len(pairs), len(marks)), _MOST_PARAMS // 2):
            part = slice(start, start + _MOST_PARAMS // 2)
            self._client.log_batch(copy.id, params=pairs[part], tags=marks[part])
        copy.params |= params
        copy.tags |= tags
        for start in range(0, len(metrics), _MOST_METRICS):
            some = metrics[start : start + _MOST_METRICS]
            self._client.log_batch(copy.id, metrics=some)
            for metric in some:
                copy.steps.setdefault(metric.key, set()).add(metric.step)
        return len({metric.step for metric in metrics})

    def _send_end(self, copy: _Copy, run: Run) -> None:
        """What is known of a run when it has ended, its files, and how it ended."""
        known = self._client.get_run(copy.id).data.metrics
        for name, (value, step) in _outcome(run).items():
            if known.get(name) != value:
                self._client.log_metric(copy.id, name, value, step=step)
        for pattern in _FILES:
            for file in sorted(run.path.glob(pattern)):
                self._client.log_artifact(copy.id, str(file))
        self._send_checkpoint(copy, run)
        ended = run.info.get("ended") or time.time()
        self._client.set_terminated(copy.id, _STATUS[run.status], int(1000 * ended))

    def _send_checkpoint(self, copy: _Copy, run: Run) -> None:
        """The best one, unless it is there already."""
        path = run.checkpoint(f"{run.phase}-best")
        hashes = path.with_name(f"{path.name}.sha256")
        if not (path.is_file() and hashes.is_file()):
            return
        digest = hashes.read_text().split(maxsplit=1)[0]
        if copy.tags.get(_SENT) != digest:
            for file in (path, hashes):
                self._client.log_artifact(copy.id, str(file), CHECKPOINTS)
            self._client.set_tag(copy.id, _SENT, digest)
            copy.tags[_SENT] = digest


def _said(error: Exception) -> str:
    """Why, in a line that fits a terminal."""
    text = _CREDENTIALS.sub("", str(error).strip() or type(error).__name__)
    if unanswered := re.search(r"Max retries exceeded.*?Caused by (\w+)", text):
        return f"no answer ({unanswered[1]})"
    return inert(text.splitlines()[0][:200].rstrip("."))


def _key(run: Run) -> str:
    """By which a run is known again: also on another machine, and when it began anew in its
    folder, but not another one of the same name."""
    what = [run.run_id, run.parent_run_id, run.info.get("dataset", {}).get("fingerprint")]
    text = json.dumps([*what, _params(run)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _params(run: Run) -> dict[str, str]:
    """The settings that decide what is trained, flat: schedule.name, augmentation.rotation."""
    config = run.info.get("config", {})
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": one for inner, one in value.items()}
        elif name not in NOT_TRAINING:
            flat[name] = value
    return {
        _name(name): str(value)[:_LONGEST_PARAM]
        for name, value in flat.items()
        if value is not None
    }


def _name(text: str) -> str:
    """One that MLflow takes for a setting."""
    return re.sub(r"[^\w.\- /]", "_", text)[:250]


def _tags(run: Run) -> dict[str, str]:
    """What the run is, to search and group by in MLflow."""
    info, sweep = run.info, run.info.get("sweep")
    said: dict[str, Any] = {
        "run_id": run.run_id,
        "parent_run_id": run.parent_run_id,
        "phase": run.phase,
        "boundary": run.boundary,
        "data": info.get("dataset", {}).get("name"),
        "fingerprint": info.get("dataset", {}).get("fingerprint"),
        "recipe": info.get("recipe"),
        "status": run.status,
    }
    if isinstance(sweep, Mapping):
        said |= {f"sweep.{name}": sweep.get(name) for name in ("id", "name", "group", "member")}
        said["control"] = str(sweep.get("control", False)).lower()
    return {f"thaw.{name}": str(value)[:5000] for name, value in said.items() if value is not None}


def _values(record: EpochRecord) -> Iterator[tuple[str, float]]:
    for name in _METRICS:
        value = getattr(record, name)
        if value is not None and not math.isnan(value):
            yield f"{record.phase}/{name}", value


def _outcome(run: Run) -> dict[str, tuple[float, int]]:
    """What a run reached, in columns that runs of all phases share: value and epoch by name."""
    found: dict[str, tuple[float, int]] = {}
    trained = [one for one in run.epochs if one.phase_epoch > 0 or run.phase == "direct"]
    best = max(trained, key=lambda record: record.rank, default=None)
    if best is not None and not math.isnan(best.val_acc):
        found["best_val_acc"] = best.val_acc, best.epoch
        found["best_epoch"] = float(best.epoch), best.epoch
        start = [one.val_acc for one in run.epochs if one.epoch == run.boundary]
        if start and run.phase == "finetune":
            found["boundary_val_acc"] = start[-1], best.epoch
            found["change"] = best.val_acc - start[-1], best.epoch
    with contextlib.suppress(RunError):  # a damaged test.json
        if tested := read_tested(run):
            found["test_acc"] = tested.accuracy, tested.epoch
    return {name: pair for name, pair in found.items() if not math.isnan(pair[0])}

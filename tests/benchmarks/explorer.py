"""The explorer beside TensorBoard, on the same synthetic runs.

    python -m tests.benchmarks.explorer [--runs 1000] [--epochs 45] [--compare 50] [--rounds 5]
        [--out FILE.json]

Writes runs as `python -m trainer sweep` leaves them, event files for TensorBoard included, then
measures in turn, in fresh processes, and prints medians in seconds as JSON:

- curves: from the start of a process until both accuracies of the newest `--compare` runs ("some"),
  and then of all runs, are there as JSON; asked for some again; and from writing one epoch more of
  one of these runs until it is in the answer. The same numbers for both. TensorBoard is asked for
  all runs of a tag at once, with its fast loader (auto) and without (false).
- page: from the start of `streamlit run` until Chromium, already open, has drawn the first page's
  curves (cold), and from opening it again (warm); warm also with some runs chosen.
- script: the server's time for one run of a page, the first in a process and later ones.
- snapshot: reading the runs folder, first, again, and after one epoch of one run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from playwright.sync_api import Browser, BrowserContext, sync_playwright

from tests.browser.conftest import CHROMIUM_FLAGS, ROOT, _free_port, serve
from trainer.config import Config, Schedule, ScheduleName
from trainer.run_writer import RunWriter
from trainer.schema import EpochRecord, PhaseRecord, Preprocess
from trainer.tensorboard import TensorBoardLog

# A sweep with its trunk and its control: every run of a family validates on the same photos.
_PHOTOS: Final = (300, 4000)
_CLASSES: Final = (5, 43)
_GRID: Final[tuple[tuple[str, str, ScheduleName], ...]] = tuple(
    itertools.product(
        ("1e-3", "3e-4", "1e-4", "3e-5", "1e-5", "3e-6"),
        ("6", "10", "20", "all"),
        ("constant", "cosine"),
    )
)
_FAMILY: Final = len(_GRID) + 2
_LAYERS: Final = ("features.7.0.block.0.0", "features.8.0", "classifier.1")
_PARAMS: Final = 1_127_989
_TAGS: Final = {"train/accuracy": "train_acc", "validation/accuracy": "val_acc"}

Curves = dict[str, dict[str, list[tuple[int, float]]]]  # by tag and run: (epoch, accuracy)
Seconds = dict[str, list[float]]


# --- runs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photos:
    """What a family is validated on: names, labels [N], and logits [N, classes] of a network."""

    files: NDArray[np.str_]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]

    @classmethod
    def some(cls, rng: np.random.Generator) -> Photos:
        count, classes = (int(np.exp(rng.uniform(*np.log(ends)))) for ends in (_PHOTOS, _CLASSES))
        labels = np.sort(rng.integers(classes, size=count))
        files = [f"class_{c:02}/IMG_20240612_{100000 + i}.jpg" for i, c in enumerate(labels)]
        logits = rng.normal(size=(count, classes)) + 3 * (np.arange(classes) == labels[:, None])
        return cls(np.array(files), labels, logits.astype(np.float32))

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.logits.argmax(axis=1) == self.labels))

    def moved(self, rng: np.random.Generator) -> Photos:
        """The same photos after more training."""
        gain = rng.normal(0.1, 0.2)
        right = np.arange(self.logits.shape[1]) == self.labels[:, None]
        noise = rng.normal(scale=0.5, size=self.logits.shape)
        return replace(self, logits=(self.logits + noise + gain * right).astype(np.float32))

    def save(self, path: Path) -> None:
        np.savez(path, **{name: getattr(self, name) for name in ("logits", "labels", "files")})


class Logs:
    """The logs of one run, open."""

    def __init__(self, runs_dir: Path, name: str, config: Config, photos: Photos, first: int):
        self._writer = RunWriter.create(runs_dir, name, _info(config, photos))
        self._board = TensorBoardLog(self._writer.path)
        self._writer.start_phase(PhaseRecord(config.phase, first, None, _LAYERS, _PARAMS))
        self._last: EpochRecord

    @property
    def run_id(self) -> str:
        return self._writer.run_id

    def predictions(self, name: str) -> Path:
        return self._writer.predictions(name)

    def epoch(self, record: EpochRecord) -> None:
        self._writer.epoch(record)
        self._board.epoch(record)
        self._last = record

    def one_more(self) -> EpochRecord:
        last = self._last
        self.epoch(replace(last, epoch=last.epoch + 1, phase_epoch=last.phase_epoch + 1))
        return self._last

    def close(self) -> None:
        self._writer.end_phase(self._last.epoch)
        self._writer.close("done")


def write_runs(runs_dir: Path, runs: int, epochs: int) -> Logs:
    """Runs as `python -m trainer sweep` leaves them, TensorBoard's event files included, but for
    checkpoints; each with an evaluation before any step and `epochs` more. The last stays open."""
    rng = np.random.default_rng(0)
    for family in range(math.ceil(runs / _FAMILY)):
        photos = Photos.some(rng)
        config = Config(phase="transfer", data=f"photos-{family}", epochs=epochs)
        trunk = _write(runs_dir, config, "trunk", photos, rng)
        trunk.close()
        config = replace(config, parent=trunk.run_id)
        run = _write(runs_dir, config, "control", photos.moved(rng), rng, photos)
        for lr, unfreeze, schedule in _GRID:
            run.close()
            member = replace(
                config,
                phase="finetune",
                lr=float(lr),
                unfreeze=unfreeze,
                schedule=Schedule(schedule),
            )
            name = f"{unfreeze}-lr{lr}-{schedule}"
            run = _write(runs_dir, member, name, photos.moved(rng), rng, photos)
        if family + 1 < math.ceil(runs / _FAMILY):
            run.close()
    return run


def _write(
    runs_dir: Path,
    config: Config,
    name: str,
    photos: Photos,
    rng: np.random.Generator,
    before: Photos | None = None,
) -> Logs:
    """One run that ends with these answers, after those of its parent."""
    logs = Logs(runs_dir, name, config, photos, config.epochs if before else 0)
    change = (before.accuracy if before else 0.1, photos.accuracy)
    for record in _records(config, config.epochs if before else 0, change, rng):
        logs.epoch(record)
    photos.save(logs.predictions("after"))
    if before and config.phase == "finetune":
        before.save(logs.predictions("before"))
    return logs


def _records(
    config: Config, first: int, change: tuple[float, float], rng: np.random.Generator
) -> Iterator[EpochRecord]:
    start, end = change
    for epoch in range(config.epochs + 1):
        near = 1 - np.exp(-6 * epoch / config.epochs)
        accuracy = float(np.clip(start + (end - start) * near + rng.normal(scale=0.004), 0, 1))
        yield EpochRecord(
            phase=config.phase,
            epoch=first + epoch,
            phase_epoch=epoch,
            train_loss=1.1 - accuracy if epoch else None,
            train_acc=min(1.0, accuracy + 0.03) if epoch else None,
            val_loss=1.15 - accuracy,
            val_acc=accuracy,
            val_top5=min(1.0, accuracy + 0.2),
            val_macro_f1=0.98 * accuracy,
            lr_head=config.learning_rate,
            lr_backbone=config.learning_rate if config.phase == "finetune" else 0.0,
            trainable_params=_PARAMS,
            seconds=float(rng.uniform(0.5, 0.6)),
            images_per_second=float(rng.uniform(90, 150)),
            peak_memory_bytes=1_554_472_960,
            time=time.time(),
        )


def _info(config: Config, photos: Photos) -> dict[str, Any]:
    classes = photos.logits.shape[1]
    return {
        "recipe": None,
        "config": config.to_dict(),
        "parent_run_id": config.parent,
        "parent_checkpoint": {"file": "transfer-last.pt", "sha256": "0" * 64},
        "model": {"arch": "efficientnet_b0", "num_classes": classes, "head": [], "pool": "avg"},
        "weights": {"source": "imagenet", "sha256": "0" * 64},
        "classes": [f"class_{number:02}" for number in range(classes)],
        "dataset": {
            "name": config.data,
            "root": f"/photos/{config.data}",
            "fingerprint": f"{config.data:0>64}",
            "counts": {"train": 2 * len(photos.files), "val": len(photos.files)},
            "rejected": [],
        },
        "preprocess": Preprocess().to_dict(),
        "engine": {"cut": "features.7.0.block.0.0", "bytes_per_photo": 37632, "form": "folded"},
        "environment": {"versions": {"thaw": "0.1.0", "torch": "2.15.0"}, "device": "cpu"},
    }


# --- curves -------------------------------------------------------------------------------------

_THAW: Final = """
import json, sys
from pathlib import Path
from explorer.data import Library, epochs_frame, lineage
library, few = Library(Path(sys.argv[1])), int(sys.argv[2])
while question := sys.stdin.readline().strip():
    snapshot = library.snapshot()
    names = snapshot.newest_first[:None if question == "all" else few]
    frame = epochs_frame(snapshot, lineage(snapshot, names)[0])
    asked = frame.loc[frame["run_id"].isin(names), ["run_id", "epoch", "train_acc", "val_acc"]]
    print(asked.to_json(orient="split"), flush=True)
"""


def thaw_curves(
    runs_dir: Path, compare: int, live: Logs, seconds: Seconds
) -> tuple[Curves, Curves]:
    """When Thaw answers with curves; returns those of the newest runs, and of all."""
    started = time.perf_counter()
    command = [sys.executable, "-c", _THAW, str(runs_dir), str(compare)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin
        assert process.stdout
        questions, answers = process.stdin, process.stdout

        def ask(question: str) -> Any:
            print(question, file=questions, flush=True)
            return json.loads(answers.readline())

        with timed(seconds, "curves, some: Thaw", started):
            ask("some")
        with timed(seconds, "curves, all: Thaw", started):
            ask("all")
        with timed(seconds, "curves, some, again: Thaw"):
            ask("some")
        live.one_more()
        with timed(seconds, "curves, some, one epoch later: Thaw"):
            some = ask("some")
        everything = ask("all")
        questions.close()
    return _by_tag(some), _by_tag(everything)


@contextmanager
def timed(seconds: Seconds, name: str, started: float | None = None) -> Iterator[None]:
    started = time.perf_counter() if started is None else started
    yield
    seconds[name].append(time.perf_counter() - started)


def _by_tag(frame: Any) -> Curves:
    found: Curves = {tag: defaultdict(list) for tag in _TAGS}
    for run, epoch, *accuracies in frame["data"]:
        for tag, accuracy in zip(_TAGS, accuracies, strict=True):
            if accuracy is not None:
                found[tag][run].append((round(epoch), accuracy))
    return found


def tensorboard_curves(
    runs_dir: Path, some: Curves, everything: Curves, live: Logs, load_fast: str, seconds: Seconds
) -> None:
    """When TensorBoard answers with the same curves, and with an epoch more of one run."""
    port, started, us = _free_port(), time.perf_counter(), f"TensorBoard ({load_fast})"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs_dir)]
    command += ["--port", str(port), "--load_fast", load_fast]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        try:
            with timed(seconds, f"curves, some: {us}", started):
                _wait_for(port, some)
            with timed(seconds, f"curves, all: {us}", started):
                _wait_for(port, everything)
            with timed(seconds, f"curves, some, again: {us}"):
                _wait_for(port, some)
            record = live.one_more()
            for tag, name in _TAGS.items():
                some[tag][live.run_id].append((record.epoch, getattr(record, name)))
            with timed(seconds, f"curves, some, one epoch later: {us}"):
                _wait_for(port, some)
        finally:
            process.terminate()


def _wait_for(port: int, curves: Curves) -> None:
    end = time.perf_counter() + 300
    for tag, wanted in curves.items():
        missing = list(wanted)
        while missing:
            if time.perf_counter() > end:
                raise RuntimeError(f"TensorBoard never answered with the {tag} of {missing}.")
            asked = time.perf_counter()
            found = _scalars(port, tag, missing)
            missing = [run for run in missing if not _same(found.get(run, []), wanted[run])]
            if missing:  # leaves it twice as much time to load as it needs to answer
                time.sleep(max(0.05, 2 * (time.perf_counter() - asked)))


def _scalars(port: int, tag: str, runs: Sequence[str]) -> dict[str, list[tuple[float, int, float]]]:
    url = f"http://localhost:{port}/data/plugin/scalars/scalars_multirun"
    form = urllib.parse.urlencode([("tag", tag), *(("runs", run) for run in runs)]).encode()
    try:
        with urllib.request.urlopen(url, form, timeout=60) as answer:
            return dict(json.load(answer))
    except OSError:  # not listening yet, or not knowing this tag yet
        return {}


def _same(found: list[tuple[float, int, float]], wanted: list[tuple[int, float]]) -> bool:
    return len(found) == len(wanted) and all(
        epoch == step and math.isclose(accuracy, value, rel_tol=1e-6)  # event files hold float32
        for (_, step, value), (epoch, accuracy) in zip(found, wanted, strict=True)
    )


# --- pages --------------------------------------------------------------------------------------


# As SVG, or as pixels: Streamlit chooses a canvas where there are many points.
_CURVES_ARE_THERE: Final = """() => document.querySelector(".mark-line path") ||
    [...document.querySelectorAll("canvas.marks")].some(canvas => canvas.width && canvas
        .getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean))"""


def visit(
    browser: BrowserContext, address: str, started: float, name: str, seconds: Seconds
) -> None:
    """Open a page in a new tab: when its header is there, and when its curves are."""
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("h2", timeout=120_000)
    seconds[f"page, {name}, header"].append(time.perf_counter() - started)
    page.wait_for_function(_CURVES_ARE_THERE, timeout=120_000)
    seconds[f"page, {name}, curves"].append(time.perf_counter() - started)
    page.close()


def pages(browser: Browser, runs_dir: Path, chosen: Sequence[str], seconds: Seconds) -> None:
    visitor = browser.new_context(viewport={"width": 1400, "height": 1000})
    started = time.perf_counter()
    with serve(runs_dir) as address:
        seconds["page, server ready"].append(time.perf_counter() - started)
        visit(visitor, address, started, "cold", seconds)
        visit(visitor, address, time.perf_counter(), "warm", seconds)
        link = urllib.parse.urlencode([("runs", run) for run in chosen])
        visit(visitor, f"{address}/?{link}", time.perf_counter(), "some, warm", seconds)
    visitor.close()


_SCRIPT: Final = """
import json, os, sys, time
from pathlib import Path
from streamlit.testing.v1 import AppTest
page, folder, few = sys.argv[1:]
os.environ["THAW_RUNS_DIR"], sys.argv = folder, ["streamlit_app.py"]
from explorer.data import Library
from explorer.loading import load
load()
app = AppTest.from_string(f"from explorer.pages import {page}\\n{page}.page()", default_timeout=300)
if page == "compare":
    app.query_params["runs"] = Library(Path(folder)).snapshot().newest_first[:int(few)]
seconds = []
for _ in range(4):
    started = time.perf_counter()
    assert not app.run().exception, app.exception
    seconds.append(time.perf_counter() - started)
sent = [chart.proto.ByteSize() for chart in app.get("vega_lite_chart")]
print(json.dumps({"seconds": seconds, "bytes of charts": sent}))
"""

_SNAPSHOT: Final = """
import json, sys, time
from pathlib import Path
from explorer.data import Library
library = Library(Path(sys.argv[1]))
def timed():
    started = time.perf_counter()
    return library.snapshot(), time.perf_counter() - started
(found, first), (_, again) = timed(), timed()
run = found.runs[found.newest_first[0]]
with (run.path / "metrics.jsonl").open("ab") as log:
    lines = (run.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    log.write(next(line for line in reversed(lines) if b'"event": "epoch"' in line))
(_, grown) = timed()
print(json.dumps({"first": first, "again": again, "after one more epoch": grown}))
"""


def child(code: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


# --- the whole ----------------------------------------------------------------------------------


def measure(
    arguments: argparse.Namespace, runs_dir: Path, live: Logs, browser: Browser
) -> dict[str, Any]:
    seconds: Seconds = defaultdict(list)
    loads, sent = [], set()
    for number in range(arguments.rounds):
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
        loads.append(os.getloadavg()[0])
        for load_fast in ("auto", "false"):
            some, everything = thaw_curves(runs_dir, arguments.compare, live, seconds)
            tensorboard_curves(runs_dir, some, everything, live, load_fast, seconds)
        pages(browser, runs_dir, list(some["validation/accuracy"]), seconds)
        for page in ("compare", "runs"):
            found = child(_SCRIPT, page, runs_dir, arguments.compare)
            seconds[f"script, {page}, first"].append(found["seconds"][0])
            seconds[f"script, {page}, later"] += found["seconds"][1:]
            sent |= set(found["bytes of charts"])
    for _ in range(arguments.rounds):  # last, because it adds to a run what TensorBoard never sees
        for name, value in child(_SNAPSHOT, runs_dir).items():
            seconds[f"snapshot, {name}"].append(value)
    return report(seconds) | {"load averages": loads, "bytes of charts": sorted(sent)}


def report(seconds: Seconds) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "versions": {p: metadata.version(p) for p in ("streamlit", "altair", "tensorboard")},
        "median seconds": {name: round(value, 4) for name, value in medians.items()},
        "times as fast as TensorBoard": {
            name: round(value / medians[f"{name.partition(': ')[0]}: Thaw"], 1)
            for name, value in medians.items()
            if "TensorBoard" in name
        },
        "all seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=1000, help="rounded up to sweeps of 50")
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--compare", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="thaw-") as name, sync_playwright() as playwright:
        print(f"writing {arguments.runs} runs", file=sys.stderr)
        live = write_runs(Path(name), arguments.runs, arguments.epochs)
        executable = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        text = json.dumps(measure(arguments, Path(name), live, browser), indent=2)
        browser.close()
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

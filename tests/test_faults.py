"""Signals, losses that are no numbers, damaged files, readers of a run that is being written."""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from explorer.data import Library
from export.classifier import Classifier
from export.metadata import ModelFileError
from tests.conftest import TINY
from tests.explorer_runs import record
from tests.faults import litter, start, wait_for
from trainer.__main__ import main
from trainer.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from trainer.loop import Objective
from trainer.run_writer import RunWriter
from trainer.runlog import Run, RunReader, list_runs, read_run

# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGTERM, 143, id="TERM", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, id="INT"),
    ],
)
def test_a_signal_leaves_a_checkpoint(
    photos: Path, tmp_path: Path, number: int, status: int
) -> None:
    argv = ["--phase", "transfer", "--epochs", "100000", *TINY, "--data", str(photos)]
    process = start([*argv, "--runs-dir", str(tmp_path)])
    wait_for(lambda: any(len(one.epochs) > 2 for one in list_runs(tmp_path)))
    assert process.pid is not None
    os.kill(process.pid, number)
    began = time.monotonic()
    process.join(60)
    assert (process.exitcode, time.monotonic() - began < 10) == (status, True)
    [found] = list_runs(tmp_path)
    assert found.status == "interrupted"
    # The signal may come between an epoch's line in the log and what is kept of it.
    lost = found.epochs[-1].epoch - load_checkpoint(found.checkpoint("transfer-last")).epoch
    assert lost in (0, 1)
    assert litter(found.path) == []


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="TERM"),
        pytest.param(signal.SIGINT, id="INT", marks=pytest.mark.slow),
    ],
)
def test_a_second_signal_stops_at_once(photos: Path, tmp_path: Path, number: int) -> None:
    argv = ["--phase", "transfer", "--epochs", "100000", *TINY, "--data", str(photos)]
    process = start([*argv, "--runs-dir", str(tmp_path)], save_for_ever, tmp_path / "saving")
    wait_for(lambda: any(len(one.epochs) > 1 for one in list_runs(tmp_path)))
    assert process.pid is not None
    os.kill(process.pid, number)
    wait_for((tmp_path / "saving").exists)
    os.kill(process.pid, number)
    process.join(10)
    assert process.exitcode == -number


def save_for_ever(mark: Path) -> None:
    """A fault: what is saved in the end takes very long."""
    from trainer.phase import PhaseRun

    end = PhaseRun.end

    def slow(self: PhaseRun, *about: Any) -> None:
        mark.touch()
        time.sleep(600)
        end(self, *about)

    PhaseRun.end = slow  # type: ignore[method-assign]


# --- losses that are no numbers -------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, after: int, value: float) -> None:
    """From this step on the loss of the first learner is no number."""
    steps = iter(range(after - 1))
    cross_entropy = Objective.__call__
    first: list[Objective] = []

    def spoiled(self: Objective, logits: Tensor, labels: Tensor) -> Tensor:
        first.append(self)
        loss = cross_entropy(self, logits, labels)
        return loss * value if self is first[0] and next(steps, None) is None else loss

    monkeypatch.setattr(Objective, "__call__", spoiled)


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_no_number_stops_a_run_within_a_step(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    value: float,
) -> None:
    """Three batches an epoch on cached features: the second of epoch 2 is spoiled."""
    spoil(monkeypatch, 5, value)
    argv = ["--phase", "transfer", *TINY, "--batch-size", "6", "--epochs", "4"]
    assert main([*argv, "--data", str(photos), "--runs-dir", str(tmp_path)]) == 2
    where = f"The loss became {value} in epoch 2, batch 2"
    assert where in capsys.readouterr().err
    [found] = list_runs(tmp_path)
    assert (found.status, [e.epoch for e in found.epochs]) == ("failed", [0, 1])
    assert where in (found.path / "metrics.jsonl").read_text()
    for kind in ("best", "last"):
        checkpoint = load_checkpoint(found.checkpoint(f"transfer-{kind}"))
        assert checkpoint.epoch == 1
        assert all(value.isfinite().all() for value in checkpoint.state_dict.values())


def test_no_number_in_one_of_several_stops_only_that(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two heads that take their steps as one product."""
    spoil(monkeypatch, 2, math.nan)
    argv = ["sweep", "--phase", "transfer", *TINY, "--epochs", "2", "--lr", "1e-3", "1e-2"]
    assert main([*argv, "--data", str(photos), "--runs-dir", str(tmp_path)]) == 0
    failed, done = sorted(list_runs(tmp_path), key=lambda one: one.status, reverse=True)
    assert (failed.status, done.status) == ("failed", "done")
    assert "in epoch 1, batch 2" in (failed.path / "metrics.jsonl").read_text()
    values = load_checkpoint(done.checkpoint("transfer-last")).state_dict.values()
    assert all(value.isfinite().all() for value in values)


def test_weights_that_are_no_numbers_are_said(
    photos: Path, awake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = torch.load(awake)
    weights["features.0.0.weight"][0] = math.nan
    torch.save(weights, tmp_path / "weights.pth")
    argv = ["--phase", "transfer", *TINY, "--weights", str(tmp_path / "weights.pth")]
    runs_dir = tmp_path / "runs"
    assert main([*argv, "--data", str(photos), "--runs-dir", str(runs_dir)]) == 2
    assert "The loss became nan in the evaluation before any step" in capsys.readouterr().err
    [found] = list_runs(runs_dir)
    assert (found.status, found.problem) == ("failed", None)


# --- damaged files --------------------------------------------------------------------------------


def damaged(content: bytes, count: int) -> list[bytes]:
    """Half with a flipped bit, half cut short; the first and the last bytes among them."""
    draw = random.Random(0)
    places = [0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(count // 2 - 2))]
    flipped = []
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        flipped.append(bytes(changed))
    ends = [0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(count // 2 - 2))]
    return [*flipped, *(content[:end] for end in ends)]


def test_damaged_checkpoints_are_refused(exported: Run, tmp_path: Path) -> None:
    good = exported.checkpoint(f"{exported.phase}-best")
    path = tmp_path / good.name
    save_checkpoint(path, load_checkpoint(good))
    for content in damaged(path.read_bytes(), 100):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="SHA-256 does not match"):
            load_checkpoint(path)


def test_damaged_models_are_refused(exported: Run, tmp_path: Path) -> None:
    good = exported.path / "model.onnx"
    Classifier.load(good, "cpu")
    path = tmp_path / "model.onnx"
    reasons = []
    for content in damaged(good.read_bytes(), 100):
        path.write_bytes(content)
        with pytest.raises(ModelFileError) as refusal:
            Classifier.load(path, "cpu")
        reasons.append("SHA-256" in str(refusal.value))
    # What is cut has lost the hash at its end, and hardly ever is a model at all.
    assert all(reasons[:50])


# --- readers --------------------------------------------------------------------------------------


def test_a_live_run_is_never_read_half(tmp_path: Path) -> None:
    """A thousand polls or more while a run writes as fast as it can, ends, and goes on."""
    writer = RunWriter.create(tmp_path, "live", {"beat": 0, "twice": 0, "config": {}})
    stop = threading.Event()
    failed: list[BaseException] = []
    thread = threading.Thread(target=_write, args=(writer, stop, failed))
    thread.start()
    try:
        _poll(tmp_path, writer.path)
    finally:
        stop.set()
        thread.join()
    assert failed == []


def _poll(runs_dir: Path, path: Path) -> None:
    library, reader = Library(runs_dir), RunReader(path)
    seen = number = 0
    # A disk may be slow, but a minute is enough for ten epochs.
    last = time.monotonic() + 60
    while number < 1000 or (seen <= 10 and time.monotonic() < last):
        number += 1
        found = (reader.read(), library.snapshot().runs[path.name])[number % 2]
        assert found.problem is None
        assert found.info["twice"] == 2 * found.info["beat"]
        assert found.status in ("running", "done")
        assert [e.epoch for e in found.epochs] == list(range(len(found.epochs)))
        seen = max(seen, len(found.epochs))
    assert seen > 10


def _write(writer: RunWriter, stop: threading.Event, failed: list[BaseException]) -> None:
    epoch = 0
    try:
        while not stop.is_set():
            writer.epoch(record("transfer", epoch, epoch, 0.5))
            writer.update(beat=epoch, twice=2 * epoch)
            epoch += 1
            if epoch % 50 == 0:
                writer.close("done")
                writer = RunWriter.reopen(read_run(writer.path), epoch - 1)
        writer.close("done")
    except BaseException as error:
        failed.append(error)


@pytest.mark.slow
def test_a_training_is_never_read_half(photos: Path, tmp_path: Path) -> None:
    """As above, with a real training: its checkpoints and predictions too."""
    argv = ["--phase", "transfer", "--epochs", "100000", *TINY, "--data", str(photos)]
    process = start([*argv, "--runs-dir", str(tmp_path)])
    wait_for(lambda: any(one.epochs for one in list_runs(tmp_path)))
    for _ in range(1000):
        [found] = list_runs(tmp_path)
        assert (found.problem, found.status) == (None, "running")
        assert [e.epoch for e in found.epochs] == list(range(len(found.epochs)))
        for path in (found.path / "checkpoints").glob("*.pt"):
            load_checkpoint(path)
    assert process.is_alive()
    process.kill()
    process.join()
    [found] = list_runs(tmp_path)
    assert found.status == "interrupted"


def test_trainers_of_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    with get_context("fork").Pool(8) as pool:
        names = pool.starmap(_create, [(tmp_path, time.time() + 0.2)] * 8, chunksize=1)
    assert len(set(names)) == 8
    assert len(list_runs(tmp_path)) == 8


def _create(runs_dir: Path, when: float) -> str:
    time.sleep(max(0.0, when - time.time()))
    writer = RunWriter.create(runs_dir, "same", {})
    writer.close("done")
    return writer.run_id

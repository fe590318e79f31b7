"""A disk that is full, in whatever is being written: what was there stays whole, and the message
says which file, and how much space there is."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.explorer_runs import write_finetune, write_trunk
from tests.faults import replace_call, run
from trainer.checkpoint import load_checkpoint
from trainer.files import write_atomically
from trainer.run_writer import RunWriter
from trainer.runlog import RunError, list_runs, read_run

ROOT = Path(__file__).resolve().parents[1]
_SIZE = 48 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 48 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={_SIZE}".encode()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options) != 0:
        pytest.skip(f"cannot mount a tmpfs: {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount2(os.fsencode(folder), 2)


def fill(folder: Path, leave: int = 0) -> Path:
    """Use up a disk but for so many bytes."""
    path = folder / "filling"
    with path.open("wb", buffering=0) as file:
        left = shutil.disk_usage(folder).free - leave
        while left > 0 and (written := _write(file.fileno(), min(left, 1 << 20))):
            left -= written
    return path


def _write(descriptor: int, size: int) -> int:
    try:
        return os.write(descriptor, bytes(size))
    except OSError:
        return 0


def contents(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in found if path.name != "filling"}


def test_a_log_line_is_whole_or_not_there(small: Path) -> None:
    writer = RunWriter.create(small, "run", {})
    writer.note("kept")
    log = writer.path / "metrics.jsonl"
    filling = fill(small)
    before = log.read_bytes()
    with pytest.raises(RunError, match=r"metrics.jsonl: No space left on device, [\d.]+ MB are fr"):
        for _ in range(100):
            before = log.read_bytes()
            writer.note("lost" * 300)
    assert log.read_bytes() == before
    with pytest.raises(RunError, match=r"run.json: No space left on device, 0.0 MB are free in"):
        writer.update(text="x" * 100_000)
    filling.unlink()
    writer.note("later")
    writer.close("interrupted")
    assert read_run(writer.path).problem is None


@pytest.mark.slow
def test_a_training_stops_with_its_files_whole_and_goes_on(
    small: Path, photos: Path, tmp_path: Path
) -> None:
    runs_dir = small / "runs"
    cache = ["--cache-dir", str(tmp_path / "cache")]
    argv = ["--phase", "transfer", *TINY, "--data", str(photos), "--runs-dir", str(runs_dir)]
    argv += ["--epochs", "3", *cache]
    status, errors = run(argv, fill_at, "trainer.journal:Journal.write", 2, small)
    assert status == 2
    assert errors.startswith("error: Cannot write the checkpoint")
    assert "No space left on device, 0.0 MB are free in" in errors
    assert "Traceback" not in errors
    [failed] = list_runs(runs_dir)
    assert failed.problem is None
    assert failed.status in ("failed", "interrupted")
    for path in (failed.path / "checkpoints").glob("*.pt"):
        load_checkpoint(path)
    (small / "filling").unlink()
    assert run(["--resume", failed.run_id, "--runs-dir", str(runs_dir), *cache]) == (0, "")
    [found] = list_runs(runs_dir)
    assert (found.status, [e.epoch for e in found.epochs]) == ("done", [0, 1, 2, 3])


def fill_at(name: str, call: int, folder: Path) -> None:
    """A fault: the disk is full from this call on."""
    import importlib

    module, _, attributes = name.partition(":")
    owner, method = attributes.split(".")
    original = getattr(getattr(importlib.import_module(module), owner), method)

    def full(*args: object) -> object:
        fill(folder)
        return original(*args)

    replace_call(name, call, full)


@pytest.mark.slow
def test_a_last_checkpoint_that_does_not_fit_is_no_done_run(
    small: Path, photos: Path, tmp_path: Path
) -> None:
    """There is room for the log and for run.json, not for the network."""
    runs_dir = small / "runs"
    cache = ["--cache-dir", str(tmp_path / "cache")]
    argv = ["--phase", "transfer", *TINY, "--data", str(photos), "--runs-dir", str(runs_dir)]
    status, errors = run([*argv, "--epochs", "2", *cache], leave_little, small)
    assert (status, "No space left on device" in errors) == (2, True)
    [failed] = list_runs(runs_dir)
    assert failed.status == "failed"
    assert load_checkpoint(failed.checkpoint("transfer-last")).epoch == 0
    (small / "filling").unlink()
    assert run(["--resume", failed.run_id, "--runs-dir", str(runs_dir), *cache]) == (0, "")
    assert load_checkpoint(failed.checkpoint("transfer-last")).epoch == 2


def leave_little(folder: Path) -> None:
    from trainer.phase import PhaseRun

    original = PhaseRun.end

    def end(self: PhaseRun, status: str, reason: str | None = None) -> None:
        if status == "done":
            fill(folder, leave=200_000)
        original(self, status, reason)  # type: ignore[arg-type]

    PhaseRun.end = end  # type: ignore[method-assign, assignment]


def test_without_room_for_a_cache_the_training_goes_on(small: Path, photos: Path) -> None:
    cache = small / "cache"
    argv = ["--phase", "transfer", *TINY, "--data", str(photos), "--epochs", "1"]
    argv += ["--runs-dir", str(small.parent / "runs"), "--cache-dir", str(cache)]
    assert run(argv) == (0, "")
    assert not list(cache.glob("rows/.*"))


def test_a_report_leaves_the_old_one(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from explorer.report import main

    trunk = write_trunk(tmp_path)
    write_finetune(tmp_path, trunk, "fine", [0.7, 0.8])
    report = small / "report.html"
    report.write_text("old")
    fill(small)
    argv = [trunk, "--runs-dir", str(tmp_path), "-o", str(report)]
    status = main(argv)
    message = capsys.readouterr().err
    assert (status, report.read_text()) == (2, "old")
    assert str(report) in message
    assert "No space left on device, 0.0 MB are free in" in message


@pytest.mark.slow
def test_an_export_leaves_the_old_one(small: Path, photos: Path, tmp_path: Path) -> None:
    runs_dir = small / "runs"
    argv = ["--phase", "transfer", *TINY, "--data", str(photos), "--runs-dir", str(runs_dir)]
    assert run([*argv, "--epochs", "1", "--cache-dir", str(tmp_path / "cache")]) == (0, "")
    [done] = list_runs(runs_dir)
    export = [sys.executable, "-m", "export", done.run_id, "--runs-dir", str(runs_dir)]
    subprocess.run(export, cwd=ROOT, check=True, capture_output=True)
    fill(small)
    before = contents(done.path)
    again = subprocess.run(export, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2
    assert "model.onnx" in again.stderr
    assert "No space left on device, 0.0 MB are free in" in again.stderr
    assert contents(done.path) == before


def test_a_file_larger_than_the_process_may_write(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: another way to have no space, without a disk of our own."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large, [\d,.]+ MB are free in"):
            write_atomically(path, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [one.name for one in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"old"

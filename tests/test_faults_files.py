"""What the file system does to a training, an export and the app, and what the user is told."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import io
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

import trainer.data
from explorer.annotations import Annotation, save_annotation
from explorer.data import Library, epochs_frame, lineage
from explorer.manage import delete
from tests.explorer_runs import write_finetune, write_run, write_trunk
from trainer.__main__ import main
from trainer.checkpoint import load_checkpoint
from trainer.config import Config
from trainer.data import find_fingerprint, load_photos
from trainer.evidence import load_predictions
from trainer.intake import PhotoError, read_photo
from trainer.listing import DataError, list_photos
from trainer.run_writer import check_writable
from trainer.runlog import Run, RunError, list_runs
from trainer.schema import Preprocess
from trainer.survey import survey
from trainer.tensorboard import TensorBoardLog

SMALL = Preprocess(resize=36, crop=32)
TINY = ("--arch", "cnn10", "--weights", "none", "--size", "32", "--batch-size", "8")


def draw(path: bytes | Path, seed: int) -> None:
    """A photo of 40 x 40 pixels; its class decides the square in it."""
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    pixels[8:30, 8:30] = [(200, 0, 0), (0, 200, 0), (0, 0, 200)][seed // 100]
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
    with open(path, "wb") as file:  # noqa: PTH123
        file.write(content.getvalue())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes of six small photos."""
    for label, name in enumerate(("red", "green")):
        for number in range(6):
            draw(tmp_path / "data" / name / f"{number}.png", 100 * label + number)
    return tmp_path / "data"


def fit(data: Path, runs: Path, *flags: str, epochs: int = 2) -> int:
    """The command line in this process; returns the exit status."""
    given = flags if "--phase" in flags else ("--phase", "transfer", *flags)
    where = ("--data", str(data), "--runs-dir", str(runs))
    return main([*TINY, *where, "--epochs", str(epochs), *given])


def newest(runs: Path) -> Run:
    return list_runs(runs)[-1]


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """The same folder, for reading only: to root, permissions say nothing."""
    if os.geteuid() != 0:
        folder.chmod(0o555)
        try:
            yield folder
        finally:
            folder.chmod(0o755)
        return
    seen = folder.with_name(f"{folder.name}-read-only")
    seen.mkdir()
    mount = ["mount", "--bind", "-o", "ro", str(folder), str(seen)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("root may write everywhere, and cannot mount anything here")
    try:
        if os.access(seen, os.W_OK):
            subprocess.run(["mount", "-o", "remount,bind,ro", str(seen)], check=True)
        yield seen
    finally:
        subprocess.run(["umount", str(seen)], check=True)


@contextlib.contextmanager
def bound_by_permissions() -> Iterator[None]:
    """Root without the capabilities that let it pass by permissions (Linux, this thread only)."""
    if os.geteuid() != 0:
        yield
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before, now = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, before) != 0:
        pytest.skip("root passes by all permissions here")
    libc.capget(header, now)
    now[0] &= ~0b110  # effective: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capset(header, now) != 0:
        pytest.skip("root passes by all permissions here")
    try:
        yield
    finally:
        libc.capset(header, before)


@contextlib.contextmanager
def meanwhile(runs: Path, epochs: int, act: Callable[[Path], object]) -> Iterator[None]:
    """`act` on the folder of a run that begins now, as soon as its log has more epochs."""
    ended, before = threading.Event(), set(runs.glob("*"))

    def watch() -> None:
        while not ended.wait(0.01):
            for log in runs.glob("*/metrics.jsonl"):
                if log.parent not in before and log.read_bytes().count(b'"epoch", "ph') > epochs:
                    act(log.parent)
                    return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def delete_at_once(folder: Path) -> None:
    """As `rm -r`, but nobody writes a file into it meanwhile."""
    trash = Path(tempfile.mkdtemp(prefix="trash-", dir=folder.parents[2]))
    folder.rename(trash / folder.name)
    shutil.rmtree(trash)


# --- a runs folder that is there for reading only -----------------------------------------------


def test_training_into_a_read_only_folder_is_refused_before_any_photo_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    with read_only(tmp_path / "runs") as runs:
        for folder in (runs, runs / "deeper"):
            assert fit(tmp_path / "no data at all", folder) == 2
            message = capsys.readouterr().err
            assert f"Cannot write to the runs folder {folder}: no permission" in message
            assert "--runs-dir" in message


def test_the_app_shows_a_read_only_folder_and_says_what_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    trunk = write_trunk(runs)
    name = write_finetune(runs, trunk, "a", [0.70, 0.74]).run_id
    whole = Library(runs).snapshot()
    with read_only(runs) as seen:
        snapshot = Library(seen).snapshot()
        assert snapshot.labels == whole.labels
        assert not snapshot.broken
        monkeypatch.setenv("THAW_RUNS_DIR", str(seen))
        monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
        assert not opened("runs").exception
        assert "Cannot delete" in delete(seen, [name])[0]
        if seen != runs:  # permissions of a folder say nothing of those in it
            with pytest.raises(RunError, match=r"annotations.json.*Nothing was changed"):
                save_annotation(seen / name, Annotation("other"))
        assert Library(seen).snapshot().labels == whole.labels


def opened(page: str) -> AppTest:
    code = f"from explorer.pages import {page}\n{page}.page()"
    return AppTest.from_string(code, default_timeout=30).run()


@pytest.mark.slow
def test_a_run_in_a_read_only_folder_is_exported_elsewhere(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from export.__main__ import main as export
    from export.infer import main as infer

    assert fit(data, tmp_path / "runs") == 0
    with read_only(tmp_path / "runs") as runs:
        flags = [newest(runs).run_id, "--runs-dir", str(runs)]
        capsys.readouterr()
        assert export(flags) == 2
        assert "--output" in capsys.readouterr().err
        model = tmp_path / "model.onnx"
        assert export([*flags, "--output", str(model)]) == 0
        assert "parity.json" in capsys.readouterr().out
    (data / "red" / "0.png").write_bytes(b"no photo")
    assert infer([str(model), str(data), "--csv"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 13


# --- a run folder that goes ---------------------------------------------------------------------


def test_a_run_whose_folder_is_deleted_stops_and_says_so(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    with meanwhile(runs, 2, delete_at_once):
        assert fit(data, runs, epochs=2000) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    assert "was deleted or moved while the run was trained" in error
    assert "Traceback" not in error
    assert not list(runs.iterdir())  # nothing comes back


@pytest.mark.slow
def test_a_run_whose_folder_is_moved_keeps_what_it_had(data: Path, tmp_path: Path) -> None:
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with meanwhile(runs, 2, lambda folder: folder.rename(elsewhere / folder.name)):
        assert fit(data, runs, epochs=2000) == 2
    (run,) = list_runs(elsewhere)
    assert run.problem is None
    assert len(run.epochs) > 2
    load_checkpoint(run.checkpoint("transfer-last"))


def test_a_folder_for_checkpoints_that_is_deleted_is_made_again(data: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"

    def remove(folder: Path) -> None:
        delete_at_once(folder / "checkpoints")
        delete_at_once(folder / "predictions")

    with meanwhile(runs, 1, remove):
        assert fit(data, runs, epochs=20) == 0
    run = newest(runs)
    assert run.status == "done"
    assert load_checkpoint(run.checkpoint("transfer-last")).epoch == 20
    load_checkpoint(run.checkpoint("transfer-best"))
    load_predictions(run.predictions("after"))


@pytest.mark.slow
def test_a_member_of_a_sweep_whose_folder_is_deleted_does_not_stop_the_others(
    data: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    assert fit(data, runs) == 0
    sweep = ["sweep", "--from", newest(runs).run_id, "--runs-dir", str(runs), "--unfreeze", "1"]
    with meanwhile(runs, 2, delete_at_once):
        main([*sweep, "--lr", "1e-3", "1e-4", "--epochs", "40"])
    members = [run for run in list_runs(runs) if run.parent_run_id is not None]
    assert [(run.status, len(run.epochs)) for run in members] == [("done", 41)] * 2


def test_events_for_tensorboard_that_cannot_be_written_fail_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = TensorBoardLog(tmp_path / "gone")
    from tests.explorer_runs import record

    log.epoch(record("transfer", 1, 1, 0.5))
    assert capsys.readouterr().out.count("TensorBoard will not show") == 1


def test_a_runs_folder_that_goes_while_the_app_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    write_run(runs, "one", [0.2, 0.5])
    monkeypatch.setenv("THAW_RUNS_DIR", str(runs))
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    app = opened("compare")
    assert not app.exception
    shutil.rmtree(runs)
    assert not app.run().exception
    assert [title.value for title in app.subheader] == ["No runs yet"]


def test_a_runs_folder_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "ring").symlink_to("ring")
    for folder in (tmp_path / "ring", tmp_path / ("n" * 256)):
        with pytest.raises(RunError, match="cannot be read"):
            list_runs(folder)
        snapshot = Library(folder).snapshot()
        assert not snapshot.runs
        assert "cannot be read" in snapshot.broken[str(folder)]


def test_a_run_that_may_not_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    good, private = (write_run(tmp_path, name, [0.2, 0.5]) for name in ("good", "private"))
    private.path.chmod(0o000)
    try:
        with bound_by_permissions():
            snapshot = Library(tmp_path).snapshot()
    finally:
        private.path.chmod(0o755)
    assert list(snapshot.runs) == [good.run_id]
    assert "Permission denied" in snapshot.broken[private.run_id]


# --- names --------------------------------------------------------------------------------------


def test_names_that_are_not_utf_8_and_as_long_as_names_can_be(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, long = os.fsencode(data), b"n" * 251 + b".png"
    for number, name in enumerate((b"\xff\xfe.png", long, b"a\nb\x1b[2J.png")):
        draw(root + b"/red/" + name, 50 + number)
    for number in range(4):
        draw(root + b"/\xe9t\xe9/%d.png" % number, 200 + number)
        draw(root + b"/" + b"c" * 255 + b"/%d.png" % number, 250 + number)
    runs = tmp_path / "runs"
    assert fit(data, runs, "--rotation", "0.1", epochs=1) == 0
    assert main(["data", str(data)]) == 0
    assert "".join(capsys.readouterr().out.split("\n")).isprintable()
    run = newest(runs)
    assert run.problem is None
    assert run.classes == ("c" * 255, "green", "red", "\udce9t\udce9")
    assert run.info["dataset"]["counts"] == {"train": 16, "val": 7}
    load_predictions(run.predictions("after"))
    snapshot = Library(runs).snapshot()
    assert len(epochs_frame(snapshot, lineage(snapshot, [run.run_id])[0])) == 2


@pytest.mark.parametrize("flag", ["--data", "--runs-dir", "--split-file", "--exclude-file"])
def test_a_path_that_is_too_long_is_an_error_without_a_traceback(
    data: Path, tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(data, tmp_path, flag, "n" * 256) == 2
    assert "File name too long" in capsys.readouterr().err


# --- links and what is no file ------------------------------------------------------------------


def test_links_that_lead_back_are_left_out_and_said(data: Path) -> None:
    for link, target in (
        ("again", "."),
        ("up", ".."),
        ("ring", "ring"),
        ("nowhere", "gone"),
        ("red/self", ".."),
        ("red/ring.png", "ring.png"),
        ("red/gone.png", "nothing.png"),
    ):
        (data / link).symlink_to(target)
    os.mkfifo(data / "red" / "pipe.png")
    loaded = load_photos(Config("transfer", data=str(data)), SMALL)
    assert loaded.classes == ("green", "red")
    assert len(loaded.train) + len(loaded.val) == 12
    assert [notice.split(":")[0] for notice in loaded.listing.notices] == ["again", "up"]
    reasons = dict(loaded.rejected)
    assert reasons["red/ring.png"] == "Too many levels of symbolic links"
    assert reasons["red/gone.png"] == "No such file or directory"
    assert "a pipe" in reasons["red/pipe.png"]
    assert survey(loaded.listing).broken == loaded.rejected


def test_a_class_may_be_a_link_to_another_place(data: Path, tmp_path: Path) -> None:
    (data / "red").rename(tmp_path / "red")
    (data / "red").symlink_to(tmp_path / "red")
    assert list_photos(Config("transfer", data=str(data))).classes == ("green", "red")


def test_a_folder_that_may_not_be_read_is_no_empty_one(data: Path) -> None:
    part = data / "red" / "part"
    part.mkdir()
    part.chmod(0o000)
    try:
        with bound_by_permissions(), pytest.raises(DataError, match=r"red/part: Permission denied"):
            list_photos(Config("transfer", data=str(data)))
    finally:
        part.chmod(0o755)


# --- photos that change -------------------------------------------------------------------------


@pytest.mark.slow
def test_photos_that_are_changed_or_deleted_during_a_run_change_nothing(
    data: Path, tmp_path: Path
) -> None:
    flags = ("--rotation", "0.1", "--noise", "2")
    assert fit(data, tmp_path / "calm", *flags, epochs=12) == 0
    cache = tmp_path / "cache"  # empty, so that this run decodes for itself

    def change(folder: Path) -> None:
        for photo in (data / "red").iterdir():
            photo.unlink()
        for photo in (data / "green").iterdir():
            photo.write_bytes(b"no photo any more")

    with meanwhile(tmp_path / "runs", 1, change):
        assert fit(data, tmp_path / "runs", *flags, "--cache-dir", str(cache), epochs=12) == 0
    assert not list((data / "red").iterdir())
    calm, disturbed = newest(tmp_path / "calm"), newest(tmp_path / "runs")
    assert [e.val_loss for e in disturbed.epochs] == [e.val_loss for e in calm.epochs]
    assert disturbed.info["dataset"]["fingerprint"] == calm.info["dataset"]["fingerprint"]


def test_a_photo_that_changes_between_listing_and_decoding_is_left_out_and_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = data / "red" / "0.png"
    config = Config("transfer", data=str(data), cache_dir=tmp_path / "cache")
    hash_all, content = trainer.data._hash_all, photo.read_bytes()

    def replaced_afterwards(*arguments: object) -> object:
        found = hash_all(*arguments)  # type: ignore[arg-type]
        photo.write_bytes((data / "green" / "0.png").read_bytes())
        return found

    with monkeypatch.context() as patched:
        patched.setattr(trainer.data, "_hash_all", replaced_afterwards)
        loaded = load_photos(config, SMALL)
    assert loaded.rejected == (("red/0.png", "it was changed while the photos were read"),)
    photo.write_bytes(content)
    again = load_photos(config, SMALL)  # the cache holds nothing of the other photo
    assert not again.rejected
    fresh = load_photos(dataclasses.replace(config, cache=False), SMALL)
    assert np.array_equal(again.train.photos[:], fresh.train.photos[:])
    assert np.array_equal(again.val.photos[:], fresh.val.photos[:])


def test_other_bytes_of_the_same_name_size_and_time_are_other_photos(
    data: Path, tmp_path: Path
) -> None:
    one, other = data / "red" / "0.bmp", data / "red" / "1.bmp"
    for path, seed in ((one, 7), (other, 8)):
        draw(path, seed)
        Image.open(path).save(path, "bmp")
    config = Config("transfer", data=str(data), cache_dir=tmp_path / "cache")
    before, status = load_photos(config, SMALL), one.stat()
    one.write_bytes(other.read_bytes())
    os.utime(one, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (one.stat().st_size, one.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    after = load_photos(config, SMALL)
    assert after.fingerprint != before.fingerprint
    assert find_fingerprint(config) == after.fingerprint
    split, row = next(
        (name, getattr(after, name).files.index("red/0.bmp"))
        for name in ("train", "val")
        if "red/0.bmp" in getattr(after, name).files
    )
    now, then = (getattr(photos, split).photos[np.array([row])] for photos in (after, before))
    assert not np.array_equal(now, then)


def test_a_decoded_photo_that_is_damaged_and_gone_is_an_error_that_names_it(
    data: Path, tmp_path: Path
) -> None:
    loaded = load_photos(Config("transfer", data=str(data), cache_dir=tmp_path / "cache"), SMALL)
    for path in (tmp_path / "cache").rglob("*.rows"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # of the last photo
        with path.open("r+b") as file:
            file.write(content)
    gone = data / loaded.train.files[-1]
    gone.unlink()
    with pytest.raises(DataError, match=rf"{gone.name} cannot be decoded again: No such file"):
        loaded.train.photos[:]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(PhotoError, match="pipe"):
        read_photo(tmp_path / "pipe.png")


# --- the clock ----------------------------------------------------------------------------------


def test_a_clock_that_goes_backwards(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(2_000_000_000, 0, -3600))
    runs = tmp_path / "runs"
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: float(next(now)))
        assert fit(data, runs, epochs=3) == 0
    run = newest(runs)
    times = [epoch.time for epoch in run.epochs]
    assert times == sorted(times, reverse=True)
    assert [epoch.epoch for epoch in run.epochs] == [0, 1, 2, 3]
    assert all(epoch.seconds >= 0 and epoch.images_per_second > 0 for epoch in run.epochs)
    assert run.info["ended"] < run.info["started"]
    assert (run.status, run.problem) == ("done", None)
    snapshot = Library(runs).snapshot()
    frame = epochs_frame(snapshot, lineage(snapshot, [run.run_id])[0])
    assert frame["epoch"].tolist() == [0, 1, 2, 3]


def test_which_run_is_the_newest_follows_the_clock_that_runs_were_started_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, "before", [0.2, 0.5])
    yesterday = time.time() - 86400
    monkeypatch.setattr(time, "time", lambda: yesterday)
    monkeypatch.setattr(time, "strftime", lambda *_: "20200101-000000")
    ids = {write_run(tmp_path, "after", [0.2, 0.5]).run_id for _ in range(3)}
    assert len(ids) == 3  # however often the same second comes
    assert list_runs(tmp_path)[-1].run_id.endswith("before")
    assert Library(tmp_path).snapshot().newest_first[0].endswith("before")


def test_check_writable_looks_at_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()

"""A training that is killed at any moment goes on, and ends with the bits of one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from explorer.data import Library
from tests.conftest import TINY
from tests.faults import figures, kill_at, litter, run, start
from trainer.__main__ import main
from trainer.checkpoint import load_checkpoint
from trainer.files import write_atomically
from trainer.journal import Entry, Journal, Kept
from trainer.resume import resume_of
from trainer.run_writer import RunWriter
from trainer.runlog import Run, list_runs, read_run

EPOCHS = 3
VIEWS = ("--rotation", "0.05", "--noise", "2")


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def two_phases(tmp_path_factory: pytest.TempPathFactory, photos: Path, awake: str) -> list[str]:
    """The command line of a two-phase training, in batches of six; without --runs-dir."""
    cache = tmp_path_factory.mktemp("cache")
    flags = ["--phase", "finetune", *TINY, "--batch-size", "6", "--weights", awake, *VIEWS]
    flags += ["--epochs", str(EPOCHS), "--transfer-epochs", str(EPOCHS), "--lr", "1e-3"]
    return [*flags, "--transfer-lr", "1e-2", "--data", str(photos), "--cache-dir", str(cache)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, two_phases: list[str]) -> tuple[Path, float]:
    """The runs of that training, uninterrupted, and how long they took."""
    folder = tmp_path_factory.mktemp("whole") / "runs"
    began = time.monotonic()
    assert run([*two_phases, "--runs-dir", str(folder)])[0] == 0
    return folder, time.monotonic() - began


def check_alike(found: Path, expected: Path) -> None:
    """To the bit, every epoch once, every line whole, nothing left behind."""
    ours, theirs = list_runs(found), list_runs(expected)
    assert [r.phase for r in ours] == [r.phase for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert (one.status, one.problem, litter(one.path)) == ("done", None, [])
        for line in (one.path / "metrics.jsonl").read_text().splitlines():
            json.loads(line)
        assert figures(one) == figures(other)
        assert one.info["phases"] == other.info["phases"]
        for path in sorted((other.path / "checkpoints").glob("*.pt")):
            check_same_checkpoint(one.path / "checkpoints" / path.name, path)
        for path in (other.path / "predictions").iterdir():
            assert (one.path / "predictions" / path.name).read_bytes() == path.read_bytes()


def check_same_checkpoint(found: Path, expected: Path) -> None:
    one, other = load_checkpoint(found), load_checkpoint(expected)
    assert one.epoch == other.epoch
    assert_equal(dict(one.state_dict), dict(other.state_dict))
    assert_equal(one.optimizer, other.optimizer)


def assert_equal(one: object, other: object) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)  # type: ignore[arg-type]
    elif isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        assert isinstance(other, list)
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert one == other


def check_killed(folder: Path) -> int:
    """What a killed process leaves behind can be read as it is; returns how many of the epochs in
    its log have to be trained again."""
    lost = 0
    for found in list_runs(folder):
        assert found.problem is None
        assert found.status in ("interrupted", "done")
        for path in (found.path / "checkpoints").glob("*.pt"):
            load_checkpoint(path)
        if found.status == "interrupted" and found.epochs:
            lost = max(lost, found.epochs[-1].epoch - newest(found))
    return lost


def newest(found: Run) -> int:
    """The epoch after which a run can go on; before the first checkpoint that before its first."""
    if not found.checkpoint(f"{found.phase}-last").exists():
        return found.epochs[0].epoch - 1
    phase: Any = found.phase
    return resume_of(found, phase, found.info["dataset"]["fingerprint"], {}).checkpoint.epoch


def go_on(command: list[str], folder: Path) -> None:
    """`--resume auto`, or the command itself where it was killed before there was a run."""
    argv = ["--resume", "auto"] if list_runs(folder) else command
    assert run([*argv, "--runs-dir", str(folder)]) == (0, "")


def is_finished(folder: Path) -> bool:
    runs = list_runs(folder)
    return len(runs) == 2 and all(one.status == "done" for one in runs)


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(
    two_phases: list[str], whole: tuple[Path, float], tmp_path: Path, kills: int
) -> None:
    """Killed, gone on with, killed again; whenever one has ended, the next one begins."""
    expected, seconds = whole
    moments, number = random.Random(kills), 0
    costs: list[int] = []
    while len(costs) < kills:
        folder = tmp_path / f"runs-{number}"
        argv = ["--resume", "auto"] if list_runs(folder) else two_phases
        process = start([*argv, "--runs-dir", str(folder)])
        process.join(moments.uniform(0, 0.7 * seconds))
        if process.is_alive():
            process.kill()
            process.join()
            costs.append(check_killed(folder))
        if is_finished(folder):
            check_alike(folder, expected)
            number += 1
    print(f"{kills} kills in {number + 1} trainings; epochs lost: {Counter(costs)}")
    assert max(costs) <= 1
    if not is_finished(tmp_path / f"runs-{number}"):
        go_on(two_phases, tmp_path / f"runs-{number}")
        check_alike(tmp_path / f"runs-{number}", expected)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        slow("trainer.fit:_from_run", 1),  # the trunk is done, the finetune phase has not begun
        slow("trainer.journal:Journal.write", 5),  # an epoch is logged and not kept
        *(slow("os:fsync", call) for call in range(1, 34, 4)),  # a temporary file is there
        *(slow("trainer.phase:save_checkpoint", call) for call in range(1, 7)),
        *(slow("trainer.journal:Journal.write", call) for call in (1, 3, 4, 6)),
        slow("trainer.run_writer:RunWriter.close", 1),
        slow("trainer.run_writer:RunWriter.close", 2),
        slow("trainer.run_writer:RunWriter.start_phase", 1),
        slow("trainer.run_writer:RunWriter.start_phase", 2),
    ],
)
def test_killed_where_it_hurts(
    two_phases: list[str], whole: tuple[Path, float], tmp_path: Path, name: str, call: int
) -> None:
    folder = tmp_path / "runs"
    assert run([*two_phases, "--runs-dir", str(folder)], kill_at, name, call)[0] == -9
    assert check_killed(folder) <= 1
    go_on(two_phases, folder)
    check_alike(folder, whole[0])


# --- sweeps ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heads(two_phases: list[str]) -> list[str]:
    """A sweep of three heads that are trained as one product, rounded unlike each alone."""
    flags = ["sweep", "--phase", "transfer", *TINY, *VIEWS, "--batch-size", "6", "--epochs", "3"]
    kept = {two_phases[i]: two_phases[i + 1] for i in range(len(two_phases) - 1)}
    flags += [
        word for name in ("--weights", "--data", "--cache-dir") for word in (name, kept[name])
    ]
    return [*flags, "--lr", "1e-3", "3e-3", "1e-2"]


@pytest.fixture(scope="module")
def whole_sweep(tmp_path_factory: pytest.TempPathFactory, heads: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("whole-sweep") / "runs"
    assert run([*heads, "--runs-dir", str(folder)])[0] == 0
    return folder


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("trainer.journal:Journal.write", 5),  # one member is an epoch ahead of the others
        *(slow("trainer.journal:Journal.write", call) for call in (2, 3, 4, 6, 8)),
        *(slow("trainer.phase:save_checkpoint", call) for call in (1, 2, 4, 5, 8)),
        *(slow("trainer.run_writer:RunWriter.create", call) for call in (2, 3)),
    ],
)
def test_a_sweep_killed_where_its_members_part(
    heads: list[str], whole_sweep: Path, tmp_path: Path, name: str, call: int
) -> None:
    folder = tmp_path / "runs"
    assert run([*heads, "--runs-dir", str(folder)], kill_at, name, call)[0] == -9
    assert check_killed(folder) <= 1
    assert run([*heads, "--runs-dir", str(folder)]) == (0, "")
    found = [one for one in list_runs(folder) if one.status == "done" or one.epochs]
    assert len(found) == 3
    check_alike(folder, whole_sweep)
    logs = "".join((one.path / "metrics.jsonl").read_text() for one in found)
    assert len(set(re.findall(r"Resumed after epoch \d+", logs))) <= 1  # all from the same one


# --- the command ----------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    return capsys.readouterr().err


def test_what_cannot_be_resumed_is_said(
    two_phases: list[str],
    whole: tuple[Path, float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = whole
    where = ["--runs-dir", str(folder)]
    done = list_runs(folder)[-1].run_id
    assert "No interrupted run in" in refused(capsys, "--resume", "auto", *where)
    assert f"Run {done} is done" in refused(capsys, "--resume", done, *where)
    assert "--lr: a run goes on with" in refused(capsys, "--resume", "auto", "--lr", "1", *where)
    assert "No run 'none'" in refused(capsys, "--resume=none", *where)
    held = RunWriter.create(tmp_path, "held", {"config": {"phase": "transfer"}})
    where = ["--runs-dir", str(tmp_path)]
    message = refused(capsys, "--resume", held.run_id, *where)
    assert "is being trained by another process" in message
    held.update(sweep={"name": "rates"})
    held.close("interrupted")
    assert "belongs to the sweep rates" in refused(capsys, "--resume", "auto", *where)


@pytest.mark.slow
def test_a_run_of_other_photos_does_not_go_on(
    two_phases: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "photos"
    shutil.copytree(two_phases[two_phases.index("--data") + 1], data)
    where = ["--runs-dir", str(tmp_path / "runs")]
    argv = ["--phase", "transfer", *TINY, "--epochs", "2", "--data", str(data), *where]
    assert run(argv, kill_at, "trainer.journal:Journal.write", 2)[0] == -9
    (data / "red" / "000.jpg").unlink()
    message = refused(capsys, "--resume", "auto", *where)
    assert "its photos or their split have changed" in message


@pytest.mark.slow
def test_a_killed_run_can_be_started_from(two_phases: list[str], tmp_path: Path) -> None:
    """Its status still says that it is running; nobody has to wait for it."""
    where = ["--runs-dir", str(tmp_path)]
    data = ["--data", two_phases[two_phases.index("--data") + 1]]
    argv = ["--phase", "transfer", *TINY, "--epochs", "2", *data, *where]
    assert run(argv, kill_at, "trainer.journal:Journal.write", 2)[0] == -9
    [killed] = list_runs(tmp_path)
    assert json.loads((killed.path / "run.json").read_text())["status"] == "running"
    snapshot = Library(tmp_path).snapshot()
    assert snapshot.runs[killed.run_id].status == "interrupted"
    assert not snapshot.running
    assert main(["--phase", "finetune", "--epochs", "1", "--from", killed.run_id, *where]) == 0
    assert list_runs(tmp_path)[-1].parent_run_id == killed.run_id


def test_a_damaged_journal_is_as_good_as_none(two_phases: list[str], tmp_path: Path) -> None:
    where = ["--runs-dir", str(tmp_path)]
    data = ["--data", two_phases[two_phases.index("--data") + 1]]
    argv = ["--phase", "transfer", *TINY, "--epochs", "4", *data, *where]
    assert run(argv, kill_at, "trainer.journal:Journal.write", 4)[0] == -9
    [killed] = list_runs(tmp_path)
    assert newest(killed) == 3
    found = sorted((killed.path / "checkpoints").glob(".*"))
    for path, epoch in zip(found[::-1], (2, 0), strict=True):
        content = bytearray(path.read_bytes())
        content[-50] ^= 1
        path.write_bytes(content)
        assert newest(killed) == epoch
    payload = pickle.dumps({"last": _Payload(tmp_path / "ran"), "best": None})
    found[0].write_bytes(hashlib.sha256(payload).hexdigest().encode() + payload)
    assert newest(killed) == 0
    assert not (tmp_path / "ran").exists()


class _Payload:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_an_interrupted_journal_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        Journal(tmp_path, "transfer").write(Entry(Kept(1, {}), None))
    assert litter(tmp_path) == []


def test_stale_temporary_files_go(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path, "killed", {})
    path = writer.path
    writer.close("interrupted")
    stale = [path / ".run.json.abc.tmp", path / "checkpoints" / ".transfer-best.pt.x.tmp"]
    stale.append(path / "predictions" / ".after.npz.y.tmp")
    others = path / ".model.onnx.abc.tmp"  # which an export may be writing
    for file in (*stale, others):
        file.touch()
    RunWriter.reopen(read_run(path), 0).close("interrupted")
    assert litter(path) == [others.name]
    write_atomically(path / "model.onnx", b"")
    assert others.exists()
    os.utime(others, (0, 0))
    write_atomically(path / "model.onnx", b"")
    assert litter(path) == []


def test_a_folder_that_is_deleted_while_the_journal_is_written_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real, calls = tmp_path / "checkpoints", Path.replace, [0]

    def replace(self: Path, target: Path) -> Path:
        calls[0] += 1
        if calls[0] == 1:
            shutil.rmtree(folder)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    Journal(folder, "transfer").write(Entry(Kept(1, {}), None))
    assert [entry.last.epoch for entry in Journal(folder, "transfer").read()] == [1]

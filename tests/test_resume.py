"""An interrupted sweep goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.progress
from tests.conftest import TINY, Train
from tests.test_together import PHOTOS, figures, sweep
from trainer.checkpoint import load_checkpoint
from trainer.run_writer import RunWriter
from trainer.runlog import Run, RunError, list_runs, read_run

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 4


@pytest.fixture
def flags(train_awake: Train, photos: Path) -> list[str]:
    """Two rates and the control, in three batches an epoch."""
    parent = train_awake("--phase", "transfer", "--epochs", "1", "--lr", "0.01")
    members = ["--from", str(parent.path), "--lr", "1e-3", "1e-2", "--unfreeze", "20"]
    return [*members, "--epochs", str(EPOCHS), "--batch-size", "6", "--data", str(photos), *PHOTOS]


def weights(run: Run, kind: str) -> Mapping[str, torch.Tensor]:
    return load_checkpoint(run.checkpoint(f"{run.phase}-{kind}")).state_dict


def check_alike(found: Mapping[str, Run], expected: Mapping[str, Run]) -> None:
    """To the bit, and every epoch once."""
    assert found.keys() == expected.keys()
    for group, run in found.items():
        other = expected[group]
        assert run.status == "done"
        assert run.problem is None
        assert [e.phase_epoch for e in run.epochs] == list(range(EPOCHS + 1))
        assert figures(run) == figures(other)
        assert run.info["phases"] == other.info["phases"]
        for kind in ("best", "last"):
            theirs = weights(other, kind)
            assert all(torch.equal(v, theirs[name]) for name, v in weights(run, kind).items())
        assert run.predictions("after").read_bytes() == other.predictions("after").read_bytes()


def events(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C in the middle of an epoch, after this many batches."""
    left = iter(range(after))
    batch = trainer.progress.Progress.batch

    def counted(self: trainer.progress.Progress, *figures: Any) -> None:
        batch(self, *figures)
        if next(left, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.progress.Progress, "batch", counted)


@pytest.mark.slow
def test_an_interrupted_sweep_ends_as_one_that_was_not(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = sweep(tmp_path / "whole", *flags)
    with monkeypatch.context() as patched:
        interrupt(patched, after=2 * 3 + 1)
        begun = sweep(tmp_path / "torn", *flags, status=130)
    assert [run.status for run in begun.values()] == ["interrupted"] * 3
    assert "The same command goes on" in capsys.readouterr().out
    found = sweep(tmp_path / "torn", *flags)
    assert "3 runs go on, interrupted after epoch 2 of 4." in capsys.readouterr().out
    assert {run.path for run in found.values()} == {run.path for run in begun.values()}
    check_alike(found, expected)
    for run in found.values():
        kinds = [event["event"] for event in events(run)]
        assert kinds == ["phase", *["epoch"] * 3, "note", *["epoch"] * 2, "stop"]


def test_the_trunk_of_a_sweep_goes_on_too(
    tmp_path: Path, photos: Path, awake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*TINY, "--weights", awake, "--data", str(photos), "--lr", "1e-3", "--unfreeze", "5"]
    flags += ["--epochs", "1", "--transfer-epochs", str(EPOCHS), *PHOTOS]
    for name, after in (("whole", 1000), ("torn", 7)):
        with monkeypatch.context() as patched:
            interrupt(patched, after)
            sweep(tmp_path / name, *flags, status=130 if name == "torn" else 0)
    (begun,) = list_runs(tmp_path / "torn")
    assert begun.status == "interrupted"
    sweep(tmp_path / "torn", *flags)
    trunk, *members = list_runs(tmp_path / "torn")
    assert (trunk.path, len(members)) == (begun.path, 2)
    expected, *_ = list_runs(tmp_path / "whole")
    check_alike({"": trunk}, {"": expected})


KILLED = """if True:
    import os, signal, sys
    import trainer.phase as phase
    from trainer.__main__ import main

    phase._SAVE_SECONDS, left, save = 0, int(sys.argv[1]), phase.save_checkpoint

    def counted(path, checkpoint):
        global left
        save(path, checkpoint)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    phase.save_checkpoint = counted
    main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("saves", [2, 5, 13])
def test_a_sweep_killed_while_it_saves_goes_on(
    flags: list[str], tmp_path: Path, saves: int
) -> None:
    """Its members then have got to different epochs."""
    argv = ["sweep", *flags, "--runs-dir", str(tmp_path / "torn")]
    done = subprocess.run([sys.executable, "-c", KILLED, str(saves), *argv], cwd=ROOT, timeout=100)
    assert done.returncode == -9
    begun = {run.path for run in list_runs(tmp_path / "torn")}
    assert len(begun) == 3
    found = sweep(tmp_path / "torn", *flags)
    if saves > 3:
        assert {run.path for run in found.values()} == begun
    check_alike(found, sweep(tmp_path / "whole", *flags))


def test_what_cannot_go_on_begins_anew(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: Path
) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, after=4)
        begun = sweep(tmp_path / "torn", *flags, status=130)
    held, damaged, old = begun.values()
    writer = RunWriter.reopen(held, 1)  # as another process would
    path = damaged.checkpoint(f"{damaged.phase}-last")
    path.write_bytes(path.read_bytes()[:-1])
    shutil.rmtree(old.path / "checkpoints")
    found = sweep(tmp_path / "torn", *flags)
    assert not {run.path for run in found.values()} & {run.path for run in begun.values()}
    assert {run.status for run in found.values()} == {"done"}
    writer.close("interrupted")


def test_a_run_is_not_written_by_two(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path, "run", {})
    with pytest.raises(RunError, match="being written by another process"):
        RunWriter.reopen(read_run(writer.path), 0)
    writer.close("interrupted")
    assert read_run(writer.path).status == "interrupted"
    again = RunWriter.reopen(read_run(writer.path), 0)
    assert read_run(writer.path).status == "running"
    again.close("done")

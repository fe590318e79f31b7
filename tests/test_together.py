"""Members that share their batches learn what each would have learnt alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.conftest import TINY, Train
from trainer.__main__ import main
from trainer.runlog import Run, list_runs

PHOTOS = ("--rotation", "0.05", "--noise", "2")


def figures(run: Run) -> list[float]:
    return [v for e in run.epochs for v in (e.train_loss or 0.0, e.val_loss, e.val_acc)]


def sweep(runs_dir: Path, *flags: str, status: int = 0) -> dict[str, Run]:
    """The real command; its runs by their sweep's label."""
    assert main(["sweep", *flags, "--runs-dir", str(runs_dir)]) == status
    return {run.info["sweep"]["group"]: run for run in list_runs(runs_dir) if "sweep" in run.info}


@pytest.mark.parametrize("head", ["linear", "16"])
def test_heads_trained_as_one_product_are_those_trained_alone(
    train_awake: Train, tmp_path: Path, photos: Path, awake: str, head: str
) -> None:
    flags = ("--phase", "transfer", "--epochs", "3", "--head", head, *PHOTOS)
    rates = ("0.001", "0.003", "0.01")
    together = sweep(
        tmp_path / "sweep", *TINY, "--weights", awake, "--data", str(photos), *flags, "--lr", *rates
    )
    for rate in rates:
        alone = train_awake(*flags, "--lr", rate)
        assert figures(together[f"lr {rate}"]) == pytest.approx(figures(alone), rel=1e-5)


def test_members_of_any_depth_share_batches_with_the_control(
    train_awake: Train, tmp_path: Path, photos: Path
) -> None:
    parent = train_awake("--phase", "transfer", "--epochs", "2", "--lr", "0.01")
    flags = ("--epochs", "2", "--from", str(parent.path), *PHOTOS, "--data", str(photos))
    pairs = (("1e-4", "20"), ("1e-3", "3"), ("1e-5", "all"))
    together = sweep(
        tmp_path / "sweep", *flags, "--batch-size", "8", "--pairs", *(":".join(p) for p in pairs)
    )
    assert len(together) == 4
    for rate, layers in pairs:
        (run,) = [r for name, r in together.items() if f"{layers} layers" in name]
        alone = train_awake(
            *("--phase", "finetune", "--lr", rate, "--unfreeze", layers, "--batch-size", "8"),
            *flags,
        )
        assert figures(run) == pytest.approx(figures(alone), rel=1e-4)
        assert run.info["phases"] == alone.info["phases"]
    further = train_awake("--phase", "transfer", "--batch-size", "8", *flags)
    assert figures(together["control"]) == pytest.approx(figures(further), rel=1e-4)
    assert further.parent_run_id == parent.run_id
    assert [(e.epoch, e.phase_epoch) for e in further.epochs] == [(2, 0), (3, 1), (4, 2)]


def test_the_control_goes_on_with_the_schedule_of_its_parent(train_awake: Train) -> None:
    schedule = ("--schedule", "exponential", "--decay", "0.5")
    parent = train_awake("--phase", "transfer", "--epochs", "3", "--lr", "0.01", *schedule)
    run = train_awake("--phase", "transfer", "--epochs", "2", "--from", str(parent.path))
    expected = [0.01 * math.exp(-0.5 * epoch) for epoch in (3, 3, 4)]
    assert [epoch.lr_head for epoch in run.epochs] == pytest.approx(expected)
    # and is itself no trunk for others unless it is named
    assert train_awake("--phase", "finetune", "--epochs", "1").parent_run_id == parent.run_id


@pytest.mark.parametrize("phase", ["transfer", "finetune"])
def test_a_member_that_diverges_does_not_stop_the_others(
    tmp_path: Path, photos: Path, awake: str, phase: str
) -> None:
    flags = [*TINY, "--weights", awake, "--phase", phase, "--epochs", "2", "--data", str(photos)]
    flags += ["--optimizer", "sgd", "--head", "8", "--lr", "0.001", "1e30"]
    found = (
        sweep(tmp_path / "sweep", *flags, "--transfer-epochs", "1")
        if phase == "finetune"
        else (sweep(tmp_path / "sweep", *flags))
    )
    states = {name: run.status for name, run in found.items() if name != "control"}
    assert states == {"lr 0.001": "done", "lr 1e+30": "failed"}
    assert all(math.isfinite(value) for run in found.values() for value in figures(run))

"""A batch that is too large for the memory is computed in portions, and gives the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import trainer.portions as portions_module
from tests.conftest import TINY, Train
from trainer.__main__ import main
from trainer.loop import Objective
from trainer.portions import bytes_kept, evaluated, portions
from trainer.runlog import list_runs


def test_portions_cover_a_batch_in_order() -> None:
    assert [list(range(10))[part] for part in portions(10, 4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    network, photos = nn.Linear(3, 2), torch.rand(130, 3)
    assert torch.allclose(evaluated(network, (photos,)), network(photos))


def test_what_is_kept_for_the_backward_pass_is_counted_once() -> None:
    # The ReLU keeps its output, and so does the last layer as its input: one thing of 20 bytes. The
    # weights and the photos are there anyway.
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    assert bytes_kept(network, (torch.rand(7, 3),)) == 20


@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 3.0, 1.0])])
def test_the_shares_of_portions_add_up_to_the_loss_of_the_batch(
    weights: torch.Tensor | None,
) -> None:
    objective = Objective(smoothing=0.1, weights=weights)
    logits, labels = torch.randn(10, 3), torch.randint(3, (10,))
    whole = objective(logits, labels)
    parts = [
        objective(logits[part], labels[part]) * objective.share(labels[part], labels)
        for part in portions(10, 4)
    ]
    assert torch.allclose(torch.stack(parts).sum(), whole)


def test_a_training_in_portions_is_the_same_training(
    train_awake: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parent = train_awake("--phase", "transfer", "--epochs", "1")
    flags = ("--phase", "finetune", "--from", parent.run_id, "--unfreeze", "all", "--epochs", "1")
    flags = (*flags, "--batch-size", "16", "--optimizer", "sgd", "--lr", "0.01")
    whole = train_awake(*flags)
    monkeypatch.setattr(portions_module, "_STEP_BYTES", 100_000_000)  # three photos
    parts = train_awake(*flags)
    assert parts.run_id != whole.run_id
    # Dropout draws anew for each portion, so not the same to the last digit.
    assert parts.epochs[1].train_loss == pytest.approx(whole.epochs[1].train_loss, rel=0.05)
    assert parts.epochs[1].val_loss == pytest.approx(whole.epochs[1].val_loss, rel=0.05)


def test_a_batch_that_cannot_be_divided_and_does_not_fit_is_refused_with_one_that_does(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(portions_module, "_STEP_BYTES", 1)
    monkeypatch.setattr(portions_module, "_memory", lambda device: 200_000_000)
    flags = ["--phase", "scratch", *TINY, "--data", str(photos), "--batch-size", "16"]
    assert main([*flags, "--runs-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "BatchNorm trains here" in said
    assert "use --batch-size" in said
    assert list_runs(tmp_path)[0].status == "failed"


def test_measuring_a_step_leaves_its_photos_as_they_are() -> None:
    """A dropout in front of a head may work in place."""
    photos = torch.ones(4, 8)
    tail = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(8, 2)).train()
    bytes_kept(tail, (photos,))
    assert torch.equal(photos, torch.ones(4, 8))

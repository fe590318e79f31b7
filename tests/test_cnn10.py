"""The small network of lab 4."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.conftest import Train
from trainer.__main__ import main
from trainer.model import ModelSpec, build_model, head_name, unfreeze_head
from trainer.prefix import Trace
from trainer.weights import WeightsError, default_preprocess, find_weights

CNN10 = "cnn10"


def test_ten_layers_with_relu_behind_all_but_the_last() -> None:
    network = build_model(ModelSpec(CNN10, 43))
    weighty = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighty) == 10
    assert sum(isinstance(m, nn.ReLU) for m in network.modules()) == 9
    assert sum(p.numel() for p in network.parameters()) == 1_445_707
    assert head_name(network) == "classifier"


@pytest.mark.parametrize("side", [16, 32, 100, 224])
def test_it_takes_photos_of_other_sizes(side: int) -> None:
    network = build_model(ModelSpec(CNN10, 43))
    assert network(torch.rand(2, 3, side, side)).shape == (2, 43)
    assert default_preprocess(CNN10).crop == 32


def test_its_frozen_part_can_be_cut_off() -> None:
    network = build_model(ModelSpec(CNN10, 43))
    unfreeze_head(network)
    found = Trace(network, torch.rand(3, 3, 32, 32)).cut()
    assert found is not None
    assert found.parts == (("float32", (256,)),)


def test_pretrained_weights_there_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WeightsError, match=r"cnn10 has no ImageNet weights\. Use --phase"):
        find_weights(CNN10, "imagenet")
    assert find_weights(CNN10, "none").tensors is None
    assert main(["--phase", "transfer", "--arch", CNN10]) == 2
    assert "no ImageNet weights" in capsys.readouterr().err


def test_it_learns_from_scratch(train: Train) -> None:
    flags = ("--phase", "scratch", "--arch", CNN10, "--epochs", "8", "--lr", "1e-3")
    run = train(*flags)
    assert run.info["preprocess"]["crop"] == 32
    first, last = run.epochs[1], run.epochs[-1]
    assert last.train_loss is not None
    assert first.train_loss is not None
    assert last.train_loss < 0.8 * first.train_loss

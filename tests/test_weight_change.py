"""How far a phase moved the weights, and what the explorer says when that is next to nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from explorer.conclusions import flags, moved, percent
from tests.conftest import Train
from trainer.checkpoint import load_checkpoint
from trainer.runlog import Run
from trainer.weight_change import WeightChange, weight_change


def test_it_is_the_distance_from_the_start_relative_to_the_size() -> None:
    start, now = nn.Linear(2, 1), nn.Linear(2, 1)
    with torch.no_grad():
        for network, weight, bias in ((start, [3.0, 0.0], 4.0), (now, [3.0, 0.5], 4.0)):
            network.weight.copy_(torch.tensor([weight]))
            network.bias.fill_(bias)
    found = weight_change(nn.Sequential(start), nn.Sequential(now), ["0"])
    assert found == WeightChange(relative=0.1, changed=1 / 3)


def test_there_is_none_without_weights_or_of_nothing_but_zeros() -> None:
    network = nn.Sequential(nn.ReLU(), nn.Linear(2, 1))
    nn.init.zeros_(network[1].weight)
    nn.init.zeros_(network[1].bias)
    assert weight_change(network, network, ["0"]) is None
    assert weight_change(network, network, ["0", "1"]) is None


def _distance(before: Run, after: Run, names: list[str]) -> float:
    start, now = (
        load_checkpoint(run.checkpoint(f"{run.phase}-last")).state_dict for run in (before, after)
    )
    pairs = [(start[n].double(), now[n].double()) for n in names]
    moved = sum(float((b - a).square().sum()) for a, b in pairs)
    return math.sqrt(moved / sum(float(a.square().sum()) for a, _ in pairs))


def _two_phases(train: Train, lr: str) -> tuple[Run, Run]:
    parent = train("--phase", "transfer", "--epochs", "1")
    flags = ("--from", parent.run_id, "--unfreeze", "8", "--epochs", "2", "--lr", lr)
    return parent, train("--phase", "finetune", *flags)


def test_a_run_says_how_far_its_backbone_and_its_head_moved(train_awake: Train) -> None:
    parent, run = _two_phases(train_awake, "1e-3")
    head = [f"classifier.3.{name}" for name in ("weight", "bias")]
    state = load_checkpoint(run.checkpoint("finetune-last")).state_dict
    modules = set(run.info["phases"][0]["unfrozen_layers"]) - {"classifier.3"}
    backbone = [name for name in state if name.rpartition(".")[0] in modules]
    said = run.info["weight_change"]
    assert said["head"]["relative"] == pytest.approx(_distance(parent, run, head))
    assert said["backbone"]["relative"] == pytest.approx(_distance(parent, run, backbone))
    assert parent.info["weight_change"].keys() == {"head"}
    assert not any("moved" in line for line in flags(run))


def test_at_a_rate_below_what_float32_resolves_the_explorer_says_so(train_awake: Train) -> None:
    _, run = _two_phases(train_awake, "1e-10")
    assert run.info["weight_change"]["backbone"]["changed"] < 0.5
    (said,) = flags(run)  # not also that the best epoch was the last
    assert "float32 rounds such small steps away" in said


@pytest.mark.parametrize(
    "damaged", [None, 3, {}, {"backbone": {"relative": "0", "changed": 1}}, {"backbone": []}]
)
def test_a_run_whose_file_is_damaged_does_not_say_it(damaged: object) -> None:
    assert moved(Run(Path("x"), {"weight_change": damaged})) is None


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.0, "0%"), (3.21e-9, "0.00000032%"), (0.0411, "4.1%"), (1.5, "150%")]
)
def test_small_fractions_keep_two_digits(fraction: float, text: str) -> None:
    assert percent(fraction) == text

"""Learning rates that fall with the distance from the head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import Train
from tests.test_resume import check_alike, interrupt
from tests.test_together import PHOTOS, figures, sweep
from trainer.checkpoint import load_checkpoint
from trainer.config import ConfigError
from trainer.depth import distances
from trainer.model import ModelSpec, build_model
from trainer.phase import make_optimizer
from trainer.recipe import parse
from trainer.runlog import Run


def away(arch: str, head: tuple[int, ...] = ()) -> dict[str, int]:
    return distances(build_model(ModelSpec(arch, 5, head)))


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        (
            "efficientnet_b0",
            {
                "classifier.1.bias": 0,
                "features.8.0.weight": 1,
                "features.8.1.weight": 1,  # a norm is with the block before it
                "features.7.0.block.0.0.weight": 2,
                "features.0.0.weight": 9,
            },
        ),
        ("resnet18", {"fc.weight": 0, "layer4.1.conv1.weight": 1, "layer1.0.conv1.weight": 8}),
        ("resnet18", {"conv1.weight": 9, "bn1.bias": 9}),
        (
            "vit_b_16",
            {
                "heads.head.weight": 0,
                "encoder.ln.weight": 1,
                "encoder.layers.encoder_layer_11.ln_1.weight": 1,
                "encoder.layers.encoder_layer_0.ln_1.weight": 12,
                "conv_proj.weight": 13,
                "class_token": 13,
            },
        ),
        ("vgg11_bn", {"classifier.6.weight": 0, "classifier.3.weight": 1, "features.0.weight": 10}),
        (
            "timm:tf_efficientnet_lite0",
            {"classifier.weight": 0, "conv_head.weight": 1, "blocks.5.3.bn1.weight": 2},
        ),
        ("timm:tf_efficientnet_lite0", {"conv_stem.weight": 17}),
    ],
)
def test_blocks_are_counted_from_the_head(arch: str, expected: dict[str, int]) -> None:
    found = away(arch)
    assert {name: found[name] for name in expected} == expected


def test_all_of_a_head_learns_at_the_full_rate() -> None:
    found = away("resnet18", (8,))
    assert {found[f"fc.{i}.weight"] for i in (0, 2)} == {0}


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "timm:vit_tiny_patch16_224", "resnet18"])
def test_every_distance_up_to_the_first_block_is_there(arch: str) -> None:
    network = build_model(ModelSpec(arch, 5))
    found = distances(network)
    assert list(found) == [name for name, _ in network.named_parameters()]
    assert set(found.values()) == set(range(max(found.values()) + 1))


def test_without_decay_the_optimizer_is_the_one_it_was() -> None:
    network = torch.nn.Linear(2, 2)
    plain = torch.optim.Adam(network.parameters(), 0.1, fused=True)
    assert make_optimizer(network, "adam", 0.1).state_dict() == plain.state_dict()


def groups(run: Run) -> list[dict[str, float]]:
    optimizer = load_checkpoint(run.checkpoint("finetune-last")).optimizer
    assert optimizer is not None
    return list(optimizer["param_groups"])


def test_the_schedule_moves_all_rates_and_the_run_lists_them(train_awake: Train) -> None:
    flags = ("--phase", "finetune", "--epochs", "2", "--lr", "0.01", "--transfer-epochs", "1")
    flags += ("--unfreeze", "20", "--schedule", "step", "--drop", "0.5", "--epochs-drop", "1")
    run = train_awake(*flags, "--layer-decay", "0.5")
    # features.12, classifier.0 and the head classifier.3: three blocks, and features.11 below.
    assert [group["rate"] for group in run.info["layer_rates"]] == [0.01, 0.005, 0.0025, 0.00125]
    listed = [name for group in run.info["layer_rates"] for name in group["modules"]]
    assert run.info["layer_rates"][0]["modules"] == ["classifier.3"]
    assert sorted(listed) == sorted(run.info["phases"][0]["unfrozen_layers"])
    assert [group["lr"] for group in groups(run)] == [0.005, 0.0025, 0.00125, 0.000625]
    assert [epoch.lr_head for epoch in run.epochs] == [0.01, 0.01, 0.005]
    assert [epoch.lr_backbone for epoch in run.epochs] == [0.005, 0.005, 0.0025]


def moved(run: Run, parent: Run) -> dict[str, float]:
    """How far each parameter got, in steps of 1e-3."""
    before = load_checkpoint(parent.checkpoint("transfer-last")).state_dict
    after = load_checkpoint(run.checkpoint("finetune-last")).state_dict
    return {name: float((after[name] - before[name]).abs().max()) / 1e-3 for name in before}


def test_adams_first_step_is_as_long_as_the_rate(train_awake: Train) -> None:
    """One batch, one step: the head moves by the rate, the next block by half of it, and so on."""
    parent = train_awake("--phase", "transfer", "--epochs", "1")
    flags = ("--phase", "finetune", "--from", parent.run_id, "--epochs", "1", "--lr", "1e-3")
    flags += ("--unfreeze", "20", "--batch-size", "64")
    run = train_awake(*flags, "--layer-decay", "0.5")
    far = moved(run, parent)
    found = {n: far[f"{n}.weight"] for n in ("classifier.3", "classifier.0", "features.12.0")}
    assert list(found.values()) == pytest.approx([1, 0.5, 0.25], rel=0.02)
    assert "layer_rates" not in train_awake(*flags).info


@pytest.mark.slow
def test_members_share_batches_and_an_interrupted_one_goes_on(
    train_awake: Train, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = train_awake("--phase", "transfer", "--epochs", "1", "--lr", "0.01")
    flags = ["--from", str(parent.path), "--unfreeze", "20", "--lr", "1e-3", "--epochs", "4"]
    flags += ["--batch-size", "6", "--data", str(photos), *PHOTOS, "--optimizer", "sgd"]
    decays = ["--layer-decay", "1", "0.5"]
    expected = sweep(tmp_path / "whole", *flags, *decays)
    assert set(expected) == {"layer decay 1", "layer decay 0.5", "control"}
    with monkeypatch.context() as patched:
        interrupt(patched, after=2 * 3 + 1)
        sweep(tmp_path / "torn", *flags, *decays, status=130)
    check_alike(sweep(tmp_path / "torn", *flags, *decays), expected)
    alone = train_awake("--phase", "finetune", *flags, "--layer-decay", "0.5")
    assert figures(expected["layer decay 0.5"]) == pytest.approx(figures(alone), rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--layer-decay 0", "--layer-decay 0.0: must be above 0, at most 1"),
        ("--layer-decay 1.1", "--layer-decay 1.1: must be above 0"),
        ("--phase transfer --layer-decay 0.5", "--layer-decay belongs to --phase finetune"),
    ],
)
def test_nonsense_is_refused_with_the_flag(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(flags.split())

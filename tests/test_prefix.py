"""Computing what is frozen once must not change what is learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import Train
from trainer.model import ModelSpec, build_model, set_train_mode, unfreeze, unfreeze_head
from trainer.prefix import cut
from trainer.runlog import Run

EXAMPLE = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def test_b0_is_cut_where_little_crosses_over() -> None:
    network = build_model(ModelSpec("efficientnet_b0", 5))
    unfreeze_head(network)
    pooled = cut(network, EXAMPLE)
    assert pooled is not None
    assert (pooled.at, pooled.bytes_per_photo) == ("classifier.0", 1280 * 4)
    for which in ("10", "20", "features.7"):  # for 10 it could be later, and larger
        unfreeze(network, which)
        found = cut(network, EXAMPLE)
        assert found is not None
        assert found.at == "features.7.0.block.0.0"
        assert found.bytes_per_photo == 192 * 7 * 7 * 4


@pytest.mark.parametrize(
    "arch", ["densenet121", "swin_t", "timm:vit_tiny_patch16_224", "googlenet"]
)
@pytest.mark.parametrize("which", ["3", "8"])
def test_the_parts_give_what_the_whole_gives(arch: str, which: str) -> None:
    network = build_model(ModelSpec(arch, 5)).eval()
    unfreeze(network, which)
    found = cut(network, EXAMPLE)
    assert found is not None
    photos = torch.rand(5, 3, 224, 224)  # another batch size than it was traced with
    with torch.inference_mode():
        assert torch.allclose(found.tail(*found.prefix(photos)), network(photos), atol=1e-5)


def test_the_parts_share_their_modules() -> None:
    network = build_model(ModelSpec("efficientnet_b0", 5))
    unfreeze(network, "20")
    found = cut(network, EXAMPLE)
    assert found is not None
    ours = {id(p) for p in network.parameters() if p.requires_grad}
    assert ours <= {id(p) for p in found.tail.parameters()}
    assert not ours & {id(p) for p in found.prefix.parameters()}
    set_train_mode(network)
    assert found.tail.get_submodule("classifier.0").training
    assert not found.tail.get_submodule("features.8.1").training


def test_nothing_frozen_is_no_prefix() -> None:
    network = build_model(ModelSpec("mobilenet_v3_small", 5))
    unfreeze(network, "all")
    assert cut(network, EXAMPLE) is None


def figures(run: Run) -> list[float]:
    return [v for e in run.epochs for v in (e.train_loss or 0.0, e.val_loss, e.val_acc)]


@pytest.mark.parametrize("augmentation", [(), ("--rotation", "0.05", "--noise", "2")])
def test_training_is_the_same_with_and_without(train: Train, augmentation: tuple[str, ...]) -> None:
    flags = ("--phase", "transfer", "--epochs", "3", "--lr", "0.01", *augmentation)
    once, anew = train(*flags), train(*flags, "--no-cache")
    assert once.info["engine"]["cut"] == "classifier.0"
    assert "engine" not in anew.info
    assert figures(once) == pytest.approx(figures(anew), rel=1e-4)
    flags = ("--phase", "finetune", "--epochs", "3", "--lr", "0.001", *augmentation)
    flags = (*flags, "--from", once.run_id)
    assert figures(train(*flags)) == pytest.approx(figures(train(*flags, "--no-cache")), rel=1e-4)


def test_too_much_for_memory_runs_whole(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = ("--phase", "transfer", "--epochs", "2", "--lr", "0.01")
    once = train(*flags)
    monkeypatch.setattr("trainer.loop.MEMORY_BYTES", 0)
    assert figures(train(*flags)) == pytest.approx(figures(once), rel=1e-4)

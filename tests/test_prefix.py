"""Where a network is cut, and that its parts are the whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from trainer.model import ModelSpec, build_model, unfreeze, unfreeze_head
from trainer.phase import Part, Stage
from trainer.prefix import Trace, in_order, trace

EXAMPLE = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def test_b0_is_cut_where_little_crosses_over() -> None:
    network = build_model(ModelSpec("efficientnet_b0", 5))
    traced = Trace(network, EXAMPLE)
    unfreeze_head(network)
    pooled = traced.cut()
    assert pooled is not None
    assert (pooled.at, pooled.parts) == ("classifier.0", (("float32", (1280,)),))
    deeper = []
    for which in ("10", "20", "features.7"):  # for 10 it could be later, and larger
        unfreeze(network, which)
        found = traced.cut()
        assert found is not None
        assert found.at == "features.7.0.block.0.0"
        assert found.bytes_per_photo == 192 * 7 * 7 * 4
        deeper.append(found)
    assert in_order([pooled, None, *deeper]) == [deeper[0], pooled]


def test_small_photos_are_cut_where_training_begins() -> None:
    """Their activations are small everywhere; the smallest would be a block before what trains."""
    network = build_model(ModelSpec("efficientnet_b0", 5))
    traced = Trace(network, EXAMPLE[..., :32, :32])
    unfreeze(network, "10")
    found = traced.cut()
    assert found is not None
    assert found.at == "features.7.0.block.2.fc2"  # SE-expand, the first of the ten
    assert found.bytes_per_photo <= 16 * 1024


@pytest.mark.parametrize(
    "arch",
    [
        "densenet121",
        pytest.param("swin_t", marks=pytest.mark.slow),
        "timm:vit_tiny_patch16_224",
        "googlenet",
    ],
)
def test_the_parts_give_what_the_whole_gives(arch: str) -> None:
    network = build_model(ModelSpec(arch, 5)).eval()
    traced = Trace(network, EXAMPLE)
    cuts = []
    for which in ("8", "3"):
        unfreeze(network, which)
        cuts.append(traced.cut())
    photos = torch.rand(5, 3, 224, 224)  # another batch size than it was traced with
    stages = [None, *in_order(cuts), None]
    with torch.inference_mode():
        values: tuple[torch.Tensor, ...] = (photos,)
        for start, stop in pairwise(stages[:-1]):
            values = traced.part(start, stop)(*values)
        logits = traced.part(stages[-2], None)(*values)
        assert torch.allclose(logits, network(photos), atol=1e-5)


def test_a_copy_of_the_tail_trains_alone_and_shares_what_is_frozen() -> None:
    network = build_model(ModelSpec("efficientnet_b0", 5))
    unfreeze(network, "20")
    part = Part.of(network, Trace(network, EXAMPLE), [Stage.of(network)])
    one, two = part.copy(), part.copy()
    for name, parameter in one.named_parameters():
        other = two.get_parameter(name)
        assert (other is parameter) == (not parameter.requires_grad)
        assert torch.equal(other, network.get_parameter(name))
    assert all(two.get_buffer(name) is buffer for name, buffer in one.named_buffers())
    assert "classifier.0" in part.training
    assert "features.8.1" not in part.training  # BatchNorm
    whole = Part.of(network, None, [Stage.of(network)]).copy()
    assert not {id(p) for p in network.parameters() if p.requires_grad} & {
        id(p) for p in whole.parameters()
    }


def test_what_has_no_frozen_beginning_or_cannot_be_traced_runs_whole() -> None:
    network = build_model(ModelSpec("mobilenet_v3_small", 5))
    traced = Trace(network, EXAMPLE)
    unfreeze(network, "all")
    assert traced.cut() is None

    class Decides(torch.nn.Module):
        def forward(self, photos: torch.Tensor) -> torch.Tensor:
            return photos if photos.sum() > 0 else -photos

    assert trace(Decides(), EXAMPLE) is None

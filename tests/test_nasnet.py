"""NASNet-Mobile: Keras's size, any input, frozen parts, heads, export."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from export.to_onnx import export_run
from tests.conftest import Train
from trainer.model import (
    ModelError,
    ModelSpec,
    build_model,
    check_takes,
    head_name,
    layers,
    set_train_mode,
    trainable_parameters,
    unfreeze,
    unfreeze_head,
)
from trainer.nasnet import HalvingPad, Shift
from trainer.prefix import Trace, in_order
from trainer.weights import choose_preprocess, default_preprocess

NASNET = "nasnet_mobile"


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return build_model(ModelSpec(NASNET, 43)).eval()


def test_it_has_as_many_numbers_as_in_keras() -> None:
    state = build_model(ModelSpec(NASNET, 1000)).state_dict()
    numbers = {k: v.numel() for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert sum(numbers.values()) == 5_326_716
    statistics = sum(n for k, n in numbers.items() if k.endswith(("running_mean", "running_var")))
    assert statistics == 36_738  # "non-trainable" in Keras


def test_batchnorm_is_that_of_keras(network: nn.Module) -> None:
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 1 - 0.9997)}


@pytest.mark.parametrize(("side", "last"), [(32, 1), (33, 1), (75, 3), (224, 7), (256, 8)])
def test_photos_of_any_side_from_32(network: nn.Module, side: int, last: int) -> None:
    maps: list[torch.Size] = []
    handle = network.get_submodule("relu").register_forward_hook(
        lambda module, given, made: maps.append(made.shape)
    )
    with torch.inference_mode():
        assert network(torch.rand(2, 3, side, side)).shape == (2, 43)
    handle.remove()
    assert maps == [(2, 1056, last, last)]


def test_padding_for_even_and_odd_sides() -> None:
    ones = torch.ones(1, 1, 6, 5)
    assert HalvingPad(5)(ones).shape[-2:] == (6 + 1 + 2, 5 + 2 + 2)
    assert HalvingPad(3)(ones)[0, 0, 0].tolist() == [0, 1, 1, 1, 1, 1, 0]  # nothing above
    rows = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert Shift()(rows)[0, 0].tolist() == [[4, 5, 0], [0, 0, 0]]


def test_its_parts_give_what_the_whole_gives(network: nn.Module) -> None:
    traced = Trace(network, torch.rand(3, 3, 32, 32))
    cuts = []
    for which in ("cells.6", "predictions"):
        unfreeze(network, which)
        cuts.append(traced.cut())
    assert None not in cuts
    photos = torch.rand(5, 3, 32, 32)
    values: tuple[torch.Tensor, ...] = (photos,)
    stages = [None, *in_order(cuts)]
    with torch.inference_mode():
        for start, stop in pairwise(stages):
            values = traced.part(start, stop)(*values)
        logits = traced.part(stages[-1], None)(*values)
        assert torch.allclose(logits, network(photos), atol=1e-5)


def test_layers_are_counted_from_the_head(network: nn.Module) -> None:
    counted = layers(network)
    assert [layer.name for layer in counted[-3:]] == ["relu", "avgpool", "predictions"]
    assert counted[0].name == "stem_conv1"
    top = unfreeze(network, "12")
    assert top == (
        "cells.12.left5.separable_conv_1.depthwise",
        "cells.12.left5.separable_conv_1.pointwise",
        "cells.12.left5.separable_conv_2.depthwise",
        "cells.12.left5.separable_conv_2.pointwise",
        "predictions",
    )
    assert unfreeze(network, "all")[0] == "stem_conv1"


@pytest.mark.parametrize("arch", [pytest.param(NASNET, marks=pytest.mark.slow), "efficientnet_b0"])
@pytest.mark.parametrize(
    ("head", "pool", "side"),
    [
        ((512, 256, 128), "avg", 32),
        pytest.param((1024, 256), "max", 256, marks=pytest.mark.slow),
    ],
)
def test_the_heads_of_lab_4(arch: str, head: tuple[int, ...], pool: str, side: int) -> None:
    network = build_model(ModelSpec(arch, 43, head, "max" if pool == "max" else "avg"))
    check_takes(network, arch, side)
    sizes = [m.out_features for m in network.modules() if isinstance(m, nn.Linear)]
    assert sizes == [*head, 43]
    assert any(isinstance(m, nn.AdaptiveMaxPool2d) for m in network.modules()) == (pool == "max")
    name = head_name(network)
    assert unfreeze_head(network) == tuple(f"{name}.{2 * i}" for i in range(len(sizes)))
    assert [layer.module for layer in layers(network) if layer.module in unfreeze_head(network)]
    inputs = 1056 if arch == NASNET else 1280
    expected = sum((a + 1) * b for a, b in pairwise((inputs, *head, 43)))
    assert trainable_parameters(network) == expected
    set_train_mode(network)
    assert not network.get_submodule("cells" if arch == NASNET else "features").training


def test_preprocessing_is_keras_own() -> None:
    found = default_preprocess(NASNET)
    assert (found.crop, found.mean, found.std) == (224, (0.5,) * 3, (0.5,) * 3)
    small = choose_preprocess(NASNET, 32)
    assert (small.resize, small.crop, small.interpolation) == (32, 32, "bicubic")
    assert small.mean == found.mean


def test_a_misspelt_name_is_corrected() -> None:
    with pytest.raises(ModelError, match="Did you mean nasnet_mobile"):
        build_model(ModelSpec("nasnet-mobile", 2))


def test_a_size_that_a_network_does_not_take_is_said() -> None:
    with pytest.raises(ModelError, match="--size 32: vit_b_16 does not take photos of 32 x 32"):
        check_takes(build_model(ModelSpec("vit_b_16", 2)), "vit_b_16", 32)


@pytest.mark.slow
def test_train_and_export(train: Train, tmp_path: Path) -> None:
    flags = ("--arch", NASNET, "--size", "32", "--epochs", "1")
    run = train("--phase", "transfer", *flags, "--head", "16", "--pool", "max")
    assert run.info["preprocess"]["crop"] == 32
    assert export_run(run, output=tmp_path / "model.onnx").parity is not None

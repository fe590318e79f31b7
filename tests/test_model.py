"""Networks, the layer table, freezing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import efficientnet_b0

from trainer.model import (
    InputNormalize,
    ModelError,
    ModelSpec,
    build_model,
    head_name,
    layers,
    set_train_mode,
    trainable_parameters,
    unfreeze,
    unfreeze_everything,
    unfreeze_head,
)
from trainer.schema import Preprocess

# What `model.layers[-20:]` and `[-10:]` hold in Keras with Flatten and Dense on top.
KERAS_TOP_20 = [
    "block6d_add",
    "block7a_expand_conv",
    "block7a_expand_bn",
    "block7a_expand_activation",
    "block7a_dwconv",
    "block7a_bn",
    "block7a_activation",
    "block7a_se_squeeze",
    "block7a_se_reshape",
    "block7a_se_reduce",
    "block7a_se_expand",
    "block7a_se_excite",
    "block7a_project_conv",
    "block7a_project_bn",
    "top_conv",
    "top_bn",
    "top_activation",
    "avg_pool",
    "flatten",
    "predictions",
]


@pytest.fixture(scope="module")
def b0() -> nn.Module:
    return build_model(ModelSpec("efficientnet_b0", 5))


def test_layers_are_counted_as_keras_counts_them(b0: nn.Module) -> None:
    counted = layers(b0)
    # Keras: 237 layers without the top; plus pooling, Flatten and Dense.
    assert len(counted) == 240
    assert [layer.name for layer in counted[-20:]] == KERAS_TOP_20
    for layer in counted:
        assert layer.module is None or b0.get_submodule(layer.module) is not None


def test_every_weight_of_the_network_is_in_exactly_one_layer(b0: nn.Module) -> None:
    counted = [layer.module for layer in layers(b0) if layer.module is not None]
    owners = [n for n, m in b0.named_modules() if any(True for _ in m.parameters(recurse=False))]
    assert [name for name in counted if name in set(owners)] == owners
    assert len(counted) == len(set(counted))


def test_unfreeze_10(b0: nn.Module) -> None:
    assert unfreeze(b0, "10") == (
        "features.7.0.block.2.fc2",
        "features.7.0.block.3.0",
        "features.8.0",
        "classifier.1",
    )


def test_unfreeze_20_is_block_7_and_the_top(b0: nn.Module) -> None:
    assert unfreeze(b0, "20") == (
        "features.7.0.block.0.0",
        "features.7.0.block.1.0",
        "features.7.0.block.2.fc1",
        "features.7.0.block.2.fc2",
        "features.7.0.block.3.0",
        "features.8.0",
        "classifier.1",
    )
    assert unfreeze(b0, "features.7") == unfreeze(b0, "20")


def test_unfreeze_all_leaves_batchnorm_frozen(b0: nn.Module) -> None:
    unfreeze(b0, "all")
    frozen = {n for n, p in b0.named_parameters() if not p.requires_grad}
    norms = {n for n, m in b0.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert frozen == {f"{n}.{kind}" for n in norms for kind in ("weight", "bias")}


def test_transfer_trains_the_head_and_scratch_everything(b0: nn.Module) -> None:
    assert unfreeze_head(b0) == ("classifier.1",)
    assert trainable_parameters(b0) == 1280 * 5 + 5
    unfreeze_everything(b0)
    assert trainable_parameters(b0) == sum(p.numel() for p in b0.parameters())


@pytest.mark.parametrize("which", ["0", "241", "features.9", "", "-3", "block7"])
def test_unfreeze_nonsense_says_what_there_is(b0: nn.Module, which: str) -> None:
    with pytest.raises(ModelError, match=r"--unfreeze .*(240|features)"):
        unfreeze(b0, which)


def test_training_mode_reaches_only_what_trains(b0: nn.Module) -> None:
    unfreeze(b0, "20")
    b0.train()
    set_train_mode(b0)
    assert not any(m.training for m in b0.modules() if isinstance(m, nn.BatchNorm2d))
    assert not b0.get_submodule("features.6.1.stochastic_depth").training
    assert b0.get_submodule("features.7.0.stochastic_depth").training
    assert b0.get_submodule("classifier.0").training  # dropout before the head


def test_dropout_of_the_head_is_live_in_the_transfer_phase(b0: nn.Module) -> None:
    unfreeze_head(b0)
    set_train_mode(b0)
    live = [n for n, m in b0.named_modules() if m.training and not list(m.children())]
    assert live == ["classifier.0", "classifier.1"]


def test_from_scratch_batchnorm_trains() -> None:
    network = build_model(ModelSpec("mobilenet_v3_small", 2))
    unfreeze_everything(network)
    set_train_mode(network)
    assert all(m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def test_state_dict_loads_into_plain_torchvision(b0: nn.Module) -> None:
    efficientnet_b0(num_classes=5).load_state_dict(b0.state_dict())


ARCHS = [
    "squeezenet1_1",
    "mobilenet_v3_small",
    "resnet18",
    "densenet121",
    "googlenet",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "regnet_y_400mf",
    "timm:tf_efficientnet_lite0",
    "timm:vit_tiny_patch16_224",
]


@pytest.mark.parametrize("arch", ARCHS)
def test_architectures_get_a_head_that_alone_trains(arch: str) -> None:
    network = build_model(ModelSpec(arch, 7))
    assert unfreeze_head(network) == (head_name(network),)
    logits = network.eval()(torch.rand(2, 3, 224, 224))
    assert logits.shape == (2, 7)
    (logits.sum()).backward()


@pytest.mark.slow
def test_every_torchvision_classification_model() -> None:
    from torchvision import models

    for arch in models.list_models(module=models):
        if arch in ("regnet_y_128gf", "vit_h_14"):  # more memory than a CI machine has to spare
            continue
        network = build_model(ModelSpec(arch, 7))
        unfreeze_head(network)
        size = models.get_model_weights(arch).DEFAULT.transforms().crop_size[0]
        with torch.inference_mode():
            assert network.eval()(torch.rand(1, 3, size, size)).shape == (1, 7), arch


@pytest.mark.parametrize("arch", ["efficientnet_b0", "resnet18", "timm:tf_efficientnet_lite0"])
def test_hidden_head_and_max_pooling(arch: str) -> None:
    network = build_model(ModelSpec(arch, 4, head=(32, 16), pool="max"))
    shapes = [tuple(p.shape) for p in network.get_submodule(head_name(network)).parameters()]
    assert shapes[1:] == [(32,), (16, 32), (16,), (4, 16), (4,)]
    photos = torch.rand(2, 3, 224, 224)
    average = build_model(ModelSpec(arch, 4, head=(32, 16)))
    average.load_state_dict(network.state_dict())
    logits = []
    for model in (network, average):
        torch.manual_seed(0)  # the same dropout in both
        logits.append(model.train()(photos))  # batch statistics: a random network fades without
    assert not torch.allclose(*logits)


def test_what_a_network_lacks_is_said() -> None:
    with pytest.raises(ModelError, match="--pool max: densenet121"):
        build_model(ModelSpec("densenet121", 3, pool="max"))
    with pytest.raises(ModelError, match="squeezenet1_1 come from a Conv2d"):
        build_model(ModelSpec("squeezenet1_1", 3, head=(8,)))


@pytest.mark.parametrize(
    ("arch", "close"), [("efficientnet-b0", "efficientnet_b0"), ("timm:resnet_18", "resnet18")]
)
def test_unknown_arch_names_close_ones(arch: str, close: str) -> None:
    with pytest.raises(ModelError, match=f"Unknown architecture.*{close}"):
        build_model(ModelSpec(arch, 3))


def test_input_normalize_is_torchvisions_normalisation() -> None:
    from torchvision.transforms.v2 import functional

    photos = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    preprocess = Preprocess()
    expected = functional.normalize(
        photos.permute(0, 3, 1, 2) / 255, list(preprocess.mean), list(preprocess.std)
    )
    assert torch.allclose(InputNormalize(preprocess)(photos), expected, atol=1e-6)

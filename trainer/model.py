"""Networks: build, replace the head, count layers as Keras does, freeze and unfreeze.

Every network here maps normalised float32 [N, 3, H, W] to logits [N, classes]. torchvision networks
keep their own module names, so their state dicts load into plain torchvision as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.cnn10 import Cnn10
from trainer.nasnet import NASNetMobile
from trainer.schema import Preprocess, ThawError

DEFAULT_ARCH: Final = "efficientnet_b0"
TIMM_PREFIX: Final = "timm:"
NASNET: Final = "nasnet_mobile"
CNN10: Final = "cnn10"
# Networks of no library.
OWN: Final[Mapping[str, type[nn.Module]]] = {NASNET: NASNetMobile, CNN10: Cnn10}

Pool = Literal["avg", "max"]


class ModelError(ThawError):
    """An unknown architecture, or one that lacks what was asked of it."""


@dataclass(frozen=True)
class ModelSpec:
    """What is needed to build a network anew.

    `arch` is a torchvision classification model, one of `OWN`, or `timm:<name>`; `head` holds the
    sizes of hidden layers (empty for a linear head); `pool` is the last spatial pooling.
    """

    arch: str
    num_classes: int
    head: tuple[int, ...] = ()
    pool: Pool = "avg"

    def to_dict(self) -> dict[str, Any]:
        return {
            "arch": self.arch,
            "num_classes": self.num_classes,
            "head": list(self.head),
            "pool": self.pool,
        }


class InputNormalize(nn.Module):
    """uint8 or float [N, H, W, 3] in 0..255 -> normalised float32 [N, 3, H, W]."""

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        mean = torch.tensor(preprocess.mean).view(1, 3, 1, 1) * 255
        std = torch.tensor(preprocess.std).view(1, 3, 1, 1) * 255
        self.register_buffer("scale", 1 / std, persistent=False)
        self.register_buffer("offset", -mean / std, persistent=False)

    def forward(self, photos: Tensor) -> Tensor:
        pixels = photos.permute(0, 3, 1, 2).to(torch.float32)
        return pixels * self.get_buffer("scale") + self.get_buffer("offset")


# --- building ---------------------------------------------------------------------------------


def build_model(spec: ModelSpec) -> nn.Module:
    """A network with random weights. Raises ModelError for an unknown arch, with close matches."""
    if spec.arch.startswith(TIMM_PREFIX):
        network = _timm(spec)
    else:
        network = OWN[spec.arch]() if spec.arch in OWN else _torchvision(spec)
        _replace_pool(network, spec)
    _replace_head(network, spec)
    return network


def _torchvision(spec: ModelSpec) -> nn.Module:
    from torchvision import models

    names = models.list_models(module=models)
    if spec.arch not in names:
        raise ModelError(_unknown_arch(spec.arch, [*OWN, *names]))
    # Auxiliary classifiers would add a second output; the other networks do not know these flags.
    extra: dict[str, Any] = {"googlenet": _NO_AUX, "inception_v3": _NO_AUX}.get(spec.arch, {})
    made: nn.Module = models.get_model(spec.arch, weights=None, **extra)
    return made


def _replace_pool(network: nn.Module, spec: ModelSpec) -> None:
    if spec.pool == "max":
        pool = getattr(network, "avgpool", None)
        if not isinstance(pool, nn.AdaptiveAvgPool2d):
            raise ModelError(f"--pool max: {spec.arch} has no pooling layer to replace. Use avg.")
        network.avgpool = nn.AdaptiveMaxPool2d(pool.output_size)


_NO_AUX: Final = {"aux_logits": False, "init_weights": False}


def _timm(spec: ModelSpec) -> nn.Module:
    import timm

    name = spec.arch.removeprefix(TIMM_PREFIX)
    if not timm.is_model(name):
        raise ModelError(_unknown_arch(name, timm.list_models()))
    options: dict[str, Any] = {"global_pool": "max"} if spec.pool == "max" else {}
    try:
        network: nn.Module = timm.create_model(name, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ModelError(f"timm cannot build {name} with --pool {spec.pool}: {error}") from error
    return network


def _unknown_arch(name: str, known: list[str]) -> str:
    import difflib

    close = ", ".join(difflib.get_close_matches(name, known, n=3))
    hint = f"Did you mean {close}?" if close else ""
    return (
        f"Unknown architecture {name!r}. {hint} Use a torchvision classification model "
        f"(such as {DEFAULT_ARCH} or resnet50), {', '.join(OWN)}, or timm:<name>."
    )


def head_name(network: nn.Module) -> str:
    """The path of the module that gives the logits, such as `classifier.1`."""
    get_classifier: Any = getattr(network, "get_classifier", None)
    if get_classifier is not None:  # timm
        classifier = get_classifier()
        for name, module in network.named_modules():
            if module is classifier:
                return name
    linear = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | _Mlp)]
    if linear:
        return [n for n in linear if not any(n.startswith(f"{other}.") for other in linear)][-1]
    convolutions = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    return convolutions[-1]  # SqueezeNet: its logits come from a 1x1 convolution


class _Mlp(nn.Sequential):
    """A head with hidden layers: Linear, ReLU, ..., Linear."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(*layers[:-1])


def _replace_head(network: nn.Module, spec: ModelSpec) -> None:
    name = head_name(network)
    old = network.get_submodule(name)
    new: nn.Module
    if isinstance(old, nn.Conv2d) and not spec.head:
        new = nn.Conv2d(old.in_channels, spec.num_classes, kernel_size=1)
    elif isinstance(old, nn.Linear):
        sizes = (old.in_features, *spec.head, spec.num_classes)
        new = _Mlp(sizes) if spec.head else nn.Linear(old.in_features, spec.num_classes)
    else:
        raise ModelError(
            f"--head {','.join(map(str, spec.head))}: the logits of {spec.arch} come from a "
            f"{type(old).__name__}, which has no hidden layers to add. Use --head linear."
        )
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, new)


def check_takes(network: nn.Module, arch: str, side: int) -> None:
    """Raise ModelError where the network does not take photos of `side` x `side` pixels."""
    network.eval()
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, side, side))
    except (RuntimeError, ValueError, AssertionError) as error:  # as each architecture pleases
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"--size {side}: {arch} does not take photos of {side} x {side} pixels ({reason})."
        ) from error


# --- layers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer as it is counted by `--unfreeze N`; `module` is None where Keras has a layer of its
    own (a padding, a reshape) and torchvision does not."""

    name: str
    module: str | None


def layers(network: nn.Module) -> tuple[Layer, ...]:
    """All layers in order, head last.

    torchvision's EfficientNets are counted as Keras lists them in `model.layers` of
    `EfficientNetB0(include_top=False, pooling="avg")` with Flatten and Dense on top, which is what
    the labs' `model.layers[-20:]` counted. Other networks: every module that computes something, in
    the order of definition.
    """
    from torchvision.models import EfficientNet

    is_b = isinstance(network, EfficientNet) and len(network.features) == 9
    return tuple(_keras_layers(network) if is_b else _plain_layers(network))


def _plain_layers(network: nn.Module) -> Iterator[Layer]:
    for name, module in network.named_modules():
        leaf = not any(True for _ in module.children())
        owns_parameters = any(True for _ in module.parameters(recurse=False))
        if name and (leaf or owns_parameters) and not isinstance(module, nn.Identity):
            yield Layer(name, name)


def _keras_layers(network: nn.Module) -> Iterator[Layer]:
    for name in ("input", "rescaling", "normalization", "stem_conv_pad"):
        yield Layer(name, None)
    for number, name in enumerate(("stem_conv", "stem_bn", "stem_activation")):
        yield Layer(name, f"features.0.{number}")
    for stage in range(1, 8):
        for index, _ in enumerate(network.get_submodule(f"features.{stage}").children()):
            yield from _keras_block(network, stage, index)
    for number, name in enumerate(("top_conv", "top_bn", "top_activation")):
        yield Layer(name, f"features.8.{number}")
    yield Layer("avg_pool", "avgpool")
    yield Layer("flatten", None)
    head = head_name(network)
    dense = [
        n for n, m in network.named_modules() if n.startswith(head) and isinstance(m, nn.Linear)
    ]
    for number, name in enumerate(dense):
        yield Layer("predictions" if name == dense[-1] else f"dense_{number}", name)


def _keras_block(network: nn.Module, stage: int, index: int) -> Iterator[Layer]:
    """One MBConv block: expand, depthwise, squeeze-and-excite, project, add."""
    path = f"features.{stage}.{index}"
    block = network.get_submodule(path)
    parts = [f"{path}.block.{n}" for n, _ in block.get_submodule("block").named_children()]
    prefix = f"block{stage}{chr(ord('a') + index)}_"
    if len(parts) == 4:  # the first stage has no expansion
        expand = parts.pop(0)
        yield Layer(f"{prefix}expand_conv", f"{expand}.0")
        yield Layer(f"{prefix}expand_bn", f"{expand}.1")
        yield Layer(f"{prefix}expand_activation", f"{expand}.2")
    depthwise, squeeze, project = parts
    if network.get_submodule(f"{depthwise}.0").stride != (1, 1):
        yield Layer(f"{prefix}dwconv_pad", None)
    yield Layer(f"{prefix}dwconv", f"{depthwise}.0")
    yield Layer(f"{prefix}bn", f"{depthwise}.1")
    yield Layer(f"{prefix}activation", f"{depthwise}.2")
    yield Layer(f"{prefix}se_squeeze", f"{squeeze}.avgpool")
    yield Layer(f"{prefix}se_reshape", None)
    yield Layer(f"{prefix}se_reduce", f"{squeeze}.fc1")
    yield Layer(f"{prefix}se_expand", f"{squeeze}.fc2")
    yield Layer(f"{prefix}se_excite", None)
    yield Layer(f"{prefix}project_conv", f"{project}.0")
    yield Layer(f"{prefix}project_bn", f"{project}.1")
    if block.use_res_connect:
        yield Layer(f"{prefix}drop", f"{path}.stochastic_depth")
        yield Layer(f"{prefix}add", None)


# --- freezing ---------------------------------------------------------------------------------


def freeze(network: nn.Module) -> None:
    """Freeze everything."""
    network.requires_grad_(False)


def unfreeze_head(network: nn.Module) -> tuple[str, ...]:
    """Let the head train and nothing else; returns the names of the modules that train."""
    freeze(network)
    network.get_submodule(head_name(network)).requires_grad_(True)
    return trainable_modules(network)


def unfreeze_everything(network: nn.Module) -> tuple[str, ...]:
    """Let everything train, BatchNorm included: training from scratch."""
    network.requires_grad_(True)
    return trainable_modules(network)


def unfreeze(network: nn.Module, which: str) -> tuple[str, ...]:
    """Let the top layers train, BatchNorm never; returns the names of the modules that train.

    `which` is a number of layers counted from the top (head included), `all`, or a module name,
    which frees that module and all above it. Raises ModelError for anything else.
    """
    freeze(network)
    for name in _chosen(network, which):
        module = network.get_submodule(name)
        if not isinstance(module, _BatchNorm):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
    # With hidden layers a small number would free half a head; the head trains in every phase.
    network.get_submodule(head_name(network)).requires_grad_(True)
    return trainable_modules(network)


def _chosen(network: nn.Module, which: str) -> list[str]:
    names = [name for name, _ in network.named_modules()]
    if which == "all":
        return names
    if which.isdecimal():
        counted = layers(network)
        if not 1 <= int(which) <= len(counted):
            raise ModelError(
                f"--unfreeze {which}: this network has {len(counted)} layers. Give a number from "
                f"1 to {len(counted)}, 'all', or a module name."
            )
        return [layer.module for layer in counted[-int(which) :] if layer.module is not None]
    if which in names and which:
        return names[names.index(which) :]
    top = ", ".join(name for name, _ in network.named_children())
    raise ModelError(
        f"--unfreeze {which}: no such module. Give a number of layers, 'all', or a module name; "
        f"at the top level there are: {top}."
    )


def trainable_modules(network: nn.Module) -> tuple[str, ...]:
    """Names of the modules that own a trainable parameter, in order."""
    return tuple(
        name
        for name, module in network.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    )


def trainable_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def set_train_mode(network: nn.Module) -> None:
    """Put the part that trains into training mode and leave the frozen part in evaluation mode.

    `network.train()` would let frozen BatchNorm statistics drift and drop frozen paths
    (StochasticDepth). Frozen BatchNorm stays in evaluation mode wherever it stands. The dropout in
    front of the head is live in every phase.
    """
    network.eval()
    training = trainable_modules(network)
    if not training:
        return
    top = head_name(network).partition(".")[0]
    above = False
    for name, module in network.named_modules():
        above = above or name == training[0]
        if (above or name.partition(".")[0] == top) and not _is_frozen_norm(module):
            module.training = True


def _is_frozen_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters())

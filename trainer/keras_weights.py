"""Weights that Keras published as HDF5 files, for the same network in PyTorch.

Such a file has a group for each layer, with an attribute that names its tensors; both are found by
name, never by order. Every tensor of the file must be wanted and every one wanted be there, except
that the layer which gives the logits may be missing (the files called "no top").
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from trainer.schema import ThawError

SUFFIXES: Final = (".h5", ".hdf5")
TOP: Final = "predictions"


class KerasError(ThawError):
    """A file that does not hold Keras weights, or those of another network."""


@dataclass(frozen=True)
class Published:
    """A file of ImageNet weights as Keras's own source states it; `md5` is all it gives."""

    url: str
    md5: str


PUBLISHED: Final = {
    "nasnet_mobile": Published(
        "https://storage.googleapis.com/tensorflow/keras-applications/nasnet/NASNet-mobile.h5",
        "020fb642bf7360b370c678b08e0adf61",
    ),
}


@dataclass(frozen=True)
class Place:
    """Where in a Keras file a tensor of ours is: the layer, what it is there, and which dimension
    of the file's becomes each of ours."""

    layer: str
    role: str
    order: tuple[int, ...]


def read_keras(path: Path, arch: str, network: nn.Module) -> dict[str, Tensor]:
    """What the file holds, as a state dict of `network`, a network of `arch`.

    The head has as many classes as the file, whatever `network` has, or is missing as it is there.
    Raises KerasError.
    """
    if arch not in _NAMES:
        raise KerasError(
            f"--weights {path}: Keras files can be read for {', '.join(_NAMES)}. For {arch} give a "
            "state dict of PyTorch."
        )
    import h5py  # type: ignore[import-untyped]

    try:
        with h5py.File(path, "r") as file:
            found = _layers(path, file)
            wanted = {
                name: place
                for name, place in places(network, arch).items()
                if place.layer != TOP or TOP in found
            }
            _check(path, arch, found, wanted)
            shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
            return {
                name: _tensor(path, found[place.layer][place.role], place, shapes[name])
                for name, place in wanted.items()
            }
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # as h5py pleases
        raise KerasError(
            f"--weights {path} is not an HDF5 file that can be read: {error}"
        ) from error


def check_md5(path: Path, wanted: str) -> None:
    """Raise KerasError where the file is not the published one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != wanted:
        raise KerasError(f"it is damaged: its MD5 is {found}, that of the original {wanted}")


# --- the file ---------------------------------------------------------------------------------


def _layers(path: Path, file: Any) -> dict[str, dict[str, Any]]:
    """The datasets of each layer that has some, by what they are there, such as `kernel`."""
    group = file.get("model_weights", file)  # the former where a whole model was saved
    names = _attribute(group, "layer_names")
    if not names and "layers" in file:
        raise KerasError(
            f"--weights {path} has the layout of Keras 3's save_weights, which names no layers. "
            "Save it in Keras with model.save('FILE.h5')."
        )
    if not names:
        raise KerasError(f"--weights {path} is an HDF5 file without Keras layers.")
    layers = {name: group[name] for name in names}
    tensors = {
        name: {
            _role(each): _own(path, file, layer[each]) for each in _attribute(layer, "weight_names")
        }
        for name, layer in layers.items()
    }
    return {name: found for name, found in tensors.items() if found}


def _own(path: Path, file: Any, dataset: Any) -> Any:
    """HDF5 can link to other files, and take the bytes of a tensor from any file of this disk."""
    if dataset.file.filename != file.filename or dataset.external or dataset.is_virtual:
        raise KerasError(f"--weights {path} refers to other files, and Thaw reads none but itself.")
    return dataset


def _attribute(group: Any, name: str) -> list[str]:
    """A list of names; one too long for an attribute of HDF5 is in several, which are numbered."""
    numbered = takewhile(group.attrs.__contains__, map(f"{name}{{}}".format, count()))
    parts = [name] if name in group.attrs else list(numbered)
    values = [value for part in parts for value in group.attrs[part]]
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _role(name: str) -> str:
    """`stem_bn1/gamma:0` -> `gamma`."""
    return name.rpartition("/")[2].partition(":")[0]


def _check(
    path: Path, arch: str, found: Mapping[str, Mapping[str, Any]], chosen: Mapping[str, Place]
) -> None:
    """That the file holds what is wanted and nothing else."""
    there = {f"{layer}/{role}": None for layer, roles in found.items() for role in roles}
    wanted = {f"{place.layer}/{place.role}": None for place in chosen.values()}
    missing = [name for name in wanted if name not in there]
    unknown = [name for name in there if name not in wanted]
    if missing or unknown:
        raise KerasError(
            f"--weights {path} belongs to another network: of the {len(wanted)} tensors of {arch} "
            f"it lacks {_some(missing)}; it has {_some(unknown)} that {arch} has not."
        )


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if names[3:] else ''})" if names else "0"


def _tensor(path: Path, dataset: Any, place: Place, wanted: list[int]) -> Tensor:
    """One tensor, its dimensions in our order. Its shape is compared before it is read."""
    if len(dataset.shape) != len(wanted):
        raise KerasError(_unfit(path, place, dataset, wanted))
    shape = [dataset.shape[axis] for axis in place.order]
    free = 1 if place.layer == TOP else 0  # the number of classes
    if shape[free:] != wanted[free:]:
        raise KerasError(_unfit(path, place, dataset, wanted))
    values = torch.from_numpy(dataset.astype("float32")[()])
    return values.permute(place.order).contiguous()


def _unfit(path: Path, place: Place, dataset: Any, wanted: list[int]) -> str:
    there = [0] * len(wanted)
    for ours, axis in enumerate(place.order):
        there[axis] = wanted[ours]
    return (
        f"--weights {path} belongs to another network: {place.layer}/{place.role} has shape "
        f"{list(dataset.shape)}, where {there} is needed."
    )


# --- the network ------------------------------------------------------------------------------


def places(network: nn.Module, arch: str) -> dict[str, Place]:
    """Where in a Keras file each tensor of the state dict of a network of `arch` is."""
    return {
        f"{path}.{name}": Place(_NAMES[arch](path), role, order)
        for path, module in network.named_modules()
        for name, role, order in _tensors(path, module)
    }


def _tensors(path: str, module: nn.Module) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Ours, Keras's, and the order of dimensions of the tensors of one module."""
    if isinstance(module, nn.Conv2d):
        kind = path.rpartition(".")[2]
        depthwise = kind == "depthwise"  # [h, w, channels, 1]
        role = f"{kind}_kernel" if kind in ("depthwise", "pointwise") else "kernel"
        yield "weight", role, (2, 3, 0, 1) if depthwise else (3, 2, 0, 1)
    elif isinstance(module, nn.BatchNorm2d):
        for ours, theirs in _NORM:
            yield ours, theirs, (0,)
    elif isinstance(module, nn.Linear):
        yield "weight", "kernel", (1, 0)
        yield "bias", "bias", (0,)


_NORM: Final = (
    ("weight", "gamma"),
    ("bias", "beta"),
    ("running_mean", "moving_mean"),
    ("running_var", "moving_variance"),
)


def _nasnet(path: str) -> str:
    """`cells.0.left1.separable_conv_1.depthwise` -> `separable_conv_1_normal_left1_0`."""
    if not path.startswith("cells."):
        return path
    _, cell, block, layer, *_ = path.split(".")
    kind = "normal" if cell.isdecimal() else "reduction"
    return f"{layer}_{cell}" if block in ("enter", "adjust") else f"{layer}_{kind}_{block}_{cell}"


_NAMES: Final[dict[str, Callable[[str], str]]] = {"nasnet_mobile": _nasnet}

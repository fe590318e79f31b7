"""How far from the head each part of a network is, for rates that fall with the distance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.model import head_name

_SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
# A part that holds as much of the network is no block, but holds the blocks.
_NEARLY_ALL = 0.9


def distances(network: nn.Module) -> dict[str, int]:
    """For each parameter how many blocks it is away from the head, whose own are at 0.

    The blocks are those of timm's `group_matcher` where a network has one. Elsewhere they are the
    network's children, and the children of those that are plain sequences or hold nearly all of
    it: `features.0` to `features.8` of torchvision's EfficientNets, `layer1.0` and so on of its
    ResNets, the encoder's layers of its transformers. A norm by itself belongs to the block before
    it, and what no block holds to the first one.
    """
    head = head_name(network)
    body = [name for name, _ in network.named_parameters() if not _inside(name, head)]
    blocks = _matched(network) if hasattr(network, "group_matcher") else _found(network, head, body)
    used = sorted({blocks[name] for name in body})
    away = {block: len(used) - place for place, block in enumerate(used)}
    return {
        name: 0 if _inside(name, head) else away[blocks[name]]
        for name, _ in network.named_parameters()
    }


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _matched(network: Any) -> dict[str, int]:
    from timm.models import group_parameters

    matcher = network.group_matcher(coarse=False)
    found: dict[str, int] = group_parameters(network, matcher, reverse=True)
    return found


def _found(network: nn.Module, head: str, body: list[str]) -> dict[str, int]:
    """The number of each parameter's block, counted from the photos on."""
    sizes = {name: network.get_parameter(name).numel() for name in body}
    blocks: dict[str, int] = {}
    number = 0
    for path in _paths(network, head, sizes):
        owned = [name for name in body if _inside(name, path)]
        if owned:
            number += not isinstance(network.get_submodule(path), _NORMS)
            blocks |= dict.fromkeys(owned, max(1, number))
    return {name: blocks.get(name, 1) for name in body}


def _paths(
    network: nn.Module, head: str, sizes: dict[str, int], path: str = "", opened: bool = True
) -> Iterator[str]:
    """The paths of the blocks; `opened` says whether the children of sequences are blocks here."""
    for name, child in network.get_submodule(path).named_children():
        below = f"{path}.{name}" if path else name
        held = sum(size for owner, size in sizes.items() if _inside(owner, below))
        nearly_all = held >= _NEARLY_ALL * sum(sizes.values())
        sequence = type(child) in _SEQUENCES
        if any(True for _ in child.children()) and (nearly_all or (sequence and opened)):
            yield from _paths(network, head, sizes, below, opened=nearly_all and not sequence)
        else:
            yield below

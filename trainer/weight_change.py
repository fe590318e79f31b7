"""How far training moved the weights: whether a phase could have helped at all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class WeightChange:
    """Of the weights that trained, taken as one vector w: `relative` is |w - w0| / |w0|, the
    Euclidean distance from where they started; `changed` the fraction of them that are not what
    they were at all: a step that float32 rounds away changes nothing."""

    relative: float
    changed: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def weight_change(start: nn.Module, now: nn.Module, modules: Iterable[str]) -> WeightChange | None:
    """The change from `start` to `now` of what these modules own themselves, named alike in both;
    None where that is nothing, or nothing but zeros."""
    moved = norm = changed = total = 0.0
    with torch.no_grad():
        for name in modules:
            before = start.get_submodule(name)
            for key, after in now.get_submodule(name).named_parameters(recurse=False):
                first, last = before.get_parameter(key).double(), after.double()
                moved += float((last - first).square().sum())
                norm += float(first.square().sum())
                changed += float((last != first).sum())
                total += first.numel()
    return WeightChange((moved / norm) ** 0.5, changed / total) if norm else None

"""NASNet-A (4 @ 1056), "NASNet-Mobile" (Zoph et al., 2018), as `keras.applications` builds it.

timm has the large network only, with other padding. What decides whether the published Keras
weights give the same logits here is kept: where zeros are padded, that they count in the reduction
cells' pooling, the shifted path of the factorised reduction, and BatchNorm's epsilon. Modules bear
the names of the Keras layers, so that `trainer.keras_weights` finds each; of those, the layers of
one cell end in its name, here the name of the module that holds them.

Takes float32 [N, 3, H, W], H and W from 32 up; the published weights want values from -1 to 1.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FILTERS: Final = 44  # 1056 at the end, over 6 inputs of the last concatenation, over 4
_STEM: Final = 32
_CELLS: Final = 4  # in each of the three stacks


class NASNetMobile(nn.Module):
    """Logits [N, classes]; 5,326,716 numbers with 1000 classes, BatchNorm's statistics included."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem_conv1 = _conv(3, _STEM, 3, stride=2)
        self.stem_bn1 = _norm(_STEM)
        self.cells = nn.ModuleDict()
        previous: int | None = None
        channels, shrunk = _STEM, False
        for name, filters in _plan():
            reduction = not name.isdecimal()
            kind = ReductionCell if reduction else NormalCell
            self.cells[name] = cell = kind(channels, previous, shrunk, filters)
            previous, channels, shrunk = channels, cell.channels, reduction
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.predictions = nn.Linear(channels, classes)

    def forward(self, photos: Tensor) -> Tensor:
        previous, values = None, self.stem_bn1(self.stem_conv1(photos))
        for cell in self.cells.values():
            previous, values = values, cell(values, previous)
        return self.predictions(torch.flatten(self.avgpool(self.relu(values)), 1))


def _plan() -> list[tuple[str, int]]:
    """Each cell as Keras names it, with its filters; normal cells have a number."""
    cells = [("stem_1", _FILTERS // 4), ("stem_2", _FILTERS // 2)]
    for stack in range(3):
        first, filters = stack * _CELLS, _FILTERS * 2**stack
        if stack:
            cells.append((f"reduce_{first}", filters))
        cells += [(str(first + i + (stack > 0)), filters) for i in range(_CELLS)]
    return cells


class _Cell(nn.Module):
    """What both kinds begin with: the output of the cell before last, fitted to that of the last,
    and a 1x1 convolution of the last. `previous` channels are None in the first cell, `shrunk`
    says that the last cell has half the sides of the one before it."""

    kind: str
    channels: int

    def __init__(self, channels: int, previous: int | None, shrunk: bool, filters: int) -> None:
        super().__init__()
        self.adjust: nn.Module | None = None
        self.other = channels if previous is None else filters
        if previous is not None and shrunk:
            self.adjust = FactorizedReduction(previous, filters)
        elif previous is not None and previous != filters:
            self.adjust = Projection("adjust_conv_projection", "adjust_bn", previous, filters)
        self.enter = Projection(f"{self.kind}_conv_1", f"{self.kind}_bn_1", channels, filters)

    def _inputs(self, values: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        other = values if previous is None else previous
        return self.enter(values), other if self.adjust is None else self.adjust(other)


class NormalCell(_Cell):
    kind = "normal"

    def __init__(self, channels: int, previous: int | None, shrunk: bool, filters: int) -> None:
        super().__init__(channels, previous, shrunk, filters)
        self.channels = 6 * filters
        self.left1 = SeparableConvs(filters, filters, 5)
        self.right1 = SeparableConvs(filters, filters, 3)
        self.left2 = SeparableConvs(filters, filters, 5)
        self.right2 = SeparableConvs(filters, filters, 3)
        self.left3, self.left4, self.right4 = _smooth(), _smooth(), _smooth()
        self.left5 = SeparableConvs(filters, filters, 3)

    def forward(self, values: Tensor, previous: Tensor | None) -> Tensor:
        h, p = self._inputs(values, previous)
        x1 = self.left1(h) + self.right1(p)
        x2 = self.left2(p) + self.right2(p)
        x3 = self.left3(h) + p
        x4 = self.left4(p) + self.right4(p)
        x5 = self.left5(h) + h
        return torch.cat([p, x1, x2, x3, x4, x5], 1)


class ReductionCell(_Cell):
    """Halves the sides, rounding up."""

    kind = "reduction"

    def __init__(self, channels: int, previous: int | None, shrunk: bool, filters: int) -> None:
        super().__init__(channels, previous, shrunk, filters)
        self.channels = 4 * filters
        self.pad = HalvingPad(3)
        self.left1 = SeparableConvs(filters, filters, 5, halve=True)
        self.right1 = SeparableConvs(self.other, filters, 7, halve=True)
        self.left2 = nn.MaxPool2d(3, stride=2)
        self.right2 = SeparableConvs(self.other, filters, 7, halve=True)
        self.left3 = nn.AvgPool2d(3, stride=2)
        self.right3 = SeparableConvs(self.other, filters, 5, halve=True)
        self.right4 = _smooth()
        self.left4 = SeparableConvs(filters, filters, 3)
        self.right5 = nn.MaxPool2d(3, stride=2)

    def forward(self, values: Tensor, previous: Tensor | None) -> Tensor:
        h, p = self._inputs(values, previous)
        padded = self.pad(h)
        x1 = self.left1(h) + self.right1(p)
        x2 = self.left2(padded) + self.right2(p)
        x3 = self.left3(padded) + self.right3(p)
        x4 = x2 + self.right4(x1)
        x5 = self.left4(x1) + self.right5(padded)
        return torch.cat([x2, x3, x4, x5], 1)


class SeparableConvs(nn.Sequential):
    """Twice ReLU, separable convolution, BatchNorm; the first may halve the sides."""

    def __init__(self, inputs: int, outputs: int, kernel: int, halve: bool = False) -> None:
        pad = {"pad": HalvingPad(kernel)} if halve else {}
        parts: dict[str, nn.Module] = {
            "relu_1": nn.ReLU(),
            **pad,
            "separable_conv_1": _separable(inputs, outputs, kernel, halve),
            "separable_conv_1_bn": _norm(outputs),
            "relu_2": nn.ReLU(),
            "separable_conv_2": _separable(outputs, outputs, kernel),
            "separable_conv_2_bn": _norm(outputs),
        }
        super().__init__(OrderedDict(parts))


class Projection(nn.Sequential):
    """ReLU, 1x1 convolution, BatchNorm, of which the latter two are named."""

    def __init__(self, conv: str, norm: str, inputs: int, outputs: int) -> None:
        parts: dict[str, nn.Module] = {
            "relu": nn.ReLU(),
            conv: _conv(inputs, outputs, 1),
            norm: _norm(outputs),
        }
        super().__init__(OrderedDict(parts))


class FactorizedReduction(nn.Module):
    """Half the sides, rounding up: 1x1 convolutions of the even rows and columns and of the odd."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.adjust_conv_1 = _conv(inputs, outputs // 2, 1, stride=2)
        self.shift = Shift()
        self.adjust_conv_2 = _conv(inputs, outputs // 2, 1, stride=2)
        self.adjust_bn = _norm(outputs)

    def forward(self, values: Tensor) -> Tensor:
        values = self.relu(values)
        halves = [self.adjust_conv_1(values), self.adjust_conv_2(self.shift(values))]
        return self.adjust_bn(torch.cat(halves, 1))


class Shift(nn.Module):
    """Up and left by one, zeros behind."""

    def forward(self, values: Tensor) -> Tensor:
        return F.pad(values[:, :, 1:, 1:], (0, 1, 0, 1))


class HalvingPad(nn.Module):
    """Zeros around, so that `kernel` at stride 2 halves the sides: Keras's `correct_pad`, which
    pads one less above and left where a side is even.

    torch.fx does not look into modules without children, so it may ask for the size.
    """

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, values: Tensor) -> Tensor:
        half = self.kernel // 2
        top, left = (half - 1 + side % 2 for side in values.shape[-2:])
        return F.pad(values, (left, half, top, half))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Starts as Keras's he_normal: a normal distribution cut off at two deviations, and widened so
    that what is left has the variance that is meant."""
    made = nn.Conv2d(inputs, outputs, kernel, stride, bias=False)
    std = math.sqrt(2 / (inputs * kernel**2)) / 0.87962566103423978
    nn.init.trunc_normal_(made.weight, std=std, a=-2 * std, b=2 * std)
    return made


def _separable(inputs: int, outputs: int, kernel: int, halve: bool = False) -> nn.Sequential:
    """Starts as Keras's glorot_uniform."""
    stride, padding = (2, 0) if halve else (1, kernel // 2)
    depthwise = nn.Conv2d(inputs, inputs, kernel, stride, padding, groups=inputs, bias=False)
    pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
    for made in (depthwise, pointwise):
        nn.init.xavier_uniform_(made.weight)
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=1 - 0.9997)


def _smooth() -> nn.AvgPool2d:
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

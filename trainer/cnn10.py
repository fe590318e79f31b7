"""CNN_10_relu, the small network beside which lab 4 put NASNet-Mobile.

The report says "own small network, ten layers, ReLU" and no more. Chosen here: ten layers with
weights, eight 3x3 convolutions in four stages of 32, 64, 128 and 256 channels with max-pooling
behind each, and two linear layers; ReLU behind all but the last; no BatchNorm, no dropout. Of
photos of 32x32 pixels 2x2 places are left for the linear layers, and of larger ones as many are
made: 1.44 million weights with 43 classes.
"""

from __future__ import annotations

import itertools
from typing import Final

import torch
from torch import Tensor, nn

SIDE: Final = 32
_CHANNELS: Final = (3, 32, 64, 128, 256)
_HIDDEN: Final = 256


class Cnn10(nn.Module):
    """float32 [N, 3, H, W], H and W from 16 up -> logits [N, classes]."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(_stage(inputs, outputs) for inputs, outputs in itertools.pairwise(_CHANNELS))
        )
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.hidden = nn.Sequential(nn.Linear(_CHANNELS[-1] * 4, _HIDDEN), nn.ReLU())
        self.classifier = nn.Linear(_HIDDEN, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                # Without BatchNorm, torch's own narrower start would let the signal fade.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:  # never, but torch's types allow it
                    nn.init.zeros_(module.bias)

    def forward(self, photos: Tensor) -> Tensor:
        return self.classifier(self.hidden(torch.flatten(self.avgpool(self.features(photos)), 1)))


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )

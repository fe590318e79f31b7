"""Network, photos and loaders of the peers that run on torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal, Self

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import efficientnet_b0
from torchvision.transforms import InterpolationMode, v2

from tests.benchmarks.peers.job import (
    BATCH,
    BRIGHTNESS,
    CONTRAST,
    CROP,
    CROP_FROM,
    MEAN,
    NOISE,
    RESIZE,
    STD,
    TURN,
    Job,
    Phase,
)

_BICUBIC: Final = InterpolationMode.BICUBIC


class Network(nn.Module):
    """torchvision's EfficientNet-B0 with a new head, whose frozen part stays in evaluation mode."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        torch.manual_seed(job.seed)
        base = efficientnet_b0()
        given = torch.load(job.weights, weights_only=True)
        missing, unexpected = base.load_state_dict(given, strict=False)
        assert set(missing) <= {"classifier.1.weight", "classifier.1.bias"} and not unexpected
        self.features, self.avgpool, self.classifier = base.features, base.avgpool, base.classifier
        self.classifier[1] = nn.Linear(base.classifier[1].in_features, len(job.classes))
        self.format = torch.channels_last if job.channels_last else torch.contiguous_format
        self.to(memory_format=self.format)

    def forward(self, photos: Tensor) -> Tensor:
        maps = self.features(photos.contiguous(memory_format=self.format))
        return self.classifier(self.avgpool(maps).flatten(1))

    def unfreeze(self, phase: Phase) -> list[nn.Parameter]:
        """Let what the phase names train, BatchNorm never; returns the parameters that do."""
        self.requires_grad_(False)
        for name in phase.unfrozen:
            for parameter in trainable(self.get_submodule(name)):
                parameter.requires_grad_(True)
        self.train()
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def train(self, mode: bool = True) -> Self:
        """Frameworks call this before every epoch or step; BatchNorm's statistics stay."""
        super().train(mode)
        for stage in self.features:
            if not any(parameter.requires_grad for parameter in stage.parameters()):
                stage.eval()
        for module in self.features.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that are not BatchNorm's."""
    return [
        parameter
        for part in module.modules()
        if not isinstance(part, nn.BatchNorm2d)
        for parameter in part.parameters(recurse=False)
    ]


class Photos(Dataset[Any]):
    """One split, decoded and transformed anew whenever a photo is asked for."""

    def __init__(
        self, job: Job, split: Literal["train", "val"], transform: Callable[[Any], Any]
    ) -> None:
        self._photos, self._transform = job.photos(split), transform

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self._photos[index]
        with Image.open(path) as image:
            return self._transform(image.convert("RGB")), label


def plain_steps() -> list[nn.Module]:
    """What every photo goes through without augmentation; uint8 [3, 224, 224] at the end.

    On uint8 tensors, as torchvision's documentation recommends: half the time of Pillow images.
    """
    return [v2.ToImage(), v2.Resize(RESIZE, _BICUBIC, antialias=True), v2.CenterCrop(CROP)]


def random_steps() -> list[nn.Module]:
    """Random changes drawn for each photo, noise apart; uint8 [3, 224, 224] at the end."""
    return [
        v2.ToImage(),
        v2.Resize(CROP_FROM, _BICUBIC, antialias=True),
        v2.CenterCrop(CROP_FROM),
        v2.RandomCrop(CROP),
        v2.RandomRotation(TURN * 360, InterpolationMode.BILINEAR),
        v2.ColorJitter(brightness=BRIGHTNESS, contrast=(1 / CONTRAST, CONTRAST)),
    ]


def noise() -> nn.Module:
    return v2.GaussianNoise(sigma=NOISE / 255)


def transform(random: bool) -> v2.Compose:
    """From a Pillow image to a normalised float32 tensor [3, 224, 224]."""
    to_float = v2.ToDtype(torch.float32, scale=True)
    steps = [*random_steps(), to_float, noise()] if random else [*plain_steps(), to_float]
    return v2.Compose([*steps, v2.Normalize(MEAN, STD)])


def datasets(job: Job) -> tuple[Photos, Photos]:
    """Training and validation photos."""
    return Photos(job, "train", transform(job.augment)), Photos(job, "val", transform(False))


def loader(job: Job, photos: Dataset[Any], shuffle: bool, **options: Any) -> DataLoader[Any]:
    """A loader whose workers stay from epoch to epoch."""
    return DataLoader(
        photos,
        BATCH,
        shuffle=shuffle,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
        generator=torch.Generator().manual_seed(job.seed),
        **options,
    )


def loaders(job: Job) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and validation batches."""
    train, val = datasets(job)
    return loader(job, train, shuffle=True), loader(job, val, shuffle=False)

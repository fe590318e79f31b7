"""The loop of timm's train.py: its transforms, collation, prefetching loader and meters.

`create_loader` itself drops the last, smaller batch of each epoch and knows other augmentations
only, so its parts are put together here; batches cross from the workers as uint8 and are normalised
after that. Noise is rounded to whole grey levels on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.data import create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter, accuracy
from torch import nn
from torchvision.transforms import v2

from tests.benchmarks.peers.job import CROP, MEAN, RESIZE, STD, Job, Report
from tests.benchmarks.peers.torch_parts import Network, Photos, loader, noise, random_steps


def run(job: Job, report: Report) -> None:
    network = Network(job)
    still = create_transform(
        CROP, interpolation="bicubic", crop_pct=CROP / RESIZE, use_prefetcher=True
    )
    moving = v2.Compose([*random_steps(), noise()]) if job.augment else still
    train, val = _batches(job, "train", moving), _batches(job, "val", still)
    for phase in job.phases:
        network.unfreeze(phase)
        optimizer = create_optimizer_v2(network, opt="adam", lr=phase.lr, weight_decay=0.0)
        with report.phase(phase) as clock:
            clock.validated(_validate(network, val))
            for _ in range(phase.epochs):
                clock.start_epoch()
                _train_one_epoch(network, train, optimizer)
                clock.end_epoch()
                clock.validated(_validate(network, val))


def _batches(job: Job, split: Any, transform: Callable[[Any], Any]) -> PrefetchLoader:
    photos = Photos(job, split, transform)
    batches = loader(job, photos, shuffle=split == "train", collate_fn=fast_collate)
    return PrefetchLoader(batches, mean=MEAN, std=STD, device=torch.device("cpu"))


def _train_one_epoch(
    network: nn.Module, batches: PrefetchLoader, optimizer: torch.optim.Optimizer
) -> float:
    losses = AverageMeter()
    network.train()
    for photos, labels in batches:
        loss = nn.functional.cross_entropy(network(photos), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), len(labels))
    return losses.avg


def _validate(network: nn.Module, batches: PrefetchLoader) -> float:
    top1 = AverageMeter()
    network.eval()
    with torch.inference_mode():
        for photos, labels in batches:
            (percent,) = accuracy(network(photos), labels, topk=(1,))
            top1.update(percent.item(), len(labels))
    return top1.avg / 100

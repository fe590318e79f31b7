"""The loop of PyTorch's tutorials."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.benchmarks.peers.job import Job, Report
from tests.benchmarks.peers.torch_parts import Network, loaders


def run(job: Job, report: Report) -> None:
    network = Network(job)
    train, val = loaders(job)
    for phase in job.phases:
        optimizer = torch.optim.Adam(network.unfreeze(phase), phase.lr)
        with report.phase(phase) as clock:
            clock.validated(validate(network, val))
            for _ in range(phase.epochs):
                clock.start_epoch()
                train_epoch(network, train, optimizer)
                clock.end_epoch()
                clock.validated(validate(network, val))


def train_epoch(
    network: nn.Module, batches: DataLoader[Any], optimizer: torch.optim.Optimizer
) -> float:
    """One epoch; returns the mean loss, which a user would print."""
    network.train()
    total = 0.0
    for photos, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(photos), labels)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(batches)


def validate(network: nn.Module, batches: DataLoader[Any]) -> float:
    network.eval()
    hits = seen = 0
    with torch.inference_mode():
        for photos, labels in batches:
            hits += int((network(photos).argmax(dim=1) == labels).sum())
            seen += len(labels)
    return hits / seen

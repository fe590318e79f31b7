"""One epoch: train on every photo once, or evaluate on every photo once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from trainer.augment import augment, view_generator
from trainer.config import Augmentation
from trainer.data import Split
from trainer.model import InputNormalize, set_train_mode
from trainer.prefix import Activations, Cut, compute
from trainer.schema import ThawError

# Activations beyond this are computed anew in every epoch instead of being kept.
MEMORY_BYTES: Final = 4 << 30


class DivergedError(ThawError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Setup:
    """What stays the same from epoch to epoch."""

    network: nn.Module
    normalize: InputNormalize
    device: torch.device
    batch_size: int
    augmentation: Augmentation
    crop: int
    seed: int
    cut: Cut | None = None


@dataclass(frozen=True)
class Evaluation:
    """Validation figures: logits float32 [N, classes], loss in nats, the others fractions 0..1."""

    logits: NDArray[np.float32] = field(repr=False)
    loss: float
    accuracy: float
    top5: float
    macro_f1: float


@dataclass(frozen=True)
class TrainingResult:
    """Means over one epoch, as the photos were seen (dropout and augmentation on)."""

    loss: float
    accuracy: float
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class Source:
    """One split, ready to run: photos, or the activations at the cut where those are at hand."""

    split: Split
    activations: Activations | None = None


def frozen_activations(setup: Setup, split: Split) -> Source:
    """Run the prefix over a split once; without a cut, or where it needs too much memory, the split
    alone, which then runs whole."""
    cut = setup.cut
    if cut is None or cut.bytes_per_photo * len(split) > MEMORY_BYTES:
        return Source(split)
    setup.network.eval()
    starts = range(0, len(split), setup.batch_size)
    shown = tqdm(starts, "Computing what is frozen", unit="batch", leave=False, disable=None)
    batches = (_photos(setup, split, slice(s, s + setup.batch_size), None) for s in shown)
    return Source(split, compute(cut.prefix, batches))


def _photos(
    setup: Setup, split: Split, rows: slice | NDArray[np.int64], epoch: int | None
) -> Tensor:
    """Normalised photos [n, 3, H, W] on the device; augmented where an epoch is given."""
    photos = torch.from_numpy(split.photos[rows]).to(setup.device)
    if epoch is not None and setup.augmentation.active:
        names = [split.files[row] for row in np.arange(len(split))[rows]]
        photos = augment(photos, names, setup.augmentation, setup.crop, setup.seed, epoch)
    return setup.normalize(photos)


def _logits(
    setup: Setup, source: Source, rows: slice | NDArray[np.int64], epoch: int | None
) -> Tensor:
    """The network over some photos of a source: [n, classes]; only the tail where it can be."""
    if source.activations is None or setup.cut is None:
        return setup.network(_photos(setup, source.split, rows, epoch))
    return setup.cut.tail(*(values[rows].to(setup.device) for values in source.activations))


def evaluate(setup: Setup, source: Source) -> Evaluation:
    """Run the network in evaluation mode over a split, in order."""
    setup.network.eval()
    starts = range(0, len(source.split), setup.batch_size)
    with torch.inference_mode():
        batches = [
            _logits(setup, source, slice(s, s + setup.batch_size), None).float().cpu()
            for s in starts
        ]
    return score(torch.cat(batches), torch.from_numpy(source.split.labels))


def score(logits: Tensor, labels: Tensor) -> Evaluation:
    """Metrics of logits [N, classes] against labels [N]."""
    classes = logits.shape[1]
    predicted = logits.argmax(dim=1)
    top5 = logits.topk(min(5, classes), dim=1).indices
    return Evaluation(
        logits=logits.numpy(),
        loss=float(functional.cross_entropy(logits, labels)),
        accuracy=float((predicted == labels).float().mean()),
        top5=float((top5 == labels[:, None]).any(dim=1).float().mean()),
        macro_f1=_macro_f1(predicted, labels),
    )


def _macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """Mean F1 over the classes that occur as label or prediction (scikit-learn's default)."""
    scores = []
    for label in torch.cat([predicted, labels]).unique():
        hits = int(((predicted == label) & (labels == label)).sum())
        scores.append(2 * hits / int((predicted == label).sum() + (labels == label).sum()))
    return float(np.mean(scores))


def train_epoch(
    setup: Setup,
    source: Source,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    on_batch: Callable[[int, float, float], None],
) -> TrainingResult:
    """One pass over the training photos in an order drawn from (seed, epoch).

    `on_batch` gets the number of photos and the running mean loss and accuracy. Raises
    DivergedError, naming epoch and batch, as soon as a loss is not finite.
    """
    set_train_mode(setup.network)
    # Dropout draws from torch's global generator; seeding it by the epoch makes any epoch
    # repeatable without replaying those before it.
    torch.manual_seed(int(view_generator(setup.seed, "dropout", epoch).integers(2**62)))
    started, seen, loss_sum, hits = time.perf_counter(), 0, 0.0, 0
    for number, rows in enumerate(_order(setup, source.split, epoch), start=1):
        labels = torch.from_numpy(source.split.labels[rows]).to(setup.device)
        logits = _logits(setup, source, rows, epoch)
        loss = functional.cross_entropy(logits, labels)
        if not torch.isfinite(loss):
            raise DivergedError(
                f"The loss became {loss.item()} in epoch {epoch}, batch {number}. The best "
                "checkpoint so far is untouched; try a smaller --lr."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seen += len(rows)
        loss_sum += loss.item() * len(rows)
        hits += int((logits.argmax(dim=1) == labels).sum())
        on_batch(len(rows), loss_sum / seen, hits / seen)
    seconds = time.perf_counter() - started
    return TrainingResult(loss_sum / seen, hits / seen, seconds, seen / seconds)


def _order(setup: Setup, split: Split, epoch: int) -> Iterator[NDArray[np.int64]]:
    order = view_generator(setup.seed, "order", epoch).permutation(len(split))
    for start in range(0, len(order), setup.batch_size):
        yield np.sort(order[start : start + setup.batch_size])  # sorted: kinder to a mapped file

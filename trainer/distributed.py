"""One step of one network by several processes: the step that one process would take.

Each takes its share of the batch, and DistributedDataParallel adds up the gradients. A photo counts
what it counts in the whole batch, and dropout draws for the whole batch on every rank, so that the
result is that of one process but for rounding.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.frozen import Batch
from trainer.graphs import TrainingForward
from trainer.portions import at_once, portions
from trainer.prefix import Activations
from trainer.ranks import RanksError, from_first, rank, reached, size, total
from trainer.rows import Rows

if TYPE_CHECKING:
    from trainer.loop import Learner

_aten: Final = torch.ops.aten


@dataclass(frozen=True)
class Share:
    """What one of several processes computes of a portion of a batch: the photos at `positions` of
    the batch, `places` within the portion of `photos` photos.

    Where there are fewer photos than processes, one without any computes the first photo, which
    `counts` nothing: all have to take the step.
    """

    positions: Rows
    places: Rows
    photos: int
    counts: bool


def shares(photos: int, most: int, number: int, among: int) -> list[Share]:
    """The shares of process `number` of `among` in a batch that takes its step in portions."""
    found = []
    for portion in portions(photos, most):
        count = portion.stop - portion.start
        mine = np.arange(number, count, among)
        places = mine if len(mine) else np.zeros(1, np.int64)
        found.append(Share(portion.start + places, places, count, len(mine) > 0))
    return found


def check_divisible(network: nn.Module) -> None:
    """Raise RanksError for modules, in training mode, that look at the whole batch at once."""
    for name, module in network.named_modules():
        if module.training and isinstance(module, _BatchNorm):
            raise RanksError(
                f"{name} is a BatchNorm that trains: each process would normalise by its own share "
                "of the batch, and the result depend on their number. Train from scratch in one "
                "process, without torchrun; the phases transfer and finetune leave BatchNorm as it "
                "is."
            )


# --- a step ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Divided:
    """A tail that adds up its gradients over all processes."""

    run: DistributedDataParallel
    at_once: int
    draws: bool


# By the forward that a run makes anew whenever more of it trains.
_known: WeakKeyDictionary[TrainingForward, _Divided] = WeakKeyDictionary()


def take_step(learner: Learner, batch: Batch, draws: int) -> tuple[float, int]:
    """As `trainer.loop.take_step` for one learner on the whole batch: its plain loss and how many
    photos it had right, from before the step."""
    divided = _known.get(learner.forward) or _divide(learner, batch)
    found = shares(len(batch.rows), divided.at_once, rank(), size())
    mine = batch.part(np.concatenate([share.positions for share in found]))
    inputs, labels, whole = mine.at(learner.cut), mine.labels, batch.labels
    torch.manual_seed(draws)
    learner.optimizer.zero_grad(set_to_none=True)
    sums, start = torch.zeros(3, dtype=torch.float64), 0
    for number, share in enumerate(found, start=1):
        own = slice(start, start + len(share.positions))
        start = own.stop
        # Gradients travel once, with those of the last portion.
        with nullcontext() if number == len(found) else divided.run.no_sync():
            with _DrawnForAll(share) if divided.draws else nullcontext():
                logits = divided.run(*(value[own] for value in inputs))
            loss = learner.objective(logits, labels[own])
            loss = loss * (learner.objective.share(labels[own], whole) if share.counts else 0.0)
            with reached():
                (loss * size()).backward()  # the mean over the processes is taken
        if share.counts:
            sums += _figures(loss, logits.detach(), labels[own])
    minimised, plain, hits = total(*sums.tolist())
    if not math.isfinite(minimised):
        return minimised, 0
    learner.optimizer.step()
    return plain / len(whole), int(hits)


def _figures(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """What is minimised, the sum of the cross-entropies, the number of hits."""
    plain = functional.cross_entropy(logits, labels, reduction="sum")
    hits = (logits.argmax(dim=1) == labels).sum()
    return torch.stack([loss.detach(), plain, hits]).double().cpu()


def _divide(learner: Learner, batch: Batch) -> _Divided:
    check_divisible(learner.tail)
    gc.collect()  # of an earlier stage, whose hooks would add up the gradients too
    (share,) = shares(len(batch.rows), len(batch.rows), rank(), size())
    inputs = batch.part(share.positions).at(learner.cut)
    most = from_first(lambda: at_once(learner.tail, inputs, len(batch.rows)))
    draws, unused = _looked_at(learner.tail, inputs)
    with reached():
        made = DistributedDataParallel(
            learner.tail, forward_sync_buffers=False, find_unused_parameters=unused
        )
    divided = _Divided(made, most, draws)
    _known[learner.forward] = divided
    return divided


def _looked_at(tail: nn.Module, inputs: Activations) -> tuple[bool, bool]:
    """Whether it draws at random, and whether some of what trains has no part in its logits."""
    watch = _Watch()
    with watch:
        logits = tail(*(value[:1].clone() for value in inputs))
    trained = [parameter for parameter in tail.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(logits.sum(), trained, allow_unused=True)
    return watch.drew, any(gradient is None for gradient in gradients)


# --- chance ---------------------------------------------------------------------------------------


class _Watch(TorchDispatchMode):
    """Notes whether anything is drawn at random."""

    def __init__(self) -> None:
        super().__init__()
        self.drew = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.drew = self.drew or _draws(func, args)
        return func(*args, **(kwargs or {}))


class _DrawnForAll(TorchDispatchMode):
    """Draws for a whole portion what is drawn for each photo, and hands out one's own share."""

    def __init__(self, share: Share) -> None:
        super().__init__()
        self._share = share

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not _draws(func, args):
            return func(*args, **(kwargs or {}))
        value = args[0]
        # With one photo a share cannot be told from what is drawn once for a batch. Networks whose
        # paths are dropped for all photos at once are not among those that are offered.
        if len(value) == len(self._share.places):
            if func is _aten.bernoulli_.float:
                return value.copy_(self._mine(value, lambda whole: func(whole, *args[1:])))
            if func is _aten.native_dropout.default:
                kept = self._mine(value, lambda whole: func(whole.fill_(1), *args[1:])[1])
                return value * kept / (1 - args[1]), kept
        raise RanksError(
            f"This network draws at random ({func}) in a way that cannot be divided over "
            "processes. Train it in one, without torchrun."
        )

    def _mine(self, value: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """`draw` fills or takes a tensor like `value`, of all photos of the portion."""
        whole = torch.empty_strided(
            (self._share.photos, *value.shape[1:]),
            value.stride(),
            dtype=value.dtype,
            device=value.device,
        )
        return draw(whole)[torch.from_numpy(self._share.places).to(value.device)]


def _draws(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether it draws; attention is made for that, and does not where its dropout is 0."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return True
    place = names.index("dropout_p")
    return place < len(args) and args[place] > 0

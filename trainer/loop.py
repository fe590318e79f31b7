"""One epoch of one or many networks that share their batches: train on every photo, or evaluate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from trainer.augment import view_generator
from trainer.config import Config
from trainer.distributed import take_step as take_divided_step
from trainer.frozen import Batch, Source
from trainer.graphs import TrainingForward
from trainer.portions import evaluated
from trainer.prefix import Activations, Cut
from trainer.ranks import gathered, my_pieces, size
from trainer.rows import Rows
from trainer.schema import ThawError


class DivergedError(ThawError):
    """The loss is no longer a number."""


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


@dataclass(frozen=True)
class Objective:
    """What training minimises, the mean cross-entropy unless told otherwise; see
    `torch.nn.functional.cross_entropy` for `smoothing` and for `weights`, float32 [classes].

    A batch's loss with weights is sum(w[label] * loss) / sum(w[label]) over its photos. Only the
    gradients come of it: the losses that are recorded are plain, so that runs compare.
    """

    smoothing: float = 0.0
    weights: Tensor | None = field(default=None, repr=False)

    @property
    def plain(self) -> bool:
        return self.smoothing == 0 and self.weights is None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [n, classes] and labels [n] -> a number."""
        return functional.cross_entropy(
            logits, labels, self.weights, label_smoothing=self.smoothing
        )

    def share(self, part: Tensor, whole: Tensor) -> Tensor | float:
        """What the labels of a part of a batch count for in the loss of all of it, 0..1."""
        if self.weights is None:
            return len(part) / len(whole)
        return self.weights[part].sum() / self.weights[whole].sum()


def objective_of(
    config: Config, labels: NDArray[np.int64], classes: int, device: torch.device
) -> Objective:
    """As `config` says. Balanced weights are n / (classes * n_c), n_c of the n labels being c."""
    if config.class_weights == "off":
        return Objective(config.label_smoothing)
    counts = torch.bincount(torch.from_numpy(labels), minlength=classes)
    # A class without photos has no loss, but smoothed labels reach it.
    weights = len(labels) / (classes * counts.clamp(min=1).float())
    return Objective(config.label_smoothing, weights.to(device))


class Learner(Protocol):
    """What an epoch needs to know of a network that trains.

    `objective` is what its steps lower.
    `tail` maps what crosses over at `cut` (None: normalised photos) to logits [n, classes], and so
    does `forward`, in training only.
    `training` names its modules that are in training mode while it trains. `linear` says that all
    of it trains and that it is small: several of them are then computed as one product.
    """

    tail: nn.Module
    forward: TrainingForward
    cut: Cut | None
    training: frozenset[str]
    optimizer: torch.optim.Optimizer
    objective: Objective
    linear: bool


Failed = dict[int, DivergedError]


def evaluate(learners: Sequence[Learner], source: Source, batch_size: int) -> list[Evaluation]:
    """Each network in evaluation mode over a split, in order."""
    source.open()
    logits: list[list[Tensor]] = [[] for _ in learners]
    for learner in learners:
        learner.tail.eval()
    mine: list[Rows] = []
    with torch.inference_mode():
        for rows in my_pieces(len(source.split), batch_size):
            mine.append(rows)
            batch = source.batch(rows)
            for parts, learner in zip(logits, learners, strict=True):
                parts.append(evaluated(learner.tail, batch.at(learner.cut)).float().cpu())
    labels = torch.from_numpy(source.split.labels)
    return [score(gathered(parts, mine, len(labels)), labels) for parts in logits]


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
    classes = int(torch.cat([predicted, labels]).max()) + 1
    true = torch.bincount(labels[predicted == labels], minlength=classes)
    occurring = torch.bincount(predicted, minlength=classes) + torch.bincount(
        labels, minlength=classes
    )
    seen = occurring > 0
    return float((2 * true[seen] / occurring[seen]).double().mean())


class _Running:
    """Sums of one learner over an epoch."""

    def __init__(self) -> None:
        self.seen, self.loss, self.hits = 0, 0.0, 0

    def add(self, loss: float, hits: int, photos: int) -> None:
        self.seen += photos
        self.loss += loss * photos
        self.hits += hits

    def result(self) -> TrainingResult:
        return TrainingResult(self.loss / self.seen, self.hits / self.seen)


def train_epoch(
    learners: Sequence[Learner],
    source: Source,
    batch_size: int,
    epoch: int,
    on_batch: Callable[[int, float, float], None],
) -> tuple[list[TrainingResult | DivergedError], float]:
    """One pass over the training photos in an order drawn from (seed, epoch).

    Returns each learner's result, or why it stopped as soon as its loss was not finite, and the
    seconds it took. `on_batch` gets the number of photos and the first learner's running mean loss
    and accuracy.
    """
    started = time.perf_counter()
    for learner in learners:
        set_modes(learner)
    running = [_Running() for _ in learners]
    failed: Failed = {}
    for number, (batch, draws) in enumerate(batches(source, batch_size, epoch), start=1):
        for group in _together(learners, failed):
            steps = _steps([learners[i] for i in group], batch, draws)
            for i, (loss, hits) in zip(group, steps, strict=True):
                if not np.isfinite(loss):
                    failed[i] = diverged(loss, f"epoch {epoch}, batch {number}")
                else:
                    running[i].add(loss, hits, len(batch.rows))
        if len(failed) == len(learners):
            break
        first = next(r for i, r in enumerate(running) if i not in failed)
        on_batch(len(batch.rows), first.loss / first.seen, first.hits / first.seen)
    results = [failed.get(i) or r.result() for i, r in enumerate(running)]
    return results, time.perf_counter() - started


def _steps(learners: Sequence[Learner], batch: Batch, draws: int) -> list[tuple[float, int]]:
    """A step of learners with the same cut: each one's loss, and how many photos it had right."""
    if size() > 1:
        return [take_divided_step(learner, batch, draws) for learner in learners]
    return [
        (loss, int((logits.argmax(dim=1) == batch.labels).sum()))
        for loss, logits in take_step(learners, batch, draws)
    ]


def batches(source: Source, batch_size: int, epoch: int) -> Iterator[tuple[Batch, int]]:
    """The training photos in an order drawn from (seed, epoch), with the seed of each step."""
    seed = source.engine.seed
    source.open(epoch)
    for number, rows in enumerate(_order(seed, len(source.split), batch_size, epoch), start=1):
        # Dropout draws from torch's global generator. Seeded by the batch, a network draws the same
        # whether it trains alone or beside others, and any epoch can be repeated alone.
        draws = int(view_generator(seed, f"dropout {number}", epoch).integers(2**62))
        yield source.batch(rows), draws


def diverged(loss: float, where: str) -> DivergedError:
    return DivergedError(
        f"The loss became {loss} in {where}. The best checkpoint so far is untouched; try a "
        "smaller --lr."
    )


def set_modes(learner: Learner) -> None:
    """Each of its modules as it is while it trains."""
    for name, module in learner.tail.named_modules():
        module.training = name in learner.training


def _order(seed: int, count: int, batch_size: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    order = view_generator(seed, "order", epoch).permutation(count)
    for start in range(0, count, batch_size):
        yield np.sort(order[start : start + batch_size])  # sorted: neighbours are read as one


def _together(learners: Sequence[Learner], failed: Failed) -> list[list[int]]:
    """Which learners take a step as one: small ones of the same form; all others alone."""
    groups: dict[object, list[int]] = {}
    for i, learner in enumerate(learners):
        if i not in failed:
            place = learner.cut.place if learner.cut is not None else None
            groups.setdefault((place, learner.linear) if learner.linear else i, []).append(i)
    return list(groups.values())


def take_step(learners: Sequence[Learner], batch: Batch, draws: int) -> list[tuple[float, Tensor]]:
    """A step of learners with the same cut, in the modes that they are in; each one's plain loss
    and logits, from before the step. Chance is drawn from `draws`.

    One whose loss is not finite takes none.
    """
    inputs, labels = batch.at(learners[0].cut), batch.labels
    if len(learners) == 1:
        values, logits = _step_alone(learners[0], inputs, labels, draws)
    else:
        values, logits = _step_stacked(learners, inputs, labels, draws)
    for learner, value in zip(learners, values, strict=True):
        if np.isfinite(value):
            learner.optimizer.step()
    if not all(learner.objective.plain for learner in learners):
        values = _plain_losses(values, logits, labels)
    return list(zip(values, logits, strict=True))


def _step_alone(
    learner: Learner, inputs: Activations, labels: Tensor, draws: int
) -> tuple[list[float], Tensor]:
    """Gradients, the loss [1] and logits [1, n, classes]; a large batch in portions."""
    learner.forward.prepare(inputs, graph=learner.cut is not None)
    torch.manual_seed(draws)
    learner.optimizer.zero_grad(set_to_none=True)
    losses, logits = [], []
    for part in learner.forward.portions(len(labels)):
        answers = learner.forward(*(value[part] for value in inputs))
        loss = learner.objective(answers, labels[part])
        loss = loss * learner.objective.share(labels[part], labels)
        loss.backward()
        losses.append(loss.item())
        logits.append(answers.detach())
    return [sum(losses)], torch.cat(logits)[None]


def _step_stacked(
    learners: Sequence[Learner], inputs: Activations, labels: Tensor, draws: int
) -> tuple[list[float], Tensor]:
    """As `_step_alone` for several networks at once: losses and logits [networks, n, classes]."""
    torch.manual_seed(draws)
    logits = _stacked([learner.tail for learner in learners], inputs)
    pairs = list(zip(learners, logits, strict=True))
    losses = torch.stack([learner.objective(one, labels) for learner, one in pairs])
    values = losses.tolist()
    for learner in learners:
        learner.optimizer.zero_grad(set_to_none=True)
    # The networks share no parameter that trains, so the sum's gradient is each one's own.
    losses[[i for i, value in enumerate(values) if np.isfinite(value)]].sum().backward()
    return values, logits.detach()


def _plain_losses(minimised: list[float], logits: Tensor, labels: Tensor) -> list[float]:
    """The cross-entropies of logits [networks, n, classes]; where what was minimised is not finite,
    that stays to be seen."""
    plain = torch.stack([functional.cross_entropy(one, labels) for one in logits]).tolist()
    return [new if np.isfinite(old) else old for old, new in zip(minimised, plain, strict=True)]


def _stacked(tails: list[nn.Module], inputs: tuple[Tensor, ...]) -> Tensor:
    """Networks of the same form on the same input, as one: [networks, n, classes]."""
    names = [name for name, _ in tails[0].named_parameters()]
    stacks = [torch.stack([tail.get_parameter(name) for tail in tails]) for name in names]
    buffers = dict(tails[0].named_buffers())

    def run(*parameters: Tensor) -> Tensor:
        state = {**dict(zip(names, parameters, strict=True)), **buffers}
        logits: Tensor = functional_call(tails[0], state, inputs)
        return logits

    logits: Tensor = torch.vmap(run, randomness="same")(*stacks)
    return logits

"""Which learning rate? The range test of Smith (arXiv 1506.01186): a rate that grows with every
batch, until the loss diverges.

What is lowered is a copy of the part that would train, behind the frozen one's cached activations;
no run is written and no network kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from trainer.config import Config
from trainer.environment import choose_device
from trainer.fit import Job
from trainer.frozen import Batch, Source
from trainer.loop import batches, objective_of, set_modes, take_step
from trainer.phase import Sample, layer_scales, set_rate
from trainer.together import engine_of, part_of, trace_of

# As fastai has them: how much of the past the smoothed loss holds, and how many times its lowest it
# may rise to.
_PAST: Final = 0.98
_DIVERGED: Final = 4.0
# Left out of the search for a rate: steps before the mean has settled, and those at the end.
_START: Final = 10
_END: Final = 5


@dataclass(frozen=True)
class RangeTest:
    """One value for each step: the rate, the batch's loss in nats before it, and that smoothed.

    `diverged` says that the test ended there, before it had reached the last rate.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    diverged: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "rates": list(self.rates),
            "losses": list(self.losses),
            "smoothed": list(self.smoothed),
            "diverged": self.diverged,
            "steep": steep(self.rates, self.smoothed),
            "valley": valley(self.rates, self.smoothed),
        }


def find_rate(
    job: Job, low: float, high: float, steps: int, on_step: Callable[[float], None]
) -> RangeTest:
    """Train for up to `steps` batches at rates from `low` to `high`; `on_step` gets each loss."""
    config, start, photos = job.config, job.start, job.photos
    device = choose_device(config.device)
    start.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    traced = trace_of(config, start, device)
    part = part_of(config, start.network, traced)
    scales = layer_scales(part.module, start.network, config.layer_decay)
    objective = objective_of(config, photos.train.labels, len(start.classes), device)
    sample = Sample.of(part, config.optimizer, low, objective, scales)
    source = Source(
        engine_of(config, start, photos, device, traced, [part]), photos.train, augmented=True
    )
    set_modes(sample)
    rates = rising(low, high, steps)
    losses = _losses(sample, _endless(config, source, start.first_epoch), rates)
    return _until_diverged(rates, losses, on_step)


def rising(low: float, high: float, steps: int) -> tuple[float, ...]:
    """`steps` rates from low to high, each the same factor above the one before."""
    return tuple(float(rate) for rate in np.geomspace(low, high, steps))


def _endless(config: Config, source: Source, first_epoch: int) -> Iterator[tuple[Batch, int]]:
    for epoch in itertools.count(first_epoch + 1):
        yield from batches(source, config.batch_size, epoch)


def _losses(
    sample: Sample, drawn: Iterator[tuple[Batch, int]], rates: Sequence[float]
) -> Iterator[float]:
    for rate, (batch, draws) in zip(rates, drawn, strict=False):
        set_rate(sample.optimizer, rate)
        ((loss, _),) = take_step([sample], batch, draws)
        yield loss


def _until_diverged(
    rates: Sequence[float], losses: Iterator[float], on_step: Callable[[float], None]
) -> RangeTest:
    seen: list[float] = []
    smoothed: list[float] = []
    mean, diverged = 0.0, False
    for loss in losses:
        on_step(loss)
        if not math.isfinite(loss):
            diverged = True
            break
        seen.append(loss)
        mean = _PAST * mean + (1 - _PAST) * loss
        smoothed.append(mean / (1 - _PAST ** len(seen)))
        diverged = smoothed[-1] > _DIVERGED * min(smoothed)
        if diverged:
            break
    return RangeTest(tuple(rates[: len(seen)]), tuple(seen), tuple(smoothed), diverged)


def _settled(rates: Sequence[float], smoothed: Sequence[float]) -> tuple[Any, Any] | None:
    """Without the first and last steps; None where too few are left to say anything."""
    part = slice(min(_START, len(rates) // 10), len(rates) - _END)
    kept = np.log(rates[part]), np.array(smoothed[part])
    return kept if len(kept[0]) >= 3 else None


def steep(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """The rate where the smoothed loss falls most steeply over the rate's logarithm; None where it
    never falls."""
    found = _settled(rates, smoothed)
    if found is None:
        return None
    logs, losses = found
    slopes = np.diff(losses) / np.diff(logs)
    return float(np.exp(logs[slopes.argmin()])) if slopes.min() < 0 else None


def valley(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """Half way down the longest fall of the smoothed loss, whatever rises in between, as fastai's
    suggestion of that name; None where it never falls."""
    found = _settled(rates, smoothed)
    if found is None:
        return None
    logs, losses = found
    # The longest falling subsequence that ends at each step.
    length = np.ones(len(losses), dtype=int)
    for i in range(1, len(losses)):
        above = length[:i][losses[:i] > losses[i]]
        length[i] = 1 + above.max(initial=0)
    end, longest = int(length.argmax()), int(length.max())
    if longest < 2:
        return None
    third = (longest - 1) / 3
    return float(np.exp(logs[end - longest + 1 + int(third) + int(third / 2)]))

"""Learning rate policies of the labs, by whole epochs."""

from __future__ import annotations

import math

from trainer.config import Schedule


def learning_rate(schedule: Schedule, lr0: float, epoch: int, epochs: int) -> float:
    """The rate for training epoch `epoch` (0 for the first one of the phase) of `epochs`.

    constant lr0; exponential lr0*exp(-decay*epoch); step lr0*drop^floor(epoch/epochs_drop);
    cosine from lr0 to 0. `warmup` epochs before rise linearly to lr0; the policy starts after them.
    """
    if epoch < schedule.warmup:
        return lr0 * (epoch + 1) / (schedule.warmup + 1)
    epoch -= schedule.warmup
    match schedule.name:
        case "constant":
            return lr0
        case "exponential":
            return lr0 * math.exp(-schedule.decay * epoch)
        case "step":
            return lr0 * schedule.drop ** (epoch // schedule.epochs_drop)
        case "cosine":
            return lr0 * 0.5 * (1 + math.cos(math.pi * epoch / max(1, epochs - schedule.warmup)))

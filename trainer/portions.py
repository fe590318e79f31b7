"""Large batches in portions: a step of 512 photos in the memory of a few dozen.

What a step keeps for its backward pass grows with the photos in it: 88 MB for each one where all of
EfficientNet-B0 trains at 224 pixels. Gradients add up over portions of a batch to those of the
whole, as long as no BatchNorm trains on the batch's statistics.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.cache import format_size
from trainer.prefix import Activations
from trainer.schema import ThawError

# The same on every machine, so that a training is: dropout draws anew for each portion.
_STEP_BYTES: Final = 4_000_000_000
_SAMPLE: Final = 2  # photos to measure with
_EVALUATED: Final = 64  # photos at once where nothing is kept


class MemoryNeededError(ThawError):
    """A step needs more memory than the machine has, and cannot be divided."""


def portions(photos: int, at_once: int) -> Iterator[slice]:
    """All of so many photos, in order."""
    for start in range(0, photos, at_once):
        yield slice(start, min(start + at_once, photos))


def evaluated(network: nn.Module, inputs: Activations) -> Tensor:
    """The logits of a batch [n, ...], without the memory that all of it at once would take."""
    parts = portions(len(inputs[0]), _EVALUATED)
    return torch.cat([network(*(value[part] for value in inputs)) for part in parts])


def at_once(network: nn.Module, inputs: Activations, batch: int | None = None) -> int:
    """How many photos of a batch a step may take at a time; the network's modules are in the modes
    that they train in. `inputs` is all of the batch, or a part of one of `batch` photos.

    Draws from the generators, so seed them afterwards. Raises MemoryNeededError where the batch
    cannot be divided and does not fit.
    """
    photos = batch or len(inputs[0])
    needed = bytes_kept(network, inputs) * photos
    if needed <= _STEP_BYTES:
        return photos
    if not any(isinstance(m, _BatchNorm) and m.training for m in network.modules()):
        return max(1, _STEP_BYTES * photos // needed)
    if needed > (there := _memory(inputs[0].device)):
        raise MemoryNeededError(
            f"A step of {photos} photos would take about {format_size(needed)} of memory, of which "
            f"there are {format_size(there)}. BatchNorm trains here, so a batch cannot be divided: "
            f"use --batch-size {max(1, photos * there // needed // 2)}."
        )
    return photos


def bytes_kept(network: nn.Module, inputs: Activations) -> int:
    """What a forward pass keeps of each photo for the backward pass, in bytes."""
    # Copies: a dropout that works in place would change the photos that are about to be trained on.
    few = tuple(value[:_SAMPLE].clone() for value in inputs)
    tensors = (*network.parameters(), *network.buffers(), *few)  # there anyway
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _statistics_kept(network), torch.autograd.graph.saved_tensors_hooks(note, _as_it_is):
        logits = network(*few)
    del logits  # until here it held what was kept, so that no address was used twice
    return sum(kept.values()) // len(few[0])


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""A tail in training on a GPU: its many small kernels are launched as one CUDA graph.

Not yet run on a GPU; see docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trainer.portions import at_once, portions
from trainer.prefix import Activations

Capture = Callable[[nn.Module, Activations], Callable[..., Tensor]]
_SEED = 0


class TrainingForward:
    """Calls a tail: activations [n, ...] -> logits [n, classes], with gradients.

    Batches, or portions, of the size that was prepared for go through the graph, the smaller ones
    at the end of an epoch do not. Where capturing fails, or the graph does not give what the tail
    gives, the tail is always called itself.
    """

    def __init__(self, tail: nn.Module, capture: Capture | None = None) -> None:
        self._tail = tail
        self._capture = capture or _cuda_graph
        self._graph: Callable[..., Tensor] | None = None
        self._size: int | None = None

    def prepare(self, inputs: Activations, graph: bool = True) -> None:
        """Find out how much of batches such as `inputs` may be computed at once, and capture the
        tail for that, in the modes that its modules are in, if `graph` says so.

        Does nothing but the first time. Draws from the generators, so seed them afterwards. Raises
        MemoryNeededError.
        """
        if self._size is None:
            self._size = at_once(self._tail, inputs)
            if graph:
                self._graph = self._captured(tuple(value[: self._size] for value in inputs))

    def portions(self, photos: int) -> Iterator[slice]:
        """What of a batch to compute at once, one after the other."""
        return portions(photos, self._size or photos)

    def _captured(self, inputs: Activations) -> Callable[..., Tensor] | None:
        try:
            graph = self._capture(_Step(self._tail), inputs)
            same = torch.allclose(_seeded(graph, inputs), _seeded(self._tail, inputs), atol=1e-4)
        except Exception:  # what cannot be captured fails in any way, and trains without
            return None
        return graph if same else None

    def __call__(self, *inputs: Tensor) -> Tensor:
        fits = len(inputs[0]) == self._size
        run = self._graph if fits and self._graph is not None else self._tail
        logits: Tensor = run(*inputs)
        return logits


class _Step(nn.Module):
    """The tail under another name: capturing replaces a module's `forward`, and the tail is also
    evaluated."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self._tail = tail

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self._tail(*inputs)
        return logits


def _cuda_graph(module: nn.Module, inputs: Activations) -> Callable[..., Tensor]:
    if not inputs[0].is_cuda:
        raise ValueError("CUDA graphs are for GPUs")
    graph: Any = torch.cuda.make_graphed_callables(module, inputs)
    captured: Callable[..., Tensor] = graph
    return captured


@torch.no_grad()
def _seeded(run: Callable[..., Tensor], inputs: Activations) -> Tensor:
    torch.manual_seed(_SEED)
    return run(*inputs)

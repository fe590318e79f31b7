"""A captured tail stands in for the tail where it fits and is right; on a CPU there is none.

What captures is a stand-in here: real CUDA graphs need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.graphs import TrainingForward
from trainer.prefix import Activations

FULL = (torch.rand(4, 3),)
REST = (torch.rand(2, 3),)


class Recorder:
    """Captures a module as itself plus an error; remembers the sizes of the batches it ran."""

    def __init__(self, error: float = 0.0) -> None:
        self.error, self.captured, self.sizes = error, 0, list[int]()

    def __call__(self, module: nn.Module, inputs: Activations) -> Callable[..., Tensor]:
        self.captured += 1

        def run(*batch: Tensor) -> Tensor:
            self.sizes.append(len(batch[0]))
            logits: Tensor = module(*batch)
            return logits + self.error

        return run


def test_full_batches_go_through_the_graph_and_others_do_not() -> None:
    tail, recorder = nn.Sequential(nn.Dropout(), nn.Linear(3, 5)), Recorder()
    forward = TrainingForward(tail, recorder)
    for inputs in (FULL, FULL, REST):
        forward.prepare(inputs)
        torch.manual_seed(1)
        found = forward(*inputs)
        torch.manual_seed(1)
        assert torch.equal(found, tail(*inputs))
        assert found.requires_grad
    assert recorder.captured == 1
    assert recorder.sizes == [4, 4, 4]  # the first of them is the comparison


def test_a_graph_that_is_wrong_is_not_used() -> None:
    tail, recorder = nn.Linear(3, 5), Recorder(error=0.1)
    forward = TrainingForward(tail, recorder)
    forward.prepare(FULL)
    assert torch.equal(forward(*FULL), tail(*FULL))
    assert recorder.sizes == [4]


def test_without_a_gpu_the_tail_is_called_itself() -> None:
    tail = nn.Linear(3, 5)
    forward = TrainingForward(tail)
    forward.prepare(FULL)
    assert torch.equal(forward(*FULL), tail(*FULL))

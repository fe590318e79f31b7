"""fastai: a Learner with parameter groups, frozen and unfrozen, around torch's own loaders.

The loaders come in as fastai's guide "migrating from PyTorch" passes them: its own would resize and
augment by other rules. BatchNorm is in no group and so never trains.
"""

from __future__ import annotations

from functools import partial

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from torch import nn

from tests.benchmarks.peers.job import Job, PhaseClock, Report
from tests.benchmarks.peers.torch_parts import Network, loaders, trainable


class _Timed(Callback):
    """Tells the clock when an epoch's training, without its validation, starts and ends."""

    def __init__(self, clock: PhaseClock) -> None:
        self.clock = clock

    def before_train(self) -> None:
        self.clock.start_epoch()

    def after_train(self) -> None:
        self.clock.end_epoch()


def run(job: Job, report: Report) -> None:
    learner = Learner(
        DataLoaders(*loaders(job)),
        Network(job).requires_grad_(False),
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=torch.optim.Adam),
        splitter=_groups,
        metrics=accuracy,
        train_bn=False,
    )
    learner.remove_cb(ProgressCallback)
    for phase in job.phases:
        groups = {"transfer": -1, "finetune": -2 if job.unfreeze == "top" else 0}
        learner.freeze_to(groups[phase.name])
        with report.phase(phase) as clock, learner.no_logging():
            clock.validated(learner.validate()[-1])
            learner.fit(phase.epochs, phase.lr, cbs=_Timed(clock))
            for *_, accuracy_after in learner.recorder.values:
                clock.validated(accuracy_after)


def _groups(network: Network) -> list[list[nn.Parameter]]:
    body, top = network.features[:7], network.features[7:]
    return [trainable(part) for part in (body, top, network.classifier)]

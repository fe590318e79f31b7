"""Lightning: one LightningModule, a Trainer for each phase."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tests.benchmarks.peers.job import Job, Phase, PhaseClock, Report
from tests.benchmarks.peers.torch_parts import Network, loaders


class _Classifier(L.LightningModule):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.hits = self.seen = 0

    def start(self, phase: Phase) -> None:
        self.phase = phase
        self.network.unfreeze(phase)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(parameters, self.phase.lr)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        photos, labels = batch
        loss = nn.functional.cross_entropy(self.network(photos), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        photos, labels = batch
        accuracy = (self.network(photos).argmax(dim=1) == labels).float().mean()
        self.log("val_acc", accuracy, on_epoch=True, batch_size=len(labels))


class _Timed(L.Callback):
    """Validation runs inside Lightning's training epoch, so its start ends the clock's epoch."""

    def __init__(self, clock: PhaseClock) -> None:
        self.clock = clock

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.clock.start_epoch()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.clock.end_epoch()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.clock.validated(trainer.callback_metrics["val_acc"].item())


def run(job: Job, report: Report) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    train, val = loaders(job)
    classifier = _Classifier(Network(job))
    for phase in job.phases:
        classifier.start(phase)
        with report.phase(phase) as clock:
            trainer = L.Trainer(callbacks=[_Timed(clock)], max_epochs=phase.epochs, **_QUIET)
            trainer.validate(classifier, val, verbose=False)
            trainer.fit(classifier, train, val)


_QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}

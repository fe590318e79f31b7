"""Hugging Face: transformers.Trainer around the torchvision network."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from tests.benchmarks.peers.job import BATCH, Job, Phase, PhaseClock, Report
from tests.benchmarks.peers.torch_parts import Network, Photos, datasets


class _WithLoss(nn.Module):
    """The Trainer wants a network that computes its own loss."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class _Timed(TrainerCallback):
    """The Trainer evaluates after `on_epoch_end`."""

    def __init__(self, clock: PhaseClock) -> None:
        self.clock = clock

    def on_epoch_begin(self, *arguments: Any, **more: Any) -> None:
        self.clock.start_epoch()

    def on_epoch_end(self, *arguments: Any, **more: Any) -> None:
        self.clock.end_epoch()

    def on_evaluate(self, *arguments: Any, metrics: dict[str, float], **more: Any) -> None:
        self.clock.validated(metrics["eval_accuracy"])


def run(job: Job, report: Report) -> None:
    network = Network(job)
    model = _WithLoss(network)
    photos = datasets(job)
    with tempfile.TemporaryDirectory() as folder:
        for phase in job.phases:
            optimizer = torch.optim.Adam(network.unfreeze(phase), phase.lr)
            with report.phase(phase) as clock:
                trainer = _trainer(model, photos, _arguments(job, phase, folder), optimizer)
                trainer.add_callback(_Timed(clock))
                trainer.evaluate()
                trainer.train()


def _trainer(
    model: nn.Module,
    photos: tuple[Photos, Photos],
    arguments: TrainingArguments,
    optimizer: torch.optim.Optimizer,
) -> Trainer:
    train, val = photos
    return Trainer(
        model=model,
        args=arguments,
        data_collator=_collate,
        train_dataset=train,
        eval_dataset=val,
        compute_metrics=_accuracy,
        optimizers=(optimizer, None),
    )


def _arguments(job: Job, phase: Phase, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=phase.epochs,
        learning_rate=phase.lr,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,  # nobody else clips
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_num_workers=job.workers,
        dataloader_persistent_workers=job.workers > 0,
        remove_unused_columns=False,
        seed=job.seed,
    )


def _collate(rows: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    photos, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(photos), "labels": torch.tensor(labels)}


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    hits = np.asarray(prediction.predictions).argmax(axis=1) == prediction.label_ids
    return {"accuracy": float(hits.mean())}

"""One phase in one run folder."""

from __future__ import annotations

import dataclasses
import io
import time

import numpy as np
import torch
from torch import nn

from trainer.checkpoint import Checkpoint, save_checkpoint
from trainer.config import Config, OptimizerName
from trainer.data import Photos, Split
from trainer.environment import peak_memory_bytes
from trainer.loop import (
    Evaluation,
    Setup,
    Source,
    TrainingResult,
    evaluate,
    frozen_activations,
    train_epoch,
)
from trainer.model import InputNormalize, head_name, trainable_modules, trainable_parameters
from trainer.prefix import Cut, cut
from trainer.progress import PhaseProgress, summary
from trainer.runlog import RunWriter, write_atomically
from trainer.schedule import learning_rate
from trainer.schema import EpochRecord, PhaseRecord
from trainer.start import Start
from trainer.tensorboard import TensorBoardLog


def make_optimizer(network: nn.Module, name: OptimizerName, lr: float) -> torch.optim.Optimizer:
    """A fresh optimizer over what trains; nothing is carried over from an earlier phase."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    match name:
        case "adam":
            return torch.optim.Adam(parameters, lr)
        case "adamw":
            return torch.optim.AdamW(parameters, lr)
        case "sgd":
            return torch.optim.SGD(parameters, lr, momentum=0.9)


class PhaseRun:
    """One phase in one run folder: evaluates, trains, records, keeps the best."""

    def __init__(
        self,
        config: Config,
        photos: Photos,
        start: Start,
        writer: RunWriter,
        device: torch.device,
        unfrozen: tuple[str, ...],
    ) -> None:
        self.config, self.start, self.writer = config, start, writer
        network = start.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.setup = Setup(
            network,
            InputNormalize(start.preprocess).to(device),
            device,
            config.batch_size,
            config.augmentation,
            start.preprocess.crop,
            config.seed,
            self._cut(network, device),
        )
        started = time.perf_counter()
        val = _pretrained_labels(photos, start) if config.phase == "direct" else photos.val
        self.val = frozen_activations(self.setup, val)
        # Augmented photos differ in every epoch, so what is frozen runs on each view as it comes.
        repeated = not config.augmentation.active
        self.train = (
            frozen_activations(self.setup, photos.train) if repeated else Source(photos.train)
        )
        self.prefix_seconds = time.perf_counter() - started
        self.params = trainable_parameters(network)
        self.backbone_trains = len(trainable_modules(network)) > _head_size(network)
        self.board = TensorBoardLog(writer.path)
        writer.start_phase(
            PhaseRecord(config.phase, start.first_epoch, None, unfrozen, self.params)
        )

    def _cut(self, network: nn.Module, device: torch.device) -> Cut | None:
        if not self.config.cache or self.config.phase in ("direct", "scratch"):
            return None  # one evaluation has nothing to save, and from scratch nothing is frozen
        side = self.start.preprocess.crop
        found = cut(network, torch.rand(3, 3, side, side, device=device))
        self.writer.update(
            engine={"cut": found.at, "bytes_per_photo": found.bytes_per_photo} if found else None
        )
        return found

    def run(self) -> None:
        config, epochs = self.config, 0 if self.config.phase == "direct" else self.config.epochs
        with PhaseProgress(config.phase, epochs, len(self.train.split)) as progress:
            first, before = self._evaluate(0, None, config.learning_rate, progress)
            if config.phase == "finetune":
                self._save_predictions("before", before)
            self._save_checkpoint("last", first)
            if config.phase == "direct":
                best = first
                self._keep_best(first, before)
                self.writer.end_phase(first.epoch)
            else:
                best = self._train(epochs, progress)
        self.board.close()
        boundary = first if config.phase == "finetune" else None
        seconds = self.prefix_seconds + progress.seconds
        print(summary(config.phase, best, boundary, seconds))

    def _train(self, epochs: int, progress: PhaseProgress) -> EpochRecord:
        """Train and return the record of the best epoch."""
        optimizer = make_optimizer(
            self.setup.network, self.config.optimizer, self.config.learning_rate
        )
        best: EpochRecord | None = None
        record = None
        for phase_epoch in range(1, epochs + 1):
            rate = learning_rate(
                self.config.schedule, self.config.learning_rate, phase_epoch - 1, epochs
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            progress.start_epoch(phase_epoch)
            epoch = self.start.first_epoch + phase_epoch
            trained = train_epoch(self.setup, self.train, optimizer, epoch, progress.batch)
            record, evaluation = self._evaluate(phase_epoch, trained, rate, progress)
            if best is None or record.rank > best.rank:
                best = record
                self._keep_best(record, evaluation)
            self._save_checkpoint("last", record)
            patience = self.config.early_stop
            if patience is not None and phase_epoch - best.phase_epoch >= patience:
                text = f"Stopped early: no better validation accuracy for {patience} epochs."
                self.writer.note(text)
                print(text)
                break
        assert best is not None and record is not None
        self.writer.end_phase(record.epoch)
        return best

    def _evaluate(
        self,
        phase_epoch: int,
        trained: TrainingResult | None,
        rate: float,
        progress: PhaseProgress,
    ) -> tuple[EpochRecord, Evaluation]:
        started = time.perf_counter()
        evaluation = evaluate(self.setup, self.val)
        seconds = time.perf_counter() - started
        if phase_epoch == 0:
            seconds += self.prefix_seconds  # or the phase would look faster than it was
        speed = trained.images_per_second if trained else len(self.val.split) / seconds
        record = EpochRecord(
            phase=self.config.phase,
            epoch=self.start.first_epoch + phase_epoch,
            phase_epoch=phase_epoch,
            train_loss=trained.loss if trained else None,
            train_acc=trained.accuracy if trained else None,
            val_loss=evaluation.loss,
            val_acc=evaluation.accuracy,
            val_top5=evaluation.top5,
            val_macro_f1=evaluation.macro_f1,
            lr_head=rate,
            lr_backbone=rate if self.backbone_trains else 0.0,
            trainable_params=self.params,
            seconds=seconds + (trained.seconds if trained else 0.0),
            images_per_second=speed,
            peak_memory_bytes=peak_memory_bytes(self.setup.device),
            time=time.time(),
        )
        self.writer.epoch(record)
        self.board.epoch(record)
        progress.epoch(record)
        return record, evaluation

    def _keep_best(self, record: EpochRecord, evaluation: Evaluation) -> None:
        self._save_checkpoint("best", record)
        self._save_predictions("after", evaluation)

    def _save_checkpoint(self, kind: str, record: EpochRecord) -> None:
        state = {
            k: v.detach().cpu().contiguous() for k, v in self.setup.network.state_dict().items()
        }
        checkpoint = Checkpoint(
            self.start.spec,
            self.start.classes,
            self.start.preprocess,
            record.phase,
            record.epoch,
            state,
        )
        save_checkpoint(self.writer.checkpoint(f"{record.phase}-{kind}"), checkpoint)

    def _save_predictions(self, name: str, evaluation: Evaluation) -> None:
        """Per-photo validation logits float32 [N, classes], labels int64 [N], files str [N]."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            logits=evaluation.logits,
            labels=self.val.split.labels,
            files=np.array(self.val.split.files, dtype=np.str_),
        )
        write_atomically(self.writer.predictions(name), buffer.getvalue())


def _head_size(network: nn.Module) -> int:
    head = head_name(network)
    names = trainable_modules(network)
    return sum(name == head or name.startswith(f"{head}.") for name in names)


def _pretrained_labels(photos: Photos, start: Start) -> Split:
    """Validation photos labelled by the classes of the pretrained head.

    Class folders named like ImageNet classes are matched by name. Where any is not, class number i
    counts as output i, which is how the labs extended their labels to 1000.
    """
    wanted = [_plain(name) for name in photos.classes]
    known = {_plain(name): index for index, name in reversed(list(enumerate(start.classes)))}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        print(
            f"Note: {len(unknown)} classes (such as {unknown[0]!r}) are not known to the "
            "pretrained network; class number i is compared with its output i, so expect chance."
        )
    mapping = [i if unknown else known[name] for i, name in enumerate(wanted)]
    return dataclasses.replace(photos.val, labels=np.array(mapping)[photos.val.labels])


def _plain(name: str) -> str:
    """`n01530575_brambling` and `Brambling` are the same class."""
    head, _, rest = name.partition("_")
    is_wnid = len(head) == 9 and head[0] == "n" and head[1:].isdecimal()
    return (rest if is_wnid else name).replace("_", " ").replace("-", " ").strip().lower()

"""The scalars of a run as TensorBoard events, for those who look there."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from trainer.schema import PHASES, EpochRecord

_TAGS = {
    "train/loss": "train_loss",
    "train/accuracy": "train_acc",
    "validation/loss": "val_loss",
    "validation/accuracy": "val_acc",
    "validation/top5_accuracy": "val_top5",
    "validation/macro_f1": "val_macro_f1",
    "learning_rate/head": "lr_head",
    "learning_rate/backbone": "lr_backbone",
    "images_per_second": "images_per_second",
}


class TensorBoardLog:
    """Mirrors epoch records into `events.out.tfevents.*` in the run folder.

    What is there of epochs from `purge_from` on no longer counts.
    """

    def __init__(self, path: Path, purge_from: int | None = None) -> None:
        self._writer = SummaryWriter(str(path), purge_step=purge_from)

    def epoch(self, record: EpochRecord) -> None:
        for tag, name in _TAGS.items():
            value = getattr(record, name)
            if value is not None:
                self._writer.add_scalar(tag, value, record.epoch, walltime=record.time)
        self._writer.add_scalar("phase_id", PHASES.index(record.phase), record.epoch)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

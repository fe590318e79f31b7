"""Runs with known numbers, written by the real RunWriter, for the explorer's tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.run_writer import RunWriter
from trainer.schema import EpochRecord, Phase, PhaseRecord

TRUNK_ACCURACY = (0.20, 0.50, 0.60, 0.70)
INFO: dict[str, Any] = {
    "classes": ["daisy", "rose"],
    "config": {},
    "dataset": {"name": "flowers", "counts": {"train": 700, "val": 200}},
}


# A run in progress has a writer that lives: whose writer is gone was killed.
_WRITING: list[RunWriter] = []


def record(phase: Phase, epoch: int, phase_epoch: int, accuracy: float) -> EpochRecord:
    """Loss is 1 - accuracy; training is 0.05 better; an epoch takes two seconds."""
    trained = phase_epoch > 0
    return EpochRecord(
        phase=phase,
        epoch=epoch,
        phase_epoch=phase_epoch,
        train_loss=0.95 - accuracy if trained else None,
        train_acc=accuracy + 0.05 if trained else None,
        val_loss=1 - accuracy,
        val_acc=accuracy,
        val_top5=1.0,
        val_macro_f1=accuracy,
        lr_head=1e-3,
        lr_backbone=0.0,
        trainable_params=10,
        seconds=2.0,
        images_per_second=50.0,
        peak_memory_bytes=10**8,
        time=1.8e9 + epoch,
    )


def write_run(
    runs_dir: Path,
    name: str,
    accuracies: Sequence[float],
    phase: Phase = "transfer",
    first_epoch: int = 0,
    done: bool = True,
    **info: Any,
) -> RunWriter:
    """A run of one phase; `accuracies` start with the evaluation before the first step."""
    writer = RunWriter.create(runs_dir, name, INFO | info)
    writer.start_phase(PhaseRecord(phase, first_epoch, None, ("head",), 10))
    for phase_epoch, accuracy in enumerate(accuracies):
        writer.epoch(record(phase, first_epoch + phase_epoch, phase_epoch, accuracy))
    if done:
        writer.end_phase(first_epoch + len(accuracies) - 1)
        writer.close("done")
    else:
        _WRITING.append(writer)
    return writer


def write_trunk(runs_dir: Path, name: str = "trunk") -> str:
    """A transfer run of three epochs, so that its boundary is 3; returns its id."""
    return write_run(runs_dir, name, TRUNK_ACCURACY).run_id


def write_finetune(
    runs_dir: Path, parent: str, name: str, accuracies: Sequence[float], done: bool = True
) -> RunWriter:
    return write_run(runs_dir, name, accuracies, "finetune", 3, done, parent_run_id=parent)

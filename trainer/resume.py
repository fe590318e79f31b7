"""What of an interrupted run is there to go on with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from trainer.journal import Entry, Journal, Kept
from trainer.runlog import Run, is_being_written
from trainer.schema import CHECKPOINTS, EpochRecord, Phase, ThawError


class ResumeError(ThawError):
    """A run that cannot go on where it was: says why."""


@dataclass(frozen=True)
class Resume:
    """An interrupted run as it was after an epoch: that of `checkpoint`.

    `unsaved` is what its checkpoint files do not hold yet, "best" and "last"; `earlier` is the same
    run an epoch before, where that is there too.
    """

    run: Run
    checkpoint: Checkpoint = field(repr=False)
    unsaved: dict[str, Kept] = field(default_factory=dict, repr=False)
    earlier: Resume | None = field(default=None, repr=False)

    @property
    def records(self) -> list[EpochRecord]:
        """From epoch 0 to that of the checkpoint."""
        return [record for record in self.run.epochs if record.epoch <= self.checkpoint.epoch]

    @property
    def phase_epoch(self) -> int:
        """How many epochs are done."""
        return self.checkpoint.epoch - self.run.epochs[0].epoch

    @property
    def whole(self) -> bool:
        """Whether log and checkpoint have all that is needed to go on."""
        known = [record.phase_epoch for record in self.records]
        if not known or known != list(range(self.phase_epoch + 1)):
            return False
        # Runs of earlier versions of Thaw have no optimizer in their checkpoints.
        return self.phase_epoch == 0 or self.checkpoint.optimizer is not None


def find_resume(
    run: Run, phase: Phase, fingerprint: str, origin: Mapping[str, Any]
) -> Resume | None:
    """As `resume_of`; None: the run has to begin anew."""
    try:
        return resume_of(run, phase, fingerprint, origin)
    except ResumeError:
        return None


def resume_of(run: Run, phase: Phase, fingerprint: str, origin: Mapping[str, Any]) -> Resume:
    """How to go on with a run of `phase`.

    Raises ResumeError where it trained on other photos or from another network than `fingerprint`
    and `origin` say, where another process writes it, and where its files do not suffice.
    """
    if run.info.get("dataset", {}).get("fingerprint") != fingerprint:
        raise ResumeError(f"Run {run.run_id} cannot go on: its photos or their split have changed.")
    if any(run.info.get(key) != value for key, value in origin.items()):
        raise ResumeError(
            f"Run {run.run_id} cannot go on: the network that it started from is another one now."
        )
    if is_being_written(run):
        raise ResumeError(f"Run {run.run_id} is being trained by another process.")
    try:
        checkpoint = load_checkpoint(run.checkpoint(f"{phase}-last"))
    except CheckpointError as error:
        raise ResumeError(f"Run {run.run_id} cannot go on: {error}") from error
    found: Resume | None = None
    for one in sorted(_states(run, phase, checkpoint), key=lambda one: one.checkpoint.epoch):
        if one.whole:
            found = dataclasses.replace(one, earlier=found)
    if found is None:
        raise ResumeError(f"Run {run.run_id} cannot go on: its log and its checkpoint do not fit.")
    return found


def _states(run: Run, phase: Phase, checkpoint: Checkpoint) -> Iterator[Resume]:
    yield Resume(run, checkpoint)
    for entry in Journal(run.path / CHECKPOINTS, phase).read():
        if entry.last.epoch > checkpoint.epoch and _fits(entry, checkpoint):
            unsaved = {"last": entry.last} | ({} if entry.best is None else {"best": entry.best})
            yield Resume(run, _after(entry.last, checkpoint), unsaved)


def _fits(entry: Entry, checkpoint: Checkpoint) -> bool:
    shapes = {name: value.shape for name, value in checkpoint.state_dict.items()}
    return all(
        shapes.get(name) == value.shape
        for kept in (entry.last, entry.best)
        if kept is not None
        for name, value in kept.changed.items()
    )


def _after(kept: Kept, checkpoint: Checkpoint) -> Checkpoint:
    return dataclasses.replace(
        checkpoint,
        epoch=kept.epoch,
        state_dict={**checkpoint.state_dict, **kept.changed},
        optimizer=kept.optimizer,
    )

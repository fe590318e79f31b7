"""What of an interrupted run is there to go on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from trainer.runlog import Run, is_being_written
from trainer.schema import EpochRecord, Phase


@dataclass(frozen=True)
class Resume:
    """An interrupted run as it was when its last checkpoint was written."""

    run: Run
    checkpoint: Checkpoint = field(repr=False)

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
    """How to go on with a run of `phase`; None: it has to begin anew.

    That is so where it trained on other photos or from another network than `fingerprint` and
    `origin` say, where another process writes it, and where its files do not suffice.
    """
    photos = run.info.get("dataset", {}).get("fingerprint")
    same = photos == fingerprint and all(run.info.get(k) == value for k, value in origin.items())
    if not same or is_being_written(run):
        return None
    try:
        found = Resume(run, load_checkpoint(run.checkpoint(f"{phase}-last")))
    except CheckpointError:
        return None
    return found if found.whole else None

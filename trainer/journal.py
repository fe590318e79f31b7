"""What a phase has reached, on disk after every epoch: a killed run loses one epoch at most.

Only what changes in training is written, so it costs little (0.6 ms for the head of a B0, 31 ms for
its top 20 layers with Adam's state), and it is not flushed to the disk: that takes longer, and what
a process wrote outlives it. After a power failure the checkpoints count, which are flushed.

The files lie beside the checkpoints while a run is written: `.<phase>-last.0` after even epochs,
`.1` after odd ones, so that one is whole while the other is written, and the members of a sweep,
one of them killed before it could write, have an epoch in common.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.checkpoint import CheckpointError
from trainer.files import said_with_space
from trainer.schema import SCHEMA_VERSION, Phase

_DIGEST_BYTES = 64


@dataclass(frozen=True)
class Kept:
    """What changes in training, as it was after an epoch of the lineage.

    `optimizer` is the state to train on with, `logits` those of the validation photos, float32
    [N, classes], of the best epoch.
    """

    epoch: int
    changed: Mapping[str, Tensor] = field(repr=False)
    optimizer: dict[str, Any] | None = field(default=None, repr=False)
    logits: NDArray[np.float32] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Entry:
    """The last epoch, and the best one where its checkpoint is not written yet."""

    last: Kept
    best: Kept | None


class Journal:
    """The two files of one phase in a run's folder of checkpoints."""

    def __init__(self, folder: Path, phase: Phase) -> None:
        self._paths = [folder / f".{phase}-last.{number}" for number in (0, 1)]

    def write(self, entry: Entry) -> None:
        """Replaces what was written two epochs before. Raises CheckpointError."""
        best = None if entry.best is None else _to_dict(entry.best)
        content = {"schema_version": SCHEMA_VERSION, "last": _to_dict(entry.last), "best": best}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        digest = hashlib.sha256(buffer.getbuffer()).hexdigest().encode()
        path = self._paths[entry.last.epoch % 2]
        try:
            try:
                _replace(path, digest, buffer)
            except FileNotFoundError:  # its folder was deleted in between
                _replace(path, digest, buffer)
        except OSError as error:
            reason = said_with_space(error, path).strerror
            raise CheckpointError(f"Cannot write the checkpoint {path}: {reason}.") from error

    def read(self) -> list[Entry]:
        """What is there and whole, the newest first."""
        found = [entry for path in self._paths if (entry := _read(path)) is not None]
        return sorted(found, key=lambda entry: entry.last.epoch, reverse=True)

    def remove(self) -> None:
        """Once the checkpoints hold the same."""
        for path in self._paths:
            path.unlink(missing_ok=True)


def _replace(path: Path, digest: bytes, content: io.BytesIO) -> None:
    """Not flushed; what was there stays whole until all is written."""
    new = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with new.open("wb") as file:
            file.write(digest)
            file.write(content.getbuffer())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _to_dict(kept: Kept) -> dict[str, Any]:
    return {
        "epoch": kept.epoch,
        "changed": dict(kept.changed),
        "optimizer": kept.optimizer,
        "logits": None if kept.logits is None else torch.from_numpy(kept.logits),
    }


def _read(path: Path) -> Entry | None:
    try:
        content = path.read_bytes()
        digest, rest = content[:_DIGEST_BYTES], memoryview(content)[_DIGEST_BYTES:]
        if hashlib.sha256(rest).hexdigest().encode() != digest:
            return None
        data = torch.load(io.BytesIO(rest), map_location="cpu", weights_only=True)
        best = data["best"]
        return Entry(_from_dict(data["last"]), None if best is None else _from_dict(best))
    except Exception:  # torch raises many kinds on foreign content; the checkpoints are still there
        return None


def _from_dict(data: Mapping[str, Any]) -> Kept:
    logits = data["logits"]
    return Kept(
        int(data["epoch"]),
        data["changed"],
        data["optimizer"],
        None if logits is None else logits.numpy(),
    )

"""Which runs logs become: a transfer phase, and finetunes that start from it at the boundary.

Both phases in one log become two runs as well, trunk and finetune, as Thaw's own trainer writes
them: so the accuracy before unfreezing has a line of its own, and more finetunes may join the
trunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from trainer.imports.logs import Log, LogError, LoggedEpoch
from trainer.runlog import Run
from trainer.schema import EpochRecord, Phase

OnePhase = Literal["transfer", "finetune", "scratch"]
ONE_PHASE: Final[tuple[OnePhase, ...]] = ("transfer", "finetune", "scratch")


@dataclass(frozen=True)
class NewRun:
    """A run that is to be written. `parent` is another of them, or a run that is there already."""

    name: str
    log: Log
    phase: Phase
    first_epoch: int
    records: tuple[EpochRecord, ...] = field(repr=False)
    parent: NewRun | Run | None = None

    @property
    def trained(self) -> tuple[EpochRecord, ...]:
        return tuple(record for record in self.records if record.phase_epoch > 0)

    @property
    def last_epoch(self) -> int:
        return self.records[-1].epoch

    def info(self, parent_run_id: str | None) -> dict[str, Any]:
        """What run.json says; nothing that the log does not."""
        files = [{"path": str(path), "sha256": digest} for path, digest in self.log.files.items()]
        times = [record.time for record in self.trained if not math.isnan(record.time)]
        return {
            "parent_run_id": parent_run_id,
            "config": self._config(),
            "started": min(times, default=self.log.started),
            "imported": {
                "format": self.log.format,
                "path": str(self.log.path),
                "files": files,
            },
        }

    def _config(self) -> dict[str, Any]:
        config = {name: value for name, value in self.log.config.items() if name != "lr"}
        rates = (record.lr_head for record in self.trained if not math.isnan(record.lr_head))
        # Of two phases in one log, what stands beside it tells of the first.
        second = isinstance(self.parent, NewRun) and self.parent.log is self.log
        rate = next(rates, None if second else self.log.config.get("lr"))
        known = {} if rate is None else {"lr": rate}
        return config | {"epochs": len(self.trained)} | known


def alone(log: Log, phase: OnePhase | None = None) -> NewRun:
    """A log as one run of one phase (transfer unless given).

    Raises LogError where the log holds several fits and nobody says that they are one phase.
    """
    if log.seams and phase is None:
        raise LogError(
            f"it holds {len(log.seams) + 1} fits; the next begins after epoch "
            f"{', '.join(map(str, log.seams[:10]))}. Say where layers were unfrozen, such as "
            f"--boundary {log.seams[0]}, or --phase transfer if all of it is one phase."
        )
    phase = phase or "transfer"
    first = max(0, log.epochs[0].epoch - 1)
    records = tuple(_record(one, phase, one.epoch, one.epoch - first) for one in log.epochs)
    return NewRun(log.name, log, phase, first, records)


def halves(log: Log, boundary: int) -> tuple[NewRun, NewRun]:
    """A log that holds both phases: a trunk up to epoch `boundary`, and its finetune after it.

    Raises LogError where the boundary is not within the log.
    """
    before = tuple(epoch for epoch in log.epochs if epoch.epoch <= boundary)
    after = tuple(epoch for epoch in log.epochs if epoch.epoch > boundary)
    if not any(epoch.epoch > 0 for epoch in before) or not after:
        raise LogError(
            f"the boundary {boundary} is not within {log.name}, which holds the epochs "
            f"{log.epochs[0].epoch} to {log.last_epoch}."
        )
    first = max(0, before[0].epoch - 1)
    records = tuple(_record(one, "transfer", one.epoch, one.epoch - first) for one in before)
    trunk = NewRun(f"{log.name} transfer", log, "transfer", first, records)
    return trunk, _finetune(trunk, log, f"{log.name} finetune", boundary, after, boundary)


def family(
    trunk: NewRun | Run, logs: Iterable[Log], boundary: int | None = None
) -> tuple[NewRun, ...]:
    """The finetunes of a trunk, which left it after epoch `boundary` (the trunk's last).

    A log that counts on from the boundary, or from 0 again, continues on the trunk's axis. Raises
    LogError where the boundary is not within the trunk.
    """
    records = trunk.records if isinstance(trunk, NewRun) else trunk.epochs
    name = trunk.name if isinstance(trunk, NewRun) else trunk.run_id
    if not records or (isinstance(trunk, Run) and trunk.status == "running"):
        raise LogError(f"{name} has no epoch yet, or is still training: nothing can start from it.")
    left = records[-1].epoch if boundary is None else boundary
    if not max(1, records[0].epoch) <= left <= records[-1].epoch:
        raise LogError(
            f"the boundary {left} is not within the transfer phase {name}, which holds the epochs "
            f"{records[0].epoch} to {records[-1].epoch}."
        )
    return tuple(
        _finetune(trunk, log, log.name, left, log.epochs, _counted_from(log, left)) for log in logs
    )


def _counted_from(log: Log, boundary: int) -> int:
    """The number before the first epoch of a log, in its own count."""
    first = next(epoch.epoch for epoch in log.epochs if epoch.epoch > 0)
    return first - 1 if first >= max(2, boundary) else 0


def _finetune(
    trunk: NewRun | Run,
    log: Log,
    name: str,
    boundary: int,
    epochs: Sequence[LoggedEpoch],
    base: int,
) -> NewRun:
    start = _at_boundary(trunk, boundary)
    trained = [
        _record(one, "finetune", boundary + one.epoch - base, one.epoch - base)
        for one in epochs
        if one.epoch > base
    ]
    records = trained if start is None else [start, *trained]
    return NewRun(name, log, "finetune", boundary, tuple(records), trunk)


def _at_boundary(trunk: NewRun | Run, boundary: int) -> EpochRecord | None:
    """The last frozen evaluation, as epoch 0 of the phase that starts from it."""
    records = trunk.records if isinstance(trunk, NewRun) else trunk.epochs
    evaluated = [
        record
        for record in records
        if record.epoch <= boundary
        and not (math.isnan(record.val_acc) and math.isnan(record.val_loss))
    ]
    if not evaluated:
        return None
    last = evaluated[-1]
    measured = LoggedEpoch(
        boundary,
        val_loss=last.val_loss,
        val_acc=last.val_acc,
        val_top5=last.val_top5,
        val_macro_f1=last.val_macro_f1,
        seconds=0.0,
        time=last.time,
    )
    return _record(measured, "finetune", boundary, 0)


def _record(logged: LoggedEpoch, phase: Phase, epoch: int, phase_epoch: int) -> EpochRecord:
    return EpochRecord(
        phase=phase,
        epoch=epoch,
        phase_epoch=phase_epoch,
        train_loss=_or_none(logged.train_loss),
        train_acc=_or_none(logged.train_acc),
        val_loss=logged.val_loss,
        val_acc=logged.val_acc,
        val_top5=logged.val_top5,
        val_macro_f1=logged.val_macro_f1,
        lr_head=logged.lr,
        lr_backbone=math.nan if phase == "transfer" else logged.lr,
        trainable_params=0,
        seconds=logged.seconds,
        images_per_second=math.nan,
        peak_memory_bytes=0,
        time=logged.time,
    )


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value

"""The scalars of a run as TensorBoard events, for those who look there."""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from pathlib import Path
from typing import Final

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from trainer.cache import say
from trainer.schema import PHASES, EpochRecord

_TAGS: Final = {
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
_NUMBERS: Final = itertools.count()  # several runs of one process may begin in the same second


class TensorBoardLog:
    """Mirrors epoch records into `events.out.tfevents.*` in the run folder.

    What is there of epochs from `purge_from` on no longer counts. Nothing here fails a run: where
    events cannot be written, that is said once. Written by the thread that trains: torch's own
    writer has a thread for each run, whose errors reach the screen as tracebacks.
    """

    def __init__(self, path: Path, purge_from: int | None = None) -> None:
        name = f"{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self._file = path / f"events.out.tfevents.{name}"
        self._failed = False
        first = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if purge_from is not None:
            restarted = SessionLog(status=SessionLog.START)
            first.append(Event(wall_time=time.time(), step=purge_from, session_log=restarted))
        self._write(first)

    def epoch(self, record: EpochRecord) -> None:
        known = {tag: getattr(record, name) for tag, name in _TAGS.items()}
        known["phase_id"] = PHASES.index(record.phase)
        values = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in known.items()
            if value is not None
        ]
        summary = Summary(value=values)
        self._write([Event(wall_time=record.time, step=record.epoch, summary=summary)])

    def _write(self, events: list[Event]) -> None:
        if self._failed:
            return
        content = io.BytesIO()
        records = RecordWriter(content)
        for event in events:
            records.write(event.SerializeToString())
        try:
            with self._file.open("ab") as file:
                file.write(content.getvalue())
        except OSError as error:
            self._failed = True
            say(f"{self._file}: {error.strerror}. TensorBoard will not show what follows.")

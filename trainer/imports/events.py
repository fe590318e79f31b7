"""TensorBoard event files, of TensorFlow 1 and 2 and of torch; neither is imported."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from trainer.imports.logs import LogError, Point
from trainer.imports.tags import Meaning, is_epoch
from trainer.schema import LATEST_TIME

MAX_BYTES: Final = 512 * 2**20
_MAX_POINTS: Final = 1_000_000
_AROUND_RECORD: Final = 16  # bytes: its length and two checksums
# Evaluations further apart than this count batches: nobody validates so rarely by epochs.
_EPOCHS_APART: Final = 20


def read_events(files: Sequence[tuple[str, Path]]) -> tuple[list[Point], list[str]]:
    """The scalars of event files in the order of time, and notes on what could not be read.

    `files` are pairs of stream and path; a stream that has a name (`train`, `validation`) is put
    before its tags. Raises LogError for files that are no event files.
    """
    points: list[Point] = []
    notes: list[str] = []
    for part, (stream, path) in enumerate(sorted(files, key=lambda file: file[1].name)):
        intact = 0
        for size, event in _records(path):
            intact += size
            points += _scalars(event, f"{stream}/" if stream else "", part)
            if len(points) > _MAX_POINTS:
                raise LogError(f"more than {_MAX_POINTS:,} scalars; Thaw reads logs by epoch.")
        lost = path.stat().st_size - intact
        if lost > 0:
            notes.append(f"{path.name} breaks off: its last {lost:,} bytes were left out.")
    points.sort(key=lambda point: point.time if point.time == point.time else 0.0)
    return points, notes


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """The size in the file and the content of each record, up to the first damaged one."""
    # tensorboard takes half a second, and --help need not wait for it.
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    try:
        for record in RawEventFileLoader(str(path)).Load():
            yield len(record) + _AROUND_RECORD, Event.FromString(record)
    except (DecodeError, MemoryError, OverflowError) as error:
        raise LogError(f"{path.name} is not a TensorBoard event file, or damaged.") from error


def _scalars(event: Any, prefix: str, part: int) -> Iterator[Point]:
    time = event.wall_time if 0 < event.wall_time < LATEST_TIME else math.nan
    for value in event.summary.value:
        number = _number(value)
        if math.isfinite(number):
            yield Point(prefix + value.tag, float(event.step), number, time=time, part=part)


def _number(value: Any) -> float:
    """The number in a summary; NaN for an image, a histogram, a graph."""
    from tensorboard.util.tensor_util import make_ndarray

    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return float(value.simple_value)
    if kind != "tensor" or value.metadata.plugin_data.plugin_name not in ("", "scalars"):
        return math.nan
    # Before it is made: a tensor may claim any size.
    if any(dim.size != 1 for dim in value.tensor.tensor_shape.dim):
        return math.nan
    try:
        return float(make_ndarray(value.tensor).item())
    except (TypeError, ValueError, AttributeError):
        return math.nan


def with_epochs(
    points: Sequence[Point], chosen: Mapping[str, Meaning]
) -> tuple[list[Point], list[str]]:
    """The chosen points with their epochs, and notes on how these were found.

    Lightning and Hugging Face count batches and log the epoch beside; Keras counts epochs from 0,
    others from 1. Where steps count batches and nothing tells the epoch, each evaluation is one.
    """
    counted = {
        (point.part, point.step): _logged_epoch(point) for point in points if is_epoch(point.tag)
    }
    kept = [point for point in points if point.tag in chosen]
    if counted:
        told = [(point, counted.get((point.part, point.step))) for point in kept]
        return [replace(point, epoch=epoch) for point, epoch in told if epoch is not None], []
    judged = {tag for tag, meaning in chosen.items() if meaning.field.startswith("val_")}
    evaluations = sorted({point.step for point in kept if point.tag in judged})
    gaps = [after - before for before, after in pairwise(evaluations)]
    if gaps and min(gaps) > _EPOCHS_APART:
        ranked = [
            replace(point, epoch=bisect_left(evaluations, point.step) + 1)
            for point in kept
            if point.step <= evaluations[-1]
        ]
        return ranked, ["Its steps count batches: each evaluation is taken as one epoch."]
    kept, notes = _without_batches(kept, judged, evaluations)
    base = 0 if min((point.step for point in kept), default=0) == 1 else 1
    return [replace(point, epoch=int(point.step) + base) for point in kept], notes


def _logged_epoch(point: Point) -> int:
    # Hugging Face logs train/epoch as the fraction that is over, Lightning epoch, from 0 on.
    if point.tag == "epoch":
        return int(point.value) + 1
    return math.ceil(point.value - 0.005)


def _without_batches(
    points: list[Point], judged: set[str], evaluations: Sequence[float]
) -> tuple[list[Point], list[str]]:
    """Without the values of single batches, where validation was logged by epoch."""
    beside = [point for point in points if point.tag not in judged]
    if not evaluations or len({point.step for point in beside}) <= 5 * len(evaluations):
        return points, []
    note = "Its training values count batches, not epochs, and were left out."
    return [point for point in points if point.tag in judged], [note]

"""A candidate -> the log that it holds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trainer.imports import events, huggingface, tables
from trainer.imports.find import Candidate, Skipped, check_size, find
from trainer.imports.hparams import read_hparams
from trainer.imports.logs import (
    MAX_EPOCH,
    Format,
    Log,
    LogError,
    Point,
    Sample,
    as_fractions,
    assemble,
)
from trainer.imports.tags import Meaning, choose, is_epoch

_MAX_BYTES: Final[dict[Format, int]] = {
    "tensorboard": events.MAX_BYTES,
    "keras-csv": tables.MAX_BYTES,
    "lightning": tables.MAX_BYTES,
    "fastai": tables.MAX_BYTES,
    "huggingface": huggingface.MAX_BYTES,
}


@dataclass(frozen=True)
class Found:
    """What there is at some paths: logs, and what is none with the reason."""

    logs: tuple[Log, ...]
    skipped: tuple[Skipped, ...]


def read_all(
    paths: Sequence[Path], wanted: Format | None = None, accuracy: str | None = None
) -> Found:
    """Read every log at `paths`; one that cannot be read is among the skipped.

    Raises LogError for a path where there is no log at all, or one that cannot be read alone.
    """
    logs: dict[Path, Log] = {}
    skipped: list[Skipped] = []
    for path in paths:
        candidates, others = find(path, wanted)
        skipped += others
        for candidate in candidates:
            try:
                logs[candidate.path.absolute()] = read(candidate, accuracy)
            except LogError as error:
                skipped.append(Skipped(candidate.path, str(error)))
    if not logs:
        reasons = "\n".join(f"{one.path}: {one.reason}" for one in skipped[:20])
        raise LogError(f"There is nothing to import.\n{reasons}".rstrip())
    return Found(tuple(logs.values()), tuple(skipped))


def read(candidate: Candidate, accuracy: str | None = None) -> Log:
    """Read one log. Raises LogError with the reason, without the path."""
    try:
        for _, file in candidate.files:
            check_size(file, _MAX_BYTES[candidate.format])
        return _read(candidate, accuracy)
    except OSError as error:
        raise LogError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _read(candidate: Candidate, accuracy: str | None) -> Log:
    points, config, notes = _points(candidate)
    tags = list(dict.fromkeys(point.tag for point in points if not is_epoch(point.tag)))
    if not points:
        raise LogError("it holds no numbers: its training broke off before the first epoch.")
    fastai = candidate.format == "fastai"
    chosen = choose(tags, "val" if fastai else "train", accuracy)
    if fastai and tables.SECONDS in tags:
        chosen[tables.SECONDS] = Meaning("seconds")
    samples, more = _samples(points, chosen, candidate.format)
    fractions, percent = as_fractions(samples)
    epochs, seams = assemble(fractions)
    if not epochs:
        raise LogError("it holds no epoch: its training broke off before the end of the first.")
    parts = {sample.part for sample in samples}
    files = sorted((file for _, file in candidate.files), key=lambda file: file.name)
    used = [file for part, file in enumerate(files) if len(files) == 1 or part in parts]
    return Log(
        path=candidate.path,
        name=candidate.name,
        format=candidate.format,
        files={file: _sha256(file) for file in used},
        epochs=epochs,
        seams=seams,
        started=_started(samples, used),
        config=config | _first_rate(samples, config),
        notes=(*notes, *more, *percent),
    )


def _points(candidate: Candidate) -> tuple[list[Point], dict[str, Any], list[str]]:
    """The numbers of a log, its settings, and notes."""
    path = candidate.files[0][1]
    if candidate.format == "tensorboard":
        points, notes = events.read_events(candidate.files)
        return points, read_hparams(candidate.path), notes
    if candidate.format == "huggingface":
        return *huggingface.read_state(path), []
    points, notes = tables.read_table(path, candidate.format)
    return points, read_hparams(path.parent) if candidate.format == "lightning" else {}, notes


def _samples(
    points: Sequence[Point], chosen: Mapping[str, Meaning], kind: Format
) -> tuple[list[Sample], list[str]]:
    """The chosen points with their fields and epochs, and notes."""
    notes: list[str] = []
    if kind == "tensorboard":
        points, notes = events.with_epochs(points, chosen)
    samples: list[Sample] = []
    for point in points:
        meaning = chosen.get(point.tag)
        if meaning is None or point.epoch is None:
            continue
        if not 0 <= point.epoch <= MAX_EPOCH:
            raise LogError(f"the epoch {point.epoch} of {point.tag} is not plausible.")
        value = 1 - point.value if meaning.inverted else point.value
        samples.append(
            Sample(meaning.field, point.step, point.epoch, value, point.time, point.part)
        )
    return samples, notes


def _started(samples: Sequence[Sample], files: Sequence[Path]) -> float:
    """When the first number was logged; of a log without times, when its file was last written."""
    times = [sample.time for sample in samples if not math.isnan(sample.time)]
    return min(times, default=min((file.stat().st_mtime for file in files), default=0.0))


def _first_rate(samples: Sequence[Sample], config: Mapping[str, Any]) -> dict[str, Any]:
    rate = next((sample.value for sample in samples if sample.field == "lr"), None)
    return {} if rate is None or "lr" in config else {"lr": rate}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""CSV files: Keras CSVLogger, Lightning metrics.csv, fastai CSVLogger."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from trainer.imports.logs import MAX_EPOCH, Format, LogError, Point

MAX_BYTES: Final = 64 * 2**20
_MISSING: Final = frozenset({"", "na", "nan", "none", "null", "inf", "-inf"})
_DURATION: Final = re.compile(r"(?:(\d+):)?(\d+):(\d+)")
SECONDS: Final = "time"  # fastai's column, as mm:ss
_HEAD_BYTES: Final = 65536


def table_format(path: Path) -> Format | None:
    """Which tool's log a CSV file is, by its first line; None where it is no log."""
    try:
        with path.open("rb") as file:
            head = file.readline(_HEAD_BYTES).decode("utf-8-sig", "replace")
    except OSError:
        return None
    names = {name.lower() for name in _cells(head)}
    if "epoch" not in names:
        return None
    if "step" in names:
        return "lightning"
    return "fastai" if {"train_loss", "valid_loss"} <= names else "keras-csv"


def _cells(line: str) -> list[str]:
    return [cell.strip().strip('"') for cell in line.split(_delimiter(line))]


def _delimiter(line: str) -> str:
    return max(",;\t", key=line.count)


def read_table(path: Path, kind: Format) -> tuple[list[Point], list[str]]:
    """The numbers of a CSV log as points with epochs, and notes on what was left out.

    A header that comes again, or an epoch that does not go up, begins another part. Raises LogError
    for what is no table of numbers with an epoch column.
    """
    header, rows, notes = _rows(path)
    names = [name.strip() for name in header]
    lower = [name.lower() for name in names]
    if "epoch" not in lower:
        raise LogError(f"it has no column named epoch, but: {', '.join(names[:20])}.")
    if len(set(lower)) < len(lower):
        raise LogError("two of its columns have the same name.")
    at, step_at = lower.index("epoch"), lower.index("step") if "step" in lower else None
    points: list[Point] = []
    part, last = 0, -math.inf
    epochs = _epochs(rows, at, kind)
    for (number, row), epoch in zip(rows, epochs, strict=True):
        if row == header:
            part, last = part + 1, -math.inf
            continue
        if kind != "lightning" and epoch <= last:
            part += 1
        last = epoch
        step = float(epoch) if step_at is None else _cell(row, step_at, number, names)
        for place, name in enumerate(names):
            if place not in (at, step_at):
                value = _cell(row, place, number, names)
                if math.isfinite(value) and math.isfinite(step):
                    points.append(Point(name, step, value, epoch, part=part))
    return _counted_from_one(points, kind), notes


def _rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]], list[str]]:
    """The header, the rows with their line numbers, and a note on a torn last one."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text), delimiter=_delimiter(text.partition("\n")[0]))
        lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise LogError(f"it is not a CSV file ({error}).") from error
    if not lines:
        raise LogError("it is empty.")
    (_, header), *rows = lines
    notes = []
    if rows and len(rows[-1][1]) < len(header):
        notes.append(f"Its last line, {rows.pop()[0]}, breaks off and was left out.")
    for number, row in rows:
        if len(row) != len(header):
            raise LogError(f"line {number} has {len(row)} columns, its header {len(header)}.")
    return header, rows, notes


def _epochs(rows: Sequence[tuple[int, list[str]]], at: int, kind: Format) -> list[int]:
    """The epoch of each row. Lightning leaves it out beside the learning rate: there the next row
    tells it."""
    found: list[int] = []
    following = 0
    for number, row in reversed(rows):
        text = row[at].strip()
        if text.lower() == "epoch":
            found.append(following)
            continue
        if text or kind != "lightning":
            following = _epoch(text, number)
        found.append(following)
    return found[::-1]


def _epoch(text: str, line: int) -> int:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (number.is_integer() and 0 <= number <= MAX_EPOCH):
        raise LogError(
            f"line {line}: the epoch {text[:40]!r} is no whole number up to {MAX_EPOCH}."
        )
    return int(number)


def _cell(row: Sequence[str], place: int, line: int, names: Sequence[str]) -> float:
    """A number; NaN where there is none. Raises LogError for any other text."""
    text = row[place].strip()
    if text.lower() in _MISSING:
        return math.nan
    duration = _DURATION.fullmatch(text) if names[place].lower() == SECONDS else None
    try:
        if duration:
            hours, minutes, seconds = (float(group or 0) for group in duration.groups())
            return 3600 * hours + 60 * minutes + seconds
        return float(text)
    except ValueError:
        raise LogError(
            f"line {line}, column {names[place]}: {text[:40]!r} is not a number."
        ) from None


def _counted_from_one(points: Iterable[Point], kind: Format) -> list[Point]:
    """All these tools count epochs from 0; a table that begins with 1 was written by hand."""
    points = list(points)
    least = min((point.epoch or 0 for point in points), default=0)
    base = 0 if kind == "keras-csv" and least == 1 else 1
    return [replace(point, epoch=(point.epoch or 0) + base) for point in points]

"""The table that a lab report ends with: a row for each run of an experiment (no torch)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trainer.cli import inert, inert_cell
from trainer.experiment import FIGURES, Published
from trainer.runlog import Run
from trainer.tested import read_tested

_NO_VALUE: Final = "–"
_HEADS: Final[Mapping[str, str]] = {
    "test_acc": "test acc",
    "test_loss": "test loss",
    "train_acc": "train acc",
    "train_loss": "train loss",
    "val_acc": "val acc",
    "val_loss": "val loss",
    "seconds": "time (s)",
    "memory": "memory (MB)",
}
_DIGITS: Final[Mapping[str, int]] = {"seconds": 1, "memory": 0}


@dataclass(frozen=True)
class Row:
    """One run. `figures` by the names of experiment.FIGURES, and "memory", the peak in MB: of the
    best epoch, or of epoch 0 where nothing was trained; what was not measured is absent.
    `published` are somebody else's figures for the same settings."""

    model: str
    run_id: str
    figures: Mapping[str, float]
    published: Mapping[str, float]


def row(model: str, run: Run, published: Sequence[Published] = ()) -> Row:
    """The row of a run. Raises RunError where its test.json is damaged."""
    return Row(model, run.run_id, dict(_figures(run)), _fitting(run, published))


def _figures(run: Run) -> Iterable[tuple[str, float]]:
    tested = read_tested(run)
    if tested is not None:
        yield from (("test_acc", tested.accuracy), ("test_loss", tested.loss))
    phase = [record for record in run.epochs if record.phase == run.phase]
    best = max(
        (r for r in phase if r.phase_epoch > 0 or r.phase == "direct"),
        key=lambda record: record.rank,
        default=None,
    )
    if best is None:
        return
    for name in ("train_acc", "train_loss", "val_acc", "val_loss"):
        value = getattr(best, name)
        if value is not None and math.isfinite(value):
            yield name, value
    yield "seconds", sum(record.seconds for record in phase)
    yield "memory", max(record.peak_memory_bytes for record in phase) / 1e6


def _fitting(run: Run, published: Sequence[Published]) -> Mapping[str, float]:
    config = run.info.get("config", {})
    schedule = config.get("schedule") or {}
    flat = {**config, **schedule, **(config.get("augmentation") or {})}
    fitting = [one for one in published if one.fits(flat)]
    return max(fitting, key=lambda one: len(one.settings)).figures if fitting else {}


# --- as text ----------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """The table in the form of the labs; published figures stand in columns of their own."""
    heads, cells = _cells(rows, str.strip)
    table = [heads, ["---"] * len(heads), *cells]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in table) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """The same as CSV. No text in it is a formula to a spreadsheet."""
    heads, cells = _cells(rows, inert_cell)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([heads, *cells])
    return buffer.getvalue()


def text(rows: Sequence[Row]) -> str:
    """The same in columns, for a terminal."""
    heads, cells = _cells(rows, inert)
    lines = [heads, *cells]
    widths = [max(len(line[place]) for line in lines) for place in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in (0, len(heads) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cells(rows: Sequence[Row], safe: Callable[[str], str]) -> tuple[list[str], list[list[str]]]:
    measured = [name for name in _HEADS if any(name in row.figures for row in rows)]
    reported = [name for name in FIGURES if any(name in row.published for row in rows)]
    heads = ["model", *(_HEADS[name] for name in measured)]
    heads += [f"{_HEADS[name]}, published" for name in reported] + ["run"]
    cells = [
        [
            safe(row.model),
            *(_shown(name, row.figures.get(name)) for name in measured),
            *(_shown(name, row.published.get(name)) for name in reported),
            safe(row.run_id),
        ]
        for row in rows
    ]
    return heads, cells


def _shown(name: str, value: float | None) -> str:
    return _NO_VALUE if value is None else f"{value:.{_DIGITS.get(name, 4)}f}"


def _escaped(cell: str) -> str:
    return inert(cell).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")

"""The table that a lab report ends with: a row for each run of an experiment (no torch)."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from trainer.cli import inert, inert_cell
from trainer.experiment import FIGURES, Published
from trainer.files import read_bounded, write_atomically
from trainer.runlog import Run, RunError
from trainer.tested import read_tested

_NO_VALUE: Final = "–"
_SUFFIX: Final = ".results.json"
_SCHEMA_VERSION: Final = 1
HEADS: Final[Mapping[str, str]] = {
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
class Entry:
    """A run of an experiment, and what it is called there. `published` are somebody else's figures
    for the same settings."""

    model: str
    run_id: str
    published: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """An experiment that has been run: its recipe's name, what it asks, its runs. `data` names the
    photos, with what they stand in for."""

    name: str
    title: str
    data: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Row:
    """An entry with its figures, by the names of experiment.FIGURES, and "memory", the peak in MB:
    of the best epoch, or of epoch 0 where nothing was trained; what was not measured is absent."""

    entry: Entry
    figures: Mapping[str, float]


def entry(model: str, run: Run, published: Sequence[Published] = ()) -> Entry:
    """The entry of a run, with those published figures that were given for its settings."""
    return Entry(model, run.run_id, _fitting(run, published))


def row(entry: Entry, run: Run) -> Row:
    """The row of an entry's run. Raises RunError where its test.json is damaged."""
    return Row(entry, dict(_figures(run)))


def data_of(run: Run, stand_in_for: str | None) -> str:
    """What to call the photos of an experiment's run: their name, and what they stand in for there.

    The run itself may have been trained for something else, and does not know."""
    name = str(run.info.get("dataset", {}).get("name", ""))
    return name if stand_in_for is None else f"{name} (standing in for {stand_in_for})"


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


# --- the file that the explorer reads ---------------------------------------------------------


def table_path(runs_dir: Path, name: str) -> Path:
    return runs_dir / f"{name}{_SUFFIX}"


def write_table(runs_dir: Path, table: Table) -> None:
    """Write which runs belong to an experiment. Raises OSError."""
    content = {"schema_version": _SCHEMA_VERSION, **asdict(table)}
    path = table_path(runs_dir, table.name)
    write_atomically(path, json.dumps(content, indent=2).encode())


def list_tables(runs_dir: Path) -> tuple[dict[str, Table], dict[str, str]]:
    """The experiments of a runs folder by name, and why others cannot be read."""
    found: dict[str, Table] = {}
    broken: dict[str, str] = {}
    for path in sorted(runs_dir.glob(f"*{_SUFFIX}")):
        if path.is_symlink():
            continue  # what lies elsewhere is not this folder's
        name = path.name.removesuffix(_SUFFIX)
        try:
            found[name] = _read_table(path, name)
        except RunError as error:
            broken[name] = str(error)
    return found, broken


def _read_table(path: Path, name: str) -> Table:
    try:
        content = json.loads(read_bounded(path))
        entries = tuple(map(_read_entry, content["entries"]))
        return Table(name, _text(content["title"]), _text(content["data"]), entries)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise RunError(
            f"{path} is damaged. Give the command of the experiment again: it trains nothing twice."
        ) from error


def _read_entry(content: Any) -> Entry:
    published = {
        name: float(value) for name, value in content["published"].items() if name in FIGURES
    }
    if not all(map(math.isfinite, published.values())):
        raise ValueError("not a number")
    return Entry(_text(content["model"]), _text(content["run_id"]), published)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


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
    measured = [name for name in HEADS if any(name in row.figures for row in rows)]
    reported = [name for name in FIGURES if any(name in row.entry.published for row in rows)]
    heads = ["model", *(HEADS[name] for name in measured)]
    heads += [f"{HEADS[name]}, published" for name in reported] + ["run"]
    cells = [
        [
            safe(row.entry.model),
            *(_shown(name, row.figures.get(name)) for name in measured),
            *(_shown(name, row.entry.published.get(name)) for name in reported),
            safe(row.entry.run_id),
        ]
        for row in rows
    ]
    return heads, cells


def _shown(name: str, value: float | None) -> str:
    return _NO_VALUE if value is None else f"{value:.{_DIGITS.get(name, 4)}f}"


def _escaped(cell: str) -> str:
    return inert(cell).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")

"""All runs as one table: what they were trained with, what came of it, what users noted."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from explorer.annotations import Annotation
from explorer.compare import summarise
from explorer.data import Snapshot
from explorer.evidence import Findings, findings
from explorer.settings import OFF, SWITCHES, settings
from explorer.settings import sendable as sendable
from trainer.evidence import Evidence, points
from trainer.runlog import Run, RunError, Stamp, stamp
from trainer.schema import TEST_JSON
from trainer.tested import read_tested

# Of these, a column that says the same of every run is folded away.
SETTINGS: Final = (
    "Phase",
    "Status",
    "Data",
    "Network",
    "Recipe",
    "From",
    "Layers",
    "Learning rate",
    "Schedule",
    "Epochs",
    "Augmentation",
    "Optimizer",
    *SWITCHES,
    "Batch",
    "Seed",
)
_NOTED: Final = ("Tags", "Note", "Archived")
# Left out where no run has any.
_OPTIONAL: Final = (*SETTINGS, "Change", "95% interval", "Test accuracy", "Memory", *_NOTED)
_COLUMNS: Final = (
    *("Run", "Phase", "Status", "Best accuracy", "At epoch", "Change", "95% interval"),
    *("Test accuracy", "Curve", "Tags", *SETTINGS[2:]),
    *("Best loss", "Time", "Memory", "Note", "Archived"),
)
NEWEST: Final = "Started"
SORTS: Final = (
    *(NEWEST, "Run", "Best accuracy", "At epoch", "Change", "Test accuracy", "Best loss", "Time"),
    *("Memory", *SETTINGS),
)
BOTH: Final = " + "


@dataclass(frozen=True)
class _Row:
    """What one run says by itself; `compared` where its saved predictions have been looked at,
    `tested` how its test photos' result was on disk then."""

    run: Run
    values: Mapping[str, Any]
    compared: bool
    tested: Stamp | None


class Overview:
    """The rows of a runs folder; a row is made again only when its run has been read again.

    One instance may serve many sessions at once.
    """

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        self._lock = threading.Lock()

    def frame(self, snapshot: Snapshot) -> pd.DataFrame:
        """One row for each run, newest first, indexed by run id.

        Accuracies in percent, the change and its interval in points, time in seconds, memory in
        MB; "Curve" holds the validation accuracies of all epochs, in percent. What is not known is
        missing.
        """
        with self._lock:
            self._rows = self._refreshed(snapshot)
            rows = [
                {**self._rows[name].values, **_noted(snapshot, name)}
                for name in snapshot.newest_first
            ]
        index = pd.Index(snapshot.newest_first, name="run_id")
        return pd.DataFrame(rows, index=index, columns=list(_COLUMNS))

    def _refreshed(self, snapshot: Snapshot) -> dict[str, _Row]:
        kept = {name: row for name, row in self._rows.items() if _holds(snapshot, name, row)}
        others = [name for name in snapshot.runs if name not in kept]
        # In their order: the runs of one control follow each other, and it is read once.
        comparable = [name for name in others if _comparable(snapshot.runs[name])]
        found = findings(snapshot, comparable)
        return kept | {name: _row(snapshot.runs[name], found.get(name)) for name in others}


def _holds(snapshot: Snapshot, name: str, row: _Row) -> bool:
    same = snapshot.runs.get(name) is row.run and stamp(row.run.path / TEST_JSON) == row.tested
    return same and (row.compared or not _comparable(row.run))


def _row(run: Run, found: Findings | None) -> _Row:
    tested = stamp(run.path / TEST_JSON)
    return _Row(run, _values(run, found), found is not None, tested)


def _comparable(run: Run) -> bool:
    sides = (run.predictions("before"), run.predictions("after"))
    return run.phase == "finetune" and all(path.exists() for path in sides)


def _values(run: Run, found: Findings | None) -> dict[str, Any]:
    values = _settings(run) | _results(run, found)
    texts = {name: sendable(value) for name, value in values.items() if isinstance(value, str)}
    return values | texts


def _settings(run: Run) -> dict[str, Any]:
    rate = run.info.get("config", {}).get("lr")
    known = settings(run)
    known |= {name: "" for name in SWITCHES if known[name] == OFF}
    recipe = run.info.get("recipe")
    name = recipe.get("name") if isinstance(recipe, Mapping) else recipe
    phases = dict.fromkeys(phase["name"] for phase in run.info.get("phases") or [])
    return {key: value or None for key, value in known.items()} | {
        "Phase": BOTH.join(phases) or None,
        "Status": run.status if isinstance(run.status, str) else None,
        "Recipe": name if isinstance(name, str) else None,
        "Learning rate": float(rate) if known["Learning rate"] and _is_number(rate) else None,
    }


def _results(run: Run, found: Findings | None) -> dict[str, Any]:
    row = summarise(run, run.run_id)
    against = found.boundary if found else None
    known = against if isinstance(against, Evidence) else None
    return {
        "Best accuracy": _percent(row.best_acc),
        "At epoch": row.best_epoch,
        "Change": _percent(row.change),
        "95% interval": f"{points(known.low)} to {points(known.high)}" if known else None,
        "Test accuracy": _percent(_tested(run)),
        "Best loss": row.best_loss,
        "Time": row.seconds,
        "Memory": max((e.peak_memory_bytes for e in run.epochs), default=0) / 1e6 or None,
        "Curve": [100 * epoch.val_acc for epoch in run.epochs],
    }


def _tested(run: Run) -> float | None:
    try:
        found = read_tested(run)
    except RunError:
        return None
    return found.accuracy if found is not None else None


def _noted(snapshot: Snapshot, name: str) -> dict[str, Any]:
    """What depends on other runs, or changes without the run."""
    parent = snapshot.runs[name].parent_run_id
    noted = snapshot.annotations.get(name, Annotation())
    return {
        "Run": snapshot.labels[name],
        "From": snapshot.labels.get(parent, parent) if parent else None,
        "Tags": list(noted.tags) or None,
        "Note": noted.note or None,
        "Archived": "yes" if noted.archived else None,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


# --- which rows, in which order -----------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """What of the table is shown. An empty filter lets every run through; of several values in one
    filter a run needs one."""

    words: str = ""
    status: tuple[str, ...] = ()
    phase: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    archived: bool = False
    sort: str = NEWEST
    ascending: bool = False


def shown(frame: pd.DataFrame, view: View) -> pd.DataFrame:
    """The rows of Overview.frame that fit, in the order asked for."""
    if not view.archived:
        frame = frame[frame["Archived"].isna()]
    for column, wanted in (("Status", view.status), ("Data", view.data)):
        if wanted:
            frame = frame[frame[column].isin(wanted)]
    if view.phase:
        phases = frame["Phase"].fillna("").str.split(BOTH, regex=False)
        frame = frame.loc[_any_of(phases, view.phase)]
    if view.tags:
        frame = frame.loc[_any_of(frame["Tags"], view.tags)]
    return _sorted(search(frame, view.words), view.sort, view.ascending)


def _any_of(lists: Iterable[Any], wanted: Sequence[str]) -> list[bool]:
    return [isinstance(found, list) and not set(wanted).isdisjoint(found) for found in lists]


def search(frame: pd.DataFrame, words: str) -> pd.DataFrame:
    """The rows in which every word occurs: in a name, a folder's name, a setting, a tag, a note."""
    wanted = words.lower().split()
    if not wanted:
        return frame
    columns = (frame.index, *(frame[name] for name in ("Run", *SETTINGS, "Tags", "Note")))
    rows = (" ".join(map(_text, values)).lower() for values in zip(*columns, strict=True))
    return frame.loc[[all(word in row for word in wanted) for row in rows]]


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value)


def _sorted(frame: pd.DataFrame, column: str, ascending: bool) -> pd.DataFrame:
    """By a column, equal ones as they were, missing ones last; the newest first without one."""
    if column == NEWEST:
        return frame[::-1] if ascending else frame
    values = frame[column].tolist()
    known = [place for place, missing in enumerate(frame[column].isna()) if not missing]
    known.sort(key=lambda place: _rank(values[place]), reverse=not ascending)
    return frame.iloc[[*known, *sorted(set(range(len(values))) - set(known))]]


def _rank(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, also those written as text, then words."""
    try:
        number = float(value)
    except ValueError:
        number = math.inf
    word = not math.isfinite(number)
    return word, 0.0 if word else number, str(value).casefold()


def folded(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """The table without the settings that are the same in every row, and these with their value.

    What no run has is left out altogether.
    """
    same = [name for name in SETTINGS if len(frame) > 1 and frame[name].nunique(dropna=False) == 1]
    empty = [name for name in _OPTIONAL if frame[name].isna().all()]
    values = {name: str(frame[name].iloc[0]) for name in same if name not in empty}
    return frame.drop(columns={*same, *empty}), values


def constants_line(values: Mapping[str, str]) -> str:
    """What all runs have in common, in one line; empty where that is nothing."""
    if not values:
        return ""
    return "All: " + ", ".join(f"{name.lower()} {value}" for name, value in values.items())

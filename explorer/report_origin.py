"""What a report says of where its runs come from: commands, settings, environment, data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import pandas as pd

from explorer.data import Snapshot, command_of
from explorer.render import printable
from explorer.report_html import Line, Section, Table
from explorer.settings import OFF, SETTINGS, settings, varied
from trainer.reproduce import ReproduceError
from trainer.runlog import Run

_MOST_CLASSES: Final = 30


def commands_of(snapshot: Snapshot, run_ids: Sequence[str]) -> Section:
    """For each run the command that trains it again, or why there is none."""
    lines = []
    for name in run_ids:
        label = snapshot.labels[name]
        try:
            # In one line: a flag on each would take pages.
            said = command_of(snapshot.runs[name]).replace(" \\\n  ", " ")
            lines.append(Line(label, said, code=True))
        except ReproduceError as error:
            lines.append(Line(label, "", [str(error)]))
    return Section(
        "Commands",
        ["Each trains one run again. On the same machine the same flags give the same numbers."],
        lines=lines,
    )


def settings_of(snapshot: Snapshot, run_ids: Sequence[str]) -> Section:
    """What is the same for all runs in one line, and a table of the rest."""
    known = [settings(snapshot.runs[name]) for name in run_ids]
    telling = varied(snapshot, run_ids)
    constants = [
        f"{name.lower()} {known[0][name]}"
        for name in SETTINGS
        if name not in telling and known[0][name] not in ("", OFF)
    ]
    frame = pd.DataFrame(
        {
            "Run": [printable(snapshot.labels[name]) for name in run_ids],
            "Phase": [snapshot.runs[name].phase or "" for name in run_ids],
            **{name: [printable(one[name]) for one in known] for name in telling},
        }
    )
    same = "The same for all" if len(known) > 1 else "Set"
    said = [f"{same}: {', '.join(constants)}."] if constants else []
    return Section("Settings", said, tables=[Table("settings", "Settings", frame)])


def problems_of(snapshot: Snapshot, run_ids: Iterable[str]) -> Section | None:
    """What could not be read of these runs; None where all could."""
    known = dict(snapshot.broken)
    known |= {name: run.problem for name, run in snapshot.runs.items() if run.problem}
    found = {name: known[name] for name in dict.fromkeys(run_ids) if name in known}
    if not found:
        return None
    frame = pd.DataFrame({"Run": list(found), "Problem": list(found.values())})
    return Section("Problems", tables=[Table("problems", "Runs with a problem", frame)])


# --- environment --------------------------------------------------------------------------------


def environment_of(runs: Sequence[Run]) -> Section | None:
    """On what the runs were trained; where they differ, each value with its number of runs."""
    shown = Counter(
        (name, printable(value))
        for name, of in _FACTS.items()
        for run in runs
        if (value := of(run.info))
    )
    if not shown:
        return None
    rows = [(name, value, count) for (name, value), count in shown.items()]
    frame = pd.DataFrame(rows, columns=["What", "Value", "Runs"])
    if frame["Runs"].eq(len(runs)).all():
        frame = frame.drop(columns="Runs")
    return Section("Environment and data", tables=[Table("environment", "Environment", frame)])


def _at(content: Any, *path: str) -> Any:
    for name in path:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def _fact(*path: str) -> Callable[[Mapping[str, Any]], str]:
    def said(info: Mapping[str, Any]) -> str:
        value = _at(info, *path)
        return str(value) if isinstance(value, str | int | float) else ""

    return said


def _pairs(*path: str) -> Callable[[Mapping[str, Any]], str]:
    def said(info: Mapping[str, Any]) -> str:
        content = _at(info, *path)
        known = content.items() if isinstance(content, Mapping) else ()
        return ", ".join(f"{name} {value}" for name, value in known if value is not None)

    return said


def _rejected(info: Mapping[str, Any]) -> str:
    rejected = _at(info, "dataset", "rejected")
    return str(len(rejected)) if isinstance(rejected, list) and rejected else ""


def _classes(info: Mapping[str, Any]) -> str:
    names = info.get("classes") or []
    more = f" and {len(names) - _MOST_CLASSES} more" if len(names) > _MOST_CLASSES else ""
    return f"{len(names)}: {', '.join(names[:_MOST_CLASSES])}{more}" if names else ""


_FACTS: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "Imported from": _fact("imported", "path"),
    "Versions": _pairs("environment", "versions"),
    "Device": _fact("environment", "device"),
    "Processor": _fact("environment", "cpu"),
    "Threads": _fact("environment", "threads"),
    "Processes": _fact("distributed", "world_size"),
    "Commit of Thaw": _fact("environment", "git"),
    "Weights": _fact("weights", "source"),
    "Weights, SHA-256": _fact("weights", "sha256"),
    "Preprocessing": _pairs("preprocess"),
    "Photos from": _fact("dataset", "root"),
    "Photos, fingerprint": _fact("dataset", "fingerprint"),
    "Photos by split": _pairs("dataset", "counts"),
    "Photos left out": _rejected,
    "Classes": _classes,
}

"""Logs of other tools before they become runs: what was found, what they would look like, and the
command that does the same."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from explorer.access import may_write
from explorer.data import Snapshot
from trainer.imports.find import Skipped
from trainer.imports.logs import TITLES, Format, Log, LogError
from trainer.imports.plan import NewRun
from trainer.imports.read import Found, read_all
from trainer.imports.write import holder, write
from trainer.runlog import Run


@dataclass(frozen=True)
class Reading:
    """How logs are read: their format (None: recognised) and the accuracy's tag ("": guessed)."""

    format: Format | None = None
    accuracy: str = ""


def read_uploads(files: Iterable[tuple[str, bytes]], reading: Reading) -> Found:
    """Read uploaded files, pairs of name and content; nothing of them stays on this machine.

    Raises LogError as trainer.imports.read.read_all.
    """
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "upload")
        folder.mkdir()
        for number, (name, content) in enumerate(files):
            # The browser sends any name.
            last = re.split(r"[\\/]", name)[-1]
            plain = re.sub(r"[^\w.-]", "-", last)[-100:].lstrip(".") or "log"
            path = folder / plain
            if path.exists():
                path = folder / str(number) / plain
                path.parent.mkdir()
            path.write_bytes(content)
        try:
            found = read_all([folder], reading.format, reading.accuracy or None)
        except LogError as error:
            told = str(error).replace(f"{folder}/", "").replace(f"{folder}:", "It")
            raise LogError(told) from error
        logs = tuple(_uploaded(log, folder) for log in found.logs)
        skipped = tuple(Skipped(Path(one.path.name), one.reason) for one in found.skipped)
        return Found(logs, skipped)


def _uploaded(log: Log, folder: Path) -> Log:
    files = {Path(path.name): digest for path, digest in log.files.items()}
    return replace(log, path=log.path.relative_to(folder), files=files)


def labelled(logs: Sequence[Log]) -> dict[str, Log]:
    """The logs by what to call them: their names, or paths where two have the same."""
    taken = Counter(log.name for log in logs)
    return {log.name if taken[log.name] == 1 else str(log.path): log for log in logs}


def table(logs: Mapping[str, Log], snapshot: Snapshot) -> pd.DataFrame:
    """What was found, one row for each log by its label; accuracies in percent."""
    runs = list(snapshot.runs.values())
    holders = [holder(runs, log) for log in logs.values()]
    best = [log.best for log in logs.values()]
    last = [log.epochs[-1].val_acc for log in logs.values()]
    return pd.DataFrame(
        {
            "Name": [log.name for log in logs.values()],
            "Format": [TITLES[log.format] for log in logs.values()],
            "Epochs": [sum(epoch.epoch > 0 for epoch in log.epochs) for log in logs.values()],
            "Best accuracy": pd.array([100 * b.val_acc if b else None for b in best], "Float64"),
            "At epoch": pd.array([b.epoch if b else None for b in best], "Int64"),
            "Last accuracy": [100 * accuracy for accuracy in last],
            "Begun": pd.to_datetime([log.started for log in logs.values()], unit="s", utc=True),
            "Here as": [snapshot.labels[run.run_id] if run else None for run in holders],
            "Note": [" ".join(_notes(log)) or None for log in logs.values()],
        },
        index=pd.Index(list(logs), name="Log", dtype="str"),
    )


def _notes(log: Log) -> list[str]:
    seams = ", ".join(map(str, log.seams[:5]))
    fits = [f"{len(log.seams) + 1} fits: another begins after epoch {seams}."]
    return [*(fits if seams else []), *log.notes]


def preview(planned: Sequence[NewRun]) -> tuple[Snapshot, list[str]]:
    """The planned runs as if they were there, and the ids of those to choose in Compare."""
    ids = {id(new): f"new-{place}" for place, new in enumerate(planned)}
    there = {new.parent.run_id: new.parent for new in planned if isinstance(new.parent, Run)}
    runs = dict(there)
    for new in planned:
        parent = new.parent.run_id if isinstance(new.parent, Run) else ids.get(id(new.parent))
        phase = {"name": new.phase, "first_epoch": new.first_epoch}
        info = new.info(parent) | {"phases": [phase], "status": "done"}
        name = ids[id(new)]
        runs[name] = Run(Path(name), info, new.records)
    labels = _distinct({ids[id(new)]: new.name for new in planned}) | {name: name for name in there}
    return Snapshot(runs, labels=labels), list(ids.values())


def _distinct(names: Mapping[str, str]) -> dict[str, str]:
    taken = Counter(names.values())
    return {key: name if taken[name] == 1 else f"{name} ({key})" for key, name in names.items()}


def bring_in(runs_dir: Path, planned: Sequence[NewRun]) -> list[str]:
    """Write the planned runs as trainer.imports.write does; returns their ids. Raises LogError,
    RunError, ReadOnlyError."""
    may_write("An import")
    return write(runs_dir, planned)


@dataclass(frozen=True)
class Wish:
    """What becomes what, as the command line has it."""

    first: tuple[Log, ...]
    then: tuple[Log, ...] = ()
    parent: str | None = None
    boundary: int | None = None
    phase: str | None = None
    again: bool = False
    renamed: bool = False


def command(wish: Wish, reading: Reading, whole: Path | None, runs_dir: Path) -> str:
    """What to type for the same import. `whole` is the path that stands for all of `wish.first`,
    where that is so."""
    paths = [whole] if whole else [log.path for log in wish.first]
    words = ["python", "-m", "trainer", "import", *map(str, paths)]
    words += ["--then", *(str(log.path) for log in wish.then)] if wish.then else []
    flags = {
        "--from": wish.parent,
        "--boundary": wish.boundary,
        "--phase": wish.phase,
        "--format": reading.format,
        "--accuracy": reading.accuracy or None,
        "--runs-dir": None if runs_dir == Path("runs") else runs_dir,
    }
    for flag, value in flags.items():
        words += [] if value is None else [flag, str(value)]
    if wish.renamed:
        words += ["--run-name", *(log.name for log in (*wish.first, *wish.then))]
    return shlex.join([*words, *(["--again"] if wish.again else [])])

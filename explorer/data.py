"""Runs on disk -> what the explorer shows: a snapshot of a runs folder, lineages, one tidy frame.

Knows neither Streamlit nor torch.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import pandas as pd

from explorer.annotations import ANNOTATIONS_JSON, Annotation, load_annotation
from explorer.mirror import Mirror, is_there, known, mirror_of, url_of
from explorer.remote import is_url, runs_place
from trainer.reproduce import ReproduceError, command
from trainer.runlog import Run, RunError, RunReader, Stamp, checkpoint_path, run_folders, stamp
from trainer.schema import CHECKPOINTS, EPOCH_FIELDS, PREDICTIONS

DEFAULT_SHOWN: Final = 12
FRAME_COLUMNS: Final = ("run_id", "run", "role", "boundary", "since_unfreeze", *EPOCH_FIELDS)

Role = Literal["run", "trunk"]

_STAMP: Final = re.compile(r"\d{8}-\d{6}-(?=.)")
# Phases whose whole training happened with the backbone frozen (or untouched).
_FROZEN: Final = ("transfer", "direct")
# Nobody knows of a lock elsewhere. Whoever trains logs every epoch, so a run that has said nothing
# for so long was killed.
_SILENT_SECONDS: Final = 86400.0


def runs_dir_from(arguments: Sequence[str], environment: Mapping[str, str]) -> Path:
    """The runs folder: `--runs-dir DIR`, else $THAW_RUNS_DIR, else `runs` where the app started.

    Of one at a URL the folder of this machine that mirrors it.
    """
    place = runs_place(arguments, environment)
    return mirror_of(place).folder if is_url(place) else Path(place).expanduser()


# --- reading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A runs folder at one moment: readable runs (oldest first), the broken ones, labels, and what
    users noted (for every readable run)."""

    runs: Mapping[str, Run]
    broken: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, Annotation] = field(default_factory=dict)

    @property
    def running(self) -> frozenset[str]:
        return frozenset(name for name, run in self.runs.items() if run.status == "running")

    @property
    def newest_first(self) -> list[str]:
        return list(self.runs)[::-1]

    @property
    def current(self) -> list[str]:
        """The runs that are not archived, newest first."""
        return [name for name in self.newest_first if not self._is_archived(name)]

    def _is_archived(self, name: str) -> bool:
        return name in self.annotations and self.annotations[name].archived

    def default_selection(self) -> list[str]:
        """The newest run's family: the finetunes of its trunk and their controls; without any, the
        newest runs."""
        current = self.current[::-1]
        finetunes = [name for name in current if self.runs[name].boundary is not None]
        if finetunes:
            trunk = self.runs[finetunes[-1]].parent_run_id
            left = [name for name in current if left_parent(self.runs[name]) is not None]
            family = [name for name in left if self.runs[name].parent_run_id == trunk]
            # Without a parent (both phases in one run) there is no family but the run itself.
            return (family if trunk else finetunes)[-DEFAULT_SHOWN:]
        return current[-DEFAULT_SHOWN:]


class Library:
    """The runs of one folder; of files that have changed only what is new is read, where possible.

    One instance may serve many sessions at once. With a `mirror`, of which `runs_dir` is the
    folder, each look at the runs also has it look, in the background, for what is new elsewhere.
    """

    def __init__(self, runs_dir: Path, mirror: Mirror | None = None) -> None:
        self.runs_dir = runs_dir
        self.mirror = mirror
        self._folders: dict[str, _Folder] = {}
        self._lock = threading.Lock()

    @classmethod
    def at(cls, place: str) -> Library:
        """Of a folder or a URL, as it was typed."""
        if not is_url(place):
            return cls(Path(place).expanduser())
        mirror = mirror_of(place)
        return cls(mirror.folder, mirror)

    def snapshot(self) -> Snapshot:
        if self.mirror is not None:
            self.mirror.refresh()
        try:
            found = run_folders(self.runs_dir)
        except RunError as error:
            return Snapshot({}, {str(self.runs_dir): str(error)})
        with self._lock:
            let_go = None if self.mirror is None else _is_silent
            self._folders = {
                path.name: self._folders.get(path.name) or _Folder(path, let_go) for path in found
            }
            read = [(folder.read(), folder.annotation()) for folder in self._folders.values()]
        refused = {} if self.mirror is None else self.mirror.refused
        return _snapshot([run for run, _ in read], {run.run_id: n for run, n in read}, refused)


def _is_silent(log: Path) -> bool:
    written = known(log)
    return written is not None and time.time() - written.written > _SILENT_SECONDS


class _Folder:
    """One run and what users noted of it.

    Links in it are not followed, nor is a run that is one: whoever can write to a shared runs
    folder could have this process open for them what only it may read.
    """

    def __init__(self, path: Path, let_go: Callable[[Path], bool] | None) -> None:
        self._path = path
        self._run = RunReader(path, let_go)
        self._folders = [path, path / CHECKPOINTS, path / PREDICTIONS]
        self._stamps: list[Stamp] = []
        self._link: Path | None = None
        self._file = path / ANNOTATIONS_JSON
        self._stamp: Stamp = None
        self._annotation = Annotation()

    def read(self) -> Run:
        if self._found_link():
            problem = (
                f"{self._link} is a link. Thaw opens only what is in the runs folder itself: put "
                "the files there, or name their own runs folder with --runs-dir."
            )
            return Run(self._path, {}, problem=problem)
        return self._run.read_or_explain()

    def _found_link(self) -> bool:
        stamps = [stamp(folder) for folder in self._folders]  # change as entries come and go
        if stamps != self._stamps:
            self._stamps, self._link = stamps, _link_among(self._path, self._folders)
        return self._link is not None

    def annotation(self) -> Annotation:
        if self._link is not None:
            return Annotation()
        before, self._stamp = self._stamp, stamp(self._file)
        if self._stamp != before:
            self._annotation = load_annotation(self._file.parent)
        return self._annotation


def checkpoint_of(run: Run, which: Literal["before", "after"]) -> Path:
    """As trainer.runlog.checkpoint_path, but what lies behind a link is not there: the parent's
    folder may be one. It may also be elsewhere, see explorer.mirror.brought. Raises RunError."""
    path = checkpoint_path(run, which, is_there)
    runs_dir = run.path.parent
    if path.resolve() != runs_dir.resolve() / path.relative_to(runs_dir):
        raise RunError(f"The checkpoint {path} lies behind a link, and Thaw follows none there.")
    return path


def command_of(run: Run) -> str:
    """As trainer.reproduce.command. Raises ReproduceError, also for a run that is elsewhere."""
    if url := url_of(run.path):
        raise ReproduceError(
            f"The run is at {url}, where nothing can be trained. Copy it, and the run that it "
            "starts from, into a runs folder of this machine: an explorer of that folder says the "
            "command."
        )
    return command(run)


def _link_among(run: Path, folders: Iterable[Path]) -> Path | None:
    """The run's folder if it is a link, or the first link in one of these folders."""
    if run.is_symlink():
        return run
    for folder in folders:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:  # not there, or just gone
            continue
        if links := [entry for entry in entries if entry.is_symlink()]:
            return Path(links[0].path)
    return None


def _snapshot(
    runs: Iterable[Run], annotations: Mapping[str, Annotation], refused: Mapping[str, str]
) -> Snapshot:
    ordered = sorted(runs, key=lambda run: run.info.get("started", 0.0))
    readable = {run.run_id: run for run in ordered if run.info}
    broken = {run.run_id: run.problem or "" for run in ordered if not run.info} | dict(refused)
    noted = {name: annotations[name] for name in readable}
    return Snapshot(readable, broken, _labels(noted), noted)


def _labels(noted: Mapping[str, Annotation]) -> dict[str, str]:
    """Given names or short ones, by run id; where two runs have the same, both go by their id."""
    short = {name: note.name or _STAMP.sub("", name, count=1) for name, note in noted.items()}
    taken = Counter(short.values())
    return {name: text if taken[text] == 1 else name for name, text in short.items()}


def left_parent(run: Run) -> int | None:
    """The epoch after which a run left its parent: the boundary, or where a control trained the
    head further; None for a run that begins by itself."""
    if run.boundary is not None:
        return run.boundary
    phases = run.info.get("phases") or []
    return int(phases[-1]["first_epoch"]) if is_control(run) and phases else None


def is_control(run: Run) -> bool:
    """Whether the run trained the head of another further, with everything else still frozen."""
    return run.phase == "transfer" and run.parent_run_id is not None


# --- lineages ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One run as drawn; `boundary` is the epoch that becomes 0 on the "since unfreeze" axis."""

    run: Run
    role: Role
    boundary: int | None


def lineage(snapshot: Snapshot, selected: Sequence[str]) -> tuple[list[Curve], list[str]]:
    """The curves of the selected runs, each trunk before its finetunes, and what is missing.

    A trunk comes in once for each boundary at which selected runs left it: almost always one.
    """
    trunks: dict[tuple[str, int], None] = {}
    missing: list[str] = []
    for name in selected:
        missing += _climb(snapshot, name, trunks)
    trunk_ids = {name for name, _ in trunks}
    curves = [Curve(snapshot.runs[name], "trunk", boundary) for name, boundary in trunks]
    for name in selected:
        if name in snapshot.runs and name not in trunk_ids:
            run = snapshot.runs[name]
            curves.append(Curve(run, "run", _own_boundary(run)))
    return curves, list(dict.fromkeys(missing))


def _climb(snapshot: Snapshot, name: str, trunks: dict[tuple[str, int], None]) -> list[str]:
    """Add the ancestors of a run to `trunks`; returns what to tell about a missing one."""
    seen = {name}
    run = snapshot.runs.get(name)
    while run is not None and run.parent_run_id is not None:
        left = left_parent(run)
        if left is None:
            break
        parent = snapshot.runs.get(run.parent_run_id)
        if parent is None:
            broken = run.parent_run_id in snapshot.broken
            state = "cannot be read" if broken else "is not in this folder"
            label = snapshot.labels[run.run_id]
            return [f"{label}: its parent {run.parent_run_id} {state}, so it is drawn alone."]
        if parent.run_id in seen:  # a hand-edited run.json could name itself its own ancestor
            return []
        seen.add(parent.run_id)
        trunks[parent.run_id, left if parent.boundary is None else parent.boundary] = None
        run = parent
    return []


def _own_boundary(run: Run) -> int | None:
    """The run's boundary; of a run that stayed frozen its last epoch; None for `scratch`."""
    if (left := left_parent(run)) is not None:
        return left
    frozen = run.phase in _FROZEN and run.epochs
    return run.epochs[-1].epoch if frozen else None


def epochs_frame(snapshot: Snapshot, curves: Sequence[Curve]) -> pd.DataFrame:
    """One row per evaluated epoch of each curve, with the columns FRAME_COLUMNS.

    `run` is the label; `since_unfreeze` is `epoch` - `boundary` (NaN where there is none). A value
    that was not measured, such as train_acc of epoch 0, is NaN.
    """
    rows = [
        (
            curve.run.run_id,
            snapshot.labels[curve.run.run_id],
            curve.role,
            curve.boundary,
            None if curve.boundary is None else record.epoch - curve.boundary,
            *(getattr(record, name) for name in EPOCH_FIELDS),
        )
        for curve in curves
        for record in curve.run.epochs
    ]
    frame = pd.DataFrame(rows, columns=list(FRAME_COLUMNS))
    numbers = [name for name in FRAME_COLUMNS if name not in ("run_id", "run", "role", "phase")]
    return frame.astype(dict.fromkeys(numbers, "float64"))


def dataset_size(run: Run, split: str) -> int | None:
    """How many photos a split has according to run.json; None where it does not say."""
    counts = run.info.get("dataset", {}).get("counts")
    count = counts.get(split) if isinstance(counts, dict) else None
    return count if isinstance(count, int) else None

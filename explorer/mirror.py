"""A runs folder elsewhere, as a folder of this machine that all of the explorer reads.

What pages show of every run is fetched when it has changed; networks when a page asks for one.
Knows no Streamlit.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from explorer.remote import AwayError, Listed, Remote, RemoteError, shown
from trainer.config import default_cache_dir
from trainer.evidence import MOST_BYTES as MOST_PREDICTIONS
from trainer.files import MOST_BYTES, lock, write_atomically
from trainer.runlog import LONGEST_LOG, RUN_ID
from trainer.schema import LR_FIND, METRICS_JSONL, RUN_JSON

_GB: Final = 10**9
_KEPT_BYTES: Final = 5 * _GB  # of networks that were asked for: those used last
_SPARE_BYTES: Final = _GB  # left to everybody else on the disk
_LISTING_SECONDS: Final = 3.0
_AWAY_SECONDS: Final = 10.0
_SAVED_SECONDS: Final = 60.0
_UNUSED_SECONDS: Final = 30 * 86400.0
_AT_ONCE: Final = 8
_APPS: Final = 9  # explorers on one URL at the same time, each with a folder of its own

_PART: Final = r"(-[a-z0-9]+){0,3}"
# What is fetched of a run, and the most bytes that the readers of each take. Anything else that
# lies there, whatever its name, is never looked at.
_SHOWN: Final[Mapping[str, int]] = {
    rf"(run|test|annotations|parity{_PART})\.json|model-card{_PART}\.md": MOST_BYTES,
    r"metrics\.jsonl": LONGEST_LOG,
    r"predictions/(before|after)\.npz": MOST_PREDICTIONS,
}
_NETWORKS: Final[Mapping[str, int]] = {
    r"checkpoints/[a-z]+-(best|last)\.pt": 16 << 30,
    r"checkpoints/[a-z]+-(best|last)\.pt\.sha256": MOST_BYTES,
    rf"model{_PART}\.onnx": 2 << 30,
}
# Beside the runs: tables of experiments, and what the learning-rate finder measured.
_BESIDE: Final = re.compile(rf"{RUN_ID.pattern}\.results\.json|{LR_FIND}/{RUN_ID.pattern}\.json")
# In this order: a log that is fetched after a run.json that says "done" is complete.
_FIRST: Final = (RUN_JSON, METRICS_JSONL, "annotations.json", "test.json")


@dataclass(frozen=True)
class Standing:
    """How things stand with what is elsewhere at `url`: when it was last listed and all that had
    changed was fetched (seconds since 1970), how many files are still to come, and why nothing can
    be read now."""

    url: str
    fetched: float | None
    left: int
    problem: str


@dataclass
class _Kept:
    """A file that is here: its version there, its size, and when it was last asked for."""

    version: str
    size: int
    used: float


class Mirror:
    """The part of a runs folder elsewhere that was fetched. Several threads may use it at once;
    the folder is locked against other processes as long as this one lives.

    Every file in it is whole: it is put in place when all of it has come.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url = shown(url)
        self._remote = Remote(url)
        self._problem = ""
        self._listed: dict[str, Listed] = {}
        self._kept: dict[str, _Kept] = {}
        self._refused: dict[str, str] = {}
        self._fetched: float | None = None
        self._left = 0
        self._busy, self._next, self._saved = False, 0.0, 0.0
        self._lock, self._bringing = threading.Lock(), threading.Lock()
        self._ready = threading.Event()
        try:
            self._place, self._held = _claim(folder)
            self._load()
        except OSError as error:
            self._place, self._held = folder, None
            self._problem = (
                f"{self.url} cannot be shown: the cache folder {folder} cannot be written "
                f"({error.strerror}). Name another with THAW_CACHE."
            )

    @property
    def folder(self) -> Path:
        """The runs folder on this machine."""
        return self._place / "runs"

    @property
    def standing(self) -> Standing:
        return Standing(self.url, self._fetched, self._left, self._problem)

    @property
    def refused(self) -> dict[str, str]:
        """Why files of some runs are not fetched, by run id."""
        return {name.partition("/")[0]: why for name, why in self._refused.copy().items()}

    # --- keeping up -----------------------------------------------------------------------------

    def refresh(self, wait: float = 0.0) -> None:
        """Look at what has changed, in the background, unless that was done a moment ago. Waits at
        most this many seconds for the first runs to be there."""
        with self._lock:
            due = self._held is not None and not self._busy and time.monotonic() >= self._next
            self._busy = self._busy or due
        if due:
            threading.Thread(target=self._refresh, daemon=True).start()
        if self._held is not None:
            self._ready.wait(wait)

    def _refresh(self) -> None:
        with contextlib.suppress(RemoteError):  # it is in `standing`
            self.update()

    def update(self) -> None:
        """Fetch all that has changed now. Raises RemoteError."""
        if self._held is None:
            raise RemoteError(self._problem)
        self._busy, began = True, time.time()
        pause = _LISTING_SECONDS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            known = {n: f for n, f in self._remote.listing().items() if _most(n) is not None}
            pause = max(pause, 2 * (time.time() - began))  # a long listing is not for every moment
            changed = self._take(known)
            self._fetched, self._problem = began, ""
            if changed or began - self._saved > _SAVED_SECONDS:
                self._save()
        except AwayError as error:
            self._problem, pause = str(error), _AWAY_SECONDS
            raise
        except OSError as error:
            self._problem, pause = self._cannot_keep(error), _AWAY_SECONDS
            raise RemoteError(self._problem) from error
        finally:
            self._left = 0
            self._next = time.monotonic() + pause
            self._busy = False
            self._ready.set()

    def _take(self, listed: dict[str, Listed]) -> bool:
        """Make what is here what is listed; whether anything was different."""
        with self._lock:
            same = listed == self._listed
            old = [n for n, kept in self._kept.items() if not _is_same(kept, listed.get(n))]
            # What pages show stays until what is new has come.
            useless = [n for n in old if n not in listed or not _is_shown(n)]
            self._listed = listed
        self._remove(useless)
        wanted = [n for n in listed if _is_shown(n) and not self._has(n)]
        for name in self._refused.keys() - set(wanted):
            del self._refused[name]
        self._left = len(wanted)
        first, later = _in_order(wanted)
        _all(self._fetch_shown, first)
        self._ready.set()
        _all(self._fetch_shown, later)
        return bool(wanted) or not same

    def _fetch_shown(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                self._fetch(name)
                self._refused.pop(name, None)
            except AwayError:
                raise
            except RemoteError as error:
                self._refused[name] = str(error)
            self._left = max(0, self._left - 1)

    def _fetch(self, name: str) -> None:
        """Put a file in place, whole, in the version of now. Raises RemoteError, OSError."""
        listed, most = self._listed.get(name), _most(name)
        if listed is None or most is None:
            return
        free = shutil.disk_usage(self._place).free
        if listed.size > free - _SPARE_BYTES:
            raise RemoteError(
                f"{self.url}/{name} is not fetched: it has {listed.size / 1e6:,.0f} MB, and "
                f"{free / 1e6:,.0f} MB are free in {self._place}. Make room there."
            )
        into = self._place / f"{threading.get_ident()}{_COMING}"
        try:
            found = self._remote.fetch(name, listed, into, most)
            if found.written is not None:
                os.utime(into, (found.written, found.written))
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            into.replace(path)
        except FileNotFoundError:
            return  # gone since it was listed
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise RemoteError(f"{self.url}/{name} is a file and a folder at once there.") from error
        finally:
            into.unlink(missing_ok=True)
        with self._lock:
            self._kept[name] = _Kept(found.version, found.size, time.time())

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            path = self.folder / name
            path.unlink(missing_ok=True)
            with self._lock:
                self._kept.pop(name, None)
            for folder in path.relative_to(self.folder).parents:
                with contextlib.suppress(OSError):  # not empty yet
                    if folder.name:
                        (self.folder / folder).rmdir()

    def _has(self, name: str) -> bool:
        """Whether it is here as it is there; a cache may be deleted at any time."""
        kept = self._kept.get(name)
        same = kept is not None and _is_same(kept, self._listed.get(name))
        return same and (self.folder / name).is_file()

    def _cannot_keep(self, error: OSError) -> str:
        return (
            f"{self.url} cannot be shown as it is now: {self._place} cannot be written "
            f"({error.strerror}). Make room there, or name another cache folder with THAW_CACHE."
        )

    # --- networks -------------------------------------------------------------------------------

    def holds(self, path: Path) -> bool:
        return path.is_relative_to(self.folder)

    def listed(self, path: Path) -> Listed | None:
        """What is known of a file, here or only there."""
        return self._listed.get(str(path.relative_to(self.folder)))

    def bring(self, path: Path) -> None:
        """Have a file here that was listed, with the hash beside it. Raises RunError."""
        name = str(path.relative_to(self.folder))
        with self._bringing:  # two visitors who want the same network fetch it once
            for one in (name, f"{name}.sha256"):
                if one not in self._listed:
                    continue
                if not self._has(one):
                    self._bring(one)
                self._kept[one].used = time.time()
            self._make_room(name)

    def _bring(self, name: str) -> None:
        try:
            self._fetch(name)
        except OSError as error:
            raise RemoteError(self._cannot_keep(error)) from error
        if name not in self._kept:
            raise RemoteError(f"{self.url}/{name} is not there any more.")

    def _make_room(self, wanted: str) -> None:
        """Let go of the networks that nobody has asked for the longest."""
        with self._lock:
            networks = [n for n in self._kept if not _is_shown(n)]
            networks.sort(key=lambda name: (name.startswith(wanted), self._kept[name].used))
            total = sum(self._kept[name].size for name in networks)
        for name in networks:
            if total <= _KEPT_BYTES or name.startswith(wanted):
                break
            total -= self._kept[name].size
            self._remove([name])

    # --- from one explorer to the next ------------------------------------------------------------

    def _save(self) -> None:
        with self._lock:
            content = {
                "fetched": self._fetched,
                "listed": {n: [f.version, f.size, f.written] for n, f in self._listed.items()},
                "kept": {n: [f.version, f.size, f.used] for n, f in self._kept.items()},
            }
        write_atomically(self._place / _STATE, json.dumps(content).encode())
        self._saved = time.time()

    def _load(self) -> None:
        """What an earlier explorer fetched, of which all that it has not noted is let go."""
        for torn in self._place.glob(f"*{_COMING}"):
            torn.unlink()
        try:
            content = json.loads((self._place / _STATE).read_bytes())
            self._listed = {n: Listed(*f) for n, f in content["listed"].items() if _most(n)}
            kept = {n: _Kept(*f) for n, f in content["kept"].items() if _most(n)}
            self._fetched = content["fetched"]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self._listed, kept, self._fetched = {}, {}, None
        self._kept = {n: f for n, f in kept.items() if _size(self.folder / n) == f.size}
        for path in self.folder.rglob("*"):
            if path.is_file() and str(path.relative_to(self.folder)) not in self._kept:
                path.unlink()
        if self._fetched is not None:
            self._ready.set()


# --- what is fetched, and in which order ----------------------------------------------------------


def _compiled(rules: Mapping[str, int]) -> dict[re.Pattern[str], int]:
    return {re.compile(f"{RUN_ID.pattern}/({rule})"): most for rule, most in rules.items()}


_SHOWN_RULES: Final = _compiled(_SHOWN) | {_BESIDE: MOST_BYTES}
_RULES: Final = _SHOWN_RULES | _compiled(_NETWORKS)
_COMING: Final = ".coming"
_STATE: Final = "mirror.json"


@functools.lru_cache(maxsize=1 << 18)
def _most(name: str) -> int | None:
    """The most bytes that a file of this name may have; None for one that is never fetched. No name
    with a rule leads out of the folder."""
    return next((most for rule, most in _RULES.items() if rule.fullmatch(name)), None)


@functools.lru_cache(maxsize=1 << 18)
def _is_shown(name: str) -> bool:
    return any(rule.fullmatch(name) for rule in _SHOWN_RULES)


def _is_same(kept: _Kept, listed: Listed | None) -> bool:
    return listed is not None and (kept.version, kept.size) == (listed.version, listed.size)


def _in_order(names: Iterable[str]) -> tuple[list[list[str]], list[list[str]]]:
    """What is fetched first, and what can wait: each in parts to be fetched one by one, newest run
    first."""
    first: dict[str, list[str]] = {}
    later: list[str] = []
    for name in sorted(names, reverse=True):
        run, _, file = name.partition("/")
        if file in _FIRST:
            first.setdefault(run, []).append(name)
        else:
            later.append(name)
    for found in first.values():
        found.sort(key=lambda name: _FIRST.index(name.partition("/")[2]))
    return list(first.values()), [[name] for name in later]


def _all(work: Callable[[list[str]], None], parts: Sequence[list[str]]) -> None:
    """Do the work on all parts, some at once; raises the first error, which ends it."""
    left, errors = deque(parts), list[Exception]()

    def some() -> None:
        while not errors:
            try:
                work(left.popleft())
            except IndexError:
                return
            except Exception as error:
                errors.append(error)

    # Daemons: an explorer that is ended does not wait for a server that says nothing.
    threads = [threading.Thread(target=some, daemon=True) for _ in range(min(_AT_ONCE, len(left)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


# --- whose folder -------------------------------------------------------------------------------


def mirror_of(url: str) -> Mirror:
    """The one mirror of this URL in this process."""
    # The same name at another server is another folder.
    servers = sorted(item for item in os.environ.items() if "ENDPOINT" in item[0])
    digest = hashlib.sha256(json.dumps([url, servers]).encode()).hexdigest()
    return _mirror(url, default_cache_dir() / "remote" / digest[:16])


@functools.lru_cache(maxsize=16)
def _mirror(url: str, folder: Path) -> Mirror:
    mirror = Mirror(url, folder)
    _MIRRORS.append(mirror)
    return mirror


_MIRRORS: Final[list[Mirror]] = []


def _claim(folder: Path) -> tuple[Path, Any]:
    """The folder, or one beside it where another process uses it; and what holds the lock on it."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _forget_unused(folder.parent)
    for number in range(1, _APPS + 1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        place.mkdir(exist_ok=True, mode=0o700)
        held = (place / "lock").open("ab")
        if lock(held, fcntl.LOCK_EX):
            os.utime(place / "lock")
            return place, held
        held.close()
    raise OSError(0, f"{_APPS} explorers use it already")


def _forget_unused(folder: Path) -> None:
    for file in folder.glob("*/lock"):
        with contextlib.suppress(OSError), file.open("ab") as held:
            unused = time.time() - file.stat().st_mtime > _UNUSED_SECONDS
            if unused and lock(held, fcntl.LOCK_EX):
                shutil.rmtree(file.parent, ignore_errors=True)


# --- files that may be elsewhere ------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """Of a file, here or elsewhere: bytes, and when it was written, in seconds since 1970."""

    size: int
    written: float = field(default=0.0)


def known(path: Path) -> Known | None:
    """What is known of a file in a runs folder; None where there is none."""
    for mirror in _MIRRORS:
        if mirror.holds(path):
            listed = mirror.listed(path)
            return None if listed is None else Known(listed.size, listed.written or 0.0)
    try:
        status = path.stat()
    except OSError:
        return None
    return Known(status.st_size, status.st_mtime)


def is_there(path: Path) -> bool:
    """Whether there is such a file, here or elsewhere."""
    return known(path) is not None


def brought(path: Path) -> Path:
    """The file, fetched first where it is elsewhere. Raises RunError where that fails."""
    for mirror in _MIRRORS:
        if mirror.holds(path):
            mirror.bring(path)
    return path


def url_of(path: Path) -> str:
    """Where a run's folder really is, if that is elsewhere; else empty."""
    return next((mirror.url for mirror in _MIRRORS if mirror.holds(path)), "")

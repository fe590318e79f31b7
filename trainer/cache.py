"""The cache folder: decoded photos and frozen activations, kept from run to run.

One file for each key; a key is the hash of everything that can change the content. Files are
bounded in sum, least recently used first to go, and may be shared by any number of processes, or
deleted at any time: what is missing is computed again. Numpy and standard library only.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from trainer.rows import HEADER_BYTES, UNFINISHED, Header, Layout, RowFile
from trainer.schema import ThawError

_SUFFIX: Final = ".rows"
# Left to everybody else on the disk.
_SPARE_BYTES: Final = 1 << 30
# Making a file takes a moment; after this nobody is making it any more.
_ABANDONED_SECONDS: Final = 3600
# For how long a process goes by its own count of the cache's bytes, while others add to it.
_LISTED_SECONDS: Final = 5.0
# Modules whose code decides what is in a cache; a change in any of them changes every key.
_CODE: Final = ("augment.py", "forms.py", "frozen.py", "model.py", "prefix.py", "preprocess.py")


class CacheError(ThawError):
    """A cache folder that cannot be listed or cleared."""


@dataclass(frozen=True)
class Key:
    """What a cached content depends on: plain JSON values, all of which are hashed.

    `about` is for people only and is not hashed.
    """

    kind: str
    ingredients: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256, 64 hexadecimal digits."""
        content = {"kind": self.kind, "code": code_digest(), **self.ingredients}
        text = json.dumps(content, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def code_digest() -> str:
    """Of the source of this package's modules that make what is cached."""
    digest = hashlib.sha256()
    for name in _CODE:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Entry:
    """One file of the cache. `used` is the time it was last opened, in seconds since 1970."""

    path: Path
    bytes: int
    used: float


class Cache:
    """A cache folder. Nothing here fails a run: where a file cannot be kept, `open` returns None
    and says why, once."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder / "rows"
        self._limit = limit
        self._opened: set[Path] = set()
        self._full = False
        self._total, self._listed = 0, -math.inf

    def open(self, key: Key, layout: Layout, rows: int) -> RowFile | None:
        """The file of this key, whatever of its rows are there, or None where it cannot be kept."""
        path = self._folder / f"{key.digest}{_SUFFIX}"
        header = Header(key.digest, layout, rows, {"kind": key.kind, **key.about})
        file = self._load(path, header) or self._create(path, header)
        if file is not None:
            self._opened.add(path)
        return file

    def _load(self, path: Path, header: Header) -> RowFile | None:
        try:
            file = RowFile.load(path, header)
        except FileNotFoundError:
            if path in self._opened:
                say(f"{path} was deleted while it was in use; it is computed again.")
            return None
        except ValueError as error:
            say(f"{path} cannot be used: {error}. It is computed again.")
            _remove(path)
            return None
        except OSError as error:
            self._stream(f"{path} cannot be read: {error.strerror}")
            return None
        # A shared folder of somebody else's: its files stay as they are.
        if os.access(path, os.W_OK):
            with contextlib.suppress(OSError):  # another process may have made room just now
                os.utime(path)
        return file

    def _create(self, path: Path, header: Header) -> RowFile | None:
        if self._full:
            return None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(header.layout.file_bytes(header.rows))
            return RowFile.create(path, header)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self._stream(f"{self._folder}: {reason}")
            return None

    def _make_room(self, size: int) -> None:
        """Raises OSError where it cannot be made."""
        # Looking at all files takes longer the more there are, and a run makes one every epoch.
        stale = time.monotonic() - self._listed > _LISTED_SECONDS
        if stale or self._total + size > self._limit:
            self._total, self._listed = self._evict(size), time.monotonic()
        if self._total + size > self._limit:
            limit = format_size(self._limit)
            raise OSError(0, f"no more room within --cache-limit {limit}")
        if shutil.disk_usage(self._folder).free < size + _SPARE_BYTES:
            raise OSError(0, "the disk is full")
        self._total += size

    def _evict(self, size: int) -> int:
        """Remove what was not used for longest until a file of `size` fits; what all files that are
        left take, in bytes."""
        _sweep_up(self._folder)
        entries = sorted(list_entries(self._folder), key=lambda entry: entry.used)
        total = sum(entry.bytes for entry in entries)
        # Not what this process reads: evicting its own next view would make the cache useless.
        removable = [entry for entry in entries if entry.path not in self._opened]
        while total + size > self._limit and removable:
            total -= removable[0].bytes
            _remove(removable.pop(0).path)
        return total

    def _stream(self, reason: str | None) -> None:
        if not self._full:
            say(
                f"The cache cannot keep more ({reason}); what is not in it is computed whenever "
                "it is needed. That is slower and changes no result."
            )
        self._full = True

    def give_up(self, error: OSError) -> None:
        """Called where a file could not be written."""
        self._stream(f"{self._folder}: {error.strerror}")


def say(text: str) -> None:
    """One line above a progress bar."""
    tqdm.write(f"Note: {text}")


def list_entries(folder: Path) -> list[Entry]:
    """The files of a cache's folder; those that vanish meanwhile are left out."""
    return list(_entries(folder)) if folder.is_dir() else []


def _entries(folder: Path) -> Iterator[Entry]:
    for path in folder.glob(f"*{_SUFFIX}"):
        try:
            status = path.stat()
        except OSError:
            continue
        yield Entry(path, status.st_size, status.st_mtime)


def _sweep_up(folder: Path) -> None:
    """Remove what processes left behind that were killed while they made a file."""
    for path in folder.glob(f".*{UNFINISHED}"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                _remove(path)
        except OSError:
            continue


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        say(f"{path} cannot be removed: {error.strerror}.")


_UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """`20GB`, `500 MB` or a plain number of bytes. Raises ValueError."""
    number = text.strip().rstrip("BbKkMmGgTt ")
    unit = text.strip()[len(number) :].strip().upper()
    unit = unit if unit.endswith("B") or not unit else f"{unit}B"
    try:
        size = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        size = -1
    if not 0 <= size < 1e18:
        raise ValueError(f"{text}: must be a size such as 20GB")
    return int(size)


def format_size(size: float) -> str:
    """`1.4 GB`: decimal units, as disks are sold."""
    for unit in ("TB", "GB", "MB", "KB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.3g} {unit}"
    return f"{size:.0f} B"


@dataclass(frozen=True)
class Check:
    """What verifying one file found: rows written, and rows whose checksum does not fit."""

    entry: Entry
    header: Header | None
    written: int = 0
    damaged: int = 0
    problem: str | None = None


def read_header(path: Path) -> Header:
    """Raises OSError or ValueError."""
    with path.open("rb") as file:
        return Header.decode(file.read(HEADER_BYTES))


def check(entry: Entry, read_rows: bool) -> Check:
    """Look at one file; with `read_rows` at every checksum in it."""
    try:
        header = read_header(entry.path)
        file = RowFile.load(entry.path, header)
    except (OSError, ValueError) as error:
        return Check(entry, None, problem=str(error))
    rows = np.flatnonzero(file.has(np.arange(len(file))))
    if read_rows:
        for start in range(0, len(rows), 256):
            file.read(rows[start : start + 256])
    return Check(entry, header, len(rows), file.damaged)

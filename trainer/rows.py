"""Files of equally sized rows, each with its own checksum (numpy and standard library only).

A row is there when its checksum fits. So a file may be filled in any order, by several processes at
once, and be used while it is filled; a row that a crash, a full disk or a flipped bit spoiled is
simply not there and is written again. Nothing is memory-mapped: a mapped file that is cut short
kills the process that reads it.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FORMAT: Final = 1
HEADER_BYTES: Final = 8192
UNFINISHED: Final = ".new"
# Set in a mark beside the 32 bits of the checksum: a checksum of 0 is not "nothing here".
_WRITTEN: Final = 1 << 32

Arrays = tuple[NDArray[Any], ...]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Layout:
    """What a row holds: the (dtype name, shape) of each of its arrays."""

    parts: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each array."""
        return tuple(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in self.parts)

    @property
    def row_bytes(self) -> int:
        return sum(self.sizes)

    def file_bytes(self, rows: int) -> int:
        return HEADER_BYTES + rows * (8 + self.row_bytes)

    def pack(self, values: Arrays) -> NDArray[np.uint8]:
        """Arrays [n, *shape] -> bytes [n, row_bytes]."""
        flat = [
            np.ascontiguousarray(value, dtype).reshape(len(value), -1).view(np.uint8)
            for value, (dtype, _) in zip(values, self.parts, strict=True)
        ]
        return flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)

    def unpack(self, content: NDArray[np.uint8]) -> Arrays:
        """Inverse of `pack`."""
        ends = np.cumsum(self.sizes)
        pieces = [content[:, end - size : end] for end, size in zip(ends, self.sizes, strict=True)]
        return tuple(
            np.ascontiguousarray(piece).view(dtype).reshape(len(content), *shape)
            for piece, (dtype, shape) in zip(pieces, self.parts, strict=True)
        )


@dataclass(frozen=True)
class Header:
    """What the first HEADER_BYTES say: the key of the content, its size, and words for people."""

    key: str
    layout: Layout
    rows: int
    about: Mapping[str, Any]

    def encode(self) -> bytes:
        parts = [[dtype, list(shape)] for dtype, shape in self.layout.parts]
        content = {
            "format": FORMAT,
            "key": self.key,
            "parts": parts,
            "rows": self.rows,
            "about": dict(self.about),
        }
        return json.dumps(content).encode().ljust(HEADER_BYTES)

    @classmethod
    def decode(cls, content: bytes) -> Header:
        """Raises ValueError where the bytes are no header of this format."""
        try:
            data = json.loads(content)
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}, this Thaw reads {FORMAT}")
            parts = tuple((str(np.dtype(d)), tuple(map(int, s))) for d, s in data["parts"])
            return cls(str(data["key"]), Layout(parts), int(data["rows"]), dict(data["about"]))
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not a header: {error!r}") from error


class RowFile:
    """An open file of rows. Instances are made by `create`, `load` and `temporary`.

    `damaged` counts rows that were written once and did not have their checksum when read.
    """

    def __init__(self, descriptor: int, header: Header) -> None:
        self._descriptor = descriptor
        self.header = header
        self.damaged = 0
        self._marks = self._read_marks()

    def __del__(self) -> None:
        os.close(self._descriptor)

    def __len__(self) -> int:
        return self.header.rows

    @classmethod
    def create(cls, path: Path, header: Header) -> RowFile:
        """Make the file, its whole size reserved, or open the one that another process has just
        made. Raises OSError, for instance on a full disk."""
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=UNFINISHED)
        try:
            _reserve(descriptor, header)
            os.pwrite(descriptor, header.encode(), 0)
            os.fchmod(descriptor, 0o644)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return cls.load(path, header)
            return cls(os.dup(descriptor), header)
        finally:
            os.close(descriptor)
            Path(temporary).unlink()

    @classmethod
    def load(cls, path: Path, header: Header) -> RowFile:
        """Open an existing file. Raises FileNotFoundError, or ValueError saying what is wrong with
        it: another header, or not the size that belongs to it."""
        descriptor = os.open(path, _read_write(path))
        try:
            _check(descriptor, header)
            return cls(os.dup(descriptor), header)
        finally:
            os.close(descriptor)

    @classmethod
    def temporary(cls, header: Header, folder: Path | None) -> RowFile:
        """A file without a name in `folder`, or in memory; gone when closed. Raises OSError."""
        if folder is None:
            descriptor = os.memfd_create("thaw")
        else:
            with tempfile.TemporaryFile(dir=folder) as file:
                descriptor = os.dup(file.fileno())
        try:
            _reserve(descriptor, header)
            return cls(os.dup(descriptor), header)
        finally:
            os.close(descriptor)

    @property
    def deleted(self) -> bool:
        """Whether somebody removed the file meanwhile; it can be used until it is closed."""
        return os.fstat(self._descriptor).st_nlink == 0

    def refresh(self) -> None:
        """Notice what other processes have written since."""
        self._marks = self._read_marks()

    def has(self, rows: Rows) -> Mask:
        """Which rows were written; their checksums are looked at when they are read."""
        return self._marks[rows] != 0

    def read(self, rows: Rows) -> tuple[Arrays, Mask]:
        """Arrays [n, *shape] of the rows, and which of them are there and undamaged: bool [n].

        The others hold nothing that makes sense.
        """
        content = np.empty((len(rows), self.header.layout.row_bytes), np.uint8)
        for start, stop in _runs(rows):
            self._read_at(int(rows[start]), content[start:stop])
        good = self.has(rows)
        marks = self._marks[rows]
        for i in np.flatnonzero(good):
            if _mark(content[i]) != marks[i]:
                good[i] = False
                self.damaged += 1
                self._marks[rows[i]] = 0
        return self.header.layout.unpack(content), good

    def write(self, rows: Rows, values: Arrays) -> None:
        """Store arrays [n, *shape] as rows. Raises OSError."""
        content = self.header.layout.pack(values)
        marks = np.array([_mark(row) for row in content], np.uint64)
        for start, stop in _runs(rows):
            first = int(rows[start])
            self._write_at(self._offset(first), content[start:stop])
            # The mark last: a row that has one is complete, unless the machine itself went down.
            self._write_at(HEADER_BYTES + 8 * first, marks[start:stop])
        self._marks[rows] = marks

    def _offset(self, row: int) -> int:
        return HEADER_BYTES + 8 * len(self) + row * self.header.layout.row_bytes

    def _read_at(self, row: int, into: NDArray[np.uint8]) -> None:
        view, offset = into.reshape(-1).data, self._offset(row)
        while view:
            count = os.preadv(self._descriptor, [view], offset)
            if count == 0:  # cut short: what is missing fails its checksum
                view[:] = bytes(len(view))
                return
            view, offset = view[count:], offset + count

    def _write_at(self, offset: int, content: NDArray[Any]) -> None:
        view = np.ascontiguousarray(content).reshape(-1).view(np.uint8).data
        while view:
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count

    def _read_marks(self) -> NDArray[np.uint64]:
        content = os.pread(self._descriptor, 8 * len(self), HEADER_BYTES)
        marks = np.zeros(len(self), np.uint64)
        found = np.frombuffer(content[: len(content) // 8 * 8], np.uint64)
        marks[: len(found)] = found
        return marks


def _reserve(descriptor: int, header: Header) -> None:
    size = header.layout.file_bytes(header.rows)
    if hasattr(os, "posix_fallocate"):
        # Now: running out of space later would be noticed only in the middle of the work.
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _read_write(path: Path) -> int:
    return os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY


def _check(descriptor: int, header: Header) -> None:
    found = os.pread(descriptor, HEADER_BYTES, 0)
    if found != header.encode():
        raise ValueError("its header is damaged or from another version")
    expected, size = header.layout.file_bytes(header.rows), os.fstat(descriptor).st_size
    if size != expected:
        raise ValueError(f"it has {size:,} bytes instead of {expected:,}")


def _mark(row: NDArray[np.uint8]) -> int:
    return zlib.crc32(row.data) | _WRITTEN


def _runs(rows: Rows) -> Iterator[tuple[int, int]]:
    """Positions [start, stop) of the stretches of consecutive rows: one read each."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    return ((a, b) for a, b in pairwise(edges) if a < b)

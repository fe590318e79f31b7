"""The results of many photos as a folder of Parquet files, one for each part of the photos.

The photos are listed once, into a file of the folder. Each part is written whole or not at all,
under its own name; so what is there is done, and every photo is in the result once.

pyarrow and fsspec are imported when they are needed: requirements-ray.txt.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final

from export.classifier import Result
from trainer.files import write_atomically
from trainer.intake import MAX_BYTES
from trainer.preprocess import PhotoError, is_photo
from trainer.schema import ThawError

_LIST: Final = "_photos.parquet"  # readers of Parquet folders pass over such names
_KEY: Final = b"thaw"
_FETCHED: Final = 16  # at once


class PartsError(ThawError):
    """Photos that cannot be listed, or a folder that is not for their results."""


def is_url(name: str) -> bool:
    """Whether fsspec reads it, rather than the file system of this machine."""
    return "://" in name


# --- what is to be done -----------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What the result is of. `folder` is where relative paths begin."""

    paths: tuple[str, ...]
    folder: str
    model_sha256: str
    run_id: str
    top: int

    @classmethod
    def of(cls, paths: Sequence[str], model: bytes, run_id: str, top: int) -> Job:
        folder = "" if all(map(is_url, paths)) else str(Path.cwd())
        return cls(tuple(paths), folder, hashlib.sha256(model).hexdigest(), run_id, top)

    def difference(self, other: Job) -> str:
        """What is not the same in another job; empty if all is."""
        ours, theirs = asdict(self), asdict(other)
        changed = (name for name in ours if ours[name] != theirs[name])
        return " and ".join(f"another {name} ({ours[name]})" for name in changed)


@dataclass(frozen=True)
class Plan:
    """A job and its photos, each once, as they were found when it was first started."""

    job: Job
    photos: tuple[str, ...]

    @property
    def parts(self) -> range:
        return range(math.ceil(len(self.photos) / self._size))

    def part(self, number: int) -> tuple[str, ...]:
        return self.photos[number * self._size : (number + 1) * self._size]

    @property
    def _size(self) -> int:
        """Photos of a part: so few that little is lost with a worker, and many have something to
        do. It follows from what is kept, since parts are known by their numbers."""
        return min(500, max(50, len(self.photos) // 32))


def photos_at(url: str) -> list[str]:
    """The photo at an fsspec URL, or all photos below it, sorted. Raises PartsError."""
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
        if files.isfile(path):
            return [url]
        found = sorted(name for name in files.find(path) if is_photo(Path(name)))
        return [files.unstrip_protocol(name) for name in found]
    except Exception as error:  # each kind of store raises its own
        raise PartsError(f"Cannot read {url} ({type(error).__name__}: {error}).") from error


def fetched(urls: Sequence[str]) -> Iterator[IO[bytes]]:
    """What is at each URL, several asked for at once; one that cannot be read says so when it is
    read."""
    rest = iter(urls)
    while chunk := list(islice(rest, _FETCHED)):
        for found in _contents(chunk):
            yield _Unread(found) if isinstance(found, Exception) else io.BytesIO(found)


def _contents(urls: Sequence[str]) -> list[bytes | Exception]:
    import fsspec

    files, _ = fsspec.core.url_to_fs(urls[0])
    if len({fsspec.core.split_protocol(url)[0] for url in urls}) > 1:  # where one store's end
        return [found for url in urls for found in _contents([url])]
    paths = [files._strip_protocol(url) for url in urls]
    # One byte more than is allowed, to see that there are more.
    ends = [MAX_BYTES + 1] * len(paths)
    found = files.cat_ranges(paths, [0] * len(paths), ends, on_error="return")
    return [
        b"" if isinstance(content, Exception) and _empty(files, path) else content
        for path, content in zip(paths, found, strict=True)
    ]


def _empty(files: Any, path: str) -> bool:
    """Stores refuse a range of an empty file."""
    with contextlib.suppress(Exception):
        return bool(files.size(path) == 0)
    return False


class _Unread(io.BytesIO):
    """In place of a photo that did not come."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def read(self, size: int | None = -1) -> bytes:
        said = self._error.strerror if isinstance(self._error, OSError) else None
        raise PhotoError(said or f"{type(self._error).__name__}: {self._error}")


# --- the results of a part --------------------------------------------------------------------


def to_parquet(results: Sequence[Result], provider: str, job: Job, classes: int) -> bytes:
    """A Parquet file: the columns of `export.infer --csv`, and the job in its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shown = range(min(job.top, classes))
    columns: dict[str, Any] = {"file": pa.array([_text(r.photo) for r in results], pa.string())}
    for place in shown:
        suffix = f"_{place + 1}" if place else ""
        best = [result.top[place] if result.top else None for result in results]
        labels = [None if one is None else _text(one.label) for one in best]
        columns[f"label{suffix}"] = pa.array(labels, pa.string())
        values = [None if one is None else one.probability for one in best]
        columns[f"probability{suffix}"] = pa.array(values, pa.float64())
    errors = [None if result.error is None else _text(result.error) for result in results]
    columns["error"] = pa.array(errors, pa.string())
    columns["provider"] = pa.array([provider] * len(results), pa.string())
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, metadata=_metadata(job)), buffer)
    return buffer.getvalue()


def failures(part: bytes) -> tuple[int, list[tuple[str, str]]]:
    """How many photos are in a part, and those that could not be read, with the reasons."""
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(part), columns=["file", "error"])
    rows = zip(*(table[name].to_pylist() for name in ("file", "error")), strict=True)
    return len(table), [(file, error) for file, error in rows if error is not None]


def _text(text: str) -> str:
    """Arrow's texts are UTF-8, which undecodable file names are not."""
    return text.encode("utf-8", "backslashreplace").decode()


def _metadata(job: Job) -> dict[bytes, bytes]:
    return {_KEY: json.dumps(asdict(job)).encode()}


# --- the folder -------------------------------------------------------------------------------


class Folder:
    """A folder here or at an fsspec URL; one process writes it."""

    def __init__(self, place: str) -> None:
        import fsspec

        self.place = place
        try:
            self._files, self._path = fsspec.core.url_to_fs(place)
        except (ImportError, ValueError) as error:
            raise PartsError(f"Cannot write to {place}: {error}") from error

    def parts(self) -> set[int]:
        """The parts that are done."""
        return {int(name[5:-8]) for name in self._names() if name.startswith("part-")}

    def plan(self) -> Plan | None:
        """What was begun here, if anything. Raises PartsError for a folder of something else."""
        import pyarrow.parquet as pq

        names = self._names()
        if _LIST not in names:
            if names:
                raise PartsError(f"{self.place} holds something else. Name an empty --out.")
            return None
        table = pq.read_table(io.BytesIO(self._files.cat_file(f"{self._path}/{_LIST}")))
        said = json.loads(table.schema.metadata[_KEY])
        job = Job(**{**said, "paths": tuple(said["paths"])})
        return Plan(job, tuple(map(os.fsdecode, table["file"].to_pylist())))

    def begin(self, plan: Plan) -> None:
        """Keep what is to be done, before any of it is."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = pa.array(list(map(os.fsencode, plan.photos)), pa.binary())
        buffer = io.BytesIO()
        pq.write_table(pa.table({"file": names}, metadata=_metadata(plan.job)), buffer)
        self._write(_LIST, buffer.getvalue())

    def write(self, number: int, part: bytes) -> None:
        self._write(f"part-{number:06}.parquet", part)

    def counts(self) -> tuple[int, int]:
        """The photos in all parts, and how many of them could not be read."""
        import pyarrow.dataset as pd

        parts = pd.dataset(self._path, format="parquet", filesystem=self._files)
        return parts.count_rows(), parts.count_rows(filter=pd.field("error").is_valid())

    def _names(self) -> list[str]:
        self._files.invalidate_cache()
        if not self._files.exists(self._path):
            return []
        found = (name.rpartition("/")[2] for name in self._files.ls(self._path, detail=False))
        return [name for name in found if name and not name.startswith(".")]

    def _write(self, name: str, content: bytes) -> None:
        from fsspec.implementations.local import LocalFileSystem

        if isinstance(self._files, LocalFileSystem):
            Path(self._path).mkdir(parents=True, exist_ok=True)
            write_atomically(Path(self._path, name), content)
        else:
            self._files.pipe_file(f"{self._path}/{name}", content)  # stores take a file whole

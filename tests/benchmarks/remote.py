"""How soon the explorer shows a runs folder on an S3 server, and how long an unchanged one takes.

    python -m tests.benchmarks.remote [--runs 100] [--epochs 45] [--endpoint URL]

Writes runs as a sweep leaves them (without checkpoints) and serves them with rclone, or, with
`--endpoint`, uploads them to a server that is there already (moto_server, MinIO, ...; any key is
given). Then a mirror is filled: seconds until a page can show runs, until all has come, and of a
second look when nothing has changed, each beside the seconds of the listing alone. All three are of
one process on the same data.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from explorer.mirror import Mirror
from explorer.remote import Remote
from tests.benchmarks.explorer import write_runs
from tests.s3_server import environment, s3_server

_BUCKET: Final = "bucket"
_PATIENCE: Final = 600.0


@contextlib.contextmanager
def served(folder: Path, endpoint: str | None) -> Iterator[str]:
    """The runs below `folder`/bucket, at an S3 URL."""
    if endpoint is None:
        with s3_server(folder, remembers=True):
            yield f"s3://{_BUCKET}/runs"
        return
    os.environ |= environment(endpoint)
    import s3fs

    system = s3fs.S3FileSystem()
    system.mkdir(_BUCKET)
    system.put(str(folder / _BUCKET / "runs"), f"{_BUCKET}/", recursive=True)
    try:
        yield f"s3://{_BUCKET}/runs"
    finally:
        system.rm(_BUCKET, recursive=True)


def seconds_of_listing(url: str) -> tuple[float, int]:
    began = time.perf_counter()
    found = Remote(url).listing()
    return time.perf_counter() - began, len(found)


def seconds_of_mirror(url: str, cache: Path) -> tuple[float, float, float]:
    """Until the first runs are there, all are, and of a second look."""
    mirror = Mirror(url, cache)
    began = time.perf_counter()
    mirror.refresh(wait=_PATIENCE)
    first = time.perf_counter() - began
    while mirror.standing.fetched is None:
        if mirror.standing.problem:
            sys.exit(mirror.standing.problem)
        if time.perf_counter() - began > _PATIENCE:
            sys.exit(f"Not all came within {_PATIENCE:.0f} s.")
        time.sleep(0.05)
    everything = time.perf_counter() - began
    began = time.perf_counter()
    mirror.update()
    return first, everything, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--endpoint", help="of an S3 server, instead of rclone's")
    asked = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="thaw-") as work:
        folder = Path(work, "served", _BUCKET, "runs")
        folder.mkdir(parents=True)
        write_runs(folder, asked.runs, asked.epochs).close()
        runs = len(list(folder.iterdir()))  # whole families of a sweep
        with served(folder.parents[1], asked.endpoint) as url:
            listing, files = seconds_of_listing(url)
            first, everything, again = seconds_of_mirror(url, Path(work, "cache"))
    print(f"{runs:,} runs, {files:,} files, load average {load:.1f} before.\n")
    print("| | s | over the listing's |\n| --- | ---: | ---: |")
    rows = {"listing": listing, "first runs": first, "all": everything, "second look": again}
    for name, seconds in rows.items():
        print(f"| {name} | {seconds:.1f} | {seconds / listing:.1f} |")


if __name__ == "__main__":
    main()

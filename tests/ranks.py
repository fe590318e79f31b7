"""Trainings by several processes, started as torchrun starts them, without its seconds."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.faults import start

Fault = tuple[Callable[..., None], tuple[Any, ...]]


def start_ranks(
    argv: Sequence[str],
    size: int,
    job: str = "none",
    restarts: int = 0,
    faults: dict[int, Fault] | None = None,
    errors: Path = Path(os.devnull),
) -> list[BaseProcess]:
    """`torchrun --nproc-per-node SIZE -m trainer ARGV`; `faults` are by rank. What rank N writes to
    stderr goes to the file `errors`N."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": job,
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
        "THAW_LOST_SECONDS": "60",
    }
    return [
        start(
            [*_stderr(errors, rank), *argv],
            _as_rank,
            given | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            (faults or {}).get(rank),
        )
        for rank in range(size)
    ]


def _stderr(errors: Path, rank: int) -> list[str]:
    return [] if errors == Path(os.devnull) else [f"stderr={errors}{rank}"]


def _as_rank(given: dict[str, str], fault: Fault | None) -> None:
    os.environ.update(given)
    if fault is not None:
        call, about = fault
        call(*about)


def run_ranks(argv: Sequence[str], size: int, **options: Any) -> tuple[list[int | None], list[str]]:
    """As `start_ranks`, to the end: the exit status of each, and what it wrote to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "rank-"
        processes = start_ranks(argv, size, errors=errors, **options)
        for process in processes:
            process.join(240)
            assert not process.is_alive()
        texts = [Path(f"{errors}{rank}").read_text() for rank in range(size)]
        return [process.exitcode for process in processes], texts

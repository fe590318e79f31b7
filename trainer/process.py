"""What a process that computes on the CPU needs: memory that stays, a thread for each core, a quiet
screen; and what it runs on.

Imports no torch: it comes first.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

# From glibc's malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_MAX: Final = -4
_NEVER: Final = 2**31 - 1
_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLES: Final = "GLIBC_TUNABLES"
_ASK: Final = "glibc.malloc.hugetlb=1"
_THREADS: Final = "OMP_NUM_THREADS"
# Where a container sees the share of the cores that it was given.
_CGROUPS: Final = Path("/sys/fs/cgroup")


def prepare_process() -> None:
    """Call it before torch is imported."""
    keep_freed_memory()
    cores = max(1, usable_cores() // _ranks_here())
    if launched() and os.environ.get(_THREADS) == "1":  # torchrun's default, whatever there is
        del os.environ[_THREADS]
    if cores < _allowed_cores():  # torch itself sees which cores it may use, but not how much
        os.environ.setdefault(_THREADS, str(cores))


def launched() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def ranks() -> int:
    """How many processes torchrun has started to train together; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def _ranks_here() -> int:
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1


def usable_cores() -> int:
    """How many threads can compute at once here: 1 or more.

    No more than the cores that this process may run on, and than its container was given: threads
    beyond these make all of them wait.
    """
    return max(1, math.ceil(min(_allowed_cores(), _share())))


def _allowed_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _share() -> float:
    """The cores given to this container (cgroups, version 2 or 1); infinite without a limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (_CGROUPS / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = (
            (_CGROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
        )
        return math.inf if int(quota) < 0 else int(quota) / int(period)
    return math.inf


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to serve large blocks from the heap and never to shrink it.

    Half of a CPU epoch was spent asking the system again for what had just been given back: by
    default each activation of a batch, tens of megabytes, is mapped anew, page by page, and
    unmapped when freed. Measured in tests/benchmarks/allocator.py. Returns whether it was done:
    other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))


def restart_with_huge_pages() -> None:
    """Begin this program anew, once, with a malloc that asks for huge pages where that helps.

    glibc reads the setting only when a process starts. Call it first of all: nothing that the
    program has done by then is kept.
    """
    tunables = os.environ.get(_TUNABLES, "")
    if "glibc.malloc.hugetlb" in tunables or not _gives_huge_pages_on_request():
        return
    os.environ[_TUNABLES] = f"{tunables}:{_ASK}".removeprefix(":")
    with contextlib.suppress(OSError):  # it works without, a little slower
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _gives_huge_pages_on_request() -> bool:
    try:
        return platform.libc_ver()[0] == "glibc" and "[madvise]" in _HUGE_PAGES.read_text()
    except OSError:
        return False


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keep the commentary of compilers and exporters off the screen; what fails is raised all the
    same."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def cpu_name() -> str:
    """The processor, such as "AMD EPYC"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

"""Memory as training needs it: freed memory is kept, and comes in huge pages.

Half of a CPU epoch was spent asking the system again for what had just been given back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from pathlib import Path
from typing import Final

# From glibc's malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_MAX: Final = -4
_NEVER: Final = 2**31 - 1
_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLES: Final = "GLIBC_TUNABLES"
_ASK: Final = "glibc.malloc.hugetlb=1"


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to serve large blocks from the heap and never to shrink it.

    By default each activation of a batch, tens of megabytes, is mapped anew, page by page, and
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

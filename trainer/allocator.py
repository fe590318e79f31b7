"""Keep freed memory instead of giving it back: half of a CPU epoch was spent asking again."""

from __future__ import annotations

import ctypes
import platform
from typing import Final

# From glibc's malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_MAX: Final = -4
_NEVER: Final = 2**31 - 1


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

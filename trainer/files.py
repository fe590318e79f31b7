"""Reading files that anybody may have made: regular ones, up to a size (standard library only)."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Final

# A run.json of 10,000 classes has a hundredth of it.
MOST_BYTES: Final = 16_000_000


def read_bounded(path: Path, most: int = MOST_BYTES) -> bytes:
    """What a file holds. Raises OSError with the reason, also where it is no regular file or has
    more than `most` bytes."""
    with BufferedReader(open_regular(path)) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"a file of more than {most // 10**6} MB", str(path))
        try:
            return file.read(size)
        except MemoryError:
            raise OSError(errno.ENOMEM, "not enough memory to read it", str(path)) from None


def open_regular(path: Path) -> FileIO:
    """Open a file for reading, unbuffered. Raises OSError for a pipe, on which one would wait for
    its writer, a device, which may have no end, and a folder."""
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a null byte in its name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a folder the system says so
        raise OSError(errno.EINVAL, "not a file, but a pipe or a device", str(path))
    return path.open("rb", buffering=0)

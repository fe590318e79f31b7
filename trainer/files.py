"""Files (standard library only): read ones that anybody may have made, up to a size; replace one
whole or not at all; know by its lock whether somebody writes one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import stat
import tempfile
import time
from io import BufferedReader, FileIO
from pathlib import Path
from typing import IO, Final

# A run.json of 10,000 classes has a hundredth of it.
MOST_BYTES: Final = 16_000_000
_TEMPORARY: Final = ".tmp"
# Writing a file takes seconds; after this nobody is writing it any more.
_ABANDONED_SECONDS: Final = 3600.0
# The disk is full, or the share of it that a user or a process may have.
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` whole or leave it as it was, also through a crash or a full disk.

    Raises OSError, on a full disk saying how much space is left.
    """
    try:
        _replace(path, content)
    except OSError as error:
        raise said_with_space(error, path) from error


def said_with_space(error: OSError, path: Path) -> OSError:
    """The error as it is, or where the disk of `path` is full, with what is left in its text."""
    if error.errno not in _FULL:
        return error
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return error
    space = f"{error.strerror}, {free / 1e6:,.1f} MB are free in {path.parent}"
    return OSError(error.errno, space, str(path))


def _replace(path: Path, content: bytes) -> None:
    remove_temporary(path.parent, glob.escape(path.name), _ABANDONED_SECONDS)
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY
    )
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp's 0600 would hide the run from a shared explorer
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_temporary(folder: Path, name: str, age: float) -> None:
    """Remove what processes left behind that were killed while they wrote `folder`/`name`; `age`
    in seconds is how long nobody may have touched it. `name` is a pattern."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f".{name}.*{_TEMPORARY}"):
            if time.time() - path.stat().st_mtime >= age:
                path.unlink(missing_ok=True)


def lock(file: IO[bytes], kind: int) -> bool:
    """Whether nobody else holds a lock against it. A lock ends with its process, however that
    ends; on a file system without locks nobody ever holds one."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True

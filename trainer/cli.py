"""What the command lines share: errors without a traceback, names that cannot act (stdlib)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from trainer.schema import ThawError


def guarded(command: Callable[[], int]) -> int:
    """Run a command; returns its exit status.

    2 for a ThawError and for what the file system refuses, printed as `error: ...`; 130 when
    interrupted; 141 when the reader of our output went away (`| head`), both as a shell reports
    them.
    """
    try:
        status = command()
        sys.stdout.flush()
    except ThawError as error:
        print("error:", "\n".join(map(inert, str(error).splitlines())), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Otherwise the interpreter's own flush at exit prints the error we have just handled.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        named = isinstance(error.filename, str | bytes)
        where = f"{os.fsdecode(error.filename)}: " if named else ""
        print("error:", inert(f"{where}{error.strerror or error}."), file=sys.stderr)
        return 2
    return status


def inert(text: str) -> str:
    """`text` with everything unprintable escaped: a file name cannot move the cursor or break a
    line, and an undecodable one can be printed."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def inert_cell(text: str) -> str:
    """`inert`, and a spreadsheet that opens the CSV takes the cell for text, not for a formula."""
    return f"'{inert(text)}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else inert(text)

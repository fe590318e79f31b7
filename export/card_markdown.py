"""Markdown in which any name stays a name."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Final

from trainer.cli import inert

_MOST_NAMES: Final = 100
_ENDING: Final = {ord("`"): r"\x60", ord("|"): r"\x7c"}  # would end a code span, a table's cell


def finite(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if known and abs(value) < 1e300 else None


def code(text: str) -> str:
    """`text` as a code span: in every kind of Markdown it stays text, in its line and in its cell,
    and no link, image, tag, formula or emphasis comes of it."""
    return f"`{inert(text).translate(_ENDING) or ' '}`"


def name_list(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(map(code, names[:_MOST_NAMES])) + (f" and {more:,} more" if more > 0 else "")


def shown(value: Any) -> str:
    """A number or a list as it is, a text in a code span; "" for anything else."""
    if isinstance(value, str):
        return code(value) if value else ""
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(shown, value)))
    number = finite(value)
    return "" if number is None else f"{value:,}" if isinstance(value, int) else f"{number:g}"


def plain(number: Any) -> str:
    """A whole number to type again, so without commas."""
    return shown(number).replace(",", "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """`numbers`: all columns but the first are aligned to the right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def facts(head: Sequence[str], facts: Mapping[str, str]) -> str:
    """A table of what is known, one fact a line."""
    return table(head, [fact for fact in facts.items() if fact[1]])


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines if line)


def count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def moment(seconds: Any) -> str:
    known = finite(seconds)
    try:
        return "" if known is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(known))
    except (OverflowError, ValueError, OSError):
        return ""


def last_name(path: str) -> str:
    """The last part of a path, however the system wrote it."""
    return PureWindowsPath(PurePosixPath(path).name).name


def placeless(text: str) -> str:
    """A text that may hold an absolute path, without the folders of this machine."""
    return last_name(text) if re.search(r"(^|[\s:])([/\\~]|[A-Za-z]:[/\\])", text) else text

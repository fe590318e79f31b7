"""What a user says about a run: another name, a note, tags, and whether it is archived.

Kept in a file of its own, because run.json belongs to the process that trains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from explorer.access import may_write
from trainer.files import read_bounded, write_atomically
from trainer.runlog import RunError

ANNOTATIONS_JSON: Final = "annotations.json"
MAX_NAME: Final = 60
MAX_NOTE: Final = 2000
MAX_TAGS: Final = 12
# Control characters, those that turn the direction of what follows, and halves of characters: no
# browser can be sent them, or it shows another name than it is.
_UNFIT: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Annotation:
    """`name` replaces the run's own short name where it is not empty."""

    name: str = ""
    note: str = ""
    tags: tuple[str, ...] = ()
    archived: bool = False


def load_annotation(run: Path) -> Annotation:
    """What is noted of the run in this folder; nothing where there is no such file or it is
    damaged."""
    try:
        content = json.loads(read_bounded(run / ANNOTATIONS_JSON).decode())
    except (OSError, ValueError, RecursionError):
        return Annotation()
    if not isinstance(content, dict):
        return Annotation()
    return clean(
        _text(content.get("name")),
        _text(content.get("note")),
        [_text(tag) for tag in tags] if isinstance(tags := content.get("tags"), list) else [],
        content.get("archived") is True,
    )


def clean(name: str, note: str, tags: Sequence[str], archived: bool) -> Annotation:
    """An annotation of what was typed: one line for names and tags, nothing longer than allowed."""
    lines = [_line(tag) for tag in tags]
    kept = tuple(dict.fromkeys(line for line in lines if line))[:MAX_TAGS]
    return Annotation(_line(name), _UNFIT.sub("", note).strip()[:MAX_NOTE], kept, archived)


def _line(text: str) -> str:
    return " ".join(_UNFIT.sub("", text).split())[:MAX_NAME].rstrip()


def save_annotation(run: Path, annotation: Annotation) -> None:
    """Write what is noted of the run in this folder. Raises RunError where that is not possible."""
    may_write("Noting something of a run")
    text = json.dumps(asdict(annotation), indent=2, ensure_ascii=False)
    try:
        write_atomically(run / ANNOTATIONS_JSON, text.encode())
    except OSError as error:
        raise RunError(
            f"Cannot write {run / ANNOTATIONS_JSON}: {error.strerror}. Nothing was changed."
        ) from error


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""

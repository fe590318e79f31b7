"""What a user says about a run: another name, a note, tags, and whether it is archived.

Kept in a file of its own, because run.json belongs to the process that trains.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from trainer.runlog import RunError, write_atomically

ANNOTATIONS_JSON: Final = "annotations.json"
MAX_NAME: Final = 60
MAX_NOTE: Final = 2000
MAX_TAGS: Final = 12


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
        content = json.loads((run / ANNOTATIONS_JSON).read_text(encoding="utf-8"))
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


def clean(name: str, note: str, tags: list[str], archived: bool) -> Annotation:
    """An annotation of what was typed: one line for names and tags, nothing longer than allowed."""
    lines = [" ".join(tag.split())[:MAX_NAME] for tag in tags]
    kept = tuple(dict.fromkeys(line for line in lines if line))[:MAX_TAGS]
    return Annotation(" ".join(name.split())[:MAX_NAME], note.strip()[:MAX_NOTE], kept, archived)


def save_annotation(run: Path, annotation: Annotation) -> None:
    """Write what is noted of the run in this folder. Raises RunError where that is not possible."""
    text = json.dumps(asdict(annotation), indent=2, ensure_ascii=False)
    try:
        write_atomically(run / ANNOTATIONS_JSON, text.encode())
    except OSError as error:
        raise RunError(f"Cannot write to {run}: {error.strerror}.") from error


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""

"""The model card: what an exported model is, how it was trained, how good it is, and where not.

Markdown with YAML front matter, as model hubs read it. It is shipped with the model, so it names no
place on this machine; names of classes, runs and files can be any text and stand in code spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.card_facts import gather
from export.card_training import data, front_matter, limits, summary, training
from export.card_worth import contract, equality, files, results, use
from trainer.files import write_atomically
from trainer.runlog import Run, list_runs
from trainer.schema import ThawError

if TYPE_CHECKING:
    from export.to_onnx import Exported


class CardError(ThawError):
    """A model card that cannot be written."""


def card_path(model: Path) -> Path:
    """The card's place beside the model: model-card-before.md for model-before.onnx."""
    stem, dash, rest = model.stem.partition("-")
    name = f"model-card{dash}{rest}" if stem == "model" else f"{model.stem}-card"
    return model.with_name(f"{name}.md")


def write_card(run: Run, exported: Exported) -> Path:
    """Write the card beside the model; returns its path. Raises CardError."""
    path = card_path(exported.path)
    try:
        written = exported.path.stat().st_mtime
        text = model_card(run, exported, list_runs(run.path.parent), written)
        write_atomically(path, text.encode())
    except OSError as error:
        raise CardError(f"Cannot write the model card {path}: {error.strerror}.") from error
    return path


def model_card(run: Run, exported: Exported, runs: Sequence[Run], written: float) -> str:
    """The card as Markdown; the same text for the same export.

    `runs` are all of the folder, oldest first: what the run started from and its control are looked
    up there, and predictions are read. `written` is when the model was written, in seconds since
    the Unix epoch. What is not known is said to be so or left out.
    """
    card = gather(run, exported, runs, written)
    sections = (
        *(front_matter, summary, limits, data, training),
        *(results, equality, contract, use, files),
    )
    return "\n\n".join(block for section in sections for block in section(card) if block) + "\n"

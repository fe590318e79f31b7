"""What a model that was exported is worth: is it the file that was compared with PyTorch?

Knows neither Streamlit nor torch.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from explorer.data import checkpoint_of
from explorer.figures import Figures, figures_or_reason
from explorer.mirror import brought, is_there
from export.card import card_path
from export.metadata import MOST_BYTES, ModelFileError, ModelMetadata, Which, file_name
from export.precision import LARGEST_LOSS, SAME_CLASS, Parity, Precision
from export.seal import check_seal
from trainer.files import read_bounded
from trainer.runlog import Run, RunError
from trainer.schema import MODEL_ONNX, PARITY_JSON, ThawError

Verdict = Literal["proven", "outdated", "unproven"]
Card = Literal["there", "missing", "other"]

PURPOSES: Final[Mapping[Precision, str]] = {
    "fp32": "The network as it is.",
    "fp16": "For GPUs: half the size.",
    "int8": "For CPUs: smaller and faster. Refused where it costs more than "
    f"{100 * LARGEST_LOSS:.0f} point of accuracy.",
}
# What the gate of the export asks of each, in the words of a badge.
PROVEN: Final[Mapping[Precision, str]] = {
    "fp32": "Proven equal",
    "fp16": f"Proven: the same class for at least {SAME_CLASS['fp16']:.1%}",
    "int8": f"Proven: costs at most {100 * LARGEST_LOSS:.0f} point of accuracy",
}


@dataclass(frozen=True)
class Shipped:
    """A model as it lies in the run's folder: size in bytes, `written` in seconds since the epoch.

    `doubts` say why it does not count as what was measured; `checkpoint` whether the checkpoint it
    was made from is still the same; `card` whether the model card beside it is about this file.
    """

    path: Path
    precision: Precision
    size: int
    written: float
    sha256: str
    figures: Figures | None
    about: ModelMetadata | None
    doubts: tuple[str, ...]
    checkpoint: Literal["same", "changed", "gone"]
    card: Card

    @property
    def verdict(self) -> Verdict:
        if self.doubts:
            return "unproven"
        return "outdated" if self.checkpoint == "changed" else "proven"


def model_path(run: Run, which: Which, precision: Precision = "fp32") -> Path:
    """Where `python -m export` writes the model."""
    return run.path / file_name(MODEL_ONNX, which, precision)


def parity_path(run: Run, which: Which, precision: Precision = "fp32") -> Path:
    """Where `python -m export` writes what it measured."""
    return run.path / file_name(PARITY_JSON, which, precision)


def checkpoint_or_reason(run: Run, which: Which) -> Path | str:
    """The checkpoint to export, or why there is none."""
    try:
        return checkpoint_of(run, which)
    except RunError as error:
        return str(error)


def shipped(run: Run, which: Which, precision: Precision = "fp32") -> Shipped | None:
    """What was exported of this checkpoint in this precision; None where nothing was.

    Raises ModelFileError where the model or the checkpoint cannot be read.
    """
    path = model_path(run, which, precision)
    if not is_there(path):
        return None
    try:
        status = brought(path).stat()
        sha256, about = _content(path, (status.st_mtime_ns, status.st_size))
        figures = figures_or_reason(parity_path(run, which, precision))
        known = figures if isinstance(figures, Figures) else None
        return Shipped(
            path=path,
            precision=precision,
            size=status.st_size,
            written=status.st_mtime,
            sha256=sha256,
            figures=known,
            about=about if isinstance(about, ModelMetadata) else None,
            doubts=_doubts((run.run_id, which, precision), path.name, sha256, about, figures),
            checkpoint=_checkpoint(checkpoint_or_reason(run, which), known),
            card=_card(path, sha256),
        )
    except OSError as error:
        raise ModelFileError(f"{error.filename} cannot be read: {error.strerror}.") from error
    except RunError as error:  # one that is elsewhere
        raise ModelFileError(str(error)) from error


def _doubts(
    wanted: tuple[str, Which, Precision],
    model: str,
    sha256: str,
    about: ModelMetadata | str,
    figures: Figures | str,
) -> tuple[str, ...]:
    parity = file_name(PARITY_JSON, *wanted[1:])
    if isinstance(about, str):
        return (f"{model} is damaged: {about}",)
    if isinstance(figures, str):
        return (figures,)
    if figures.onnx_sha256 != sha256:
        return (f"{model} is not the file that was measured: {parity} has another SHA-256.",)
    found = []
    if figures.parity.to_dict() != about.parity:
        found.append(f"{parity} does not hold the figures that {model} holds of itself.")
    if not figures.allowed:
        found.append(f"The figures in {parity} are not within what is allowed.")
    made = (about.run_id, about.checkpoint, about.precision)
    if made != wanted:
        found.append("{} was made from run {}, {} unfreezing, in {}.".format(model, *made))
    elif figures.parity.precision != about.precision:
        found.append(f"{parity} was measured in {figures.parity.precision}.")
    return tuple(found)


def _card(model: Path, sha256: str) -> Card:
    """A card names the SHA-256 of its model, so one of an earlier export can be told."""
    path = card_path(model)
    if not path.is_file():
        return "missing"
    return "there" if sha256 in read_bounded(path).decode(errors="replace") else "other"


def _checkpoint(path: Path | str, figures: Figures | None) -> Literal["same", "changed", "gone"]:
    if isinstance(path, str):
        return "gone"
    status = brought(path).stat()
    now = _sha256(path, (status.st_mtime_ns, status.st_size))
    return "same" if figures is None or figures.checkpoint_sha256 == now else "changed"


@functools.lru_cache(maxsize=256)
def _sha256(path: Path, stamp: tuple[int, int]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=64)
def _content(path: Path, stamp: tuple[int, int]) -> tuple[str, ModelMetadata | str]:
    """The SHA-256 of a model, and what it says of itself or why that cannot be read."""
    import onnx

    content = read_bounded(path, MOST_BYTES)
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        sealed = check_seal(content)
        model = onnx.ModelProto.FromString(content)
    except ThawError as error:
        return sha256, str(error)
    except Exception:  # the exception differs between protobuf's implementations
        return sha256, "it is not an ONNX file, or only a part of one."
    try:
        props = {entry.key: entry.value for entry in model.metadata_props}
        return sha256, ModelMetadata.from_props(props, sealed)
    except ThawError as error:
        return sha256, str(error)


# --- in words ---------------------------------------------------------------------------------


def small(difference: float) -> str:
    """A difference to two digits, such as 3.1e-06 or 0.054."""
    return f"{difference:.2g}"


def share(fraction: float) -> str:
    """As percent with two decimals, which only what is exactly 100% goes without."""
    return "100%" if fraction == 1 else f"{min(fraction, 0.9999):.2%}"


def meaning(model: Shipped, figures: Figures) -> str:
    """What was found, in plain words, of a model without doubts."""
    parity = figures.parity
    found = _cost(parity) if parity.precision == "int8" else _sameness(parity)
    gone = f" {parity.photos_missing:,} more photos are gone." if parity.photos_missing else ""
    return f"{model.path.name}, computed by {parity.provider}, {found}{gone}"


def _sameness(parity: Parity) -> str:
    whole = parity.top1_agreement == 1
    part = "all" if whole else f"{share(parity.top1_agreement)} of the"
    tied = f" ({parity.ties:,} of them tied in PyTorch itself)" if parity.ties else ""
    said = (
        f"gave the same class as PyTorch on {part} {parity.photos:,} validation photos compared"
        f"{tied}. No logit was off by more than {small(parity.max_abs_logit_difference)};"
    )
    if parity.precision == "fp32":
        return f"{said} rounding alone may reach {small(parity.tolerance)}."
    return (
        f"{said} {small(parity.tolerance)} is allowed. It was also run with all values rounded to "
        "half precision after each step, as on a GPU, and the worse figures count. Black, "
        "saturated and noise images gave finite numbers."
    )


def _cost(parity: Parity) -> str:
    loss = f"It loses {100 * parity.loss:.2f} points" if parity.loss > 0 else "It loses nothing"
    return (
        f"has {share(parity.accuracy)} of the {parity.photos:,} validation photos compared right, "
        f"PyTorch {share(parity.accuracy_pytorch)}. {loss}; {100 * LARGEST_LOSS:.0f} point is the "
        "most allowed."
    )


def kept(figures: Figures) -> str:
    """What an int8 model computes in float32; empty for other precisions."""
    if figures.parity.precision != "int8":
        return ""
    if not figures.parity.kept:
        return "No layer is kept in float32."
    words = ", ".join(figures.parity.kept)
    return f"Kept in float32, {len(figures.kept_layers)} layers: {words}."


def key_figures(parity: Parity) -> dict[str, tuple[str, str]]:
    """What decides whether the model may be written: its name, the value, and what is beside it."""
    allowed = f"allowed {small(parity.tolerance)}"
    photos = (f"{parity.photos:,}", f"{parity.photos_missing:,} missing")
    same = share(parity.top1_agreement)
    if parity.precision == "int8":
        return {
            "Accuracy in int8": (share(parity.accuracy), f"{_points(-parity.loss)} points"),
            "Accuracy, PyTorch": (share(parity.accuracy_pytorch), "the network as it is"),
            "Same class": (same, "top-1 agreement"),
            "Photos compared": photos,
        }
    needed = SAME_CLASS[parity.precision]
    return {
        "Largest |Δlogit|": (small(parity.max_abs_logit_difference), allowed),
        "Between batch sizes": (small(parity.max_abs_batch_difference), allowed),
        "Same class": (same, "top-1 agreement" if needed == 1 else f"needed {needed:.1%}"),
        "Photos compared": photos,
    }


def _points(change: float) -> str:
    return f"{100 * change:+.2f}".replace("-", "−") if round(100 * change, 2) else "0.00"


def measured_as(run: Run, about: ModelMetadata) -> str:
    """The validation accuracy of the checkpoint inside a model; empty where the run's log does not
    hold it."""
    found = [record.val_acc for record in run.epochs if record.epoch == about.epoch]
    if not found or math.isnan(found[-1]):
        return ""
    return f"Its checkpoint, of epoch {about.epoch}, was measured at {found[-1]:.2%} accuracy."


def snippet(model: Path) -> str:
    """Python that classifies photos with this model."""
    return (
        "from pathlib import Path\n"
        "from export.classifier import Classifier\n"
        f"classifier = Classifier.load(Path({str(model)!r}))\n"
        'for result in classifier.classify(Path("PHOTOS").glob("*.jpg")):\n'
        "    print(result.photo, result.error or result.top[0])"
    )

"""Classify photos with a run's networks: before and after unfreezing, and the exported one.

torch and ONNX Runtime are imported only when a network is loaded; Streamlit is not known here.
Photos and answers stay in memory.
"""

from __future__ import annotations

import io
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from explorer.data import checkpoint_of
from explorer.gradcam import GradCam, overlay
from explorer.mirror import is_there
from export.metadata import Which
from trainer.preprocess import open_photo, side_to_decode, to_array
from trainer.process import usable_cores
from trainer.runlog import Run, RunError
from trainer.schema import MODEL_ONNX, Preprocess, ThawError

TOP: Final = 5

Name = Literal["before", "after", "onnx"]


@dataclass(frozen=True)
class Slot:
    """One place for a network on the page: its checkpoint, or the reason why there is none."""

    which: Which
    title: str
    path: Path | None = None
    reason: str = ""


@dataclass(frozen=True)
class Guess:
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes, best first; the seconds from pixels to probabilities, of a batch
    its share; and the probabilities of all `classes`, float32 [classes]."""

    guesses: tuple[Guess, ...]
    seconds: float
    classes: tuple[str, ...] = field(repr=False)
    probabilities: NDArray[np.float32] = field(repr=False, compare=False)

    @property
    def label(self) -> str:
        return self.guesses[0].label


Answer = Prediction | str  # or the reason why the network gave none


def slots(run: Run) -> list[Slot]:
    """Before and after for a run that was unfrozen, one network for any other."""
    if run.boundary is None:
        return [_slot(run, "after", f"The network after {run.phase}")]
    return [
        _slot(run, "before", "Before unfreezing"),
        _slot(run, "after", "After unfreezing"),
    ]


def exported(run: Run) -> Path | None:
    """The run's model.onnx, here or elsewhere; None where there is none."""
    path = run.path / MODEL_ONNX
    return path if is_there(path) else None


def _slot(run: Run, which: Which, title: str) -> Slot:
    try:
        return Slot(which, title, checkpoint_of(run, which))
    except RunError as error:
        return Slot(which, title, reason=str(error))


@dataclass(frozen=True)
class Look:
    """Where a network sees the class `label` in a photo: a JPEG with the heat over the photo as the
    network gets it, and the part of it where the heat is strongest ("" where there is none)."""

    label: str
    jpeg: bytes = field(repr=False)
    strongest: str


# --- networks -----------------------------------------------------------------------------------


class Network(ABC):
    """A network that classifies photos; `engine` names what runs it."""

    def __init__(self, classes: tuple[str, ...], preprocess: Preprocess, engine: str) -> None:
        self.classes = classes
        self.preprocess = preprocess
        self.engine = engine
        self._warm: set[int] = set()

    def predict(self, images: Sequence[Image.Image]) -> list[Answer]:
        """Classify upright RGB photos (see `decode`), all in one batch."""
        try:
            self._warm_up(len(images))
            started = time.perf_counter()
            rows = self._probabilities(images)
        except (ThawError, RuntimeError) as error:  # above all: no memory for so large a batch
            return [f"the network failed: {error}"] * len(images)
        seconds = (time.perf_counter() - started) / len(images)
        return [_answer(row, self.classes, seconds) for row in rows]

    def _warm_up(self, batch: int) -> None:
        """The first pass of each size allocates and plans, and would look slow."""
        if batch not in self._warm:
            side = self.preprocess.crop
            self._probabilities([Image.new("RGB", (side, side))] * batch)
            self._warm.add(batch)

    @abstractmethod
    def _probabilities(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """float32 [N, classes]."""


class Classifier(Network):
    """A checkpoint, ready to classify. Raises ThawError when it cannot be loaded."""

    def __init__(self, path: Path) -> None:

        import torch

        from trainer.checkpoint import load_model
        from trainer.model import InputNormalize

        # A container sees all cores of its host, also those it may not use.
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
        self._network, checkpoint = load_model(path)
        self._normalise = InputNormalize(checkpoint.preprocess).eval()
        self.sha256 = checkpoint.sha256
        super().__init__(checkpoint.classes, checkpoint.preprocess, "PyTorch on the CPU")

    def _probabilities(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        import torch

        photos = np.stack([to_array(image, self.preprocess) for image in images])
        with torch.inference_mode():
            logits = self._network(self._normalise(torch.from_numpy(photos)))
            rows: NDArray[np.float32] = logits.float().softmax(dim=1).numpy()
        return rows

    @cached_property
    def _grad_cam(self) -> GradCam:
        return GradCam(self._network, self.preprocess.crop)

    def look(self, image: Image.Image, label: str) -> Look:
        """Where the network sees `label` in a photo. Raises GradCamError."""
        import torch

        photo = to_array(image, self.preprocess)
        pixels = self._normalise(torch.from_numpy(photo[np.newaxis].copy()))
        heat = self._grad_cam.heat(pixels, self.classes.index(label))
        return Look(label, to_jpeg(overlay(photo, heat)), heat.strongest)


class Exported(Network):
    """A model.onnx, ready to classify. Raises ThawError when it cannot be loaded."""

    def __init__(self, path: Path) -> None:
        from export.classifier import Classifier as Model

        self._model = Model.load(path)
        metadata = self._model.metadata
        super().__init__(metadata.classes, metadata.preprocess, self._model.provider)

    @property
    def note(self) -> str | None:
        """Why a GPU that is there is not used, if so."""
        return self._model.note

    def _probabilities(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        results = self._model.classify(images, top=len(self.classes), batch=len(images))
        rows = np.full((len(results), len(self.classes)), np.nan, np.float32)
        for row, result in zip(rows, results, strict=True):
            for one in result.top:
                row[one.index] = one.probability
        return rows

    def outdated(self, sha256: str) -> str:
        """Says so if it was not exported from the checkpoint with this SHA-256; else empty."""
        made = self._model.metadata
        if made.checkpoint_sha256 == sha256:
            return ""
        return (
            f"model.onnx is out of date: it was exported from another checkpoint ({made.phase}, "
            f"epoch {made.epoch} of run {made.run_id}) than the run has now."
        )


def _answer(row: NDArray[np.float32], classes: tuple[str, ...], seconds: float) -> Answer:
    if not np.isfinite(row).all():
        return "the network gives no finite probabilities for it"
    best = np.argsort(-row, kind="stable")[:TOP]
    guesses = tuple(Guess(classes[i], float(row[i])) for i in best)
    return Prediction(guesses, seconds, classes, row)


# --- photos -------------------------------------------------------------------------------------


def decode(source: Path | IO[bytes], preprocess: Preprocess) -> Image.Image:
    """A photo as a network with this preprocessing sees it: upright, RGB, a large JPEG at reduced
    size. Raises PhotoError with the reason."""
    return open_photo(source, side_to_decode(preprocess))


def thumbnail(image: Image.Image, side: int = 440) -> Image.Image:
    """A small copy for the page, so that a 20-megapixel upload isn't sent back to the browser.

    A strip of 1 x 10,000 pixels is thickened: Streamlit fails on a picture it would scale to none.
    """
    scale = min(1.0, side / max(image.size))
    least = side // 20
    return image.resize(
        (max(round(image.width * scale), least), max(round(image.height * scale), least))
    )


def to_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()

"""Classify photos with a run's network from before and after unfreezing.

torch is imported only when a checkpoint is loaded; Streamlit is not known here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Literal

from PIL import Image

from trainer.preprocess import Photo, open_photo, side_to_decode, to_array
from trainer.runlog import Run, RunError, checkpoint_path
from trainer.schema import Preprocess

TOP: Final = 5

Which = Literal["before", "after"]


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
    """The most probable classes, best first, and the seconds from pixels to probabilities."""

    guesses: tuple[Guess, ...]
    seconds: float

    @property
    def label(self) -> str:
        return self.guesses[0].label


def slots(run: Run) -> list[Slot]:
    """Before and after for a run that was unfrozen, one network for any other."""
    if run.boundary is None:
        return [_slot(run, "after", f"The network after {run.phase}")]
    return [
        _slot(run, "before", "Before unfreezing"),
        _slot(run, "after", "After unfreezing"),
    ]


def _slot(run: Run, which: Which, title: str) -> Slot:
    try:
        return Slot(which, title, checkpoint_path(run, which))
    except RunError as error:
        return Slot(which, title, reason=str(error))


class Classifier:
    """A checkpoint, ready to classify. Raises ThawError when it cannot be loaded."""

    def __init__(self, path: Path) -> None:
        from trainer.checkpoint import load_model
        from trainer.model import InputNormalize

        self._network, checkpoint = load_model(path)
        self._normalise = InputNormalize(checkpoint.preprocess).eval()
        self.classes: tuple[str, ...] = checkpoint.classes
        self.preprocess: Preprocess = checkpoint.preprocess
        # The first pass allocates and plans; without this the first photo would look slow.
        self.predict(Image.new("RGB", (self.preprocess.crop, self.preprocess.crop)))

    def predict(self, image: Image.Image) -> Prediction:
        """Classify one upright RGB photo (see `decode`)."""
        started = time.perf_counter()
        probabilities = self._probabilities(to_array(image, self.preprocess))
        seconds = time.perf_counter() - started
        ranked = sorted(zip(probabilities, self.classes, strict=True), key=lambda pair: -pair[0])
        return Prediction(tuple(Guess(label, value) for value, label in ranked[:TOP]), seconds)

    def _probabilities(self, photo: Photo) -> list[float]:
        import torch

        with torch.inference_mode():
            batch = torch.from_numpy(photo.copy()).unsqueeze(0)
            logits = self._network(self._normalise(batch))
            return logits.float().softmax(dim=1)[0].tolist()


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


def agreement(predictions: list[Prediction]) -> str:
    """Whether the networks give the same first answer; empty for fewer than two."""
    if len(predictions) < 2:
        return ""
    return "same answer" if len({each.label for each in predictions}) == 1 else "answers differ"

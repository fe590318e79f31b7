"""Classify photos with a model.onnx, as a library: numpy, Pillow and onnxruntime, never torch.

classifier = Classifier.load(Path("model.onnx"))
for result in classifier.classify([Path("a.jpg"), uploaded_file, pil_image]):
    print(result.photo, result.error or result.top[0])
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.metadata import INPUT, OUTPUTS, ModelFileError, ModelMetadata
from export.session import Device, Session, open_session
from trainer.preprocess import Photo, PhotoError, load_photo, to_array, upright_rgb
from trainer.process import usable_cores
from trainer.schema import Preprocess, ThawError

# An image that is open already is taken as it is. A large JPEG is decoded at reduced size where its
# path or file is given, as in training; the difference is a fraction of a grey level.
Source = Path | IO[bytes] | Image.Image
Decoded = tuple[str, Photo | PhotoError]  # the photo's name, and the photo or what is wrong with it

BATCH: Final = 32
TOP: Final = 5


@dataclass(frozen=True)
class Prediction:
    """One class; `index` is its place in the model's classes, `probability` lies in 0..1."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Result:
    """What a photo was taken for: the likeliest classes, best first; or why it was not read."""

    photo: str
    top: tuple[Prediction, ...] = ()
    error: str | None = None


class InferenceError(ThawError):
    """The model failed on photos that were read."""


class Classifier:
    """A model of Thaw, ready to classify. Any number of threads may use one at the same time."""

    def __init__(self, session: Session, metadata: ModelMetadata) -> None:
        self._session = session
        self.metadata = metadata

    @classmethod
    def load(cls, path: Path, device: Device = "auto") -> Classifier:
        """Open a model.onnx. Raises ModelFileError, or DeviceError (see `open_session`)."""
        try:
            session = open_session(path.read_bytes(), device)
            metadata = ModelMetadata.from_props(session.runtime.get_modelmeta().custom_metadata_map)
            _check_shapes(session, metadata)
        except OSError as error:
            raise ModelFileError(f"Cannot read the model {path}: {error.strerror}.") from error
        except ModelFileError as error:
            raise ModelFileError(f"{path} is not a model that Thaw can use: {error}") from error
        return cls(session, metadata)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.metadata.classes

    @property
    def provider(self) -> str:
        """What really runs the model, such as CPUExecutionProvider."""
        return self._session.provider

    @property
    def note(self) -> str | None:
        """Why a GPU that is there is not used, if so."""
        return self._session.note

    def classify(
        self, images: Iterable[Source], top: int = TOP, batch: int = BATCH
    ) -> list[Result]:
        """One result per image, in order; an image that cannot be read gets an error instead."""
        return list(self.stream(images, top, batch))

    def stream(
        self, images: Iterable[Source], top: int = TOP, batch: int = BATCH
    ) -> Iterator[Result]:
        """As `classify`, while the work goes on: photos are decoded ahead, in other threads.

        At most 3 batches are in memory. Raises InferenceError when the model itself fails.
        """
        pool = ThreadPoolExecutor(min(8, usable_cores() + 1), "decode")
        try:
            pending: deque[Future[Decoded]] = deque()
            for item in enumerate(images):
                pending.append(pool.submit(self._decode, item))
                if len(pending) == 3 * batch:
                    yield from self._results(_take(pending, batch), top)
            while pending:
                yield from self._results(_take(pending, batch), top)
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, item: tuple[int, Source]) -> Decoded:
        number, source = item
        name = str(source) if isinstance(source, Path) else f"photo {number + 1}"
        try:
            return name, _load(source, self.metadata.preprocess)
        except PhotoError as error:
            return name, error

    def _results(self, group: Sequence[Decoded], top: int) -> Iterator[Result]:
        photos = [photo for _, photo in group if not isinstance(photo, PhotoError)]
        rows = iter(self._probabilities(np.stack(photos)) if photos else ())
        for name, photo in group:
            if isinstance(photo, PhotoError):
                yield Result(name, error=str(photo))
            else:
                yield self._result(name, next(rows), top)

    def _probabilities(self, photos: Photo) -> NDArray[np.float32]:
        """uint8 [N, H, W, 3] -> float32 [N, classes]."""
        try:
            (probabilities,) = self._session.runtime.run([OUTPUTS[1]], {INPUT: photos})
        except Exception as error:  # ONNX Runtime has no common base class for its errors
            raise InferenceError(
                f"{self.provider} failed on a batch of {len(photos)} photos ({error}). A smaller "
                "--batch needs less memory."
            ) from error
        return probabilities

    def _result(self, name: str, probabilities: NDArray[np.float32], top: int) -> Result:
        if not np.isfinite(probabilities).all():
            return Result(name, error="the model gives no finite probabilities for it")
        best = np.argsort(-probabilities, kind="stable")[:top]
        return Result(
            name, tuple(Prediction(self.classes[i], int(i), float(probabilities[i])) for i in best)
        )


def _load(source: Source, preprocess: Preprocess) -> Photo:
    if not isinstance(source, Image.Image):
        return load_photo(source, preprocess)
    try:
        return to_array(upright_rgb(source), preprocess)
    except Exception as error:  # an image is decoded when first used, and raises nearly anything
        raise PhotoError(f"{type(error).__name__}: {error}") from error


def _check_shapes(session: Session, metadata: ModelMetadata) -> None:
    side = metadata.preprocess.crop
    inputs = [(i.name, i.type, i.shape[1:]) for i in session.runtime.get_inputs()]
    outputs = {o.name: o.shape[1:] for o in session.runtime.get_outputs()}
    expected = {name: [len(metadata.classes)] for name in OUTPUTS}
    if inputs != [(INPUT, "tensor(uint8)", [side, side, 3])] or outputs != expected:
        raise ModelFileError("its inputs and outputs do not fit its metadata; export it anew.")


def _take(pending: deque[Future[Decoded]], count: int) -> list[Decoded]:
    return [pending.popleft().result() for _ in range(min(count, len(pending)))]

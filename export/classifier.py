"""Classify photos with a model.onnx, as a library: numpy, Pillow and onnxruntime, never torch.

classifier = Classifier.load(Path("model.onnx"))
for result in classifier.classify([Path("a.jpg"), uploaded_file, pil_image]):
    print(result.photo, result.error or result.top[0])
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.metadata import INPUT, MOST_BYTES, OUTPUTS, ModelFileError, ModelMetadata
from export.seal import check_seal
from export.session import Device, Session, Tell, open_session
from trainer.files import read_bounded
from trainer.preprocess import Photo, PhotoError, load_photo, to_array, upright_rgb
from trainer.process import usable_cores
from trainer.schema import Preprocess, ThawError

# An image that is open already is taken as it is. A large JPEG is decoded at reduced size where its
# path or file is given, as in training; the difference is a fraction of a grey level.
Source = Path | IO[bytes] | Image.Image
Item = tuple[int, Source]  # an image and its place among those that were given
Decoded = tuple[str, Photo | PhotoError]  # the photo's name, and the photo or what is wrong with it
T = TypeVar("T")

# On a GPU. On the CPU photos are run one by one.
BATCH: Final = 64
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
    """A model of Thaw, ready to classify. Any number of threads may use one at the same time.

    On the CPU each core takes a photo of its own, decodes it and runs it: what lies between two
    layers of one photo stays in the core's cache, and no core waits for another. Only where there
    are fewer photos than cores all cores work on each layer.
    """

    def __init__(
        self,
        session: Session,
        metadata: ModelMetadata,
        content: bytes,
        batch: int | None,
        cores: int,
    ) -> None:
        self._session = session
        self.metadata = metadata
        self._content = content
        self._batch = batch
        self._cores = cores
        self._pool = ThreadPoolExecutor(self._cores, "photos")
        self._all_cores: Session | None = None
        self._opening = threading.Lock()

    @classmethod
    def load(
        cls,
        path: Path,
        device: Device = "auto",
        batch: int | None = None,
        tell: Tell | None = None,
    ) -> Classifier:
        """Open a model.onnx.

        `batch` is the number of photos that run at a time: BATCH on a GPU unless given, one on each
        core of the CPU unless given. `tell` is told what takes minutes.
        Raises ModelFileError, or DeviceError (see `open_session`).
        """
        try:
            return cls.of(read_bounded(path, MOST_BYTES), device, batch, tell)
        except OSError as error:
            raise ModelFileError(f"Cannot read the model {path}: {error.strerror}.") from error
        except ModelFileError as error:
            raise ModelFileError(f"{path} is not a model that Thaw can use: {error}") from error

    @classmethod
    def of(
        cls,
        content: bytes,
        device: Device = "auto",
        batch: int | None = None,
        tell: Tell | None = None,
        cores: int | None = None,
    ) -> Classifier:
        """As `load`, from what such a file holds; on `cores`, or all that there are."""
        sealed = check_seal(content)
        session = open_session(content, device, batch or BATCH, one_core=True, tell=tell)
        props = session.runtime.get_modelmeta().custom_metadata_map
        metadata = ModelMetadata.from_props(props, sealed)
        _check_shapes(session, metadata)
        return cls(session, metadata, content, batch, cores or usable_cores())

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
        self, images: Iterable[Source], top: int = TOP, batch: int | None = None
    ) -> list[Result]:
        """One result per image, in order; an image that cannot be read gets an error instead."""
        return list(self.stream(images, top, batch))

    def stream(
        self, images: Iterable[Source], top: int = TOP, batch: int | None = None
    ) -> Iterator[Result]:
        """As `classify`, while the work goes on. `batch` (see `load`) is for these images only.

        A few images are taken ahead, and at most 3 batches, or a photo for each core, are in
        memory. Raises InferenceError when the model itself fails.
        """
        batch = batch or self._batch
        rest = iter(images)
        first = list(islice(rest, self._cores))
        items = enumerate(chain(first, rest))
        if batch is None and self._session.buffers is None and len(first) == self._cores:
            yield from self._each(items, top)
        else:
            yield from self._in_batches(items, top, batch or BATCH)

    def _each(self, images: Iterable[Item], top: int) -> Iterator[Result]:
        """Photo by photo, each core its own."""

        def work(image: Item) -> Result:
            return next(self._results(self._session, [self._decode(image)], top))

        yield from self._ahead(work, images, 8 * self._cores)

    def _in_batches(self, images: Iterable[Item], top: int, batch: int) -> Iterator[Result]:
        """In batches, while the next are decoded."""
        session = self._session if self._session.buffers is not None else self._on_all_cores()
        with closing(self._ahead(self._decode, images, 2 * batch)) as decoded:
            while group := list(islice(decoded, batch)):
                yield from self._results(session, group, top)

    def _ahead(
        self, work: Callable[[Item], T], images: Iterable[Item], most: int
    ) -> Generator[T, None, None]:
        """What `work` gives for each, in order, with up to `most` at work or done in the pool."""
        pending: deque[Future[T]] = deque()
        try:
            for image in images:
                pending.append(self._pool.submit(work, image))
                if len(pending) == most:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _on_all_cores(self) -> Session:
        with self._opening:
            if self._all_cores is None:
                self._all_cores = open_session(self._content, "cpu")
            return self._all_cores

    def _decode(self, image: Item) -> Decoded:
        number, source = image
        name = str(source) if isinstance(source, Path) else f"photo {number + 1}"
        try:
            return name, _load(source, self.metadata.preprocess)
        except PhotoError as error:
            return name, error

    def _results(self, session: Session, group: Sequence[Decoded], top: int) -> Iterator[Result]:
        photos = [photo for _, photo in group if not isinstance(photo, PhotoError)]
        rows = iter(_probabilities(session, np.stack(photos)) if photos else ())
        for name, photo in group:
            if isinstance(photo, PhotoError):
                yield Result(name, error=str(photo))
            else:
                yield self._result(name, next(rows), top)

    def _result(self, name: str, probabilities: NDArray[np.float32], top: int) -> Result:
        if not np.isfinite(probabilities).all():
            return Result(name, error="the model gives no finite probabilities for it")
        best = np.argsort(-probabilities, kind="stable")[:top]
        return Result(
            name, tuple(Prediction(self.classes[i], int(i), float(probabilities[i])) for i in best)
        )


def _probabilities(session: Session, photos: Photo) -> NDArray[np.float32]:
    """uint8 [N, H, W, 3] -> float32 [N, classes]."""
    try:
        return session.probabilities(photos)
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        remedy = "A smaller --batch needs less memory." if len(photos) > 1 else ""
        raise InferenceError(
            f"{session.provider} failed on {len(photos)} photos ({error}). {remedy}".rstrip()
        ) from error


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

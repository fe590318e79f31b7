"""A visitor's photos and what the networks said of them: in memory, in batches, as CSV."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Final

import numpy as np
from PIL import Image

from explorer.classify import (
    Answer,
    Classifier,
    Look,
    Name,
    Network,
    Prediction,
    decode,
    thumbnail,
    to_jpeg,
)
from trainer.cli import inert_cell
from trainer.preprocess import MAX_PIXELS, PhotoError, photo_size
from trainer.process import usable_cores

BATCH: Final = 16
_PIXELS: Final = 2 * MAX_PIXELS  # of one batch: 600 MB once decoded


@dataclass(frozen=True)
class Upload:
    """A photo that came from the browser; `key` is its own even where names are alike."""

    key: str
    name: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Ready:
    """A network that is loaded; `stamp` changes with its file."""

    name: Name
    title: str
    network: Network
    stamp: str


@dataclass(frozen=True)
class Row:
    """What came of one photo: the answers of the networks and a small JPEG of it, or the error why
    it was not read."""

    upload: Upload
    answers: Mapping[Name, Answer] = field(default_factory=dict)
    picture: bytes = field(default=b"", repr=False)
    error: str = ""

    @property
    def predictions(self) -> dict[Name, Prediction]:
        return {name: one for name, one in self.answers.items() if isinstance(one, Prediction)}

    @property
    def agreement(self) -> str:
        return agreement(list(self.predictions.values()))


def changes(rows: Sequence[Row]) -> list[tuple[str, str, int]]:
    """Photos whose class unfreezing changed: (class before, class after, photos), most first."""
    pairs = Counter(
        (each["before"].label, each["after"].label)
        for each in (row.predictions for row in rows)
        if {"before", "after"} <= each.keys() and each["before"].label != each["after"].label
    )
    return [(*pair, count) for pair, count in pairs.most_common()]


def median_seconds(rows: Sequence[Row], name: Name) -> float | None:
    """The seconds that a network took for the middle one of the photos."""
    taken = [row.predictions[name].seconds for row in rows if name in row.predictions]
    return median(taken) if taken else None


def difference(row: Row) -> float | None:
    """The largest difference of a probability between the exported network and the checkpoint."""
    one, other = row.predictions.get("after"), row.predictions.get("onnx")
    if one is None or other is None or one.classes != other.classes:
        return None
    return float(np.abs(one.probabilities - other.probabilities).max())


def to_csv(rows: Sequence[Row], networks: Sequence[Name]) -> bytes:
    """One line for each photo, in UTF-8. No cell is a formula to a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{name}_{what}" for name in networks for what in _CSV_COLUMNS]
    writer.writerow(["file", *columns, "agreement", "error"])
    for row in rows:
        cells = [cell for name in networks for cell in _cells(row.predictions.get(name))]
        failed = [f"{name}: {one}" for name, one in row.answers.items() if isinstance(one, str)]
        error = row.error or "; ".join(failed)
        writer.writerow([inert_cell(row.upload.name), *cells, row.agreement, inert_cell(error)])
    return text.getvalue().encode()


_CSV_COLUMNS: Final = ("class", "probability", "milliseconds")


def _cells(one: Prediction | None) -> list[str]:
    if one is None:
        return [""] * len(_CSV_COLUMNS)
    best = one.guesses[0]
    return [inert_cell(best.label), f"{best.probability:.6f}", f"{1000 * one.seconds:.1f}"]


def agreement(predictions: Sequence[Prediction]) -> str:
    """Whether the networks give the same first answer; empty for fewer than two."""
    if len(predictions) < 2:
        return ""
    return "same answer" if len({each.label for each in predictions}) == 1 else "answers differ"


class Desk:
    """What is known of one visitor's photos, so that nothing is computed twice. In memory only."""

    def __init__(self) -> None:
        self._pictures: dict[str, bytes | str] = {}  # small JPEGs, or why there is none
        self._answers: dict[tuple[str, str], Answer] = {}
        self._looks: dict[tuple[str, str, str], Look] = {}

    def work(
        self, uploads: Sequence[Upload], networks: Sequence[Ready]
    ) -> Iterator[tuple[int, int]]:
        """Classify what has not been classified yet; yields, before each batch, how many photos
        are done, and of how many. Forgets all photos that are not among `uploads`."""
        self._forget({upload.key for upload in uploads})
        todo = [upload for upload in uploads if self._lacks(upload, networks)]
        done = 0
        for group in _batches(todo):
            yield done, len(todo)
            self._classify(group, networks)
            done += len(group)

    def row(self, upload: Upload, networks: Sequence[Ready]) -> Row:
        """What `work` has found out about a photo."""
        picture = self._pictures[upload.key]
        if isinstance(picture, str):
            return Row(upload, error=picture)
        found = {each.name: self._answers[each.stamp, upload.key] for each in networks}
        return Row(upload, found, picture)

    def look(self, upload: Upload, ready: Ready, label: str) -> Look | None:
        """Where the network sees `label`; None for one that keeps no gradients (model.onnx).
        Raises GradCamError."""
        if not isinstance(ready.network, Classifier) or label not in ready.network.classes:
            return None
        key = (ready.stamp, upload.key, label)
        if key not in self._looks:
            image = decode(io.BytesIO(upload.content), ready.network.preprocess)
            self._looks[key] = ready.network.look(image, label)
        return self._looks[key]

    def _forget(self, kept: set[str]) -> None:
        self._pictures = {key: one for key, one in self._pictures.items() if key in kept}
        self._answers = {key: one for key, one in self._answers.items() if key[1] in kept}
        self._looks = {key: one for key, one in self._looks.items() if key[1] in kept}

    def _lacks(self, upload: Upload, networks: Sequence[Ready]) -> bool:
        picture = self._pictures.get(upload.key)
        if isinstance(picture, str):
            return False
        known = all((each.stamp, upload.key) in self._answers for each in networks)
        return picture is None or not known

    def _classify(self, group: Sequence[Upload], networks: Sequence[Ready]) -> None:
        decoded = _decode_all(group, networks)
        read = [(one.key, image) for one, image in decoded if not isinstance(image, str)]
        for each in networks:
            new = [(key, image) for key, image in read if (each.stamp, key) not in self._answers]
            answers = each.network.predict([image for _, image in new]) if new else []
            for (key, _), answer in zip(new, answers, strict=True):
                self._answers[each.stamp, key] = answer
        for one, image in decoded:
            self._pictures[one.key] = image if isinstance(image, str) else to_jpeg(thumbnail(image))


def _batches(uploads: Sequence[Upload]) -> Iterator[list[Upload]]:
    """Up to BATCH photos, fewer of large ones: all photos of a batch are decoded at once."""
    group: list[Upload] = []
    pixels = 0
    for upload in uploads:
        more = _pixels(upload)
        if group and (len(group) == BATCH or pixels + more > _PIXELS):
            yield group
            group, pixels = [], 0
        group.append(upload)
        pixels += more
    if group:
        yield group


def _pixels(upload: Upload) -> int:
    try:
        width, height = photo_size(io.BytesIO(upload.content))
    except PhotoError:  # `decode` will tell the reason
        return 0
    return width * height


def _decode_all(
    group: Sequence[Upload], networks: Sequence[Ready]
) -> list[tuple[Upload, Image.Image | str]]:
    """Each photo, or the reason why it cannot be read."""
    # One that suits all: networks of one run hardly ever differ here.
    finest = max((each.network.preprocess for each in networks), key=lambda one: one.resize)

    def decoded(upload: Upload) -> tuple[Upload, Image.Image | str]:
        try:
            return upload, decode(io.BytesIO(upload.content), finest)
        except PhotoError as error:
            return upload, str(error)

    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(decoded, group))

"""Does the ONNX file give what PyTorch gave? Measured on the run's own validation photos."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from export.metadata import INPUT, OUTPUTS
from export.session import Session, open_session
from trainer.preprocess import Photo, PhotoError, load_photo
from trainer.runlog import Run
from trainer.schema import Preprocess, ThawError

PHOTOS: Final = 1000
BATCH: Final = 32
# Every one of these must give what the same photos gave within a batch of BATCH.
OTHER_BATCHES: Final = (1, 2, 7)
# For fp32. EfficientNet-B0 with trained weights reaches 3.3e-5 at logits of 17; float64 shows that
# PyTorch and ONNX Runtime have equal parts in it, which is what rounding alone looks like.
TOLERANCE: Final = 5e-5

Floats = NDArray[np.float32]


class ParityError(ThawError):
    """The ONNX file does not give what PyTorch gives, or this cannot be measured."""


@dataclass(frozen=True)
class Parity:
    """What was measured over `photos` photos.

    Differences are the largest absolute ones, between PyTorch and ONNX Runtime and between batch
    sizes. `top1_agreement` is a fraction, in which the `ties` count as agreeing.
    """

    photos: int
    photos_missing: int
    max_abs_logit_difference: float
    max_abs_probability_difference: float
    max_abs_batch_difference: float
    max_abs_logit: float
    tolerance: float
    top1_agreement: float
    ties: int
    provider: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ValidationPhotos:
    """Photos to compare on; `missing` more are named by the run and no longer there."""

    files: tuple[Path, ...]
    missing: int

    def batches(self, preprocess: Preprocess) -> Iterator[Photo]:
        """uint8 [n, H, W, 3], n <= BATCH, one in memory at a time; unreadable photos left out."""
        bar = tqdm(self.files, "comparing with PyTorch", unit="photo", leave=False, disable=None)
        arrays: list[Photo] = []
        for file in bar:
            try:
                arrays.append(load_photo(file, preprocess))
            except PhotoError:
                continue  # the figures tell how many photos were compared
            if len(arrays) == BATCH:
                yield np.stack(arrays)
                arrays = []
        if arrays:
            yield np.stack(arrays)


def validation_photos(run: Run, data: Path | None = None) -> ValidationPhotos:
    """Up to PHOTOS of the run's validation photos, spread evenly over all of them.

    `data` is where the run's data folder is now, if it has moved. Raises ParityError when none of
    the photos is there.
    """
    names = _validation_names(run)
    root = data or Path((run.info.get("dataset") or {}).get("root") or "")
    files = [root / PurePosixPath(name) for name in names]
    there = [file for file in files if file.is_file()]
    if not there:
        raise ParityError(
            f"The {len(files)} validation photos of run {run.run_id} are not in {root}, and without"
            " them the ONNX file cannot be compared with PyTorch. If the folder has moved, name "
            "its new place with --data DIR."
        )
    chosen = np.unique(np.linspace(0, len(there) - 1, PHOTOS).round().astype(int))
    return ValidationPhotos(tuple(there[i] for i in chosen), len(files) - len(there))


def _validation_names(run: Run) -> list[str]:
    # Both files list the validation photos; which of them a run has depends on its phases.
    path = next((p for n in ("after", "before") if (p := run.predictions(n)).is_file()), None)
    if path is None:
        raise ParityError(
            f"Run {run.run_id} has no predictions/after.npz, which names its validation photos: "
            "it has not finished an epoch. Export it once it has."
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = [str(name) for name in arrays["files"]]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ParityError(f"{path} is damaged: {error}.") from error
    if not names:
        raise ParityError(f"{path} names no validation photos.")
    return names


def measure(network: nn.Module, content: bytes, batches: Iterator[Photo], missing: int) -> Parity:
    """Run both on the same arrays; raises ParityError unless they agree.

    `network` maps uint8 [N, H, W, 3] to logits and probabilities, both [N, classes]; `content` is
    the ONNX file. Photos are taken from `batches`; `missing` is only recorded.
    """
    session = open_session(content, "cpu")
    expected: list[list[Floats]] = []
    actual: list[list[Floats]] = []
    batch_difference = 0.0
    for photos in batches:
        expected.append(_with_torch(network, photos))
        actual.append(_with_onnx(session, photos))
        if len(actual) == 1:
            batch_difference = _other_batches(session, photos, actual[0][0])
    if not expected:
        raise ParityError("None of the validation photos can be read, so nothing was compared.")
    logits, probabilities = (np.concatenate(part) for part in zip(*expected, strict=True))
    onnx_logits, onnx_probabilities = (np.concatenate(p) for p in zip(*actual, strict=True))
    _refuse_non_finite(PyTorch=(logits, probabilities), ONNX=(onnx_logits, onnx_probabilities))
    tolerance = tolerance_for(logits)
    same, ties = _top1(logits, onnx_logits, tolerance)
    figures = Parity(
        photos=len(logits),
        photos_missing=missing,
        max_abs_logit_difference=_largest(logits - onnx_logits),
        max_abs_probability_difference=_largest(probabilities - onnx_probabilities),
        max_abs_batch_difference=batch_difference,
        max_abs_logit=_largest(logits),
        tolerance=tolerance,
        top1_agreement=(same + ties) / len(logits),
        ties=ties,
        provider=session.provider,
    )
    _refuse_different(figures)
    return figures


def tolerance_for(logits: Floats) -> float:
    """The largest accepted difference of a logit.

    TOLERANCE for logits between 1 and 10 in size, where trained networks have theirs. Rounding
    grows with the size, so larger logits get more; networks with smaller ones (a fresh head) get
    less, or the comparison would accept anything.
    """
    size = _largest(logits)
    return TOLERANCE * max(0.01, min(size, 1.0), size / 10)


def _top1(logits: Floats, onnx_logits: Floats, tolerance: float) -> tuple[int, int]:
    """How many photos get the same class, and how many another one that PyTorch holds for as good:
    its logit is within the tolerance of PyTorch's highest."""
    rows = np.arange(len(logits))
    theirs = onnx_logits.argmax(1)
    same = logits.argmax(1) == theirs
    tied = ~same & (logits.max(1) - logits[rows, theirs] <= tolerance)
    return int(same.sum()), int(tied.sum())


def _with_torch(network: nn.Module, photos: Photo) -> list[Floats]:
    with torch.inference_mode():
        return [output.numpy() for output in network(torch.from_numpy(photos))]


def _with_onnx(session: Session, photos: Photo) -> list[Floats]:
    outputs: list[Floats] = session.runtime.run(list(OUTPUTS), {INPUT: photos})
    return outputs


def _other_batches(session: Session, photos: Photo, logits: Floats) -> float:
    """The largest difference that the size of the batch makes to a logit."""
    return max(
        _largest(_with_onnx(session, photos[:size])[0] - logits[:size])
        for size in OTHER_BATCHES
        if size <= len(photos)
    )


def _largest(values: Floats) -> float:
    return float(np.abs(values).max())


def _refuse_non_finite(**outputs: Sequence[Floats]) -> None:
    for runtime, arrays in outputs.items():
        if not all(np.isfinite(array).all() for array in arrays):
            raise ParityError(
                f"{runtime} gives outputs that are not finite numbers; the model is not exported. "
                "Train again with a smaller learning rate, or export another checkpoint."
            )


def _refuse_different(figures: Parity) -> None:
    # Written so that a NaN, which compares false, is refused too.
    alike = (
        figures.max_abs_logit_difference <= figures.tolerance
        and figures.max_abs_batch_difference <= figures.tolerance
        # Softmax never widens a difference, so the same bound holds.
        and figures.max_abs_probability_difference <= figures.tolerance
        and figures.top1_agreement == 1.0
    )
    if not alike:
        raise ParityError(
            f"The ONNX file does not give what PyTorch gives, so it was not written. Over "
            f"{figures.photos} validation photos: logits differ by up to "
            f"{figures.max_abs_logit_difference:.1e}, between batch sizes by "
            f"{figures.max_abs_batch_difference:.1e}, probabilities by "
            f"{figures.max_abs_probability_difference:.1e} (allowed: {figures.tolerance:.1e}); "
            f"the same class for {figures.top1_agreement:.2%}."
        )

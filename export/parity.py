"""Does the ONNX file give what PyTorch gave? Measured on the run's own validation photos."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from export.half import rounded_after_each_step
from export.metadata import INPUT, OUTPUTS, ModelFileError
from export.precision import (
    LARGEST_LOSS,
    SAME_CLASS,
    Parity,
    Precision,
    tie_for,
    tolerance_for,
)
from export.session import Session, open_session
from trainer.evidence import load_logits
from trainer.preprocess import Photo, PhotoError, load_photo
from trainer.runlog import Run
from trainer.schema import Preprocess, ThawError

PHOTOS: Final = 1000
BATCH: Final = 32
# Every one of these must give what the same photos gave within a batch of BATCH.
OTHER_BATCHES: Final = (1, 2, 7)

_LOAD: Final = """
import sys, onnxruntime
content = sys.stdin.buffer.read()
onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
"""

Floats = NDArray[np.float32]


class ParityError(ThawError):
    """The ONNX file does not give what PyTorch gives, or this cannot be measured."""


@dataclass(frozen=True)
class Batch:
    """Photos uint8 [n, H, W, 3], n <= BATCH, and the labels that they should get, int64 [n]."""

    photos: Photo
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class ValidationPhotos:
    """Photos to compare on, with their labels; `names` are all that the run validated on, of which
    `missing` are no longer there."""

    files: tuple[Path, ...]
    labels: NDArray[np.int64] = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    missing: int

    def batches(self, preprocess: Preprocess) -> Iterator[Batch]:
        """One in memory at a time; unreadable photos are left out."""
        bar = tqdm(self.files, "comparing with PyTorch", unit="photo", leave=False, disable=None)
        photos: list[Photo] = []
        labels: list[int] = []
        for file, label in zip(bar, self.labels, strict=True):
            try:
                photos.append(load_photo(file, preprocess))
            except PhotoError:
                continue  # the figures tell how many photos were compared
            labels.append(label)
            if len(photos) == BATCH:
                yield Batch(np.stack(photos), np.array(labels))
                photos, labels = [], []
        if photos:
            yield Batch(np.stack(photos), np.array(labels))


def validation_photos(run: Run, data: Path | None = None) -> ValidationPhotos:
    """Up to PHOTOS of the run's validation photos, spread evenly over all of them.

    `data` is where the run's data folder is now, if it has moved. Raises ParityError when none of
    the photos is there, and EvidenceError when what names them is damaged.
    """
    names, labels = _validation(run)
    root = data or Path((run.info.get("dataset") or {}).get("root") or "")
    files = [root / PurePosixPath(name) for name in names]
    there = [row for row, file in enumerate(files) if file.is_file()]
    if not there:
        raise ParityError(
            f"The {len(files)} validation photos of run {run.run_id} are not in {root}, and without"
            " them the ONNX file cannot be compared with PyTorch. If the folder has moved, name "
            "its new place with --data DIR."
        )
    places = np.unique(np.linspace(0, len(there) - 1, PHOTOS).round().astype(int))
    chosen = [there[place] for place in places]
    return ValidationPhotos(
        files=tuple(files[row] for row in chosen),
        labels=labels[chosen],
        names=names,
        missing=len(files) - len(there),
    )


def _validation(run: Run) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names and labels of the photos that the run was validated on."""
    # Both files list them; which of them a run has depends on its phases.
    path = next((p for n in ("after", "before") if (p := run.predictions(n)).is_file()), None)
    if path is None:
        raise ParityError(
            f"Run {run.run_id} has no predictions/after.npz, which names its validation photos: "
            "it has not finished an epoch. Export it once it has."
        )
    names, labels, _ = load_logits(path)
    return names, labels


# --- the comparison ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answers:
    """Logits and probabilities, float32 [N, classes]."""

    logits: Floats
    probabilities: Floats

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.logits).all() and np.isfinite(self.probabilities).all())


@dataclass(frozen=True)
class _Comparison:
    """What PyTorch gave, and what each way of running the file gave, the file as it is first."""

    labels: NDArray[np.int64]
    wanted: _Answers
    given: tuple[_Answers, ...]
    between_batches: float
    provider: str


def measure(
    network: nn.Module,
    content: bytes,
    batches: Iterator[Batch],
    missing: int,
    precision: Precision = "fp32",
    kept: tuple[str, ...] = (),
) -> Parity:
    """Run both on the same arrays; raises ParityError unless they agree as `precision` demands.

    `network` maps uint8 [N, H, W, 3] to logits and probabilities, both [N, classes]; `content` is
    the ONNX file. Photos are taken from `batches`; `missing` and `kept` are only recorded. A CPU
    computes in float32 with the weights of an fp16 file, so that file is also run with all values
    rounded after each step, as a GPU has them, and the worse of the two figures counts.
    """
    both = _run(network, content, batches, precision)
    wanted, own = both.wanted.logits, both.given[0].logits
    size = _largest(wanted)
    same, ties = min(
        (_top1(wanted, g.logits, tie_for(size, precision)) for g in both.given), key=sum
    )
    figures = Parity(
        photos=len(wanted),
        photos_missing=missing,
        max_abs_logit_difference=max(_largest(wanted - g.logits) for g in both.given),
        max_abs_probability_difference=max(
            _largest(both.wanted.probabilities - g.probabilities) for g in both.given
        ),
        max_abs_batch_difference=both.between_batches,
        max_abs_logit=size,
        tolerance=tolerance_for(size, precision),
        top1_agreement=(same + ties) / len(wanted),
        ties=ties,
        accuracy=float((own.argmax(1) == both.labels).mean()),
        accuracy_pytorch=float((wanted.argmax(1) == both.labels).mean()),
        provider=both.provider,
        precision=precision,
        kept=kept,
    )
    if not figures.passed:
        raise ParityError(_refusal(figures))
    return figures


def _run(
    network: nn.Module, content: bytes, batches: Iterator[Batch], precision: Precision
) -> _Comparison:
    if precision == "fp16":
        _refuse_crash(content)
    sessions = [_open(content)]
    if precision == "fp16":
        sessions.append(_open(rounded_after_each_step(content)))
    labels: list[NDArray[np.int64]] = []
    wanted: list[_Answers] = []
    given: list[list[_Answers]] = [[] for _ in sessions]
    between_batches = 0.0
    for batch in batches:
        if not labels:
            _try_extremes(network, sessions, batch.photos, precision)
            between_batches = max(_other_batches(one, batch.photos) for one in sessions)
        labels.append(batch.labels)
        wanted.append(_with_torch(network, batch.photos))
        for session, answers in zip(sessions, given, strict=True):
            answers.append(_with_onnx(session, batch.photos))
    if not labels:
        raise ParityError("None of the validation photos can be read, so nothing was compared.")
    return _Comparison(
        np.concatenate(labels),
        _finite(_joined(wanted), "PyTorch", precision),
        tuple(_finite(_joined(answers), "ONNX", precision) for answers in given),
        between_batches,
        sessions[0].provider,
    )


def _refuse_crash(content: bytes) -> None:
    """ONNX Runtime dies of some fp16 graphs on a CPU, such as a ViT's, and its process with it: so
    another one tries first."""
    command = [sys.executable, "-I", "-c", _LOAD]
    status = subprocess.run(command, input=content, capture_output=True, check=False).returncode
    if status not in (0, 1):  # 1 is an exception, which `_open` explains
        raise ParityError(
            f"ONNX Runtime {onnxruntime.__version__} crashes when it loads this network in fp16 on "
            "a CPU, so nothing could be compared and the file was not written. Use --precision "
            "fp32."
        )


def _open(content: bytes) -> Session:
    try:
        return open_session(content, "cpu")
    except ModelFileError as error:
        raise ParityError(f"The ONNX file does not run, so it was not written: {error}") from error


def _top1(logits: Floats, onnx_logits: Floats, tie: float) -> tuple[int, int]:
    """How many photos get the same class, and how many another one that PyTorch holds for as good:
    its logit is no further than `tie` from PyTorch's highest."""
    rows = np.arange(len(logits))
    theirs = onnx_logits.argmax(1)
    same = logits.argmax(1) == theirs
    tied = ~same & (logits.max(1) - logits[rows, theirs] <= tie)
    return int(same.sum()), int(tied.sum())


def _with_torch(network: nn.Module, photos: Photo) -> _Answers:
    with torch.inference_mode():
        return _Answers(*(output.numpy() for output in network(torch.from_numpy(photos))))


def _with_onnx(session: Session, photos: Photo) -> _Answers:
    return _Answers(*session.runtime.run(list(OUTPUTS), {INPUT: photos}))


def _joined(answers: Sequence[_Answers]) -> _Answers:
    return _Answers(
        np.concatenate([one.logits for one in answers]),
        np.concatenate([one.probabilities for one in answers]),
    )


def _other_batches(session: Session, photos: Photo) -> float:
    """The largest difference that the size of the batch makes to a logit."""
    together = _with_onnx(session, photos).logits
    return max(
        _largest(_with_onnx(session, photos[:size]).logits - together[:size])
        for size in OTHER_BATCHES
        if size <= len(photos)
    )


def _largest(values: Floats) -> float:
    return float(np.abs(values).max())


# --- refusals ---------------------------------------------------------------------------------


def _try_extremes(
    network: nn.Module, sessions: Sequence[Session], photos: Photo, precision: Precision
) -> None:
    """A black photo, a saturated one and noise reach values that no photograph does."""
    noise = np.random.default_rng(0).integers(0, 256, photos.shape[1:], np.uint8)
    extremes = np.stack([np.zeros_like(noise), np.full_like(noise, 255), noise])
    _finite(_with_torch(network, extremes), "PyTorch", precision)
    for session in sessions:
        _finite(_with_onnx(session, extremes), "ONNX", precision)


def _finite(answers: _Answers, runtime: str, precision: Precision) -> _Answers:
    if answers.finite:
        return answers
    if runtime == "ONNX" and precision == "fp16":
        raise ParityError(
            "In fp16 the model gives outputs that are not finite numbers: values inside the "
            "network exceed 65504, the largest that half precision can hold. It was not written; "
            "use --precision fp32."
        )
    raise ParityError(
        f"{runtime} gives outputs that are not finite numbers; the model is not exported. "
        "Train again with a smaller learning rate, or export another checkpoint."
    )


def _refusal(figures: Parity) -> str:
    if figures.precision == "int8" and figures.max_abs_batch_difference <= figures.tolerance:
        kept = ", ".join(figures.kept) or "nothing"
        return (
            f"In int8 the model has {figures.accuracy:.2%} of {figures.photos} validation photos "
            f"right, PyTorch {figures.accuracy_pytorch:.2%}: it loses {100 * figures.loss:.2f} "
            f"points, and {100 * LARGEST_LOSS:.0f} is the most allowed, so it was not written. In "
            f"float32 already: {kept}. Use --precision fp16 or fp32."
        )
    share = SAME_CLASS.get(figures.precision)
    needed = f" (needed: {share:.1%})" if share is not None else ""
    return (
        f"The ONNX file does not give what PyTorch gives, so it was not written. Over "
        f"{figures.photos} validation photos: logits differ by up to "
        f"{figures.max_abs_logit_difference:.1e}, between batch sizes by "
        f"{figures.max_abs_batch_difference:.1e}, probabilities by "
        f"{figures.max_abs_probability_difference:.1e} (allowed: {figures.tolerance:.1e}); "
        f"the same class for {figures.top1_agreement:.2%}{needed}."
    )

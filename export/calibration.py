"""What quantisation must know of a network: the values that its layers see on training photos."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from tqdm import tqdm

from export.metadata import INPUT
from export.session import open_session
from trainer.config import Config
from trainer.listing import list_photos
from trainer.preprocess import Photo, PhotoError, load_photo
from trainer.process import usable_cores
from trainer.runlog import Run
from trainer.schema import Preprocess, ThawError

PHOTOS: Final = 192
LEVELS: Final = 256  # what 8 bits can tell apart

_SAMPLES: Final = 512  # values of a tensor that are kept of each photo
# How much of a tensor's range may be cut off on either side.
_SHARES: Final = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05)
_FILES: Final = ("split_file", "exclude_file")
_SPLIT: Final = (*_FILES, "split_seed", "val_fraction", "limit", "group_by")

Floats = NDArray[np.float32]


class CalibrationError(ThawError):
    """There are no training photos to calibrate on."""


# --- photos -----------------------------------------------------------------------------------


def training_photos(
    run: Run, validation: Sequence[str], preprocess: Preprocess, data: Path | None = None
) -> Photo:
    """Up to PHOTOS of the run's training photos, spread evenly over all of them: uint8
    [N, H, W, 3].

    The split is made again, which gives the same one; none of `validation`, the names that the run
    validated on, is among them in any case. `data` is where the run's data folder is now. Raises
    DataError or CalibrationError.
    """
    root = data or Path((run.info.get("dataset") or {}).get("root") or "")
    config = run.info.get("config") or {}
    split = {name: config[name] for name in _SPLIT if config.get(name) is not None}
    split |= {name: Path(split[name]) for name in _FILES if name in split}
    listing = list_photos(Config("transfer", data=str(root), **split))
    known = set(validation)
    names = [i.file for i in listing.items if i.split == "train" and i.file not in known]
    if not names:
        raise CalibrationError(
            f"{root} holds no training photos of run {run.run_id}, and int8 needs some to be "
            "calibrated on. Use --precision fp16 or fp32."
        )
    chosen = np.unique(np.linspace(0, len(names) - 1, PHOTOS).round().astype(int))
    return _decoded([root / PurePosixPath(names[i]) for i in chosen], preprocess)


def _decoded(files: Sequence[Path], preprocess: Preprocess) -> Photo:
    def load(file: Path) -> Photo | None:
        try:
            return load_photo(file, preprocess)
        except PhotoError:
            return None

    with ThreadPoolExecutor(usable_cores()) as pool:
        photos = [photo for photo in pool.map(load, files) if photo is not None]
    if not photos:
        raise CalibrationError(f"None of {len(files)} training photos such as {files[0]} is one.")
    return np.stack(photos)


# --- what layers see --------------------------------------------------------------------------


@dataclass(frozen=True)
class Observed:
    """Of each tensor: the `ranges` (low, high) for its 256 levels, and `means` of its channels."""

    ranges: Mapping[str, tuple[float, float]]
    means: Mapping[str, Floats] = field(repr=False)


def observe(model: onnx.ModelProto, tensors: Sequence[str], photos: Photo) -> Observed:
    """Run the photos, uint8 [N, H, W, 3], one by one, and look at these tensors."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    known = {output.name for output in model.graph.output}
    for name in tensors:
        if name not in known:
            info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            exposed.graph.output.append(info)
    session = open_session(exposed.SerializeToString(), "cpu").runtime
    numbers = np.random.default_rng(0)
    seen: dict[str, _Seen] = defaultdict(_Seen)
    for photo in tqdm(photos, "calibrating", unit="photo", leave=False, disable=None):
        for name, values in zip(
            tensors, session.run(list(tensors), {INPUT: photo[None]}), strict=True
        ):
            seen[name].add(values, numbers)
    used_as = _activations(model)
    ranges = {name: seen[name].best_range(used_as.get(name, _as_it_is)) for name in tensors}
    return Observed(ranges, {name: seen[name].mean() for name in tensors})


class _Seen:
    """The values of one tensor, so far."""

    def __init__(self) -> None:
        self._low, self._high = 0.0, 0.0  # zero must always be one of the levels
        self._samples: list[Floats] = []
        self._means: list[Floats] = []

    def add(self, values: Floats, numbers: np.random.Generator) -> None:
        self._low = min(self._low, float(values.min()))
        self._high = max(self._high, float(values.max()))
        flat = values.ravel()
        some = numbers.integers(0, flat.size, _SAMPLES) if flat.size > _SAMPLES else slice(None)
        self._samples.append(flat[some])
        # Channels come second in what convolutions see, and last in what linear layers see.
        axes = (0, 2, 3) if values.ndim == 4 else tuple(range(values.ndim - 1))
        self._means.append(values.mean(axis=axes))

    def mean(self) -> Floats:
        return np.mean(self._means, axis=0)

    def best_range(self, used_as: Activation) -> tuple[float, float]:
        """The range whose 256 levels come closest to the values, as the network uses them.

        A few outliers would otherwise make the levels coarse for all others, and what an activation
        makes zero of needs none.
        """
        values = np.concatenate(self._samples)
        wanted = used_as(values)
        errors = {
            (low, high): float(np.square(used_as(_rounded(values, low, high)) - wanted).mean())
            for low, high in product(_cut(self._low), _cut(self._high))
        }
        return min(errors, key=lambda ends: errors[ends])


def _cut(end: float) -> list[float]:
    return [end * share for share in _SHARES] if end else [0.0]


def _rounded(values: Floats, low: float, high: float) -> Floats:
    """To the nearest of the levels, of which one is zero."""
    step = (high - low) / (LEVELS - 1) or 1.0
    zero = round(-low / step)
    levels = np.clip(np.rint(values / np.float32(step)), -zero, LEVELS - 1 - zero)
    return levels * np.float32(step)


# --- activations ------------------------------------------------------------------------------

Activation = Callable[[Floats], Floats]


def _as_it_is(values: Floats) -> Floats:
    return values


def _silu(values: Floats) -> Floats:
    return values / (1 + np.exp(np.minimum(-values, 80)))


def _hard_swish(values: Floats) -> Floats:
    return values * np.clip(values / 6 + 0.5, 0, 1)


_USES: Final[Mapping[frozenset[str], Activation]] = {
    frozenset({"Sigmoid", "Mul"}): _silu,
    frozenset({"Swish"}): _silu,
    frozenset({"HardSwish"}): _hard_swish,
}


def _activations(model: onnx.ModelProto) -> dict[str, Activation]:
    """What is made of each tensor that goes into nothing but an activation."""
    readers: dict[str, set[str]] = defaultdict(set)
    node: Any
    for node in model.graph.node:
        for name in node.input:
            readers[name].add(node.op_type)
    uses = {name: _USES.get(frozenset(types)) for name, types in readers.items()}
    return {name: use for name, use in uses.items() if use is not None}

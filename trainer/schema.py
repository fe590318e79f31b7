"""The vocabulary shared by trainer, export and explorer: phases, records, file names, errors.

Standard library only, so that reading a run never costs an import of torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

SCHEMA_VERSION: Final = 1
# In seconds since 1970, the year 2242: what is later is no time, and dates of pandas 2 end in 2262.
LATEST_TIME: Final = 2.0**33

Phase = Literal["direct", "scratch", "transfer", "finetune"]
PHASES: Final[tuple[Phase, ...]] = ("direct", "scratch", "transfer", "finetune")

Status = Literal["running", "done", "interrupted", "failed"]

RUN_JSON: Final = "run.json"
METRICS_JSONL: Final = "metrics.jsonl"
CHECKPOINTS: Final = "checkpoints"
PREDICTIONS: Final = "predictions"
MODEL_ONNX: Final = "model.onnx"
PARITY_JSON: Final = "parity.json"
TEST_JSON: Final = "test.json"
LR_FIND: Final = "lr-find"  # the folder beside the runs with what the finder measured


class ThawError(Exception):
    """A mistake the user can mend: says what is wrong, where, and the remedy.

    Command lines print it without a traceback and exit with status 2.
    """


@dataclass(frozen=True)
class Preprocess:
    """How a photo becomes an input tensor; the same for training, export, inference and the app.

    The photo is turned upright (EXIF), converted to RGB (transparency over white), resized so that
    its shorter side is `resize` pixels, and centre-cropped to `crop` x `crop`. `mean` and `std`
    are per channel, for pixel values scaled to 0..1; they are applied by the network's own first
    step (inside the ONNX graph), so arrays stay uint8 until then.
    """

    resize: int = 256
    crop: int = 224
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize <= 4096:
            raise ThawError(
                f"Preprocess: crop {self.crop} and resize {self.resize} must satisfy "
                "1 <= crop <= resize <= 4096."
            )
        if self.interpolation not in ("bilinear", "bicubic", "lanczos"):
            raise ThawError(f"Preprocess: unknown interpolation {self.interpolation!r}.")
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if len(self.mean) != 3 or len(self.std) != 3 or not finite or min(self.std) <= 0:
            raise ThawError(
                "Preprocess: mean and std need three finite values each, std above zero."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for run.json, checkpoints and ONNX metadata."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocess:
        """Inverse of `to_dict`; raises ThawError where the content is not a preprocessing."""
        try:
            return cls(
                resize=int(data["resize"]),
                crop=int(data["crop"]),
                interpolation=data["interpolation"],
                mean=_triple(data["mean"]),
                std=_triple(data["std"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ThawError(f"The stored preprocessing is damaged ({error!r}).") from error


def _triple(values: Any) -> tuple[float, float, float]:
    r, g, b = (float(v) for v in values)
    return r, g, b


@dataclass(frozen=True)
class EpochRecord:
    """One "epoch" line of metrics.jsonl.

    `epoch` counts over the whole lineage, `phase_epoch` within the phase; phase_epoch 0 is an
    evaluation before any step, so its training fields are None. Accuracies are fractions 0..1,
    losses mean cross-entropy in nats, `time` seconds since the Unix epoch. Of imported logs, what
    they do not hold is NaN (null in the file), or 0 of the fields that are whole numbers.
    """

    phase: Phase
    epoch: int
    phase_epoch: int
    train_loss: float | None
    train_acc: float | None
    val_loss: float
    val_acc: float
    val_top5: float
    val_macro_f1: float
    lr_head: float
    lr_backbone: float
    trainable_params: int
    seconds: float
    images_per_second: float
    peak_memory_bytes: int
    time: float

    @property
    def rank(self) -> tuple[float, float]:
        """The best epoch is the one of highest rank: accuracy first, then the lower loss."""
        return _or_worst(self.val_acc), _or_worst(-self.val_loss)

    def to_dict(self) -> dict[str, Any]:
        return {"event": "epoch"} | asdict(self)


def _or_worst(value: float) -> float:
    return -math.inf if math.isnan(value) else value


@dataclass(frozen=True)
class Unfreezing:
    """Further layers that are freed within a phase, after `epoch` of the lineage. `unfrozen_layers`
    and `trainable_params` are of all that trains from then on."""

    epoch: int
    unfrozen_layers: tuple[str, ...]
    trainable_params: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"unfrozen_layers": list(self.unfrozen_layers)}


@dataclass(frozen=True)
class PhaseRecord:
    """One entry of run.json's "phases"; `last_epoch` is None until the phase has ended.

    `gradual` is what is to be freed after its first epochs, where it frees layers gradually.
    """

    name: Phase
    first_epoch: int
    last_epoch: int | None
    unfrozen_layers: tuple[str, ...]
    trainable_params: int
    gradual: tuple[Unfreezing, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        entry = asdict(self) | {"unfrozen_layers": list(self.unfrozen_layers)}
        del entry["gradual"]
        later = [unfreezing.to_dict() for unfreezing in self.gradual]
        return entry | ({"gradual": later} if later else {})


EPOCH_FIELDS: Final = tuple(field.name for field in fields(EpochRecord))

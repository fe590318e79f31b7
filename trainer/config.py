"""What a training is asked to do: one frozen dataclass, checked at once."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from trainer.schema import PHASES, Phase, ThawError

SAMPLE: Final = "sample"
# What --data may name instead of a folder; `trainer.datasets` finds all but the first.
NAMED_DATA: Final = (SAMPLE, "oregon", "food101", "signs")

ScheduleName = Literal["constant", "exponential", "step", "cosine"]
OptimizerName = Literal["adam", "adamw", "sgd"]
DeviceName = Literal["auto", "cpu", "cuda"]
ColorMode = Literal["random", "fixed"]
Views = int | Literal["exact", "auto"]
Precision = Literal["fp32", "bf16"]
ClassWeights = Literal["off", "balanced"]
Grouping = Literal["track"]
Tracker = Literal["mlflow"]

# Frames of one track are nearly the same photo: with some of them in train and some in val, the
# validation would ask for what was learnt by heart.
_GROUPED: Final[dict[str, Grouping]] = {"signs": "track"}


class ConfigError(ThawError):
    """A flag with a value that makes no sense, alone or beside another flag."""


def default_cache_dir() -> Path:
    """`$THAW_CACHE`, or `thaw` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("THAW_CACHE") or Path(base) / "thaw")


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the epoch; see `trainer.schedule`."""

    name: ScheduleName = "constant"
    decay: float = 0.3
    drop: float = 0.5
    epochs_drop: int = 10
    warmup: int = 0

    def __post_init__(self) -> None:
        _one_of("--schedule", self.name, get_args(ScheduleName))
        _check(self.decay >= 0, "--decay", self.decay, "zero or more")
        _check(0 < self.drop <= 1, "--drop", self.drop, "above 0, at most 1")
        _check(self.epochs_drop >= 1, "--epochs-drop", self.epochs_drop, "1 or more")
        _check(self.warmup >= 0, "--warmup", self.warmup, "zero or more epochs")


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the training photos; zeros (and contrast 1) switch each off.

    `brightness` is the largest shift as a fraction of the full range, `contrast` the largest
    factor (its inverse is the smallest), `rotation` the largest angle as a fraction of a turn,
    `crop_from` the side in pixels of the square that crops are taken from, `noise` the standard
    deviation of Gaussian noise in 0..255 units. With color "fixed" every photo gets exactly
    `brightness` and `contrast`.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    color: ColorMode = "random"
    rotation: float = 0.0
    crop_from: int | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        _check(0 <= self.brightness <= 1, "--brightness", self.brightness, "from 0 to 1")
        _check(self.contrast >= 1, "--contrast", self.contrast, "1 or more")
        _one_of("--color", self.color, get_args(ColorMode))
        _check(0 <= self.rotation <= 0.5, "--rotation", self.rotation, "0 to 0.5 (of a turn)")
        _check(
            self.crop_from is None or self.crop_from <= 4096,
            "--crop-from",
            self.crop_from,
            "at most 4096 pixels",
        )
        _check(self.noise >= 0, "--noise", self.noise, "zero or more")

    @property
    def active(self) -> bool:
        return self != Augmentation(color=self.color)


# Rates that are safe for a fresh head and for pretrained layers with Adam.
DEFAULT_LR: Final[dict[Phase, float]] = {
    "direct": 0.0,
    "scratch": 1e-3,
    "transfer": 1e-3,
    "finetune": 1e-5,
}


@dataclass(frozen=True)
class Config:
    """All settings of one training. None means: not given, take the default or the parent's.

    `parent` is the run to start from; a transfer phase with a parent trains its head further.
    The network sees `size` x `size` pixels, by default as many as its weights were trained with,
    and has `outputs` outputs, by default one for each class.
    `views` is "exact" where every epoch has its own view of each photo, or the number of views that
    are used in turn; "auto" is exact and says where fewer would be much faster.
    `precision` bf16 lets the frozen part run in bfloat16 where that is clearly faster; what comes
    out of it is then a few percent off. `cache_limit` is in bytes. `recipe` is the recipe and the
    stage that asked for this training, such as "oregon-transfer/transfer", `stand_in_for` the data
    that it is about, where other data was given. `track` names where the run is mirrored to as it
    is trained, see `trainer.track`.
    `label_smoothing` and `class_weights` change what training minimises, never what is recorded;
    see `trainer.loop.Objective`. `layer_decay` is the factor of the learning rate from one block to
    the next further from the head, see `trainer.depth`; `gradual` says what is freed later in a
    finetune phase, as `stages` has it.

    `group_by` "track" keeps photos named track_frame together in the split; `exclude_file` lists
    photos that are left out after the split, so that all others stay where they are.

    Raises ConfigError with the flag, its value and the remedy.
    """

    phase: Phase
    data: str | None = None
    split_file: Path | None = None
    group_by: Grouping | None = None
    exclude_file: Path | None = None
    split_seed: int = 0
    val_fraction: float = 0.3
    limit: int | None = None
    strict: bool = False
    arch: str | None = None
    weights: str = "imagenet"
    head: tuple[int, ...] | None = None
    pool: Literal["avg", "max"] | None = None
    size: int | None = None
    outputs: int | None = None
    parent: str | None = None
    epochs: int = 10
    transfer_epochs: int | None = None
    batch_size: int = 32
    lr: float | None = None
    transfer_lr: float | None = None
    optimizer: OptimizerName = "adam"
    unfreeze: str = "20"
    schedule: Schedule = field(default_factory=Schedule)
    augmentation: Augmentation = field(default_factory=Augmentation)
    device: DeviceName = "auto"
    cache: bool = True
    cache_dir: Path = field(default_factory=default_cache_dir)
    cache_limit: int = 20 * 10**9
    views: Views = "exact"
    precision: Precision = "fp32"
    seed: int = 0
    run_name: str | None = None
    runs_dir: Path = Path("runs")
    early_stop: int | None = None
    label_smoothing: float = 0.0
    class_weights: ClassWeights = "off"
    layer_decay: float = 1.0
    gradual: str | None = None
    recipe: str | None = None
    stand_in_for: str | None = None
    track: Tracker | None = None

    def __post_init__(self) -> None:
        _one_of("--phase", self.phase, PHASES)
        if self.track is not None:
            _one_of("--track", self.track, get_args(Tracker))
        if self.group_by is not None:
            _one_of("--group-by", self.group_by, get_args(Grouping))
        _check(0 < self.val_fraction < 1, "--val-fraction", self.val_fraction, "between 0 and 1")
        _check(
            self.limit is None or self.limit >= 2, "--limit", self.limit, "2 or more photos a class"
        )
        _check(self.epochs >= 1, "--epochs", self.epochs, "1 or more")
        _check(
            (self.transfer_epochs or 1) >= 1, "--transfer-epochs", self.transfer_epochs, "1 or more"
        )
        _check(self.batch_size >= 1, "--batch-size", self.batch_size, "1 or more")
        for flag, rate in (("--lr", self.lr), ("--transfer-lr", self.transfer_lr)):
            # Far above what is of use, and below what float32 optimizers cannot hold.
            _check(rate is None or 0 < rate <= 1e30, flag, rate, "above zero, at most 1e30")
        _one_of("--optimizer", self.optimizer, get_args(OptimizerName))
        _one_of("--pool", self.pool or "avg", ("avg", "max"))
        _check(self.size is None or 1 <= self.size <= 4096, "--size", self.size, "1 to 4096 pixels")
        _check(self.outputs is None or self.outputs >= 2, "--outputs", self.outputs, "2 or more")
        _one_of("--device", self.device, get_args(DeviceName))
        _check(
            min(self.head or (1,)) >= 1,
            "--head",
            self.head,
            "'linear' or layer sizes such as 512,256",
        )
        _check(self.cache_limit >= 0, "--cache-limit", self.cache_limit, "zero or more bytes")
        good = self.views >= 1 if isinstance(self.views, int) else self.views in ("exact", "auto")
        _check(good, "--views", self.views, "exact, auto, or a number of 1 or more")
        _one_of("--precision", self.precision, get_args(Precision))
        _check(0 <= self.seed < 2**63, "--seed", self.seed, "zero or more")
        _check(
            self.early_stop is None or self.early_stop >= 1,
            "--early-stop",
            self.early_stop,
            "1 or more epochs",
        )
        self._check_objective()
        self._check_phase()

    def _check_objective(self) -> None:
        _check(
            0 <= self.label_smoothing < 1,
            "--label-smoothing",
            self.label_smoothing,
            "from 0 to below 1",
        )
        _one_of("--class-weights", self.class_weights, get_args(ClassWeights))
        _check(0 < self.layer_decay <= 1, "--layer-decay", self.layer_decay, "above 0, at most 1")
        if any(not after < self.epochs for after, _ in self.stages):
            raise ConfigError(
                f"--gradual {self.gradual}: frees layers after the last of {self.epochs} epochs. "
                "Give more --epochs, or free them sooner."
            )

    def _check_phase(self) -> None:
        if self.parent is not None and self.phase not in ("transfer", "finetune"):
            raise ConfigError(f"--from belongs to --phase transfer or finetune, not {self.phase}.")
        if self.phase != "finetune":
            for flag, value in (
                ("--transfer-epochs", self.transfer_epochs),
                ("--transfer-lr", self.transfer_lr),
                ("--layer-decay", None if self.layer_decay == 1 else self.layer_decay),
                ("--gradual", self.gradual),
            ):
                if value is not None:
                    raise ConfigError(f"{flag} belongs to --phase finetune, not {self.phase}.")

    @property
    def distinct_views(self) -> int | None:
        """How many views of a photo are used in turn; None: every epoch has its own."""
        return self.views if isinstance(self.views, int) else None

    @property
    def stages(self) -> tuple[tuple[int, str], ...]:
        """What a finetune phase frees: (after how many of its epochs, what) each, `unfreeze` first.

        Raises ConfigError where `gradual` cannot be read or its epochs do not rise.
        """
        found = [(0, self.unfreeze)]
        for text in self.gradual.split(",") if self.gradual is not None else ():
            which, _, after = (part.strip() for part in text.rpartition("@"))
            if not which or (whole(after) or 0) <= found[-1][0]:
                raise ConfigError(
                    f"--gradual {self.gradual}: must be what is freed @ after which epoch, the "
                    "epochs rising from 1, such as 20@5,all@10."
                )
            found.append((int(after), which))  # whole, as was just seen
        for _, which in found:
            wrong = which.isdecimal() and whole(which) is None
            _check(not wrong, "--unfreeze", which, "a number of layers, all, or a module's name")
        return tuple(found)

    @property
    def grouping(self) -> Grouping | None:
        """What Thaw's own split keeps together; a split file decides alone."""
        if self.split_file is not None:
            return None
        return self.group_by or _GROUPED.get(self.data or "")

    @property
    def learning_rate(self) -> float:
        return DEFAULT_LR[self.phase] if self.lr is None else self.lr

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for run.json."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()} | {
            "lr": self.learning_rate,
            "group_by": self.grouping,
        }


def whole(text: str) -> int | None:
    """The whole number that a flag was given, of at most nine digits; None where it is none."""
    return int(text) if text.isdecimal() and len(text) <= 9 else None


def _one_of(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{flag} {value}: choose one of {', '.join(choices)}.")


def _check(good: bool, flag: str, value: object, wanted: str) -> None:
    if not good:
        raise ConfigError(f"{flag} {value}: must be {wanted}.")

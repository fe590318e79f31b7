"""What a training is asked to do: one frozen dataclass, checked at once."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from trainer.schema import PHASES, Phase, ThawError

SAMPLE: Final = "sample"

ScheduleName = Literal["constant", "exponential", "step", "cosine"]
OptimizerName = Literal["adam", "adamw", "sgd"]
DeviceName = Literal["auto", "cpu", "cuda"]
ColorMode = Literal["random", "fixed"]
Views = int | Literal["exact", "auto"]
Precision = Literal["fp32", "bf16"]


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
    `views` is "exact" where every epoch has its own view of each photo, or the number of views that
    are used in turn; "auto" is exact and says where fewer would be much faster.
    `precision` bf16 lets the frozen part run in bfloat16 where that is clearly faster; what comes
    out of it is then a few percent off. `cache_limit` is in bytes.

    Raises ConfigError with the flag, its value and the remedy.
    """

    phase: Phase
    data: str | None = None
    split_file: Path | None = None
    split_seed: int = 0
    val_fraction: float = 0.3
    limit: int | None = None
    strict: bool = False
    arch: str | None = None
    weights: str = "imagenet"
    head: tuple[int, ...] | None = None
    pool: Literal["avg", "max"] | None = None
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

    def __post_init__(self) -> None:
        _one_of("--phase", self.phase, PHASES)
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
        self._check_phase()

    def _check_phase(self) -> None:
        if self.parent is not None and self.phase not in ("transfer", "finetune"):
            raise ConfigError(f"--from belongs to --phase transfer or finetune, not {self.phase}.")
        if self.phase != "finetune":
            for flag, value in (
                ("--transfer-epochs", self.transfer_epochs),
                ("--transfer-lr", self.transfer_lr),
            ):
                if value is not None:
                    raise ConfigError(f"{flag} belongs to --phase finetune, not {self.phase}.")

    @property
    def distinct_views(self) -> int | None:
        """How many views of a photo are used in turn; None: every epoch has its own."""
        return self.views if isinstance(self.views, int) else None

    @property
    def learning_rate(self) -> float:
        return DEFAULT_LR[self.phase] if self.lr is None else self.lr

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for run.json."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()} | {
            "lr": self.learning_rate
        }


def _one_of(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{flag} {value}: choose one of {', '.join(choices)}.")


def _check(good: bool, flag: str, value: object, wanted: str) -> None:
    if not good:
        raise ConfigError(f"{flag} {value}: must be {wanted}.")

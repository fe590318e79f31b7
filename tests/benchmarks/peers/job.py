"""What is asked of every peer, and what it reports (imports no framework)."""

from __future__ import annotations

import argparse
import csv
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Self

# Imported before any framework: importing those is part of what a user waits for.
_STARTED: Final = time.perf_counter()

# The peer's module here, and the package whose version is reported.
PEERS: Final = {
    "plain": ("plain", "torch"),
    "timm": ("timm_loop", "timm"),
    "fastai": ("fastai_fit", "fastai"),
    "lightning": ("lightning_fit", "lightning"),
    "hf": ("hf_trainer", "transformers"),
    "keras": ("keras_fit", "keras"),
}

BATCH: Final = 32
CROP: Final = 224
RESIZE: Final = 256
MEAN: Final = (0.485, 0.456, 0.406)
STD: Final = (0.229, 0.224, 0.225)

# The augmentations of the first lab; see docs/design.md for what Thaw does with the same numbers.
CROP_FROM: Final = 235
TURN: Final = 0.02
BRIGHTNESS: Final = 0.3
CONTRAST: Final = 2.0
NOISE: Final = 0.6

HEAD: Final = "classifier"
TOP: Final = ("features.7", "features.8", HEAD)
ALL: Final = ("features", HEAD)


@dataclass(frozen=True)
class Phase:
    """One phase: `unfrozen` names torchvision's modules whose parameters train, BatchNorm never."""

    name: Literal["transfer", "finetune"]
    epochs: int
    lr: float
    unfrozen: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """The training that is asked for. `split` is a CSV with the columns path and split."""

    data: Path
    split: Path
    weights: Path
    transfer_epochs: int = 25
    finetune_epochs: int = 20
    transfer_lr: float = 1e-3
    finetune_lr: float = 1e-5
    unfreeze: Literal["top", "all"] = "top"
    augment: bool = False
    workers: int = 0
    channels_last: bool = False
    seed: int = 0
    untuned: bool = False

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        for name in ("data", "split", "weights"):
            parser.add_argument(f"--{name}", type=Path, required=True)
        for name in ("transfer_epochs", "finetune_epochs", "workers", "seed"):
            parser.add_argument(_flag(name), type=int, default=getattr(cls, name))
        for name in ("transfer_lr", "finetune_lr"):
            parser.add_argument(_flag(name), type=float, default=getattr(cls, name))
        for name in ("augment", "channels_last", "untuned"):
            parser.add_argument(_flag(name), action="store_true")
        parser.add_argument("--unfreeze", choices=("top", "all"), default="top")

    @classmethod
    def from_flags(cls, arguments: argparse.Namespace) -> Self:
        return cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})

    def to_flags(self) -> list[str]:
        """The inverse of `from_flags`, for a command line."""
        flags = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool):
                flags += [_flag(field.name)] if value else []
            else:
                flags += [_flag(field.name), str(value)]
        return flags

    @property
    def phases(self) -> list[Phase]:
        unfrozen = ALL if self.unfreeze == "all" else TOP
        both = [
            Phase("transfer", self.transfer_epochs, self.transfer_lr, (HEAD,)),
            Phase("finetune", self.finetune_epochs, self.finetune_lr, unfrozen),
        ]
        return [phase for phase in both if phase.epochs > 0]

    @cached_property
    def _rows(self) -> list[dict[str, str]]:
        with self.split.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    @cached_property
    def classes(self) -> list[str]:
        return sorted({Path(row["path"]).parts[-2] for row in self._rows})

    def photos(self, split: Literal["train", "val"]) -> list[tuple[Path, int]]:
        """The photos of a split with their labels, in the order of the CSV."""
        return [
            (self.data / row["path"], self.classes.index(Path(row["path"]).parts[-2]))
            for row in self._rows
            if row["split"] == split
        ]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class PhaseClock:
    """Times the training epochs of a phase, validation apart, and keeps its accuracies."""

    def __init__(self, photos: int) -> None:
        self._photos = photos
        self._epochs: list[float] = []
        self._accuracies: list[float] = []
        self._started = time.perf_counter()
        self._epoch_started: float | None = None

    def start_epoch(self) -> None:
        self._epoch_started = time.perf_counter()

    def end_epoch(self) -> None:
        assert self._epoch_started is not None
        self._epochs.append(time.perf_counter() - self._epoch_started)
        self._epoch_started = None

    def validated(self, accuracy: float) -> None:
        """Called before the first epoch and after each."""
        self._accuracies.append(float(accuracy))

    def result(self, epochs: int) -> dict[str, Any]:
        """What is reported of a phase of so many epochs; a peer that left one out is no peer."""
        assert (len(self._epochs), len(self._accuracies)) == (epochs, epochs + 1), vars(self)
        return {
            "val_acc": self._accuracies[-1],
            "val_acc_before": self._accuracies[0],
            "images_per_second": self._photos * epochs / sum(self._epochs),
            "seconds": time.perf_counter() - self._started,
            "epoch_seconds": [round(seconds, 3) for seconds in self._epochs],
        }


class Report:
    """What a peer did; seconds count from the start of the process."""

    def __init__(self, job: Job) -> None:
        self._photos = len(job.photos("train"))
        self._phases: dict[str, Any] = {}

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[PhaseClock]:
        clock = PhaseClock(self._photos)
        yield clock
        self._phases[phase.name] = clock.result(phase.epochs)

    def result(self) -> dict[str, Any]:
        """The whole report, to be made when the loaders' workers have ended: only then does the
        system count their CPU time."""
        usage = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return {
            "wall": time.perf_counter() - _STARTED,
            "cpu": sum(u.ru_utime + u.ru_stime for u in usage),
            **self._phases,
        }

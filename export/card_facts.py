"""What is known of a model and of the networks it is held against."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from export.card_markdown import finite, last_name
from trainer.controls import control_of, controls_by_parent
from trainer.evidence import (
    EvidenceError,
    Predictions,
    load_logits,
)
from trainer.runlog import Run
from trainer.schema import EpochRecord

if TYPE_CHECKING:
    from export.to_onnx import Exported

_BINS: Final = 10  # of the calibration error
_Z95: Final = 1.959964  # a normal distribution lies within this many sigma to 95%


@dataclass(frozen=True)
class Answers:
    """A network's answers to N photos; `confidence` [N] is the largest of their probabilities."""

    said: Predictions
    confidence: NDArray[np.float64] = field(repr=False)

    @property
    def right(self) -> NDArray[np.bool_]:
        return self.said.predicted == self.said.labels

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy: sound also where all or none are right."""
        share, spread = self.accuracy, _Z95**2 / len(self.right)
        centre = (share + spread / 2) / (1 + spread)
        half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
        return max(0.0, centre - half), min(1.0, centre + half)

    @property
    def calibration_error(self) -> float:
        """As explorer.calibration has it: over ten equal steps of confidence (Guo et al. 2017)."""
        steps = np.linspace(0, 1, _BINS + 1)[1:-1]
        place = np.digitize(self.confidence, steps, right=True)
        gaps = np.bincount(place, weights=self.right - self.confidence)
        return float(np.abs(gaps).sum() / len(place))


@dataclass(frozen=True)
class Network:
    """What was measured of one checkpoint. `answers` is None where they were not saved, are damaged
    or are those of another epoch than `record`; `record` where the log does not hold it."""

    answers: Answers | None
    record: EpochRecord | None

    @property
    def accuracy(self) -> float | None:
        if self.answers is not None:
            return self.answers.accuracy
        return finite(self.record.val_acc) if self.record else None


@dataclass(frozen=True)
class Card:
    """`lineage` holds the runs that trained the exported checkpoint, oldest first. `before` is None
    where nothing was unfrozen; `after` is also what any other run reached."""

    run: Run
    exported: Exported
    written: float
    lineage: tuple[Run, ...]
    control: Run | None
    before: Network | None
    after: Network

    @property
    def classes(self) -> tuple[str, ...]:
        return self.exported.metadata.classes

    @property
    def is_before(self) -> bool:
        return self.exported.metadata.checkpoint == "before"

    @property
    def own(self) -> Network:
        """The exported one."""
        return self.before if self.is_before and self.before else self.after

    @property
    def epochs(self) -> int:
        """How many the run's last phase trained, by its log."""
        phase = self.run.phase
        return sum(one.phase == phase and one.phase_epoch > 0 for one in self.run.epochs)

    @property
    def sweep(self) -> int:
        """The runs of the sweep that the run is of; 0 where it is of none."""
        return int(finite(stated(self.run, "sweep", "of")) or 0)

    @property
    def data(self) -> str:
        """The name of the data, such as that of their folder; "" where it is not known."""
        name = stated(self.run, "dataset", "name")
        return last_name(name) if isinstance(name, str) else ""


def gather(run: Run, exported: Exported, runs: Sequence[Run], written: float) -> Card:
    by_id = {one.run_id: one for one in runs}
    lineage = [run]
    while (parent := by_id.get(lineage[0].parent_run_id or "")) and parent not in lineage:
        lineage.insert(0, parent)
    if exported.metadata.checkpoint == "before":
        lineage.pop()
    unfrozen = run.boundary is not None
    return Card(
        run=run,
        exported=exported,
        written=written,
        lineage=tuple(lineage),
        control=control_of(run, controls_by_parent(runs)) if unfrozen else None,
        before=_network(run, exported, "before") if unfrozen else None,
        after=_network(run, exported, "after"),
    )


def _network(run: Run, exported: Exported, which: str) -> Network:
    record = _record(run, exported, which)
    answers = load_answers(run.predictions(which), len(exported.metadata.classes))
    if answers and record and not math.isnan(record.val_acc):
        # A run that is still training may have saved those of a later epoch meanwhile.
        off = abs(answers.accuracy - record.val_acc) * len(answers.right)
        answers = answers if off < 0.5 else None
    return Network(answers, record)


def _record(run: Run, exported: Exported, which: str) -> EpochRecord | None:
    about = exported.metadata
    known = [record for record in run.epochs if record.phase == run.phase]
    if which == "before":
        return next((record for record in known if record.phase_epoch == 0), None)
    if about.checkpoint == "after":
        return next((record for record in known if record.epoch == about.epoch), None)
    trained = (record for record in known if record.phase_epoch > 0)
    return max(trained, key=lambda record: record.rank, default=None)


def load_answers(path: Path, outputs: int) -> Answers | None:
    try:
        files, labels, logits = load_logits(path)
    except EvidenceError:
        return None
    fit = logits.shape[1] == outputs and np.isfinite(logits).all()
    if not fit or not ((labels >= 0) & (labels < outputs)).all():
        return None
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    said = Predictions(files, labels, logits.argmax(axis=1))
    return Answers(said, 1 / np.exp(shifted).sum(axis=1))


def stated(run: Run, *path: str) -> Any:
    """A value of run.json; None where it is not there, or what holds it has the wrong type."""
    content: Any = run.info
    for name in path:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content

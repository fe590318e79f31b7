"""Is a change of accuracy more than chance? From the predictions that runs save for each photo."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from explorer.compare import points
from explorer.data import Snapshot
from trainer.runlog import Run, Stamp, stamp
from trainer.schema import ThawError

_CONFIDENCE: Final = 0.95
SIGNIFICANT: Final = 1 - _CONFIDENCE


class EvidenceError(ThawError):
    """Predictions that cannot be read or compared."""


@dataclass(frozen=True)
class Predictions:
    """The class predicted for each validation photo: file names, and int64 arrays [N]."""

    files: tuple[str, ...]
    labels: NDArray[np.int64] = field(repr=False)
    predicted: NDArray[np.int64] = field(repr=False)


@dataclass(frozen=True)
class Evidence:
    """Two networks on the same photos. `fixed` photos only the second one has right, `broken` only
    the first. `low` to `high` is the 95% interval of `change`, fractions of the photos; `p` is the
    probability of so uneven a division of fixed and broken if neither network were better."""

    photos: int
    fixed: int
    broken: int
    low: float
    high: float
    p: float

    @property
    def change(self) -> float:
        return (self.fixed - self.broken) / self.photos


def load_predictions(path: Path) -> Predictions:
    """Read what a run saved. Raises EvidenceError with the reason."""
    try:
        with np.load(path, allow_pickle=False) as content:
            logits, labels, files = (content[name] for name in ("logits", "labels", "files"))
        sound = logits.ndim == 2 and logits.shape[1] > 0 and labels.ndim == 1 and len(files) > 0
        if not sound or not len(logits) == len(labels) == len(files):
            raise EvidenceError(f"The predictions {path} are damaged: their parts do not fit.")
        named = tuple(map(str, files.tolist()))
        return Predictions(named, labels.astype(np.int64), logits.argmax(axis=1))
    except EvidenceError:
        raise
    except Exception as error:  # damaged archives and arrays raise a dozen kinds
        raise EvidenceError(f"The predictions {path} cannot be read: {error}") from error


def compare(before: Predictions, after: Predictions) -> Evidence:
    """Paired by photo: a bootstrap interval over photos, and McNemar's exact test.

    Raises EvidenceError where the photos or their classes differ.
    """
    order = _order(before.files, after.files)
    if not np.array_equal(before.labels[order], after.labels):
        raise EvidenceError("Their photos have different classes.")
    right_before = before.predicted[order] == after.labels
    right_after = after.predicted == after.labels
    fixed = int(np.sum(right_after & ~right_before))
    broken = int(np.sum(right_before & ~right_after))
    low, high = interval(
        np.array([1, -1, 0]), np.array([fixed, broken, len(order) - fixed - broken])
    )
    return Evidence(len(order), fixed, broken, low, high, mcnemar(fixed, broken))


def _order(before: tuple[str, ...], after: tuple[str, ...]) -> NDArray[np.int64]:
    """The rows of `before` in the order of `after`."""
    if before == after:
        return np.arange(len(after))
    place = {file: row for row, file in enumerate(before)}
    if place.keys() != set(after) or len(before) != len(after):
        raise EvidenceError("They were validated on different photos.")
    return np.array([place[file] for file in after])


def interval(values: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of a mean over photos, of which `counts[i]` have the
    whole number `values[i]`; of infinitely many resamples.

    None is drawn: the characteristic function of a sum over resampled photos is that of one photo
    to the power of their number, and its Fourier transform is the chance of each sum.
    """
    photos, total = int(counts.sum()), int(counts @ values)
    # Further from its mean, by Bernstein's inequality, a sum has a chance of less than 1e-12.
    reach = 1 + 12 * math.isqrt(int(counts @ values**2)) + 52 * int(np.abs(values).max())
    angles = np.arange(reach + 1) * (np.pi / reach)
    one_photo = np.exp(1j * np.outer(angles, values - total / photos)) @ (counts / photos)
    chances = np.roll(np.fft.irfft(np.conj(one_photo) ** photos, 2 * reach), reach)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.searchsorted(np.cumsum(chances), [tail, 1 - tail]) - reach + total
    return float(low / photos), float(high / photos)


def mcnemar(fixed: int, broken: int) -> float:
    """Two-sided exact p: how often fair coins would divide the photos at least as unevenly."""
    tosses = fixed + broken

    def probability(heads: int) -> float:
        ways = math.lgamma(tosses + 1) - math.lgamma(heads + 1) - math.lgamma(tosses - heads + 1)
        return math.exp(ways - tosses * math.log(2))

    return min(1.0, 2 * math.fsum(map(probability, range(min(fixed, broken) + 1))))


def holm(p: Sequence[float]) -> list[float]:
    """The p-values adjusted for how many there are (Holm 1979): the best of many proves nothing."""
    adjusted, least = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = least
    return adjusted


# --- of runs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Findings:
    """What is known of one finetune run: against its boundary and against its control. A text says
    why there is no evidence; None: nothing to compare."""

    boundary: Evidence | str | None
    control: Evidence | str | None


def findings(snapshot: Snapshot, selected: Iterable[str]) -> dict[str, Findings]:
    """Of the finetune runs among the selected ones, by run id."""
    runs = [snapshot.runs[name] for name in selected if name in snapshot.runs]
    controls = _controls(snapshot)
    return {
        run.run_id: Findings(
            _between(run.predictions("before"), run.predictions("after")),
            None if (other := _fitting(controls, run)) is None else _against(other, run),
        )
        for run in runs
        if run.phase == "finetune"
    }


def control_of(snapshot: Snapshot, run: Run) -> Run | None:
    """The newest run that trained the same head further, as long and on the same views, with
    everything else still frozen."""
    return _fitting(_controls(snapshot), run)


def _controls(snapshot: Snapshot) -> dict[str, list[Run]]:
    """The runs that can be a control, newest first, by the parent that they go on from."""
    controls: dict[str, list[Run]] = {}
    for run in reversed(list(snapshot.runs.values())):
        if run.parent_run_id is not None and run.phase == "transfer" and run.status == "done":
            controls.setdefault(run.parent_run_id, []).append(run)
    return controls


def _fitting(controls: Mapping[str, Sequence[Run]], run: Run) -> Run | None:
    alike = controls.get(run.parent_run_id or "", ())
    return next((other for other in alike if _conditions(other) == _conditions(run)), None)


def _conditions(run: Run) -> tuple[object, ...]:
    config, dataset = run.info.get("config", {}), run.info.get("dataset", {})
    same = (config.get(name) for name in ("epochs", "batch_size", "augmentation", "views", "seed"))
    return (dataset.get("fingerprint"), *same)


def _against(control: Run, run: Run) -> Evidence | str | None:
    return _between(control.predictions("after"), run.predictions("after"))


def _between(before: Path, after: Path) -> Evidence | str | None:
    stamps = stamp(before), stamp(after)
    if None in stamps:
        return None
    return _compared(before, stamps[0], after, stamps[1])


@functools.lru_cache(maxsize=16_384)  # two for each run: a folder of 8,000 is still known
def _compared(before: Path, before_stamp: Stamp, after: Path, after_stamp: Stamp) -> Evidence | str:
    try:
        return compare(_loaded(before, before_stamp), _loaded(after, after_stamp))
    except EvidenceError as error:
        return str(error)


# A run's predictions are compared twice, and those of one control with many runs in turn.
@functools.lru_cache(maxsize=4)
def _loaded(path: Path, _: Stamp) -> Predictions:
    return load_predictions(path)


def sentence(evidence: Evidence, adjusted: float) -> str:
    """The evidence in one line: interval, counts, and what follows from them."""
    interval = f"95% interval {points(evidence.low)} to {points(evidence.high)}"
    counts = f"fixed {evidence.fixed:,}, broke {evidence.broken:,}"
    return (
        f"{points(evidence.change)} points, {interval}; {counts}: {_conclusion(evidence, adjusted)}"
    )


def _conclusion(evidence: Evidence, adjusted: float) -> str:
    p = f"p {'< 0.001' if adjusted < 0.001 else f'= {adjusted:.2g}'}"
    if adjusted >= SIGNIFICANT:
        return f"no evidence of a difference ({p})"
    return f"{'better' if evidence.change > 0 else 'worse'}, beyond chance ({p})"


def adjusted(found: Mapping[str, Findings]) -> dict[str, float]:
    """The p-value of each run against its boundary, adjusted for the number of runs."""
    known = {n: one.boundary for n, one in found.items() if isinstance(one.boundary, Evidence)}
    return dict(zip(known, holm([evidence.p for evidence in known.values()]), strict=True))


def evidence_lines(found: Mapping[str, Findings]) -> dict[str, list[str]]:
    """What to say beside the verdict of each run, by run id."""
    by_boundary = adjusted(found)
    controls = {n: one.control for n, one in found.items() if isinstance(one.control, Evidence)}
    p = holm([evidence.p for evidence in controls.values()])
    by_control = dict(zip(controls, p, strict=True))
    return {
        name: [
            *_line("Against its boundary", one.boundary, by_boundary.get(name)),
            *_line("Against its control, the head alone", one.control, by_control.get(name)),
        ]
        for name, one in found.items()
    }


def _line(what: str, evidence: Evidence | str | None, adjusted: float | None) -> list[str]:
    if isinstance(evidence, Evidence) and adjusted is not None:
        return [f"{what}: {sentence(evidence, adjusted)}."]
    return [f"{what}: {evidence}"] if isinstance(evidence, str) else []

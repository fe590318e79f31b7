"""Time engines in turn, so that a noisy moment hits all alike (no torch)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from trainer.preprocess import Photo
from trainer.process import hushed
from trainer.schema import ThawError

BATCHES: Final = (1, 2, 4, 8, 16, 32)
SECONDS: Final = 1.0
ROUNDS: Final = 3
# An engine whose first calls (compiling, searching for kernels) took this long gets no new size of
# batch: torch.compile takes minutes for each on a slow CPU.
WARM_UP_LIMIT: Final = 120.0
_SETTLE: Final = 0.1  # the threads of the engine before spin on for 40 ms
Classify = Callable[[Photo], NDArray[np.float32]]
Clock = Callable[[], float]


class BenchError(ThawError):
    """What was asked for cannot be measured, or the figures cannot be written."""


@dataclass(frozen=True)
class Opened:
    """A loaded engine: uint8 [N, H, W, 3] -> probabilities float32 [N, classes], both in memory.
    `device` is what really runs it."""

    classify: Classify
    device: str


@dataclass(frozen=True)
class Candidate:
    """Something to measure; `open` loads it, and raises whatever keeps it from running."""

    engine: str
    precision: str
    device: str
    open: Callable[[], Opened]


@dataclass(frozen=True)
class Cell:
    """One engine at one size of batch; the tuples have one figure for each round.

    `first_seconds` is the first call of this size: compiling, and choosing kernels, happen in it.
    `p50_ms` and `p99_ms` are of single calls, `calls` is how many there were.
    """

    batch: int
    first_seconds: float
    calls: tuple[int, ...]
    images_per_second: tuple[float, ...]
    p50_ms: tuple[float, ...]
    p99_ms: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Images a second: the median over the rounds."""
        return statistics.median(self.images_per_second)

    @property
    def spread(self) -> float:
        """How far the rounds' rates lie apart, as a fraction of the median."""
        return (max(self.images_per_second) - min(self.images_per_second)) / self.rate


@dataclass(frozen=True)
class Row:
    """One engine, precision and device. `load_seconds` excludes the imports; `difference` is the
    largest one of a probability from the first row's, on the same photos."""

    engine: str
    precision: str
    device: str
    load_seconds: float
    difference: float
    cells: tuple[Cell, ...]

    def cell(self, batch: int) -> Cell | None:
        return next((cell for cell in self.cells if cell.batch == batch), None)

    @property
    def p50_ms(self) -> float:
        """Milliseconds for one photo: the median over the rounds."""
        return statistics.median(self.cells[0].p50_ms)

    @property
    def p99_ms(self) -> float:
        return statistics.median(self.cells[0].p99_ms)

    @property
    def best(self) -> Cell:
        """The size of batch with the most images a second."""
        return max(self.cells, key=lambda cell: cell.rate)


@dataclass(frozen=True)
class LeftOut:
    """What was not measured, and why; a `batch` of None is the whole row."""

    engine: str
    precision: str | None
    device: str | None
    reason: str
    batch: int | None = None


@dataclass(frozen=True)
class Measured:
    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class _Warm:
    """An engine after its first calls."""

    candidate: Candidate
    opened: Opened
    load_seconds: float
    first_seconds: dict[int, float]  # by size of batch
    outputs: NDArray[np.float32]  # of the largest batch


def measure(
    candidates: Sequence[Candidate],
    photos: Photo,
    batches: Sequence[int] = BATCHES,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
    clock: Clock = time.perf_counter,
) -> Measured:
    """Load every candidate, then time all of them in turn, `rounds` times `seconds` a figure.

    `photos` are uint8 [N, H, W, 3], N the largest of `batches` or more. Batch 1 is always measured:
    the latencies are its. A candidate that does not load or run is left out with the reason.
    """
    sizes = sorted({1, *batches})
    warm, left_out = _warm_up(candidates, photos, sizes, clock)
    timings: dict[tuple[int, int], list[list[float]]] = {}
    turns = [
        (number, size)
        for size in sizes
        for number, one in enumerate(warm)
        if size in one.first_seconds
    ]
    with _bar("measuring", rounds * len(turns)) as bar:
        for number, size in turns * rounds:
            taken = _time(warm[number].opened.classify, photos[:size], seconds, clock)
            timings.setdefault((number, size), []).append(taken)
            bar.update()
    rows = [_row(one, number, timings, warm[0]) for number, one in enumerate(warm)]
    return Measured(tuple(rows), tuple(left_out))


def _bar(title: str, total: int) -> tqdm[Any]:
    return tqdm(desc=title, total=total, leave=False, disable=None, dynamic_ncols=True)


def _warm_up(
    candidates: Sequence[Candidate], photos: Photo, sizes: Sequence[int], clock: Clock
) -> tuple[list[_Warm], list[LeftOut]]:
    warm: list[_Warm] = []
    left_out: list[LeftOut] = []
    with _bar("loading", len(candidates)) as bar, hushed():
        for candidate in candidates:
            bar.set_postfix_str(f"{candidate.engine}, {candidate.device}")
            one, problem = _first_calls(candidate, photos, sizes, clock)
            warm += [one] if one else []
            left_out += [problem] if problem else []
            bar.update()
    return warm, left_out


def _first_calls(
    candidate: Candidate, photos: Photo, sizes: Sequence[int], clock: Clock
) -> tuple[_Warm | None, LeftOut | None]:
    """The engine, loaded and called once at each size; and what of it is left out."""
    named = partial(LeftOut, candidate.engine, candidate.precision, candidate.device)
    first: dict[int, float] = {}
    problem = None
    try:
        started = clock()
        opened = candidate.open()
        loaded = clock()
        for size in sizes:
            if sum(first.values()) > WARM_UP_LIMIT:
                slow = f"its first calls took more than {WARM_UP_LIMIT:.0f} s"
                problem = named(f"batches of {size} and more: {slow}", size)
                break
            before = clock()
            result = opened.classify(photos[:size])
            after = clock()
            if not np.isfinite(result).all():
                raise BenchError("it gives probabilities that are not finite numbers")
            first[size], outputs = after - before, result
    except Exception as error:  # engines and compilers fail in any way; the others still work
        if not first:
            return None, named(_first_line(error))
        failed = next(size for size in sizes if size not in first)
        problem = named(f"batches of {failed} and more: {_first_line(error)}", failed)
    return _Warm(candidate, opened, loaded - started, first, outputs), problem


def _time(classify: Classify, photos: Photo, seconds: float, clock: Clock) -> list[float]:
    """The seconds of single calls, one at least, until they add up to `seconds`."""
    time.sleep(min(_SETTLE, seconds))
    classify(photos)  # wakes the engine's threads and brings its weights back into the caches
    taken: list[float] = []
    total = 0.0
    while not taken or total < seconds:
        started = clock()
        classify(photos)
        taken.append(clock() - started)
        total += taken[-1]
    return taken


def _row(
    one: _Warm, number: int, timings: dict[tuple[int, int], list[list[float]]], first: _Warm
) -> Row:
    common = min(len(one.outputs), len(first.outputs))
    return Row(
        one.candidate.engine,
        one.candidate.precision,
        one.opened.device,
        one.load_seconds,
        float(np.abs(one.outputs[:common] - first.outputs[:common]).max()),
        tuple(_cell(size, s, timings[number, size]) for size, s in one.first_seconds.items()),
    )


def _cell(batch: int, first_seconds: float, rounds: Sequence[Sequence[float]]) -> Cell:
    return Cell(
        batch,
        first_seconds,
        tuple(len(taken) for taken in rounds),
        tuple(batch * len(taken) / sum(taken) for taken in rounds),
        tuple(1000 * float(np.percentile(taken, 50)) for taken in rounds),
        tuple(1000 * float(np.percentile(taken, 99)) for taken in rounds),
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, ThawError):
        return str(error)
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:300]

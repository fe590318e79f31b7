"""What the numbers say in plain words: of one run's curves, and of many runs together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Final

import numpy as np

from explorer.compare import Summary
from explorer.evidence import Findings, adjusted
from trainer.evidence import SIGNIFICANT, Evidence, points
from trainer.runlog import Run
from trainer.schema import EpochRecord

MANY: Final = 5  # runs compared at once from which the best of them needs a warning
_FELL: Final = 0.005
_WIDENED: Final = 0.02
_STILL: Final = 1e-4  # by which weights may move, relative to their size, without any effect seen
_DRAWS: Final = 4_000


def flags(run: Run) -> list[str]:
    """What stands out in the finetune phase of a run, each with its remedy; [] for others."""
    records = [record for record in run.epochs if record.phase == "finetune"]
    if run.phase != "finetune" or len(records) < 2 or records[0].phase_epoch != 0:
        return []
    start, *trained = records
    still = _hardly_moved(run)
    found = (
        still,
        _dropped(start, trained[0]),
        _widening(trained),
        "" if still else _at_the_edge(run, trained),  # which epoch was best then means nothing
    )
    return [text for text in found if text]


def moved(run: Run) -> tuple[float, float] | None:
    """How far the unfrozen layers moved, relative to their size, and which fraction of their
    weights changed at all; None where the run does not say."""
    said = run.info.get("weight_change")
    backbone = said.get("backbone") if isinstance(said, Mapping) else None
    if not isinstance(backbone, Mapping):
        return None
    found = [backbone.get(name) for name in ("relative", "changed")]
    known = [float(v) for v in found if isinstance(v, int | float) and 0 <= v < math.inf]
    return (known[0], known[1]) if len(known) == 2 else None


def _hardly_moved(run: Run) -> str:
    found = moved(run)
    if found is None or found[0] >= _STILL:
        return ""
    relative, changed = found
    lost = (
        f", and {1 - changed:.0%} of them not at all, because float32 rounds such small steps away"
        if changed < 0.5
        else ""
    )
    return (
        f"The unfrozen weights moved by {percent(relative)} of their size{lost}: too little to "
        "help or to harm. Try a learning rate between 1e-5 and 1e-3."
    )


def percent(fraction: float) -> str:
    """With two digits that count, such as 0.00032% or 4.1%."""
    return f"{float(f'{100 * fraction:.2g}'):.12f}".rstrip("0").rstrip(".") + "%"


def _dropped(start: EpochRecord, first: EpochRecord) -> str:
    fell = start.val_acc - first.val_acc
    if not fell >= _FELL:
        return ""
    return (
        f"Dropped {100 * fell:.1f} points in the first unfrozen epoch: the first steps were too "
        "large. Try a smaller learning rate or --warmup."
    )


def _widening(trained: Sequence[EpochRecord]) -> str:
    """The gap between training and validation accuracy, in the first and in the last third."""
    gaps = [r.train_acc - r.val_acc for r in trained if r.train_acc is not None]
    third = len(gaps) // 3
    if third == 0:
        return ""
    early, late = fmean(gaps[:third]), fmean(gaps[-third:])
    if not late - early >= _WIDENED:
        return ""
    return (
        f"The gap between training and validation accuracy widened by {100 * (late - early):.1f} "
        "points: it overfits. Unfreeze fewer layers, augment, or stop earlier."
    )


def _at_the_edge(run: Run, trained: Sequence[EpochRecord]) -> str:
    best = max(trained, key=lambda record: record.rank).phase_epoch
    if run.status != "done" or len(trained) < 3 or math.isnan(trained[0].val_acc):
        return ""
    if best == trained[-1].phase_epoch:
        return "Best at the last epoch: more epochs may gain more."
    if best == trained[0].phase_epoch:
        return "Best at the first epoch: what was trained after it made it no better."
    return ""


def best_by_chance(tested: Sequence[Evidence]) -> tuple[float, float]:
    """What the best of these comparisons would show if no network had changed for better or worse:
    the median, and what one in twenty exceeds, as fractions.

    Each photo that one of two networks has right and the other wrong is tossed anew. The runs are
    taken as independent; they share their photos, so this is the most it can be.
    """
    generator = np.random.default_rng(0)
    changes = [
        (2 * generator.binomial(each.fixed + each.broken, 0.5, _DRAWS) - each.fixed - each.broken)
        / each.photos
        for each in tested
    ]
    best = np.max(changes, axis=0)
    return float(np.median(best)), float(np.quantile(best, 0.95))


def gained_most(rows: Sequence[Summary]) -> Summary | None:
    """The run with the largest change by unfreezing; None where none has any yet."""
    return max(_changed(rows), key=lambda row: row.change or 0.0, default=None)


def _changed(rows: Sequence[Summary]) -> list[Summary]:
    return [row for row in rows if row.change is not None and not row.control]


def headline(rows: Sequence[Summary], found: Mapping[str, Findings]) -> str:
    """What several runs together say about unfreezing; empty for fewer than two that say it."""
    changed, best = _changed(rows), gained_most(rows)
    if len(changed) < 2 or best is None:
        return ""
    p = adjusted({name: one for name, one in found.items() if name in {r.run_id for r in changed}})
    beyond = [row for row in changed if p.get(row.run_id, 1.0) < SIGNIFICANT]
    better = sum((row.change or 0.0) > 0 for row in beyond)
    leading = f"Highest: {points(best.change or 0.0)} points for {best.label}."
    if not best.change:
        leading = "" if p else f"None of {len(changed)} runs gained by unfreezing."
    tally = _tally(better, len(beyond) - better, len(p)) if p else ""
    return f"{tally} {leading}".strip()


def _tally(better: int, worse: int, tested: int) -> str:
    if not better and not worse:
        return f"None of {tested} runs changed beyond chance by unfreezing."
    said = [f"{count} {word}" for count, word in ((better, "better"), (worse, "worse")) if count]
    return f"Of {tested} runs, unfreezing made {' and '.join(said)} beyond chance."


def warning(found: Mapping[str, Findings]) -> str:
    """For many runs: how large a change chance alone would show; empty for few."""
    tested = [each.boundary for each in found.values() if isinstance(each.boundary, Evidence)]
    if len(tested) < MANY:
        return ""
    usual, rarely = best_by_chance(tested)
    return (
        f"The best of {len(tested)} runs looks good by chance: if unfreezing changed nothing, it "
        f"would still show about {points(usual)} points, and more than {points(rarely)} in one "
        "case of twenty. The p below are adjusted for that (Holm)."
    )

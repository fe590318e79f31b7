"""What a sweep says in plain words: which setting is best, and is that beyond chance?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from explorer.pooled import pooled
from explorer.sweep_members import REFERENCES, SEED, Reference, Standing, adjusted_p, label
from trainer.evidence import SIGNIFICANT, Evidence, holm, points, sentence


def headline(ranked: Sequence[Standing], names: Sequence[str], against: Reference | None) -> str:
    """Which setting is best, and whether that is beyond chance given how many were tried."""
    if not ranked:
        return "No run of this group is done: there is nothing to rank yet."
    best, many = ranked[0], len(ranked)
    name = label(best.members[0], [name for name in names if name != SEED])
    name = name or ("all runs" if len(best.members) > 1 else "this run")
    name = name.replace("e-", "e-\N{WORD JOINER}")  # no line may end within a learning rate
    if against is None:
        return _headline_of_transfer(ranked, name)
    to, p = REFERENCES[against], adjusted_p(ranked)[0]
    change = round(best.change or 0.0, 6)  # equal means can differ by 1e-8
    said = f"{name} ({points(change)} points)"
    if change <= 0:
        none = "Not better" if many == 1 else f"None of {many} settings is better"
        return f"{none} than {to}: {'' if many == 1 else 'the best is '}{said}."
    if math.isnan(p):
        return (
            f"Best of {many}: {said}. Without the predictions of each run nothing says whether "
            "that is beyond chance."
        )
    if p < SIGNIFICANT:
        even = f", even as the best of {many}" if many > 1 else ""
        return f"{said} is better than {to} beyond chance{even}."
    if many == 1:
        return f"{said}: no evidence that it is better than {to}."
    return (
        f"The best of {many} looks good by chance: {said}. After adjusting for {many} settings, "
        f"there is no evidence that it is better than {to}."
    )


def _headline_of_transfer(ranked: Sequence[Standing], name: str) -> str:
    best, *others = ranked
    reached = f"{name} with {best.change or 0.0:.1%}"
    if not others:
        return f"Only one setting is done: {reached}."
    lead = f"Best of {len(ranked)}: {reached}"
    above = round(best.rank[0] - others[0].rank[0], 6)
    if above <= 0:
        return f"{lead}, no better than the next."
    p = _versus(best, others)
    lead = f"{lead}, {points(above).lstrip('+')} points above the next"
    if math.isnan(p):
        return f"{lead}. The best of {len(ranked)} looks good by chance."
    if p < SIGNIFICANT:
        return f"{lead}: better beyond chance (p {_equals(p)})."
    return (
        f"{lead}: no evidence of a difference (p {_equals(p)}). The best of {len(ranked)} looks "
        "good by chance."
    )


def _versus(best: Standing, others: Sequence[Standing]) -> float:
    """The p of the best against the next, adjusted for all that it could have been."""
    found = [_duel(best, other) for other in others]
    known = [evidence.p for evidence in found if evidence is not None]
    return holm(known)[0] if found[0] is not None else math.nan


def _duel(one: Standing, other: Standing) -> Evidence | None:
    """The two settings paired by seed; None where their seeds differ."""
    mine, theirs = ({m.settings[SEED]: m for m in side.counted} for side in (one, other))
    if mine.keys() != theirs.keys():
        return None
    pairs = [
        (theirs[seed].run.predictions("after"), mine[seed].run.predictions("after"))
        for seed in mine
    ]
    return pooled(pairs)


def _equals(p: float) -> str:
    return p_text(p) if p < 0.001 else f"= {p_text(p)}"


def details(ranked: Sequence[Standing], against: Reference | None) -> list[str]:
    """The evidence on the best setting, against its boundary and against its control."""
    if not ranked or against is None:
        return []
    lines = []
    what: dict[Reference, str] = {
        "boundary": "Against the boundary",
        "control": "Against its control, the head alone",
    }
    best = ranked[0]
    for reference, said in what.items():
        tried = [Standing(one.members, reference) for one in ranked]
        known, p = tried[0].evidence, adjusted_p(tried)[0]
        if known is not None:
            over = f", over {len(best.counted)} runs" if len(best.counted) > 1 else ""
            lines.append(f"{said}{over}: {sentence(known, p)}.")
        elif (change := tried[0].change) is not None:
            lines.append(f"{said}: {points(change)} points.")
    if all(member.control is None for member in best.members):
        lines.append(
            "It has no control, so nothing says whether unfreezing or only the further epochs "
            "made the difference."
        )
    return lines


def p_text(p: float) -> str:
    """A p-value for a table; "" for NaN."""
    if math.isnan(p):
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"

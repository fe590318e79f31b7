"""What two networks answer on the same photos: of each class, and what they confuse.

From the logits that runs save for every validation photo. Shares are fractions, not percent.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from explorer.render import printable
from trainer.evidence import (
    FEW,
    SIGNIFICANT,
    Evidence,
    EvidenceError,
    Predictions,
    compare,
    holm,
    load_logits,
    mcnemar,
    points,
    sentence,
)
from trainer.runlog import Stamp, stamp

Names = tuple[str, str]  # what the two networks are, such as ("Before unfreezing", ...)


Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


# --- reading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """A network's answers to N photos: arrays [N] of the class predicted, its probability (softmax
    of the logits), and the natural logarithm of the probability of the true class."""

    files: tuple[str, ...] = field(repr=False)
    labels: Integers = field(repr=False)
    predicted: Integers = field(repr=False)
    confidence: Floats = field(repr=False)
    true_log: Floats = field(repr=False)
    outputs: int = 0

    @property
    def right(self) -> NDArray[np.bool_]:
        return self.predicted == self.labels

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.right))


@dataclass(frozen=True)
class Change:
    """Two networks on the same photos in the same order. `classes` names every output."""

    classes: tuple[str, ...]
    before: Scored
    after: Scored
    evidence: Evidence


def change_between(before: Path, after: Path, classes: tuple[str, ...]) -> Change:
    """The change from one file of predictions to another; kept until a file changes.

    Raises EvidenceError where they cannot be read or were validated on different photos.
    """
    return _between(before, stamp(before), after, stamp(after), classes)


@functools.lru_cache(maxsize=16)
def _between(before: Path, _: Stamp, after: Path, __: Stamp, classes: tuple[str, ...]) -> Change:
    return changed(load_scored(before), load_scored(after), classes)


def load_scored(path: Path) -> Scored:
    """Read what a run saved. Raises EvidenceError with the reason."""
    files, labels, logits = load_logits(path)
    if not np.isfinite(logits).all():
        what = "some logits are not numbers, so the network had diverged"
        raise EvidenceError(f"The predictions {path} are damaged: {what}.")
    return scored(files, labels, logits)


def scored(files: tuple[str, ...], labels: Integers, logits: NDArray[np.floating]) -> Scored:
    """`logits` float [N, classes], all finite, and `labels` [N] as a network's answers."""
    rows = np.arange(len(labels))
    predicted = logits.argmax(axis=1)
    shifted = logits - logits[rows, predicted][:, None]  # the largest is 0: nothing overflows
    log_sum = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))
    true_log = shifted[rows, labels].astype(np.float64) - log_sum
    confidence = np.exp(-log_sum)
    return Scored(files, labels, predicted.astype(np.int64), confidence, true_log, logits.shape[1])


def changed(before: Scored, after: Scored, classes: Sequence[str]) -> Change:
    """Pair the answers by photo, in the order of `before`.

    Raises EvidenceError where the photos or their classes differ.
    """
    evidence = compare(_predictions(before), _predictions(after))
    order = np.arange(len(after.files))
    if before.files != after.files:
        place = {file: row for row, file in enumerate(after.files)}
        order = np.array([place[file] for file in before.files])
    paired = Scored(
        before.files,
        after.labels[order],
        after.predicted[order],
        after.confidence[order],
        after.true_log[order],
        after.outputs,
    )
    named = class_names(classes, max(before.outputs, after.outputs))
    return Change(named, before, paired, evidence)


def _predictions(of: Scored) -> Predictions:
    return Predictions(of.files, of.labels, of.predicted)


def class_names(classes: Sequence[str], outputs: int) -> tuple[str, ...]:
    """One printable name for each output, all different: outputs without a name and names that
    occur twice show their number."""
    named = [printable(name) for name in classes[:outputs]]
    names = [*named, *(f"output {n}" for n in range(len(classes), outputs))]
    taken = Counter(names)
    return tuple(f"{n} [{i}]" if taken[n] > 1 else n for i, n in enumerate(names))


# --- classes ------------------------------------------------------------------------------------


def per_class(change: Change) -> pd.DataFrame:
    """One row for each class that has photos or was predicted, in the order of the classes.

    Columns: class, n (its photos), recall_before, recall_after, change, fixed, broken, p (McNemar's
    exact test, adjusted for all classes with photos), precision_* and f1_* before and after. What
    has no photos to divide by is NaN.
    """
    labels, size = change.before.labels, len(change.classes)
    was, now = change.before.right, change.after.right
    n = np.bincount(labels, minlength=size)
    fixed = np.bincount(labels[now & ~was], minlength=size)
    broken = np.bincount(labels[was & ~now], minlength=size)
    before, after = (_quality(each, n) for each in (change.before, change.after))
    frame = pd.DataFrame(
        {
            "class": change.classes,
            "n": n,
            "recall_before": before["recall"],
            "recall_after": after["recall"],
            "change": after["recall"] - before["recall"],
            "fixed": fixed,
            "broken": broken,
            "p": _p_of_classes(n, fixed, broken),
            "precision_before": before["precision"],
            "precision_after": after["precision"],
            "f1_before": before["f1"],
            "f1_after": after["f1"],
        }
    )
    seen = (n > 0) | before["predicted"].gt(0) | after["predicted"].gt(0)
    return frame[seen].reset_index(drop=True)


def _quality(of: Scored, n: Integers) -> pd.DataFrame:
    """Recall, precision and F1 of each class, and how often it was predicted."""
    hits = pd.Series(np.bincount(of.labels[of.right], minlength=len(n)), dtype="float64")
    predicted = pd.Series(np.bincount(of.predicted, minlength=len(n)), dtype="float64")
    # 0 / 0 is NaN in pandas, which is what a share of nothing is.
    shares = {"recall": hits / n, "precision": hits / predicted, "f1": 2 * hits / (n + predicted)}
    return pd.DataFrame({**shares, "predicted": predicted})


def _p_of_classes(n: Integers, fixed: Integers, broken: Integers) -> Floats:
    p = np.full(len(n), np.nan)
    there = n > 0
    pairs = zip(fixed[there].tolist(), broken[there].tolist(), strict=True)
    p[there] = holm([mcnemar(*pair) for pair in pairs])
    return p


Order = Literal["change", "name", "photos"]


def ordered(frame: pd.DataFrame, by: Order, limit: int | None = None) -> pd.DataFrame:
    """The classes with photos (per_class) to draw: the `limit` that changed most, either way, in
    this order: largest gain first, by name, or most photos first."""
    rows = frame[frame["n"] > 0]
    if limit is not None:
        most = rows["change"].abs().sort_values(ascending=False, kind="stable").index[:limit]
        rows = rows.loc[most]
    if by == "name":
        return rows.sort_values("class", key=lambda names: names.str.lower(), ignore_index=True)
    column = "change" if by == "change" else "n"
    return rows.sort_values([column, "class"], ascending=[False, True], ignore_index=True)


def short(names: Names) -> Names:
    """The first word of each: ("before", "after") or ("control", "after")."""
    return names[0].split()[0].lower(), names[1].split()[0].lower()


def class_table(frame: pd.DataFrame, names: Names) -> pd.DataFrame:
    """per_class for display: shares in percent, the change in points, largest gain first."""
    first, then = short(names)
    rows = frame.sort_values("change", ascending=False, kind="stable", na_position="last")
    return pd.DataFrame(
        {
            "Class": rows["class"],
            "Photos": rows["n"],
            f"Recall {first}": 100 * rows["recall_before"],
            f"Recall {then}": 100 * rows["recall_after"],
            "Change": 100 * rows["change"],
            "Fixed": rows["fixed"],
            "Broken": rows["broken"],
            "p": rows["p"],
            f"Precision {first}": 100 * rows["precision_before"],
            f"Precision {then}": 100 * rows["precision_after"],
            f"F1 {first}": 100 * rows["f1_before"],
            f"F1 {then}": 100 * rows["f1_after"],
        }
    ).reset_index(drop=True)


# --- in words -----------------------------------------------------------------------------------


def headline(change: Change, names: Names) -> str:
    """What changed over all photos, with the evidence for it (one comparison, so p as it is)."""
    before, after = change.before.accuracy, change.after.accuracy
    return (
        f"Accuracy {before:.1%} ({names[0].lower()}), {after:.1%} ({names[1].lower()}) on "
        f"{change.evidence.photos:,} validation photos: "
        f"{sentence(change.evidence, change.evidence.p)}."
    )


def class_headline(frame: pd.DataFrame) -> str:
    """Which class gained and which lost most (per_class), and whether that is more than chance."""
    rows = ordered(frame, "change")
    if rows.empty or rows["change"].eq(0).all():
        return "No class changed."
    first, last = rows.iloc[0], rows.iloc[-1]
    gained = f"Gained most: {_said(first)}." if first["change"] > 0 else "No class gained."
    lost = f"Lost most: {_said(last)}." if last["change"] < 0 else "No class lost."
    return " ".join([gained, lost, _beyond_chance(rows)])


def _said(row: pd.Series) -> str:
    return (
        f"{row['class']}, {points(row['change'])} points ({row['n']:,} photos: "
        f"fixed {row['fixed']:,}, broke {row['broken']:,})"
    )


def _beyond_chance(rows: pd.DataFrame) -> str:
    sure = rows[rows["p"] < SIGNIFICANT]
    many = f", adjusted for {len(rows)} classes (Holm)" if len(rows) > 1 else ""
    if len(sure):
        names = ", ".join(sure["class"].head(5)) + (" and others" if len(sure) > 5 else "")
        says = f"{len(sure)} of {len(rows)} classes changed beyond chance{many}: {names}."
    else:
        says = f"No single class changed beyond chance{many}."
    fewest = int(rows["n"].min())
    if fewest >= FEW:
        return says
    one = f"{100 / fewest:.2g} points"
    return f"{says} The smallest class has {_photos(fewest)}, so there one photo is {one}."


def _photos(count: int) -> str:
    return "1 photo" if count == 1 else f"{count:,} photos"


# --- confusions ---------------------------------------------------------------------------------


def confusion(change: Change) -> pd.DataFrame:
    """The cells of both confusion matrices that are not 0 in both, row by row: true, predicted (the
    names), before, after (numbers of photos), n (photos of the true class)."""
    size, labels = len(change.classes), change.before.labels
    counts = [
        np.bincount(labels * size + each.predicted, minlength=size * size)
        for each in (change.before, change.after)
    ]
    cells = np.flatnonzero(counts[0] + counts[1])
    names = np.array(change.classes, dtype=object)
    return pd.DataFrame(
        {
            "true": names[cells // size],
            "predicted": names[cells % size],
            "before": counts[0][cells],
            "after": counts[1][cells],
            "n": np.bincount(labels, minlength=size)[cells // size],
        }
    )


def confused_pairs(cells: pd.DataFrame, names: Names, limit: int = 15) -> pd.DataFrame:
    """The pairs of classes that were confused most, before or after, for display."""
    wrong = cells[cells["true"] != cells["predicted"]]
    worst = wrong[["before", "after"]].max(axis=1).sort_values(ascending=False, kind="stable")
    rows = wrong.loc[worst.index[:limit]]
    first, then = short(names)
    return pd.DataFrame(
        {
            "True class": rows["true"],
            "Predicted": rows["predicted"],
            first.capitalize(): rows["before"],
            then.capitalize(): rows["after"],
            "Change": rows["after"] - rows["before"],
            "Photos": rows["n"],
        }
    ).reset_index(drop=True)

"""What the names in a log mean: `val_sparse_categorical_accuracy`, `Loss/train`, `eval_top1`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from trainer.imports.logs import Field, LogError

Split = Literal["train", "val"]
NONE: Final = "none"
_SPLITS: Final[dict[str, Split]] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "eval": "val",
}
# In order of preference, where a log has several.
_ACCURACY: Final = (
    "accuracy",
    "acc",
    "categorical_accuracy",
    "sparse_categorical_accuracy",
    "binary_accuracy",
    "multiclass_accuracy",
    "multiclassaccuracy",
    "top1",
    "top_1",
    "top1_accuracy",
    "top_1_accuracy",
    "top1_acc",
    "acc1",
    "acc_1",
    "error_rate",
)
_TOP5: Final = (
    "top_k_categorical_accuracy",
    "sparse_top_k_categorical_accuracy",
    "top5_accuracy",
    "top_5_accuracy",
    "top5",
    "top_5",
    "top5_acc",
    "acc5",
    "acc_5",
)
_MACRO_F1: Final = ("macro_f1", "f1_macro")
_RATE: Final = ("learning_rate", "lr")
_SHOWN: Final = 20
_LONGEST: Final = 60


@dataclass(frozen=True)
class Name:
    """A tag taken apart. `whole` is false for values of single steps, beside which a log may hold
    those of whole epochs."""

    split: Split | None
    metric: str
    whole: bool


@dataclass(frozen=True)
class Meaning:
    """The field that a tag stands for; `inverted` for an error rate, 1 - accuracy."""

    field: Field
    inverted: bool = False


def take_apart(tag: str) -> Name:
    """`validation/epoch_loss` -> val, "loss"; `train_loss_step` -> train, "loss", not whole."""
    words = [word for word in re.split(r"[^a-z0-9]+", tag.lower()) if word]
    split: Split | None = None
    whole = True
    while words:
        place = next((at for at in (0, -1) if words[at] in (*_SPLITS, "epoch", "step")), None)
        if place is None:
            break
        word = words.pop(place)
        split = _SPLITS.get(word, split)
        whole = whole and word != "step"
    return Name(split, "_".join(words), whole)


def is_epoch(tag: str) -> bool:
    """Whether a tag counts the epochs: `epoch`, `train/epoch`."""
    return take_apart(tag).metric == "" and tag.lower().endswith("epoch")


def choose(tags: Sequence[str], bare: Split, accuracy: str | None) -> dict[str, Meaning]:
    """What to take from a log, by tag; at most one tag for each field.

    `bare` is the split of a tag that names none, `accuracy` the user's own tag for the validation
    accuracy, or NONE to do without. Raises LogError where there is no accuracy.
    """
    found: dict[Field, tuple[tuple[int, bool], str, Meaning]] = {}
    for tag in tags:
        name = take_apart(tag)
        known = _meaning(name, name.split or bare)
        if known is None:
            continue
        meaning, preference = known
        rank = (preference, not name.whole)
        if meaning.field not in found or rank < found[meaning.field][0]:
            found[meaning.field] = rank, tag, meaning
    chosen = {tag: meaning for _, tag, meaning in found.values()}
    if accuracy is not None and accuracy != NONE:
        chosen = _with_accuracy(chosen, tags, bare, accuracy)
    _check(chosen, tags, accuracy)
    return chosen


def _meaning(name: Name, split: Split) -> tuple[Meaning, int] | None:
    """What a tag stands for, and its place among others that stand for the same (0 is best)."""
    metric = name.metric
    if metric == "loss":
        return Meaning("train_loss" if split == "train" else "val_loss"), 0
    if metric in _ACCURACY:
        place = _ACCURACY.index(metric)
        return Meaning(_accuracy(split), metric == "error_rate"), place
    if metric in _RATE or metric.startswith("lr_"):  # Lightning: lr-Adam
        return Meaning("lr"), 0 if metric in _RATE else 1
    if metric in _TOP5 and split == "val":
        return Meaning("val_top5"), _TOP5.index(metric)
    if metric in _MACRO_F1 and split == "val":
        return Meaning("val_macro_f1"), 0
    return None


def _accuracy(split: Split) -> Field:
    return "train_acc" if split == "train" else "val_acc"


def _with_accuracy(
    chosen: dict[str, Meaning], tags: Sequence[str], bare: Split, accuracy: str
) -> dict[str, Meaning]:
    """With the accuracy that the user names, and the same of the training photos."""
    wanted = take_apart(accuracy).metric
    same = {tag: take_apart(tag).split for tag in tags if take_apart(tag).metric == wanted}
    if not wanted or not same:
        raise LogError(f"there is no {accuracy!r} among its tags: {listed(tags)}.")
    if "val" not in same.values():
        bare = "val"
    fields = {tag: Meaning(_accuracy(split or bare)) for tag, split in same.items()}
    taken = {meaning.field for meaning in fields.values()} | {"val_acc"}
    rest = {tag: meaning for tag, meaning in chosen.items() if meaning.field not in taken}
    return rest | fields


def _check(chosen: dict[str, Meaning], tags: Sequence[str], accuracy: str | None) -> None:
    fields = {meaning.field for meaning in chosen.values()}
    if fields & {"train_acc", "val_acc"}:
        return
    if not fields & {"train_loss", "val_loss"}:
        raise LogError(
            "it holds neither an accuracy nor a loss under a name that Thaw knows. Its tags: "
            f"{listed(tags)}. Name the accuracy with --accuracy TAG."
        )
    if accuracy != NONE:
        raise LogError(
            f"no accuracy among its tags: {listed(tags)}. Name it with --accuracy TAG, or import "
            "the loss alone with --accuracy none."
        )


def listed(tags: Sequence[str]) -> str:
    """The tags for a message, not too many of them."""
    shown = [tag if len(tag) <= _LONGEST else f"{tag[:_LONGEST]}…" for tag in tags[:_SHOWN]]
    more = f" and {len(tags) - _SHOWN} more" if len(tags) > _SHOWN else ""
    return (", ".join(shown) or "none") + more

"""What unfreezing changed: classes, confusions, single photos, confidence."""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Final, get_args

import altair as alt
import pandas as pd
import streamlit as st

from explorer.calibration import BINS, calibration_lines, few_photos
from explorer.changed import (
    Change,
    Names,
    Order,
    change_between,
    class_headline,
    class_table,
    confused_pairs,
    confusion,
    headline,
    ordered,
    per_class,
    short,
)
from explorer.changed_charts import (
    CELL,
    Matrix,
    confidence_counts,
    dumbbell,
    matrix,
    reliability_chart,
)
from explorer.data import Snapshot
from explorer.gallery import Outcome, chosen_photos, photo_path, photo_table, small_jpeg
from explorer.pages import parts
from explorer.render import printable
from trainer.controls import control_of, controls_by_parent
from trainer.evidence import EvidenceError
from trainer.preprocess import PhotoError
from trainer.runlog import Run, Stamp, stamp

_AGAINST: Final[dict[str, Names]] = {
    "Before unfreezing": ("Before unfreezing", "After unfreezing"),
    "Control": ("Control", "After unfreezing"),
}
_PARTS: Final = ("Classes", "Confusions", "Photos", "Confidence")
_ORDERS: Final[dict[str, Order]] = {"Change": "change", "Name": "name", "Photos": "photos"}
_OUTCOMES: Final[dict[str, Outcome | None]] = {
    "Fixed": "fixed",
    "Broken": "broken",
    "Wrong both times": "wrong",
    "All": None,
}
_ANY: Final = "Any class"
_MOST: Final = 30  # classes in the dumbbell unless all are asked for
_SIDE_BY_SIDE: Final = 8  # classes; three matrices of more do not fit beside each other
_ON_A_PAGE: Final = 12
_STYLE: Final = """<style>
.thaw-photos {display: grid; gap: .9rem; padding: 0; margin: 0;
  grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr))}
.thaw-photo {margin: 0; min-width: 0; font-size: .875rem; line-height: 1.35}
.thaw-photo img, .thaw-photo .thaw-none {width: 100%; aspect-ratio: 1; object-fit: cover;
  box-sizing: border-box; border-radius: .4rem; background: rgba(124, 135, 146, .15)}
.thaw-photo .thaw-none {display: flex; align-items: center; padding: .6rem; overflow: hidden;
  overflow-wrap: anywhere}
.thaw-photo .thaw-true {font-weight: 600; margin-top: .3rem; overflow-wrap: anywhere}
.thaw-answer {display: grid; grid-template-columns: 3.1rem 1fr auto; gap: .4rem}
.thaw-answer > :nth-child(2) {overflow-wrap: anywhere}
.thaw-answer > :first-child, .thaw-photo .thaw-file {opacity: .68}
.thaw-answer > :last-child {font-variant-numeric: tabular-nums}
.thaw-answer .right {color: #12966f} .thaw-answer .wrong {color: #d9622b}
.thaw-photo .thaw-file {font-size: .8rem; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap}
</style>"""


def page() -> None:
    snapshot = parts.opened("Which classes and photos did unfreezing change?")
    if snapshot is None:
        return
    left, right = st.columns([3, 2])
    with left:
        run = parts.choose_run(snapshot, _is_suitable)
    with right:
        names = _AGAINST[parts.one_of("Compare with", list(_AGAINST), key="compare_with")]
    change = _change(snapshot, run, control=names[0] == "Control")
    if change is not None:
        _show(change, run, names)
    parts.problems(snapshot)


def _is_suitable(run: Run) -> bool:
    there = (run.predictions(name).exists() for name in ("before", "after"))
    return run.boundary is not None and all(there)


# --- what is compared ---------------------------------------------------------------------------


def _change(snapshot: Snapshot, run: Run, control: bool) -> Change | None:
    """The change that was chosen; where there is none, says why."""
    if run.boundary is None:
        st.info(
            "This run was never unfrozen. Choose a run of phase finetune, or train one with "
            "`python -m trainer --phase finetune`."
        )
        return None
    before = run.predictions("before")
    if control:
        other = control_of(run, controls_by_parent(snapshot.runs.values()))
        if other is None:
            st.info(
                "This run has no control: a run that trained the head further, as long and on the "
                "same photos, with all else frozen. `python -m trainer sweep` trains one beside "
                "its runs."
            )
            return None
        before = other.predictions("after")
    after = run.predictions("after")
    missing = [path for path in (before, after) if not path.exists()]
    if missing:
        _say_missing(run, missing)
        return None
    try:
        return change_between(before, after, run.classes)
    except EvidenceError as error:
        st.text(printable(str(error)))
        return None


def _say_missing(run: Run, missing: Sequence[Path]) -> None:
    if run.status == "running":
        st.info("This run has not saved its answers yet: the first epoch after unfreezing does.")
    else:
        st.info("The answers of this run to its validation photos were not saved.")
    for path in missing:
        st.text(printable(f"{path} is not there."))


def _show(change: Change, run: Run, names: Names) -> None:
    classes = per_class(change)
    parts.headline(headline(change, names), "")
    st.text(class_headline(classes))
    so_far = " so far" if run.status == "running" else ""
    st.caption(
        f"After unfreezing is the run's best epoch{so_far}; the best of several flatters. p is "
        "McNemar's exact test, for this run alone: Compare adjusts it for all runs shown there."
    )
    part = _one_of("Show", _PARTS, key="part")
    if part == "Classes":
        _classes(classes, names)
    elif part == "Confusions":
        _confusions(change, names)
    elif part == "Photos":
        _photos(change, run, names)
    else:
        _confidence(change, names)


# --- classes ------------------------------------------------------------------------------------


def _classes(classes: pd.DataFrame, names: Names) -> None:
    photos = int((classes["n"] > 0).sum())
    with st.container(horizontal=True, gap="medium"):
        order = _ORDERS[parts.one_of("Sort by", list(_ORDERS), key="classes_by")]
        limit: int | None = _MOST
        if photos > _MOST:
            shown = parts.one_of("Classes", (f"{_MOST} most changed", "All"), key="classes_shown")
            limit = None if shown == "All" else _MOST
    rows = ordered(classes, order, limit)
    described = f"Recall of {len(rows)} classes before and after, numbers in the table below"
    parts.chart(dumbbell(rows, names), key="dumbbell", alt_text=described)
    _table_of_classes(classes, names)


def _table_of_classes(classes: pd.DataFrame, names: Names) -> None:
    percent = st.column_config.NumberColumn(format="%.1f%%")
    shares = [f"{kind} {when}" for kind in ("Recall", "Precision", "F1") for when in short(names)]
    config: dict[str, Any] = dict.fromkeys(shares, percent)
    st.dataframe(
        class_table(classes, names),
        hide_index=True,
        key="table-classes",
        alt="Recall, precision and F1 of each class before and after",
        column_config=config
        | {
            "Class": st.column_config.TextColumn(pinned=True),
            "Change": st.column_config.NumberColumn(format="%+.1f", help="Points of recall"),
            "p": st.column_config.NumberColumn(
                format="%.2g", help="McNemar's exact test, adjusted for the classes (Holm)"
            ),
        },
    )
    st.caption(
        "Recall: how many of a class's photos were recognised. Precision: how many of the photos "
        "that were given this class belong to it. F1: the harmonic mean of both. Blank: no photos."
    )


# --- confusions ---------------------------------------------------------------------------------


def _confusions(change: Change, names: Names) -> None:
    shares = parts.one_of("Cells", ("Photos", "Percent of true class"), key="cells") != "Photos"
    cells = confusion(change)
    small = len(change.classes) <= _SIDE_BY_SIDE
    places = [*st.columns(3), st.container()] if small else [*st.columns(2), *st.columns(2)]
    for place, which in zip(places, get_args(Matrix), strict=False):
        with place:
            _clickable(matrix(cells, change.classes, which, shares, names), which)
    with places[-1]:
        _pairs(cells, names)


def _clickable(drawn: alt.LayerChart, which: Matrix) -> None:
    key = f"matrix-{which}"
    st.altair_chart(
        drawn,
        key=key,
        alt=f"Confusion matrix ({which}); the pairs confused most are in the table",
        on_select=lambda: _open_cell(key, which),
        selection_mode=CELL,
    )
    parts.svg_of(drawn, key)


def _open_cell(key: str, which: Matrix) -> None:
    """Show the photos of the cell that was clicked."""
    cells = st.session_state[key]["selection"].get(CELL)
    if not cells:
        return
    cell = cells[0]
    # Where the difference is negative there are more photos to see before.
    before = which == "before" or (which == "difference" and cell["value"] < 0)
    st.session_state["part"] = "Photos"
    st.session_state["outcome"] = "All"
    st.session_state["true_class"] = cell["true"]
    st.session_state["said_before"] = cell["predicted"] if before else _ANY
    st.session_state["said_after"] = _ANY if before else cell["predicted"]


def _pairs(cells: pd.DataFrame, names: Names) -> None:
    st.caption(
        "Colours grow with the square root. Click a cell to see its photos, or choose its classes "
        "under Photos. The pairs of classes confused most:"
    )
    st.dataframe(
        confused_pairs(cells, names),
        hide_index=True,
        key="table-pairs",
        alt="Pairs of classes with the numbers of photos confused before and after",
        column_config={
            "Change": st.column_config.NumberColumn(format="%+d"),
            "Photos": st.column_config.NumberColumn(help="Of the true class"),
        },
    )


# --- photos -------------------------------------------------------------------------------------


def _photos(change: Change, run: Run, names: Names) -> None:
    st.html(_STYLE)
    outcome = _one_of("Photos", list(_OUTCOMES), key="outcome")
    true, before, after = _wanted_classes(change.classes, short(names))
    photos = chosen_photos(photo_table(change), _OUTCOMES[outcome], true, before, after)
    if photos.empty:
        st.info("No photo is like this.")
        return
    root = _root(run)
    st.caption(f"{_counted(len(photos))}; the true class's probability changed most in the first.")
    pages = -(-len(photos) // _ON_A_PAGE)
    number = _page_number(pages, (run.run_id, names[0], outcome, true, before, after))
    first = (number - 1) * _ON_A_PAGE
    rows = photos.iloc[first : first + _ON_A_PAGE].to_dict("records")
    with st.spinner("Reading photos"):
        cards = "".join(_card(row, names, _picture(root, str(row["file"]))) for row in rows)
    st.html(f'<div class="thaw-photos" role="list">{cards}</div>')


def _counted(photos: int) -> str:
    return "One photo" if photos == 1 else f"{photos:,} photos"


def _wanted_classes(
    classes: Sequence[str], when: Names
) -> tuple[str | None, str | None, str | None]:
    """The true class and both answers to look for; None for any."""
    first, second, third = st.columns(3)
    with first:
        true = _one_class("True class", classes, "true_class")
    with second:
        before = _one_class(f"Predicted {when[0]}", classes, "said_before")
    with third:
        after = _one_class(f"Predicted {when[1]}", classes, "said_after")
    return true, before, after


def _one_class(label: str, classes: Sequence[str], key: str) -> str | None:
    options = [_ANY, *classes]
    _recall(key, options)
    name = st.selectbox(label, options, key=key, persist_state="session")
    _to_link(key, name, options)
    return None if name == _ANY else name


def _one_of(label: str, options: Sequence[str], key: str) -> str:
    """As parts.one_of, for a choice that a click on a cell may have made."""
    _recall(key, options)
    name = st.segmented_control(label, options, required=True, key=key, persist_state="session")
    _to_link(key, name or options[0], options)
    return name or options[0]


def _recall(key: str, options: Sequence[str]) -> None:
    """Start a widget with what this session or the link says, if that is still among them."""
    start, _ = parts.remembered(key, options, options[:1])
    st.session_state[key] = (start or options)[0]


def _to_link(key: str, name: str, options: Sequence[str]) -> None:
    # By hand: Streamlit's own binding leaves out what was set while the widget was not shown.
    if name == options[0]:
        st.query_params.pop(key, None)
    else:
        st.query_params[key] = name


def _page_number(pages: int, of: tuple[str | None, ...]) -> int:
    """The page of the gallery. Every choice of photos has its own; the link's is for the first."""
    linked = st.query_params.get("sheet", "")
    of_link = st.session_state.setdefault("gallery", of) == of
    first = next((n for n in range(1, pages + 1) if of_link and str(n) == linked), 1)
    number = 1
    if pages > 1:
        key = f"sheet-{hash(of)}"
        number = st.pagination(pages, default=first, key=key, persist_state="session")
    _to_link("sheet", str(number), ["1"])
    return number


def _root(run: Run) -> Path | None:
    """The photo folder of the run; where it is not there, says so."""
    root = str(run.info.get("dataset", {}).get("root", ""))
    try:
        if root and Path(root).is_dir():
            return Path(root)
        reason = "is not there any more"
    except (OSError, ValueError) as error:
        reason = f"cannot be opened ({error})"
    st.text(printable(f"The photos cannot be shown: their folder {root} {reason}."))
    return None


def _picture(root: Path | None, file: str) -> str:
    """A photo as an HTML image, or why there is none."""
    name = escape(printable(file))
    if root is None:
        return '<div class="thaw-none">no picture</div>'
    try:
        path = photo_path(root, file)
        content = _thumbnail(path, stamp(path))
    except PhotoError as error:
        return f'<div class="thaw-none">{name}: {escape(printable(str(error)))}</div>'
    data = base64.b64encode(content).decode()
    return f'<img alt="{name}" src="data:image/jpeg;base64,{data}">'


@functools.lru_cache(maxsize=1000)
def _thumbnail(path: Path, _: Stamp) -> bytes:
    return small_jpeg(path)


def _card(row: dict[Any, Any], names: Names, picture: str) -> str:
    first, then = (name.capitalize() for name in short(names))
    chance = f"{row['true_before']:.0%} → {row['true_after']:.0%}"
    name = escape(printable(row["file"]))
    return (
        f'<figure class="thaw-photo" role="listitem">{picture}<figcaption>'
        f'<div class="thaw-true">{escape(row["true"])}</div>'
        f"{_answer(first, row['before'], row['confidence_before'], row['true'])}"
        f"{_answer(then, row['after'], row['confidence_after'], row['true'])}"
        f'<div class="thaw-file">True class {chance}</div>'
        f'<div class="thaw-file" title="{name}">{name}</div>'
        "</figcaption></figure>"
    )


def _answer(when: str, answer: str, confidence: float, true: str) -> str:
    kind, mark = ("right", "✓") if answer == true else ("wrong", "✗")
    return (
        f'<div class="thaw-answer"><span>{when}</span><span><span class="{kind}" title="{kind}">'
        f"{mark}</span> {escape(answer)}</span><span>{confidence:.0%}</span></div>"
    )


# --- confidence ---------------------------------------------------------------------------------


def _confidence(change: Change, names: Names) -> None:
    words, charts = st.columns([2, 3], gap="large")
    with words:
        for line in calibration_lines(change, names):
            st.text(line)
        if warning := few_photos(change):
            st.text(warning)
        _explain_confidence()
    described = "by confidence, before and after; what follows from it stands beside"
    with charts:
        parts.chart(reliability_chart(change, names), "reliability", f"Accuracy {described}")
        parts.chart(confidence_counts(change, names), "confidence", f"Photos {described}")


def _explain_confidence() -> None:
    st.caption(
        f"Photos in {BINS} equal steps of confidence (softmax of the logits). On the diagonal a "
        "network is as often right as it is sure; above, it is under-confident. Vertical lines: "
        "95% interval of the accuracy (Wilson). Expected calibration error: the mean distance from "
        "the diagonal, weighted by photos (Guo et al. 2017, On Calibration of Modern Neural "
        "Networks)."
    )

"""Charts of what changed, from the frames of explorer.changed: classes, confusions, confidence.

Before is grey, round and dashed; after is coloured, with shapes of its own and solid. Cells of a
matrix are opaque, so that the numbers on them are as legible on the dark theme as on the light one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import altair as alt
import pandas as pd

from explorer.calibration import reliability
from explorer.changed import Change, Names, short
from explorer.charts import NOTE_COLOUR, RUN_COLOURS
from trainer.evidence import points

Matrix = Literal["before", "after", "difference"]

_FEW: Final = 8  # classes; the names of more collide unless they stand upright
MOST_TEXT: Final = 20  # classes; more cells than 20 x 20 have no room for numbers
CELL: Final = "cell"  # the name of the selection that a click on a cell makes
_GAIN, _LOSS = RUN_COLOURS[:2]
_HOW: Final = ("gained", "lost", "the same")
_ROW: Final = 24
_AROUND: Final = 170  # axis, its title and the legend: Streamlit fits all into height
_LABEL: Final = 26  # characters
# All light enough for dark text, whatever the theme.
CELL_COLOURS: Final = {
    "weak": "#dbeaf4",
    "strong": "#3f9acc",
    "fewer": "#e08a4f",
    "same": "#efeae6",
}
CELL_TEXT: Final = "#14202b"


# --- classes ------------------------------------------------------------------------------------


def dumbbell(frame: pd.DataFrame, names: Names) -> alt.LayerChart:
    """The recall of each class before and after as two marks on a line, in the order of the rows.

    `frame` is explorer.changed.per_class or some of its rows; `names` say what the two networks
    are. Beside the name of a class stands its number of photos, at its end the change in points.
    """
    kinds = [names[0], *(f"{short(names)[1].capitalize()}: {how}" for how in _HOW)]
    rows = _dumbbell_rows(frame, kinds)
    colour = alt.Scale(domain=kinds, range=[NOTE_COLOUR, _GAIN, _LOSS, NOTE_COLOUR])
    shapes = ["circle", "triangle-right", "triangle-left", "diamond"]
    shape = alt.Scale(domain=kinds, range=shapes)
    # In one column: beside long class names a phone has room for no more.
    legend = alt.Legend(orient="top", title=None, columns=1, symbolSize=90)
    y = _class_axis(rows)
    base = alt.Chart(rows).encode(y=y, tooltip=_class_tooltip(names))
    line = base.mark_rule(strokeWidth=3, opacity=0.55).encode(
        x=_recall_axis(frame),
        x2="recall_before:Q",
        color=alt.when(alt.datum.change > 0).then(alt.value(_GAIN)).otherwise(alt.value(_LOSS)),
    )
    after = base.mark_point(filled=True, opacity=1, size=110).encode(
        x="recall_after:Q",
        color=alt.Color("kind:N", scale=colour, legend=legend),
        shape=alt.Shape("kind:N", scale=shape, legend=legend),
    )
    # The row of the legend for "before" comes from the scale, so this one needs no data of its own.
    before = base.mark_point(filled=True, opacity=1, size=60, color=NOTE_COLOUR, shape="circle")
    layers = [line, after, before.encode(x="recall_before:Q"), *_change_texts(base)]
    return alt.LayerChart(layer=layers).properties(height=_ROW * len(rows) + _AROUND)


def _dumbbell_rows(frame: pd.DataFrame, kinds: Sequence[str]) -> pd.DataFrame:
    def kind(change: float) -> str:
        return kinds[1] if change > 0 else kinds[2] if change < 0 else kinds[3]

    return frame.assign(
        label=[f"{n} ({c:,})" for n, c in zip(frame["class"], frame["n"], strict=True)],
        kind=frame["change"].map(kind),
        text=frame["change"].map(points),
    )


def _class_axis(rows: pd.DataFrame) -> alt.Y:
    # Shortened in the middle: the number of photos is at the end.
    axis = alt.Axis(
        labelExpr=f"truncate(datum.label, {_LABEL}, 'center')",
        labelLimit=220,
        labelOverlap=False,
        labelPadding=8,
    )
    return alt.Y("label:N", sort=list(rows["label"]), title=None, axis=axis)


def _recall_axis(frame: pd.DataFrame) -> alt.X:
    ends = frame[["recall_before", "recall_after"]]
    low, high = float(ends.min().min()), float(ends.max().max())
    step = 0.25 if high - low > 0.6 else 0.1 if high - low > 0.25 else 0.05
    places = [round(step * n, 2) for n in range(round(1 / step) + 1)]
    # Room for the texts beside the marks, but no ticks below 0% or above 100%.
    scale = alt.Scale(zero=False, nice=False, padding=48)
    shown = [value for value in places if low - step <= value <= high + step]
    axis = alt.Axis(format=".0%", values=shown, titlePadding=8)
    return alt.X("recall_after:Q", title="Recall (photos in brackets)", scale=scale, axis=axis)


def _change_texts(base: alt.Chart) -> list[alt.Chart]:
    """The change beside the mark of after, on the side away from before."""
    gained = base.mark_text(align="left", dx=9, fontSize=12, color=NOTE_COLOUR)
    lost = base.mark_text(align="right", dx=-9, fontSize=12, color=NOTE_COLOUR)
    shown = {"x": "recall_after:Q", "text": "text:N"}
    return [
        gained.encode(**shown).transform_filter(alt.datum.change > 0),
        lost.encode(**shown).transform_filter(alt.datum.change < 0),
    ]


def _class_tooltip(names: Names) -> list[alt.Tooltip]:
    first, then = short(names)
    return [
        alt.Tooltip("class:N", title="Class"),
        alt.Tooltip("n:Q", title="Photos", format=","),
        alt.Tooltip("recall_before:Q", title=f"Recall {first}", format=".1%"),
        alt.Tooltip("recall_after:Q", title=f"Recall {then}", format=".1%"),
        alt.Tooltip("text:N", title="Change in points"),
        alt.Tooltip("fixed:Q", title="Photos fixed", format=","),
        alt.Tooltip("broken:Q", title="Photos broken", format=","),
        alt.Tooltip("p:Q", title="p (adjusted)", format=".2g"),
    ]


# --- confusions ---------------------------------------------------------------------------------


def matrix(
    cells: pd.DataFrame, classes: Sequence[str], which: Matrix, shares: bool, names: Names
) -> alt.LayerChart:
    """One confusion matrix: true classes down, predicted classes across.

    `cells` is explorer.changed.confusion; `shares` shows percent of each true class instead of
    numbers of photos. Up to MOST_TEXT classes the values stand in the cells. A click on a cell is
    the selection CELL, with the fields true, predicted and value.
    """
    title = {"before": names[0], "after": names[1]}.get(which) or _difference(names, shares)
    rows = _cell_values(cells, which, shares)
    most = float(rows["value"].abs().max()) if len(rows) else 1.0
    if shares and which != "difference":
        most = 1.0  # so that equal colours mean equal shares before and after
    written = len(classes) <= MOST_TEXT
    base = alt.Chart(rows).encode(
        x=alt.X(
            "predicted:N",
            title="Predicted class",
            **_matrix_axis(classes, -45 if len(classes) <= _FEW else -90),
        ),
        y=alt.Y("true:N", title="True class", **_matrix_axis(classes, 0)),
        tooltip=_cell_tooltip(names),
    )
    clicked = alt.selection_point(name=CELL, fields=["true", "predicted", "value"], toggle=False)
    legend = None if written else _gradient(shares)
    squares = base.mark_rect(cursor="pointer").encode(color=_cell_colour(which, most, legend))
    layers = [squares.add_params(clicked), *([_cell_text(base)] if written else [])]
    return alt.LayerChart(layer=layers).properties(
        title=alt.Title(title, anchor="start", offset=8),
        height=max(150, min(420, 44 * len(classes))) + 130 + (0 if written else 45),
    )


def _difference(names: Names, shares: bool) -> str:
    first, then = short(names)
    return f"Difference: {then} minus {first}{', in points' if shares else ''}"


def _cell_values(cells: pd.DataFrame, which: Matrix, shares: bool) -> pd.DataFrame:
    """What is drawn: value, its text, how strong its colour is, and both counts for the tooltip."""
    counts = cells["after"] - cells["before"] if which == "difference" else cells[which]
    value = counts / cells["n"] if shares else counts.astype("float64")
    signed = which == "difference"
    rows = cells.assign(value=value, text=[_cell_words(each, shares, signed) for each in value])
    return rows[rows["value"] != 0]


def _cell_words(value: float, shares: bool, signed: bool) -> str:
    size = 100 * abs(value) if shares else abs(value)
    text = "<1" if 0 < size < 0.5 else f"{size:.0f}"
    sign = ("+" if value > 0 else "\u2212") if signed else ""
    return sign + text


def _matrix_axis(classes: Sequence[str], angle: int) -> dict[str, Any]:
    crowded = len(classes) > MOST_TEXT
    axis = alt.Axis(
        labelLimit=90,
        labelPadding=4,
        titlePadding=6,
        labelAngle=angle,
        labelOverlap="greedy" if crowded else False,
    )
    scale = alt.Scale(domain=list(classes), paddingInner=0 if crowded else 0.04)
    return {"axis": axis, "scale": scale}


def _cell_colour(which: Matrix, most: float, legend: alt.Legend | None) -> alt.Color:
    weak, strong, fewer, same = CELL_COLOURS.values()
    if which == "difference":
        domain, colours = [-most, 0, most], [fewer, same, strong]
    else:
        domain, colours = [0, most], [weak, strong]
    # Square roots, or next to hundreds on the diagonal a few confused photos would have no colour.
    scale = alt.Scale(type="sqrt", domain=domain, range=colours, interpolate="rgb")
    return alt.Color("value:Q", scale=scale, legend=legend)


def _gradient(shares: bool) -> alt.Legend:
    form = ".0%" if shares else "d"
    return alt.Legend(orient="bottom", title=None, gradientLength=160, format=form, tickCount=3)


def _cell_text(base: alt.Chart) -> alt.Chart:
    return base.mark_text(
        color=CELL_TEXT,
        cursor="pointer",
        # As large as the narrower side of a cell allows; none where that is too small to read.
        fontSize=alt.expr("clamp(0.42 * min(bandwidth('x'), bandwidth('y') + 8), 8, 14)"),
        opacity=alt.expr("bandwidth('x') < 15 ? 0 : 1"),
    ).encode(text="text:N")


def _cell_tooltip(names: Names) -> list[alt.Tooltip]:
    first, then = short(names)
    return [
        alt.Tooltip("true:N", title="True class"),
        alt.Tooltip("predicted:N", title="Predicted class"),
        alt.Tooltip("before:Q", title=f"Photos {first}", format=","),
        alt.Tooltip("after:Q", title=f"Photos {then}", format=","),
        alt.Tooltip("n:Q", title="Photos of the true class", format=","),
    ]


# --- confidence ---------------------------------------------------------------------------------


def reliability_chart(change: Change, names: Names) -> alt.LayerChart:
    """Accuracy by confidence, with 95% intervals; on the diagonal a network is as often right as
    it is sure."""
    rows = _both(change, names).query("n > 0")
    colour, shape, dash = _series(names)
    base = alt.Chart(rows).encode(
        x=_confidence_axis("confidence", None), color=colour, tooltip=_bin_tooltip()
    )
    y = alt.Y(
        "accuracy:Q",
        title="Accuracy",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(format=".0%", minExtent=44, tickCount=5),
    )
    corners = pd.DataFrame({"confidence": [0.0, 1.0], "accuracy": [0.0, 1.0]})
    diagonal = (
        alt.Chart(corners)
        .mark_line(color=NOTE_COLOUR, strokeWidth=1, opacity=0.7)
        .encode(x=_confidence_axis("confidence", None), y=y)
    )
    intervals = base.mark_rule(strokeWidth=1.5, opacity=0.6).encode(
        y=alt.Y("lower:Q", title="Accuracy"), y2="upper:Q"
    )
    lines = base.mark_line(strokeWidth=2).encode(y=y, strokeDash=dash)
    dots = base.mark_point(filled=True, opacity=1, size=80).encode(y=y, shape=shape)
    return alt.LayerChart(layer=[diagonal, intervals, lines, dots]).properties(height=380)


def confidence_counts(change: Change, names: Names) -> alt.Chart:
    """How many photos lie in each step of confidence, before and after side by side."""
    rows = _both(change, names)
    middle = (rows["low"] + rows["high"]) / 2
    first = rows["network"] == names[0]
    rows = rows.assign(
        left=middle.where(~first, rows["low"] + 0.006),
        right=middle.where(first, rows["high"] - 0.006),
    )
    colour, _, _ = _series(names, legend=False)
    return (
        alt.Chart(rows)
        .mark_rect()
        .encode(
            x=_confidence_axis("left", "Confidence: the probability of the class predicted"),
            x2="right:Q",
            y=alt.Y("n:Q", title="Photos", axis=alt.Axis(minExtent=44, tickCount=3, format="~s")),
            y2=alt.datum(0),
            color=colour,
            tooltip=_bin_tooltip(),
        )
        .properties(height=170)
    )


def _both(change: Change, names: Names) -> pd.DataFrame:
    pairs = zip(names, (change.before, change.after), strict=True)
    rows = pd.concat([reliability(of).assign(network=name) for name, of in pairs])
    steps = [
        f"{low:.0%} to {high:.0%}" for low, high in zip(rows["low"], rows["high"], strict=True)
    ]
    return rows.assign(step=steps).reset_index(drop=True)


def _series(names: Names, legend: bool = True) -> tuple[alt.Color, alt.Shape, alt.StrokeDash]:
    shown = (
        alt.Legend(orient="top", title=None, symbolSize=120, symbolStrokeWidth=0)
        if legend
        else None
    )
    domain = list(names)
    return (
        alt.Color(
            "network:N",
            scale=alt.Scale(domain=domain, range=[NOTE_COLOUR, _GAIN]),
            legend=shown,
        ),
        alt.Shape(
            "network:N", scale=alt.Scale(domain=domain, range=["circle", "diamond"]), legend=shown
        ),
        alt.StrokeDash(
            "network:N", scale=alt.Scale(domain=domain, range=[[5, 4], [1, 0]]), legend=None
        ),
    )


def _confidence_axis(field: str, title: str | None) -> alt.X:
    axis = alt.Axis(format=".0%", tickCount=5)
    return alt.X(f"{field}:Q", title=title, scale=alt.Scale(domain=[0, 1]), axis=axis)


def _bin_tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("network:N", title="Network"),
        alt.Tooltip("step:N", title="Confidence"),
        alt.Tooltip("n:Q", title="Photos", format=","),
        alt.Tooltip("confidence:Q", title="Mean confidence", format=".1%"),
        alt.Tooltip("accuracy:Q", title="Accuracy", format=".1%"),
        alt.Tooltip("lower:Q", title="95% interval from", format=".1%"),
        alt.Tooltip("upper:Q", title="95% interval to", format=".1%"),
    ]

"""Charts of a sweep: pure functions from the frames of explorer.sweep.Section to Altair charts.

Colours are legible on the light and on the dark theme, and white text on each of them. Better and
worse differ in hue for every kind of colour vision, and the numbers are written beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import altair as alt
import pandas as pd

from explorer.charts import DASHES, NOTE_COLOUR, RUN_COLOURS, SHAPES
from explorer.sweep import CHANGE
from explorer.sweep_members import LAYERS

CELL: Final = "cell"  # the selection of a heatmap, and its field
# Worse, the same, better: under white text, and for thin lines.
_FILLS: Final = ["#b8510f", "#6d7883", "#0f6fb8"]
_LINES: Final = ["#d9622b", "#7c8792", "#0a84c6"]
_INK: Final = "#ffffff"
_CHOSEN: Final = "#e0a030"
_ROW: Final = 58
_LOW_ROW: Final = 34
_LANE: Final = 110
_MANY_ROWS: Final = 8
# Streamlit fits legend and axes into the height, too.
_LEGEND: Final = 90
_AXIS: Final = 60
_ENDS: Final = (1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50)
# Parallel coordinates, in pixels from the top of an axis: its title, its ticks, where lines go on.
_TITLE, _TICKS, _BAND, _STEP = 8, 26, 38, 112


def limit(values: pd.Series[float]) -> float:
    """The end of a colour scale that has zero in its middle: a round number, so that it stays the
    same while runs go on."""
    largest = float(values.abs().max()) if values.notna().any() else 0.0
    return next((float(end) for end in _ENDS if largest <= end), 100.0)


def _colour(
    values: pd.Series[float], title: str, palette: Sequence[str], legend: bool = True
) -> alt.Color:
    """The scale of all `values`, changes or accuracies; `palette` for worse, the same, better."""
    ticks: Any = alt.Undefined
    if title.startswith(CHANGE):
        end = limit(values)
        ticks = [-end, 0, end]
        scale = alt.Scale(domain=ticks, range=palette, clamp=True, interpolate="lab")
    else:
        known = values.dropna()
        ends = [known.min(), known.max()] if len(known) else [0, 100]
        scale = alt.Scale(domain=ends, range=palette[1:], interpolate="lab")
    drawn = alt.Legend(
        orient="top",
        title=title,
        gradientLength=180,
        gradientOpacity=1,
        titleLimit=300,
        format="~f",
        values=ticks,
        tickCount=3,
    )
    return alt.Color("value:Q", scale=scale, legend=drawn if legend else None)


# --- the heatmap ------------------------------------------------------------------------------


def heatmap(
    cells: pd.DataFrame, title: str, row: str, only: str = "", chosen: str = ""
) -> alt.LayerChart:
    """Learning rate by layers, coloured by the value that is written in each cell.

    `cells` is Section.cells, of which the map `only` is drawn, with the colours of all; `title` is
    explorer.sweep.measure, `row` Section.row, `chosen` the cell to put a frame around. A click on a
    cell selects its `cell` under the name CELL.
    """
    rows = cells[cells["map"] == only].drop(columns="run_ids")
    rows = rows.assign(chosen=rows["cell"] == chosen)
    base = alt.Chart(rows).encode(
        x=_x_of_cells(), y=_y_of_cells(row), tooltip=_tooltip_of_cells(rows, row)
    )
    click = alt.selection_point(name=CELL, fields=[CELL], empty=False)
    has_value = "isValid(datum.value)"
    is_first = only == cells["map"].iloc[0]  # one legend serves all maps
    filled = base.mark_rect(cornerRadius=4, cursor="pointer").encode(
        color=_colour(cells["value"], title, _FILLS, is_first)
    )
    hollow = base.mark_rect(
        cornerRadius=4,
        fillOpacity=0,  # not `filled=False`, which a click would go through
        stroke=NOTE_COLOUR,
        strokeDash=[4, 4],
        cursor="pointer",
    )
    frame = base.mark_rect(cornerRadius=4, filled=False, stroke=_CHOSEN, strokeWidth=3)
    layers = [
        filled.add_params(click).transform_filter(has_value),
        hollow.transform_filter(f"!{has_value}"),
        *_texts(base, has_value, rows["x"].nunique()),
        frame.transform_filter(alt.datum.chosen),
    ]
    return alt.LayerChart(layer=layers).properties(height=_height(rows, is_first))


def _height(rows: pd.DataFrame, legend: bool) -> int:
    count = rows["y"].nunique()
    inner = count * (_ROW if count <= _MANY_ROWS else _LOW_ROW)
    return inner + _AXIS + (_LEGEND if legend else 0)


def _x_of_cells() -> alt.X:
    axis = alt.Axis(labelAngle=0, domain=False, ticks=False, labelPadding=6)
    scale = alt.Scale(paddingInner=0.05, paddingOuter=0.02)
    order = alt.EncodingSortField("x", op="min", order="ascending")
    return alt.X("rate:N", title="Learning rate", axis=axis, scale=scale, sort=order)


def _y_of_cells(row: str) -> alt.Y:
    axis = alt.Axis(domain=False, ticks=False, labelPadding=6, labelLimit=110) if row else None
    scale = alt.Scale(paddingInner=0.06, paddingOuter=0.03)
    order = alt.EncodingSortField("y", op="min", order="descending")  # deeper is higher
    title = "Unfrozen layers" if row == LAYERS else row
    return alt.Y("row:N", title=title, axis=axis, scale=scale, sort=order)


def _tooltip_of_cells(rows: pd.DataFrame, row: str) -> list[alt.Tooltip]:
    named = {
        "rate": "Learning rate",
        "row": row,
        "text": "Mean",
        "runs": "Runs",
        "range": "From the worst run to the best",
        "interval": "95% interval",
        "p": "p, adjusted",
        "beyond": "Beyond chance",
        "state": "Not done",
    }
    said = [name for name in named if (rows[name] != "").any()]
    return [alt.Tooltip(f"{name}:N", title=named[name]) for name in said]


def _texts(base: alt.Chart, has_value: str, columns: int) -> list[alt.Chart]:
    """The value, and below it or alone what is not done, as large as a column allows."""
    column = f"(width / {columns})"
    size = f"clamp({column} / 3.6, 9, 14)"
    small: dict[str, Any] = {
        "fontSize": alt.expr(f"clamp({column} / 5, 8, 11)"),
        "limit": alt.expr(column),
        "cursor": "pointer",
    }
    value = base.mark_text(color=_INK, fontSize=alt.expr(size), fontWeight=600, cursor="pointer")
    below = base.mark_text(color=_INK, dy=alt.expr(size), **small)
    alone = base.mark_text(color=NOTE_COLOUR, **small)
    return [
        value.encode(text="text:N").transform_filter(has_value),
        below.encode(text="state:N").transform_filter(f"{has_value} && datum.state"),
        alone.encode(text="state:N").transform_filter(f"!{has_value}"),
    ]


# --- schedules --------------------------------------------------------------------------------


def schedule_dots(runs: pd.DataFrame, means: pd.DataFrame, title: str) -> alt.LayerChart:
    """One mark for each run, the mean of each schedule as a bar across, its interval behind it.

    `runs` and `means` are Section.schedules and Section.schedule_means.
    """
    names = list(means["schedule"])
    y = alt.Y(
        "schedule:N",
        title=None,
        sort=names,
        axis=alt.Axis(domain=False, ticks=False, labelLimit=110, labelPadding=6),
        scale=alt.Scale(paddingInner=0.3, paddingOuter=0.2),
    )
    colour = alt.Color("schedule:N", scale=_palette(names), legend=None)
    scale = alt.Scale(zero=False, nice=False, padding=14)
    x = alt.X("value:Q", title=title, scale=scale, axis=alt.Axis(tickCount=6, grid=False))
    tooltip = ["schedule:N", "text:N", "interval:N", "runs:Q"]
    of_runs, of_means = alt.Chart(runs), alt.Chart(means).encode(y=y, color=colour, tooltip=tooltip)
    dots = of_runs.mark_point(filled=True, size=55, opacity=0.75).encode(
        x=x,
        y=y,
        yOffset=alt.YOffset("place:Q", scale=alt.Scale(domain=[-0.15, 1.15])),
        color=colour,
        shape=alt.Shape("schedule:N", scale=_shapes(names), legend=None),
        tooltip=["run:N", "settings:N", alt.Tooltip("value:Q", format="+.2f")],
    )
    interval = of_means.mark_rule(strokeWidth=10, opacity=0.3).encode(x="low:Q", x2="high:Q")
    mean = of_means.mark_tick(thickness=3, size=46).encode(x=x)
    said = of_means.mark_text(dy=-42, fontSize=12, fontWeight=600).encode(x=x, text="text:N")
    zero = (
        alt.Chart(pd.DataFrame({"value": [0.0]})).mark_rule(color=NOTE_COLOUR).encode(x="value:Q")
    )
    layers = [interval, dots, mean, said]
    change = [zero] if title.startswith(CHANGE) else []
    height = _AXIS + _LANE * len(names)
    return alt.LayerChart(layer=[*change, *layers]).properties(height=height)


def schedule_curves(curves: pd.DataFrame, title: str) -> alt.LayerChart:
    """The mean validation accuracy of each schedule by epoch; `curves` is Section.curves, `title`
    that of the axis."""
    names = list(curves["schedule"].unique())
    legend = alt.Legend(
        orient="top",
        title=None,
        columns=2,
        symbolType="stroke",
        symbolStrokeWidth=3,
        symbolSize=300,
    )
    spread = curves["accuracy"].max() - curves["accuracy"].min()
    ticks = alt.Axis(format=".1%" if spread < 0.05 else ".0%", tickCount=6)
    base = alt.Chart(curves).encode(
        x=alt.X("epoch:Q", title=title, axis=alt.Axis(format="d", tickMinStep=1, grid=False)),
        y=alt.Y("accuracy:Q", title=None, axis=ticks, scale=alt.Scale(zero=False)),
        color=alt.Color("schedule:N", scale=_palette(names), legend=legend),
        tooltip=[
            alt.Tooltip("schedule:N", title="Schedule"),
            alt.Tooltip("epoch:Q", title=title),
            alt.Tooltip("accuracy:Q", title="Mean validation accuracy", format=".2%"),
            alt.Tooltip("runs:Q", title="Runs"),
        ],
    )
    dashes = alt.Scale(domain=names, range=[DASHES[i % len(DASHES)] for i in range(len(names))])
    dash = alt.StrokeDash("schedule:N", scale=dashes, legend=legend)
    lines = base.mark_line(strokeWidth=2).encode(strokeDash=dash)
    pointer = base.mark_point(size=120, opacity=0)
    return alt.LayerChart(layer=[lines, pointer]).properties(height=_AXIS + _LEGEND + _LANE * 2)


def _palette(names: Sequence[str]) -> alt.Scale:
    colours = [RUN_COLOURS[place % len(RUN_COLOURS)] for place in range(len(names))]
    return alt.Scale(domain=list(names), range=colours)


def _shapes(names: Sequence[str]) -> alt.Scale:
    shapes = [SHAPES[place % len(SHAPES)] for place in range(len(names))]
    return alt.Scale(domain=list(names), range=shapes)


# --- parallel coordinates ---------------------------------------------------------------------


def parallel(lines: pd.DataFrame, title: str, chosen: Sequence[str] = ()) -> alt.LayerChart:
    """Each run as a line through its settings down to its result, whose colour it has.

    `lines` is Section.lines. The axes lie one below the other, so that any number of them fits a
    phone. The runs whose ids are `chosen` stand out, and the one under the pointer does.
    """
    hover = alt.selection_point(
        name="hover",
        fields=["run_id"],
        nearest=True,
        on="pointermove",
        clear="pointerout",
        empty=False,
    )
    height = _STEP * int(lines["number"].max()) + _BAND
    rows = _segments(lines).assign(chosen=lambda frame: frame["run_id"].isin(list(chosen)))
    base = alt.Chart(rows).encode(
        x=_across("place"), y=_down("y", height), detail=["run_id:N", "segment:N"]
    )
    colour = _colour(lines["value"], title, _LINES)
    faint = 0.2 if len(chosen) else min(0.9, max(0.3, 40 / lines["run_id"].nunique()))
    others = alt.when(hover, empty=True).then(alt.value(faint)).otherwise(alt.value(0.12))
    thread = base.mark_line(strokeWidth=1.5)
    bold = base.mark_line(strokeWidth=3.5).encode(color=colour)
    pointer = base.mark_point(size=100, opacity=0).encode(tooltip=_tooltip_of_lines(title))
    layers = [
        thread.encode(color=colour, opacity=others),
        bold.transform_filter(alt.datum.chosen),
        bold.transform_filter(hover),
        *_axes(lines, height),
        pointer.add_params(hover),
    ]
    return alt.LayerChart(layer=layers).properties(height=height + _LEGEND)


def _segments(lines: pd.DataFrame) -> pd.DataFrame:
    """Each run from below one axis to the next: its lines leave room for what an axis says."""
    last = lines["number"].max()
    below = lines.assign(segment=lines["number"], y=lines["number"] * _STEP + _BAND)
    above = lines.assign(segment=lines["number"] - 1, y=lines["number"] * _STEP)
    return pd.concat([below[below["number"] < last], above[above["number"] > 0]])


def _across(field: str) -> alt.X:
    return alt.X(f"{field}:Q", axis=None, scale=alt.Scale(domain=[0, 1]))


def _down(field: str, height: float) -> alt.Y:
    return alt.Y(f"{field}:Q", axis=None, scale=alt.Scale(domain=[height, 0], nice=False))


def _axes(lines: pd.DataFrame, height: float) -> list[alt.Chart]:
    """Title and ticks of each axis, with a rule where lines end and where they go on."""
    names = lines.drop_duplicates("number")[["axis", "number"]]
    names = names.assign(y=names["number"] * _STEP + _TITLE, start=0.0)
    ticks = lines.drop_duplicates(["number", "tick"])[["number", "tick", "at"]]
    ticks = ticks.assign(y=ticks["number"] * _STEP + _TICKS)
    tops = names.loc[names["number"] > 0, "number"] * _STEP
    bottoms = names.loc[names["number"] < names["number"].max(), "number"] * _STEP + _BAND
    ends = pd.DataFrame({"y": pd.concat([tops, bottoms]), "start": 0.0, "end": 1.0})
    rule = alt.Chart(ends).mark_rule(color=NOTE_COLOUR, opacity=0.5)
    title = alt.Chart(names).mark_text(align="left", fontSize=12, fontWeight=600, color=NOTE_COLOUR)
    tick = alt.Chart(ticks).mark_text(fontSize=12, limit=110, color=NOTE_COLOUR)
    return [
        rule.encode(x=_across("start"), x2="end:Q", y=_down("y", height)),
        title.encode(x=_across("start"), y=_down("y", height), text="axis:N"),
        tick.encode(x=_across("at"), y=_down("y", height), text="tick:N"),
    ]


def _tooltip_of_lines(title: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("run:N", title="Run"),
        alt.Tooltip("settings:N", title="Settings"),
        alt.Tooltip("said:N", title=title),
    ]

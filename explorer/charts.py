"""The overlay: curves of many runs as one Altair chart, from a frame of explorer.data.epochs_frame.

Every colour is legible on the light and on the dark theme, because Streamlit restyles axes and
legends but not marks. Scales that depend on the data are left to Vega, so that a live run changes a
chart's data and never its specification: Streamlit then updates it in place, without a flicker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import altair as alt
import pandas as pd

from explorer.curves import (
    PHOTOS,
    RUN,
    SPLITS,
    Axis,
    Look,
    Metric,
    Split,
    boundaries,
    inner_boundaries,
    long_frame,
)
from explorer.settings import BEFORE, in_order

# Hues that differ in lightness too (after Okabe & Ito, and Tol), at 3:1 or more on either theme.
RUN_COLOURS: Final = (
    "#0a84c6",
    "#d9622b",
    "#12966f",
    "#b86fb0",
    "#b98200",
    "#5f72d9",
    "#d14b70",
    "#52904a",
    "#a5693f",
    "#2b98a5",
    "#8f63d2",
    "#8a8a2b",
)
TRUNK_COLOURS: Final = ("#7c8792", "#9a8578", "#6f8f8a", "#8d80a0")
# The second code, for who cannot tell the colours apart: 12 colours and 5 shapes meet again only
# after 60 runs.
SHAPES: Final = ("circle", "square", "triangle-up", "diamond", "cross")
DASHES: Final = ([1, 0], [6, 3], [2, 2], [10, 3, 2, 3], [12, 4], [1, 4])
NOTE_COLOUR: Final = "#7c8792"
_BAND_COLOUR: Final = "#e0a030"
_FADED: Final = 0.1
_MARK: Final = 6  # half a mark, which is cut off outside the plot
_LEAST_SPREAD: Final = 0.004  # of accuracies on their axis
_PLOT_HEIGHT: Final = 320
_AROUND_PLOT: Final = 150  # title, split legend, axis and its title: Streamlit fits all into height
_LEGEND_ROW: Final = 26
_WIDE_LABEL: Final = 20
Channel = alt.StrokeDash | alt.StrokeWidth | alt.StrokeWidthValue
# Each name is sent once, not once a point: a third of the bytes.
_WORDS: Final = dict.fromkeys(
    ("run", "series", "phase", "split", "mark", "colour", "dash"), "category"
)
_AXIS_TITLE: Final[dict[Axis, str]] = {"total": "Epoch", "since": "Epochs since unfreezing"}


def colours(frame: pd.DataFrame, by: str = RUN) -> dict[str, str]:
    """The colour of each run by its label, or of each value of a setting: trunks in quiet tones,
    the others in the palette."""
    trunks = frame.loc[frame["role"] == "trunk", "run" if by == RUN else by].unique()
    others = frame.loc[frame["role"] == "run", "run" if by == RUN else by].unique()
    ordered = list(others) if by == RUN else in_order(list(others))
    return _cycle(list(trunks), TRUNK_COLOURS) | _cycle(ordered, RUN_COLOURS)


def run_colours(frame: pd.DataFrame, by: str = RUN) -> dict[str, str]:
    """The colour in which each run is drawn, by run id."""
    palette = colours(frame, by)
    drawn = frame.drop_duplicates("run_id").set_index("run_id")["run" if by == RUN else by]
    return {str(run_id): palette[value] for run_id, value in drawn.items()}


def _cycle(names: Sequence[str], palette: Sequence[str]) -> dict[str, str]:
    return {name: palette[place % len(palette)] for place, name in enumerate(names)}


def overlay(
    frame: pd.DataFrame,
    metric: Metric,
    axis: Axis,
    splits: Sequence[Split] = SPLITS,
    look: Look | None = None,
    title: str = "",
) -> alt.LayerChart:
    """The curves of many runs over each other, with the unfreeze boundary as a rule and a band.

    `frame` is explorer.data.epochs_frame, with settings where `look` names one, and of seed_means
    where groups are drawn as mean and range. A click on a legend entry brings its runs out, also
    beside others; a second click lets them go. Ctrl and the wheel zoom, dragging moves, a double
    click shows all again.
    """
    look = look or Look()
    rows = long_frame(frame, metric, axis, splits, look).astype(_WORDS)
    chosen = alt.selection_point(name="chosen", fields=["colour"], bind="legend", toggle="true")
    hover = alt.selection_point(
        name="hover", nearest=True, on="pointermove", clear="pointerout", empty=False
    )
    # Channels as objects: what Altair has to find the class of takes it 3 ms each.
    base = alt.Chart().encode(_x(axis), _y(rows, metric, look), _colour(frame, look))
    # Vega-Lite makes a legend clickable only if the first layer that has it holds the selection.
    lines = (
        base.mark_line(strokeJoin="round", clip=True)
        .encode(alt.Detail("series:N"), _visible(chosen), *_styles(rows, splits, look))
        .add_params(chosen, _zoom())
    )
    # On top, and alone with a tooltip: of a line it would be that of its first epoch.
    pointer = base.mark_point(size=80, opacity=0).add_params(hover)
    pointer = pointer.encode(tooltip=_tooltip(metric, look))
    measured = base.encode(_y(rows, metric, look, "raw"))
    behind = _behind(measured, _y(rows, metric, look, "low"), rows, chosen, look)
    dots = _dots(measured, chosen, _shape(frame, look))
    under = base.mark_circle(size=110, opacity=1, clip=True).transform_filter(hover)
    layers = [*_boundary(frame, metric, axis), lines, *behind, *dots, under, pointer]
    heading = title or ("Accuracy" if metric == "accuracy" else "Loss")
    return alt.LayerChart(data=rows, layer=layers).properties(
        title=alt.Title(heading, anchor="start", offset=12),
        height=_PLOT_HEIGHT + _AROUND_PLOT + _LEGEND_ROW * _legend_rows(frame, look),
    )


def _zoom() -> alt.Parameter:
    # With Ctrl, or the wheel would no longer scroll the page; a finger scrolls it too.
    return alt.selection_interval(
        name="zoom",
        bind="scales",
        zoom="wheel![event.ctrlKey || event.metaKey]",
        translate="[pointerdown[event.pointerType !== 'touch'], window:pointerup] > "
        "window:pointermove!",
    )


def _x(axis: Axis) -> alt.X:
    ticks = alt.Axis(format="d", tickMinStep=1, tickCount=10, grid=False)
    # No "nice": it would leave an empty stretch after the last epoch.
    return alt.X(
        "x:Q",
        title=_AXIS_TITLE[axis],
        axis=ticks,
        scale=alt.Scale(nice=False, zero=False, padding=_MARK),
    )


def _y(rows: pd.DataFrame, metric: Metric, look: Look, column: str = "value") -> alt.Y:
    if metric == "accuracy":
        ticks, scale = _accuracies(rows)
    else:
        ticks = alt.Axis(format="~g", tickCount=6)
        scale = alt.Scale(zero=False, padding=_MARK)
        if look.log:
            scale = alt.Scale(type="log", nice=False, padding=_MARK)
    return alt.Y(f"{column}:Q", title=None, axis=ticks, scale=scale)


def _accuracies(rows: pd.DataFrame) -> tuple[alt.Axis, alt.Scale]:
    """No two ticks with the same label, and no rounding that is drawn as a change."""
    spread = rows["value"].max() - rows["value"].min() if len(rows) else 1.0
    step = 0.001 if spread < 0.05 else 0.01
    ticks = alt.Axis(format=".1%" if step < 0.01 else ".0%", tickCount=6, tickMinStep=step)
    drawn = rows[["value", "raw", "low", "high"]]
    low, high = drawn.min().min(), drawn.max().max()
    if not high - low < _LEAST_SPREAD:
        return ticks, alt.Scale(zero=False, padding=_MARK)
    middle = round((low + high) / 2, 3)  # the same as long as a live run stays flat
    domain = [max(0.0, middle - _LEAST_SPREAD / 2), middle + _LEAST_SPREAD / 2]
    return ticks, alt.Scale(zero=False, padding=_MARK, domain=domain)


def _colour(frame: pd.DataFrame, look: Look) -> alt.Color:
    palette = colours(frame, look.colour)
    scale = alt.Scale(domain=list(palette), range=list(palette.values()))
    return alt.Color("colour:N", scale=scale, legend=_legend(palette, look))


def _shape(frame: pd.DataFrame, look: Look) -> alt.Shape:
    palette = colours(frame, look.colour)
    scale = alt.Scale(domain=list(palette), range=list(_cycle(list(palette), SHAPES).values()))
    return alt.Shape("colour:N", scale=scale, legend=_legend(palette, look))


def _legend(palette: dict[str, str], look: Look) -> alt.Legend:
    return alt.Legend(
        orient="bottom",
        title=None if look.colour == RUN else look.colour,
        columns=_legend_columns(palette),
        labelLimit=320,
        symbolSize=90,
        symbolType="circle",
    )


def _legend_columns(names: Sequence[str] | dict[str, str]) -> int:
    # Vega does not wrap a legend: two columns of long names would not fit a phone.
    return 1 if any(len(name) > _WIDE_LABEL for name in names) else 2


def _legend_rows(frame: pd.DataFrame, look: Look) -> int:
    palette = colours(frame, look.colour)
    title = 0 if look.colour == RUN else 1
    return -(-len(palette) // _legend_columns(palette)) + title


def _styles(rows: pd.DataFrame, splits: Sequence[Split], look: Look) -> list[Channel]:
    """Dashes tell training from validation; where they stand for a setting, the width does."""
    many = len(splits) > 1
    split_legend = alt.Legend(orient="top", title=None, symbolType="stroke", symbolSize=300)
    if look.dash == PHOTOS:
        scale = alt.Scale(domain=["Validation", "Train"], range=[[1, 0], [4, 4]])
        legend = split_legend if many else None
        dash = alt.StrokeDash("dash:N", scale=scale, legend=legend)
        return [dash, alt.StrokeWidthValue(2)]
    values = in_order([value for value in rows["dash"] if value != BEFORE])
    legend = alt.Legend(orient="top", title=look.dash, symbolType="stroke", symbolSize=300)
    scale = alt.Scale(
        domain=[*values, BEFORE],
        range=[*(DASHES[place % len(DASHES)] for place in range(len(values))), DASHES[0]],
    )
    width = alt.Scale(domain=["Validation", "Train"], range=[2.5, 0.9])
    return [
        alt.StrokeDash("dash:N", scale=scale, legend=legend),
        alt.StrokeWidth("split:N", scale=width, legend=split_legend if many else None),
    ]


def _tooltip(metric: Metric, look: Look) -> list[alt.Tooltip]:
    form = ".2%" if metric == "accuracy" else ".4f"
    smoothed = [alt.Tooltip("value:Q", title="Smoothed", format=form)] if look.smoothing else []
    return [
        alt.Tooltip("run:N", title="Run"),
        alt.Tooltip("phase:N", title="Phase"),
        alt.Tooltip("epoch:Q", title="Epoch", format="d"),
        alt.Tooltip("phase_epoch:Q", title="Epoch of the phase", format="d"),
        alt.Tooltip("split:N", title="Photos"),
        alt.Tooltip("raw:Q", title=metric.capitalize(), format=form),
        *smoothed,
    ]


def _boundary(frame: pd.DataFrame, metric: Metric, axis: Axis) -> list[alt.Chart]:
    base = alt.Chart(boundaries(frame, axis)).encode(alt.X("start:Q"))
    band = base.mark_rect(color=_BAND_COLOUR, opacity=0.09, clip=True).encode(alt.X2("end:Q"))
    rule = base.mark_rule(color=_BAND_COLOUR, strokeWidth=1.5, clip=True)
    # Where the curves are not: accuracy ends high, loss ends low.
    low = metric == "accuracy"
    text = base.mark_text(
        color=NOTE_COLOUR,
        align="left",
        baseline="bottom" if low else "top",
        dx=6,
        dy=-5 if low else 5,
        fontSize=12,
        clip=True,
    ).encode(alt.YValue(alt.expr("height") if low else 0), alt.Text("text:N"))
    return [band, rule, text, *_inner_boundaries(frame, axis, low)]


def _inner_boundaries(frame: pd.DataFrame, axis: Axis, low: bool) -> list[alt.Chart]:
    base = alt.Chart(inner_boundaries(frame, axis)).encode(alt.X("start:Q"))
    rule = base.mark_rule(color=_BAND_COLOUR, strokeWidth=0.75, strokeDash=[4, 3], clip=True)
    # Along the rule, since several can be close together, and clear of the boundary's own text.
    text = base.mark_text(
        color=NOTE_COLOUR,
        angle=270,
        align="left" if low else "right",
        baseline="top",
        dx=24 if low else -24,
        dy=4,
        fontSize=10,
    ).encode(alt.YValue(alt.expr("height") if low else 0), alt.Text("text:N"))
    return [rule, text]


def _behind(
    measured: alt.Chart, low: alt.Y, rows: pd.DataFrame, chosen: alt.Parameter, look: Look
) -> list[alt.Chart]:
    """What the lines stand for: the range of the seeds, and the values before smoothing."""
    layers = []
    series = alt.Detail(["series:N", "split:N"])
    if len(rows) and rows["seeds"].max() > 1:
        ends = (low, alt.Y2("high:Q"))
        area = measured.mark_area(clip=True).encode(*ends, series, _visible(chosen, 0.16, 0.02))
        layers.append(area.transform_filter(alt.datum.split == "Validation"))
    if look.smoothing:
        raw = measured.mark_line(strokeWidth=1, clip=True)
        layers.append(raw.encode(series, _visible(chosen, 0.3, 0.03)))
    return layers


def _dots(measured: alt.Chart, chosen: alt.Parameter, shape: alt.Shape) -> list[alt.Chart]:
    """A ring at the boundary, and the run's own shape at its best epoch."""
    ring = measured.mark_point(size=60, strokeWidth=2, clip=True)
    best = measured.mark_point(size=75, filled=True, clip=True).encode(shape)
    return [
        layer.encode(_visible(chosen)).transform_filter(alt.datum.mark == mark)
        for layer, mark in ((ring, "start"), (best, "best"))
    ]


def _visible(chosen: alt.Parameter, shown: float = 1, faded: float = _FADED) -> alt.OpacityValue:
    return alt.OpacityValue(**alt.condition(chosen, alt.value(shown), alt.value(faded)))

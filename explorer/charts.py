"""Charts: pure functions from a frame (explorer.data.epochs_frame) to an Altair chart.

Every colour is legible on the light and on the dark theme, because Streamlit restyles axes and
legends but not marks. Scales that depend on the data are left to Vega, so that a live run changes a
chart's data and never its specification: Streamlit then updates it in place, without a flicker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import altair as alt
import pandas as pd

Metric = Literal["accuracy", "loss"]
Axis = Literal["total", "since"]
Split = Literal["Train", "Validation"]

SPLITS: Final[tuple[Split, ...]] = ("Train", "Validation")
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
_NOTE_COLOUR: Final = "#7c8792"
_BAND_COLOUR: Final = "#e0a030"
_FADED: Final = 0.1
_PLOT_HEIGHT: Final = 320
_AROUND_PLOT: Final = 150  # title, split legend, axis and its title: Streamlit fits all into height
_LEGEND_ROW: Final = 20
_WIDE_LABEL: Final = 20

_COLUMN: Final[dict[tuple[Metric, Split], str]] = {
    ("accuracy", "Train"): "train_acc",
    ("accuracy", "Validation"): "val_acc",
    ("loss", "Train"): "train_loss",
    ("loss", "Validation"): "val_loss",
}
_AXIS_COLUMN: Final[dict[Axis, str]] = {"total": "epoch", "since": "since_unfreeze"}
_AXIS_TITLE: Final[dict[Axis, str]] = {"total": "Epoch", "since": "Epochs since unfreezing"}


def colours(frame: pd.DataFrame) -> dict[str, str]:
    """The colour of each run by its label: trunks in quiet tones, the others in the palette."""
    trunks = frame.loc[frame["role"] == "trunk", "run"].unique()
    others = frame.loc[frame["role"] == "run", "run"].unique()
    return _cycle(list(trunks), TRUNK_COLOURS) | _cycle(list(others), RUN_COLOURS)


def _cycle(names: Sequence[str], palette: Sequence[str]) -> dict[str, str]:
    return {name: palette[place % len(palette)] for place, name in enumerate(names)}


def around_boundary(frame: pd.DataFrame, before: int = 3) -> pd.DataFrame:
    """The epochs after unfreezing and the last `before` ahead of it, where the scale of the first
    epochs would flatten the difference; runs without a boundary stay whole."""
    return frame[frame["boundary"].isna() | (frame["since_unfreeze"] >= -before)]


def long_frame(
    frame: pd.DataFrame, metric: Metric, axis: Axis, splits: Sequence[Split]
) -> pd.DataFrame:
    """One row per drawn point: run, series, phase, epoch, phase_epoch, split, x, value, mark.

    Points that were not measured, or have no place on the axis, are absent. On the total axis a
    trunk that selected runs left at several boundaries is there only once. `mark` is "best" for
    the best validation point of a run's phase, "start" for its evaluation where it left its parent,
    or "".
    """
    parts = [frame.assign(split=name, value=frame[_COLUMN[metric, name]]) for name in splits]
    rows = pd.concat(parts) if parts else frame.assign(split="", value=float("nan"))
    rows = rows.assign(x=rows[_AXIS_COLUMN[axis]], series=rows["run_id"])
    if axis == "total":
        rows = rows.drop_duplicates(["run_id", "split", "phase", "phase_epoch"])
    else:
        rows["series"] = rows["run_id"] + " " + rows["boundary"].astype(str)
    rows = rows.dropna(subset=["x", "value"]).reset_index(drop=True)
    rows["mark"] = _marks(rows, metric)
    names = ["run", "series", "phase", "epoch", "phase_epoch", "split", "x", "value", "mark"]
    return rows[names]


def _marks(rows: pd.DataFrame, metric: Metric) -> pd.Series[str]:
    marks = pd.Series("", index=rows.index, dtype="str")
    drawn = rows[(rows["split"] == "Validation") & (rows["role"] == "run")]
    start = (drawn["phase_epoch"] == 0) & (drawn["since_unfreeze"] == 0)
    marks[drawn[start].index] = "start"
    trained = drawn[(drawn["phase_epoch"] > 0) | (drawn["phase"] == "direct")]
    # As the checkpoint was chosen: of several epochs with the highest accuracy, the lowest loss.
    order = ["value", "val_loss"] if metric == "accuracy" else ["value"]
    ranked = trained.sort_values(order, ascending=[metric == "loss", True][: len(order)])
    marks[ranked.groupby(["run_id", "phase"]).head(1).index] = "best"
    return marks


def boundaries(frame: pd.DataFrame, axis: Axis) -> pd.DataFrame:
    """The shaded regions: one row (start, end, text) per boundary, in the axis's own units."""
    unfrozen = frame[(frame["role"] == "run") & (frame["phase"] == "finetune")]
    rows = unfrozen.assign(start=unfrozen["boundary"], end=unfrozen["epoch"])
    if axis == "since":
        rows = rows.assign(start=0.0, end=unfrozen["since_unfreeze"])
    ends = rows.groupby("start", as_index=False)["end"].max()
    # A run that has only just been unfrozen still shows a region, one epoch wide.
    return ends.assign(end=ends["end"].clip(lower=ends["start"] + 1), text="unfrozen")


def overlay(
    frame: pd.DataFrame, metric: Metric, axis: Axis, splits: Sequence[Split] = SPLITS
) -> alt.LayerChart:
    """The curves of many runs over each other, with the unfreeze boundary as a rule and a band.

    `frame` is explorer.data.epochs_frame. Validation is solid, training dashed, colour is the run.
    A click on a legend entry brings its run out, also beside others; a second click lets it go.
    """
    rows = long_frame(frame, metric, axis, splits)
    chosen = alt.selection_point(name="chosen", fields=["run"], bind="legend", toggle="true")
    hover = alt.selection_point(
        name="hover", nearest=True, on="pointermove", clear="pointerout", empty=False
    )
    base = alt.Chart(rows).encode(
        x=_x(axis), y=_y(rows, metric), color=_colour(frame), tooltip=_tooltip(metric)
    )
    # Vega-Lite makes a legend clickable only if the first layer that has it holds the selection.
    lines = (
        base.mark_line(strokeWidth=2, strokeJoin="round")
        .encode(strokeDash=_dash(splits), detail="series:N", opacity=_visible(chosen))
        .add_params(chosen)
    )
    # On top, or the pointer would meet a line, whose tooltip is that of its first epoch.
    pointer = base.mark_point(size=80, opacity=0).add_params(hover)
    layers = [*_boundary(frame, metric, axis), lines, *_dots(base, chosen, hover), pointer]
    heading = "Accuracy" if metric == "accuracy" else "Loss"
    return alt.LayerChart(layer=layers).properties(
        title=alt.Title(heading, anchor="start", offset=12),
        height=_PLOT_HEIGHT + _AROUND_PLOT + _LEGEND_ROW * _legend_rows(frame),
    )


def _x(axis: Axis) -> alt.X:
    ticks = alt.Axis(format="d", tickMinStep=1, tickCount=10, grid=False)
    # No "nice": it would leave an empty stretch after the last epoch.
    return alt.X(
        "x:Q", title=_AXIS_TITLE[axis], axis=ticks, scale=alt.Scale(nice=False, zero=False)
    )


def _y(rows: pd.DataFrame, metric: Metric) -> alt.Y:
    spread = rows["value"].max() - rows["value"].min() if len(rows) else 1.0
    percent = ".1%" if spread < 0.05 else ".0%"
    ticks = alt.Axis(format=percent if metric == "accuracy" else "~g", tickCount=6)
    return alt.Y("value:Q", title=None, axis=ticks, scale=alt.Scale(zero=False))


def _colour(frame: pd.DataFrame) -> alt.Color:
    palette = colours(frame)
    legend = alt.Legend(
        orient="bottom",
        title=None,
        columns=_legend_columns(palette),
        labelLimit=320,
        symbolType="stroke",
        symbolStrokeWidth=3,
        symbolSize=220,
    )
    scale = alt.Scale(domain=list(palette), range=list(palette.values()))
    return alt.Color("run:N", scale=scale, legend=legend)


def _legend_columns(names: Sequence[str] | dict[str, str]) -> int:
    # Vega does not wrap a legend: two columns of long names would not fit a phone.
    return 1 if any(len(name) > _WIDE_LABEL for name in names) else 2


def _legend_rows(frame: pd.DataFrame) -> int:
    palette = colours(frame)
    return -(-len(palette) // _legend_columns(palette))


def _dash(splits: Sequence[Split]) -> alt.StrokeDash:
    legend = alt.Legend(orient="top", title=None, symbolType="stroke", symbolSize=300)
    scale = alt.Scale(domain=["Validation", "Train"], range=[[1, 0], [4, 4]])
    return alt.StrokeDash("split:N", scale=scale, legend=legend if len(splits) > 1 else None)


def _tooltip(metric: Metric) -> list[alt.Tooltip]:
    value = ".2%" if metric == "accuracy" else ".4f"
    return [
        alt.Tooltip("run:N", title="Run"),
        alt.Tooltip("phase:N", title="Phase"),
        alt.Tooltip("epoch:Q", title="Epoch", format="d"),
        alt.Tooltip("phase_epoch:Q", title="Epoch of the phase", format="d"),
        alt.Tooltip("split:N", title="Photos"),
        alt.Tooltip("value:Q", title=metric.capitalize(), format=value),
    ]


def _boundary(frame: pd.DataFrame, metric: Metric, axis: Axis) -> list[alt.Chart]:
    base = alt.Chart(boundaries(frame, axis)).encode(x="start:Q")
    band = base.mark_rect(color=_BAND_COLOUR, opacity=0.09).encode(x2="end:Q")
    rule = base.mark_rule(color=_BAND_COLOUR, strokeWidth=1.5)
    # Where the curves are not: accuracy ends high, loss ends low.
    low = metric == "accuracy"
    text = base.mark_text(
        color=_NOTE_COLOUR,
        align="left",
        baseline="bottom" if low else "top",
        dx=6,
        dy=-5 if low else 5,
        fontSize=12,
    ).encode(y=alt.value(alt.expr("height") if low else 0), text="text:N")
    return [band, rule, text]


def _dots(base: alt.Chart, chosen: alt.Parameter, hover: alt.Parameter) -> list[alt.Chart]:
    """A ring at the boundary, a disc at the best epoch, and the point under the pointer."""
    ring = base.mark_point(size=60, strokeWidth=2).encode(opacity=_visible(chosen))
    disc = base.mark_circle(size=70).encode(opacity=_visible(chosen))
    pointed = base.mark_circle(size=110).encode(
        opacity=alt.when(hover).then(alt.value(1)).otherwise(alt.value(0))
    )
    return [
        ring.transform_filter(alt.datum.mark == "start"),
        disc.transform_filter(alt.datum.mark == "best"),
        pointed,
    ]


def _visible(chosen: alt.Parameter) -> Any:
    return alt.condition(chosen, alt.value(1), alt.value(_FADED))

"""The overlay page: the curves of many runs around the moment of unfreezing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import pandas as pd
import streamlit as st

from explorer.charts import overlay, run_colours
from explorer.compare import Summary, group_table, resolution, summaries, table
from explorer.conclusions import flags, headline, warning
from explorer.curves import (
    PHOTOS,
    RUN,
    SPLITS,
    Axis,
    Look,
    Metric,
    Panel,
    Split,
    around_boundary,
    panel,
    seed_means,
)
from explorer.data import Snapshot, epochs_frame, lineage
from explorer.evidence import adjusted, evidence_lines, findings
from explorer.pages import parts
from explorer.report import report_html
from explorer.settings import varied, with_settings, without_seed

_PANELS: Final = "Before and after"
_AXES: Final[dict[str, Axis]] = {
    "Total epoch": "total",
    "Since unfreeze": "since",
    _PANELS: "since",
}
_RANGES: Final = ("Whole run", "Around unfreezing")
_MEAN: Final = "Mean over seeds"
_ABOVE: Final = 3  # with more verdicts than these, the curves come first


def page() -> None:
    snapshot = parts.opened("Did unfreezing help, and by how much?")
    if snapshot is None:
        return
    selected = parts.choose_runs(snapshot, snapshot.default_selection())
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        view = _choose_view(varied(snapshot, selected))
        if selected:
            _report(snapshot, selected)
    parts.live(snapshot, _live, selected, view)
    parts.problems(snapshot)


@dataclass(frozen=True)
class View:
    """How the curves are shown; every field is in the page's link."""

    axis: Axis
    panels: bool
    splits: list[Split]
    zoomed: bool
    means: bool
    look: Look


def _choose_view(settings: Sequence[str]) -> View:
    axis = parts.one_of("Axis", list(_AXES), key="axis")
    extent = parts.one_of("Epochs", _RANGES, key="epochs")
    splits = st.segmented_control(
        "Photos",
        SPLITS,
        selection_mode="multi",
        default=SPLITS,
        key="photos",
        bind="query-params",
        persist_state="session",
    )
    seeds = "Seed" in settings
    lines = parts.one_of("Lines", ["Each run", _MEAN], key="lines") if seeds else ""
    with st.popover("More"):
        look = _choose_look(settings)
    return View(
        axis=_AXES[axis],
        panels=axis == _PANELS,
        splits=[name for name in SPLITS if name in splits],
        zoomed=extent == _RANGES[1],
        means=lines == _MEAN,
        look=look,
    )


def _report(snapshot: Snapshot, selected: Sequence[str]) -> None:
    st.download_button(
        "Report",
        lambda: report_html(snapshot, selected),
        file_name="thaw-report.html",
        mime="text/html",
        key="report",
        on_click="ignore",
        icon=":material/description:",
        help="All of this as one file to hand in; drawing it takes some seconds",
    )


def _choose_look(settings: Sequence[str]) -> Look:
    colour = _of_setting("Colour stands for", [RUN, *settings], key="colour")
    dash = _of_setting("Dashes stand for", [PHOTOS, *settings], key="dash")
    smoothing = st.slider(
        "Smoothing",
        0.0,
        0.95,
        0.0,
        0.05,
        key="smoothing",
        bind="query-params",
        persist_state="session",
        help="Moving average within each phase, never across the boundary; the values themselves "
        "stay behind it.",
    )
    log = st.toggle("Logarithmic loss", key="log", bind="query-params", persist_state="session")
    return Look(colour, dash, smoothing, log)


def _of_setting(label: str, options: Sequence[str], key: str) -> str:
    return st.selectbox(label, options, key=key, bind="query-params", persist_state="session")


def _live(snapshot: Snapshot, selected: Sequence[str], view: View) -> None:
    """Everything that follows the files."""
    if not selected:
        st.info("Choose one run or more above.")
        return
    curves, missing = lineage(snapshot, selected)
    frame = with_settings(epochs_frame(snapshot, curves), snapshot)
    rows = summaries(snapshot, selected)
    found = findings(snapshot, selected)
    parts.headline(headline(rows, found), warning(found))
    colours = run_colours(frame, view.look.colour)
    notes = _notes(snapshot, evidence_lines(found))
    few = len(rows) <= _ABOVE
    if few:
        parts.verdicts(rows, colours, notes)
    groups = without_seed(snapshot, selected)
    _curves(seed_means(frame, groups) if view.means else frame, view)
    _footnotes(rows, missing, len(adjusted(found)))
    _numbers(rows, groups if view.means else None)
    if not few:
        parts.verdicts(rows, colours, notes)


def _notes(snapshot: Snapshot, evidence: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {name: [*lines, *flags(snapshot.runs[name])] for name, lines in evidence.items()}


def _footnotes(rows: Sequence[Summary], missing: Sequence[str], tested: int) -> None:
    for line in missing:
        st.text(line)
    if any(row.change is not None for row in rows):
        st.caption(
            "Best epoch after unfreezing against the last evaluation before it; the best of "
            f"several epochs flatters. {_method(tested)}{resolution(rows)}"
        )


def _method(tested: int) -> str:
    if tested == 0:
        return ""
    many = f", adjusted for the {tested} runs shown (Holm)" if tested > 1 else ""
    return (
        "Intervals are bootstrapped over the photos, paired; p is McNemar's exact test on the "
        f"photos fixed and broken{many}, and decides where the two disagree. "
    )


def _curves(frame: pd.DataFrame, view: View) -> None:
    if frame.empty:
        st.info("No epoch has been evaluated yet. The curves appear as soon as one is.")
    elif not view.splits:
        st.info("Choose training or validation photos above.")
    else:
        _charts(around_boundary(frame) if view.zoomed else frame, view)


def _charts(frame: pd.DataFrame, view: View) -> None:
    alone = frame[frame["boundary"].isna()]["run"].unique()
    if view.axis == "since" and not view.panels and len(alone):
        st.text(f"Without a boundary, so not on this axis: {', '.join(alone)}")
    metrics: tuple[Metric, Metric] = ("accuracy", "loss")
    if view.panels:
        for metric in metrics:
            _panels(frame, metric, view)
    else:
        for column, metric in zip(st.columns(2, gap="medium"), metrics, strict=True):
            with column:
                drawn = overlay(frame, metric, view.axis, view.splits, view.look)
                parts.chart(drawn, f"chart-{metric}", _described(frame, metric))
    st.caption(
        "Ring: the evaluation at the boundary. Filled shape: the best epoch. Click names in a "
        "legend to bring out their runs; click again to let go. Ctrl and the wheel zoom, dragging "
        "moves, a double click shows all."
    )


def _panels(frame: pd.DataFrame, metric: Metric, view: View) -> None:
    """As the labs print them: the frozen epochs on the left, the unfrozen ones on the right."""
    sides: tuple[tuple[Panel, Axis], ...] = (("before", "total"), ("after", "since"))
    for column, (side, axis) in zip(st.columns(2, gap="medium"), sides, strict=True):
        rows = panel(frame, side)
        title = f"{metric.capitalize()} {side} unfreezing"
        with column:
            if rows.empty:
                st.info(f"No epoch {side} unfreezing.")
                continue
            drawn = overlay(rows, metric, axis, view.splits, view.look, title)
            parts.chart(drawn, f"chart-{metric}-{side}", f"{_described(rows, metric)}, {side}")


def _described(frame: pd.DataFrame, metric: Metric) -> str:
    return f"{metric} by epoch of {frame['run'].nunique()} runs, numbers in the table below"


def _numbers(rows: Sequence[Summary], groups: Mapping[str, str] | None) -> None:
    percent = st.column_config.NumberColumn(format="%.2f%%")
    change = st.column_config.NumberColumn(
        format="%+.2f", help="Points: best after unfreezing minus boundary"
    )
    columns = {
        "Run": st.column_config.TextColumn(pinned=True),
        "Best accuracy": percent,
        "At the boundary": percent,
        "Change": change,
        "Lowest change": change,
        "Highest change": change,
        "Best loss": st.column_config.NumberColumn(format="%.4f"),
        "Time": st.column_config.NumberColumn(format="%.0f s"),
    }
    shown = table(rows) if groups is None else group_table(rows, groups)
    st.dataframe(shown, hide_index=True, column_config=columns, alt="The numbers of each run")

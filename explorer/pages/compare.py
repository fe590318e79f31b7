"""The overlay page: the curves of many runs around the moment of unfreezing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import pandas as pd
import streamlit as st

from explorer.charts import SPLITS, Axis, Metric, Split, around_boundary, colours, overlay
from explorer.compare import Summary, resolution, summaries, table
from explorer.data import Snapshot, epochs_frame, lineage
from explorer.evidence import adjusted, evidence_lines, findings
from explorer.pages import parts

_AXES: Final[dict[str, Axis]] = {"Total epoch": "total", "Since unfreeze": "since"}
_RANGES: Final = ("Whole run", "Around unfreezing")


def page() -> None:
    snapshot = parts.opened("Did unfreezing help, and by how much?")
    if snapshot is None:
        return
    selected = parts.choose_runs(snapshot, snapshot.default_selection())
    view = _choose_view()
    parts.live(snapshot, _live, selected, view)
    parts.problems(snapshot)


@dataclass(frozen=True)
class View:
    """How the curves are shown; every field is in the page's link."""

    axis: Axis
    splits: list[Split]
    zoomed: bool


def _choose_view() -> View:
    with st.container(horizontal=True, gap="medium"):
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
    return View(_AXES[axis], [name for name in SPLITS if name in splits], extent == _RANGES[1])


def _live(snapshot: Snapshot, selected: Sequence[str], view: View) -> None:
    """Everything that follows the files."""
    if not selected:
        st.info("Choose one run or more above.")
        return
    curves, missing = lineage(snapshot, selected)
    frame = epochs_frame(snapshot, curves)
    rows = summaries(snapshot, selected)
    found = findings(snapshot, selected)
    parts.verdicts(rows, colours(frame), evidence_lines(found))
    _footnotes(rows, missing, len(adjusted(found)))
    if frame.empty:
        st.info("No epoch has been evaluated yet. The curves appear as soon as one is.")
    elif not view.splits:
        st.info("Choose training or validation photos above.")
    else:
        _charts(frame, view)
    _numbers(rows)


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
        f"photos fixed and broken{many}. "
    )


def _charts(frame: pd.DataFrame, view: View) -> None:
    if view.zoomed:
        frame = around_boundary(frame)
    alone = frame[frame["boundary"].isna()]["run"].unique()
    if view.axis == "since" and len(alone):
        st.text(f"Without a boundary, so not on this axis: {', '.join(alone)}")
    metrics: tuple[Metric, Metric] = ("accuracy", "loss")
    for column, metric in zip(st.columns(2, gap="medium"), metrics, strict=True):
        column.altair_chart(
            overlay(frame, metric, view.axis, view.splits),
            key=f"chart-{metric}",
            alt=f"{metric} by epoch of {frame['run'].nunique()} runs, numbers in the table below",
        )
    st.caption(
        "Ring: the evaluation at the boundary. Disc: the best epoch. Click names in a legend to "
        "bring out their runs; click again to let go."
    )


def _numbers(rows: Sequence[Summary]) -> None:
    percent = st.column_config.NumberColumn(format="%.2f%%")
    st.dataframe(
        table(rows),
        hide_index=True,
        column_config={
            "Run": st.column_config.TextColumn(pinned=True),
            "Best accuracy": percent,
            "At the boundary": percent,
            "Change": st.column_config.NumberColumn(
                format="%+.2f", help="Points: best after unfreezing minus boundary"
            ),
            "Best loss": st.column_config.NumberColumn(format="%.4f"),
            "Time": st.column_config.NumberColumn(format="%.0f s"),
        },
    )

"""The table of all runs: find some, sort them, choose which to compare."""

from __future__ import annotations

from typing import Final

import pandas as pd
import streamlit as st

from explorer.data import Snapshot
from explorer.evidence import findings
from explorer.overview import constants_line, folded, overview, search, selected_ids
from explorer.pages import parts

_PERCENT: Final = "%.2f%%"


def page() -> None:
    snapshot = parts.opened("All runs")
    if snapshot is None:
        return
    text = st.text_input(
        "Search",
        key="search",
        placeholder="Words in the name or any setting, such as: finetune flowers",
        bind="query-params",
        persist_state="session",
    )
    parts.live(snapshot, _live, text or "")
    parts.problems(snapshot)


def _live(snapshot: Snapshot, text: str) -> None:
    whole = overview(snapshot, findings(snapshot, snapshot.runs))
    frame, constants = folded(search(whole, text))
    if frame.empty:
        st.info("No run has all of these words.")
        return
    found = "" if len(frame) == len(whole) else f"{len(frame)} of {len(whole)} runs. "
    st.text(found + constants_line(constants))
    _compare(selected_ids(frame, _table(frame)))


def _table(frame: pd.DataFrame) -> list[int]:
    """Show the table; returns the places of the rows that are ticked."""
    # Ticks are kept by place: other rows are another table.
    key = f"runs-{hash(tuple(frame.index))}"
    state = st.dataframe(
        frame,
        hide_index=True,
        key=key,
        on_select="rerun",
        selection_mode="multi-row",
        placeholder="",
        column_config={
            "Run": st.column_config.TextColumn(pinned=True),
            "Curve": st.column_config.LineChartColumn(
                help="Validation accuracy of every epoch", width="small"
            ),
            "Best accuracy": st.column_config.NumberColumn(format=_PERCENT),
            "Change": st.column_config.NumberColumn(
                format="%+.2f", help="Points: best after unfreezing minus boundary"
            ),
            "95% interval": st.column_config.TextColumn(
                help="Of the change, in points: bootstrap over the validation photos. Of many "
                "runs one looks good by chance; Compare adjusts for that."
            ),
            "Learning rate": st.column_config.NumberColumn(format="%.1e"),
            "At epoch": st.column_config.NumberColumn(format="%d"),
            "Best loss": st.column_config.NumberColumn(format="%.4f"),
            "Time": st.column_config.NumberColumn(format="%.0f s"),
            "Memory": st.column_config.NumberColumn(format="%.0f MB"),
        },
    )
    return list(state["selection"]["rows"])


def _compare(chosen: list[str]) -> None:
    if not chosen:
        st.caption("Tick runs to lay their curves over each other.")
        return
    label = "Compare this run" if len(chosen) == 1 else f"Compare these {len(chosen)} runs"
    if st.button(label, type="primary"):
        parts.go("compare", runs=chosen)

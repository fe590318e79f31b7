"""The results page: the table of an experiment, as a lab report ends with it."""

from __future__ import annotations

from html import escape
from typing import Any, Final

import streamlit as st

from explorer.data import Snapshot
from explorer.overview import sendable
from explorer.pages import parts
from explorer.results import Results, accuracies, dots, frame, headline, results
from trainer.results import Table, list_tables

_PERCENT: Final = "%.2f%%"


def page() -> None:
    snapshot = parts.opened("What did each training of an experiment reach?")
    if snapshot is None:
        return
    tables, broken = list_tables(parts.runs_dir())
    if tables:
        parts.live(snapshot, _live, _choose(tables))
    else:
        _no_tables()
    for problem in broken.values():
        st.text(sendable(problem))
    parts.problems(snapshot)


def _no_tables() -> None:
    st.info(
        "No experiment has been run into this folder. An experiment is a recipe of several "
        "trainings; those of the labs come with Thaw:"
    )
    st.code(
        "python -m trainer recipes\n"
        f"python -m trainer run oregon-finetune-sweep --data PATH/TO/PHOTOS{parts.said_where()}",
        language="bash",
    )


def _choose(tables: dict[str, Table]) -> str:
    """Kept in the link by its name, as parts.choose_run keeps a run."""
    start, lost = parts.remembered("experiment", list(tables), list(tables)[:1])
    st.session_state["experiment"] = (start or list(tables))[0]
    name = st.selectbox(
        "Experiment",
        list(tables),
        key="experiment",
        format_func=sendable,
        persist_state="session",
    )
    st.query_params["experiment"] = name
    if lost:
        st.caption("The experiment of this link is not in the runs folder any more.")
    return name


def _live(snapshot: Snapshot, name: str) -> None:
    tables, _ = list_tables(parts.runs_dir())
    if name not in tables:
        st.info("The table of this experiment has been deleted.")
        return
    shown = results(snapshot, tables[name])
    parts.headline(headline(shown), "")
    _about(shown)
    if not shown.rows:
        st.info("None of its runs is in the runs folder.")
        return
    _table(shown)
    _downloads(name, shown)
    points = accuracies(shown)
    if not points.empty:
        st.subheader("Training, validation and test", anchor=False)
        parts.chart(
            dots(points),
            "results-accuracies",
            f"Dot chart of the accuracies of {len(shown.rows)} trainings, one line for each; the "
            "values are in the table above.",
        )
    said = (
        "Training and validation: the epoch with the best validation accuracy. Test: measured "
        "once, at the end, with the checkpoint of that epoch."
    )
    if any(row.entry.published for row in shown.rows):
        said += (
            " Published figures, hollow in the chart, are those of the report, reached with other "
            "software."
        )
    st.caption(said)


def _about(shown: Results) -> None:
    lines = [shown.table.title, f"Data: {shown.table.data}", *shown.problems]
    if shown.gone:
        lines.append(f"{shown.gone} of its runs are not in the runs folder any more.")
    st.html("".join(f'<div class="thaw-small">{escape(sendable(line))}</div>' for line in lines))


def _table(shown: Results) -> None:
    found = frame(shown)
    st.dataframe(
        found,
        hide_index=True,
        placeholder="",
        column_config={str(name): _column(str(name)) for name in found},
        alt="The trainings of the experiment and what each of them reached",
    )


def _column(name: str) -> Any:
    if name in ("Model", "Run"):
        return st.column_config.TextColumn(pinned=name == "Model")
    if "accuracy" in name:
        return st.column_config.NumberColumn(format=_PERCENT)
    return st.column_config.NumberColumn(format="%.4f" if "loss" in name else "%.0f")


def _downloads(name: str, shown: Results) -> None:
    with st.container(horizontal=True, gap="small"):
        if st.button("Compare their curves", type="primary"):
            parts.go("compare", runs=shown.run_ids)
        for label, suffix, text in (
            ("CSV", "csv", shown.as_csv),
            ("Markdown", "md", shown.as_markdown),
        ):
            st.download_button(
                label,
                text.encode(errors="replace"),
                file_name=f"{sendable(name)}.{suffix}",
                key=f"results-{suffix}",
                type="tertiary",
                on_click="ignore",
                icon=":material/download:",
            )

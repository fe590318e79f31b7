"""The sweep page: many settings from one trunk, and whether the best of them is beyond chance."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

import pandas as pd
import streamlit as st

from explorer.compare import resolution, summaries, table
from explorer.data import Snapshot
from explorer.lr_charts import rate_curve, rate_tests, suggestion
from explorer.pages import parts
from explorer.sweep import Section, Split, measure, section
from explorer.sweep_charts import CELL, heatmap, parallel, schedule_curves, schedule_dots
from explorer.sweep_members import Group, Reference, groups, members, varied

_AGAINST: Final[dict[str, Reference]] = {"Boundary": "boundary", "Control": "control"}
_MAPS: Final[dict[str, Split]] = {"All runs": "", "Each schedule": "Schedule", "Each seed": "Seed"}
_NONE: Final = ""


def page() -> None:
    snapshot = parts.opened("Which learning rate, and how many layers?")
    if snapshot is None:
        return
    found = groups(snapshot)
    if found:
        group = _choose_group(found)
        parts.live(snapshot, _live, group.id, *_choose_view(snapshot, group))
    else:
        _no_groups()
    _rate_tests()
    parts.problems(snapshot)


def _no_groups() -> None:
    st.info(
        "No two runs can be held against each other here: that takes a sweep, or two finetunes of "
        "the same trunk. A sweep trains them together, with a control beside them:"
    )
    st.code(
        f"python -m trainer sweep --lr 1e-6 1e-5 1e-4 --unfreeze 10 20{parts.said_where()}",
        language="bash",
    )


def _rate_tests() -> None:
    """What the learning-rate finder measured, where it has been used."""
    found = rate_tests(parts.runs_dir())
    if not found:
        return
    st.subheader("Learning-rate finder", anchor=False)
    start, lost = parts.remembered("rates", list(found), list(found)[:1])
    st.session_state["rates"] = (start or list(found))[0]
    name = st.selectbox("Test", list(found), key="rates", persist_state="session")
    st.query_params["rates"] = name
    if lost:
        st.caption("The test of this link is not in the runs folder any more.")
    test = found[name]
    st.html(f'<div class="thaw-small">{escape(test.about)}</div>')
    parts.chart(
        rate_curve(test),
        "rates-curve",
        f"Line chart of the training loss over a learning rate that grows with every batch, from "
        f"{test.frame['rate'].iloc[0]:.1e} to {test.frame['rate'].iloc[-1]:.1e}. "
        f"{suggestion(test)}",
    )
    st.caption(
        f"{suggestion(test)} A thick line is the smoothed loss, the thin one that of each batch. "
        "One short test on few batches: compare a few rates around these in a sweep."
    )


def _choose_group(found: Sequence[Group]) -> Group:
    """Kept in the link by its id, as parts.choose_run keeps a run."""
    known = {group.id: group for group in found}
    start, lost = parts.remembered("group", list(known), [found[0].id])
    st.session_state["group"] = (start or list(known))[0]
    name = st.selectbox(
        "Runs of",
        list(known),
        key="group",
        format_func=lambda name: known[name].title,
        on_change=_turned,
        persist_state="session",
    )
    st.query_params["group"] = name
    if lost:
        st.caption("The sweep of this link is not in the runs folder any more.")
    return known[name]


def _choose_view(snapshot: Snapshot, group: Group) -> tuple[Reference, Split]:
    """What changes are held against, and what has a heatmap of its own."""
    found = members(snapshot, group.members)
    against, maps = "Boundary", "All runs"
    with st.container(horizontal=True, gap="medium"):
        if any(member.control for member in found):
            against = parts.one_of(
                "Change against",
                list(_AGAINST),
                key="against",
                help="The boundary: the last evaluation before unfreezing. The control: the best "
                "of as many further epochs with the head alone.",
            )
        differ = varied(found)
        kinds = [name for name, split in _MAPS.items() if not split or split in differ]
        if len(kinds) > 1:
            maps = parts.one_of("Heatmap of", kinds, key="maps")
    return _AGAINST[against], _MAPS[maps]


def _live(snapshot: Snapshot, name: str, against: Reference, split: Split) -> None:
    """Everything that follows the files."""
    group = next((group for group in groups(snapshot) if group.id == name), None)
    if group is None:
        st.info("The runs of this group have been deleted.")
        return
    shown = section(snapshot, group.members, against, split)
    parts.headline(shown.headline, "")
    _details(shown, group)
    _heatmaps(snapshot, shown)
    st.subheader("Ranking", anchor=False)
    _ranking(shown)
    st.subheader("Schedules", anchor=False)
    _schedules(shown)
    if shown.settings and not shown.lines.empty:
        st.subheader("All settings at once", anchor=False)
        _parallel(shown)
    st.caption(_method(shown) + resolution(summaries(snapshot, group.members)))


def _details(shown: Section, group: Group) -> None:
    lines = list(shown.details)
    if group.missing:
        lines.append(
            f"{group.missing} members of this sweep are not among its runs: not begun yet, or "
            "trained in an earlier sweep. All finetunes of the same trunk hold those too."
        )
    if group.archived:
        lines.append(f"{group.archived} archived runs are left out, also of the adjusted p.")
    if lines:
        st.html("".join(f'<div class="thaw-small">{escape(line)}</div>' for line in lines))


def _method(shown: Section) -> str:
    if shown.against is None:
        return "Best epoch of each run; the best of several epochs flatters. "
    return (
        "Best epoch after unfreezing; the best of several epochs flatters. Intervals are "
        "bootstrapped over the photos, paired; p is an exact test on the photos fixed and broken, "
        "adjusted for how many were tried (Holm). With several runs each photo counts once, by "
        "the sum of its changes. "
    )


# --- the heatmap ------------------------------------------------------------------------------


def _heatmaps(snapshot: Snapshot, shown: Section) -> None:
    left, right = st.columns([3, 2], gap="medium")
    with right:
        chosen = _choose_cell(shown.cells)
        _runs_of_cell(snapshot, shown, chosen)
    with left:
        for name in shown.cells["map"].unique():
            if name:
                st.text(name)
            _heatmap(shown, name, chosen)
        st.caption(_legend(shown))


def _heatmap(shown: Section, name: str, chosen: str) -> None:
    drawn = heatmap(shown.cells, measure(shown.against), shown.row, name, chosen)
    # A chart keeps what was clicked. After a choice in a list that is out of date.
    key = f"heatmap-{name}-{st.session_state.get('cell-turn', 0)}"
    st.altair_chart(
        drawn,
        key=key,
        on_select=lambda: _clicked(key),
        selection_mode=[CELL],
        alt=f"{measure(shown.against)} by learning rate"
        f"{f' and {shown.row.lower()}' if shown.row else ''}; the same numbers are in the ranking, "
        "the runs of each cell in the list beside it",
    )
    parts.svg_of(drawn, f"heatmap-{name}" if name else "heatmap")


def _clicked(key: str) -> None:
    points = st.session_state[key]["selection"].get(CELL, [])
    st.session_state["cell"] = points[0][CELL] if points else _NONE


def _turned() -> None:
    st.session_state["cell-turn"] = st.session_state.get("cell-turn", 0) + 1


def _choose_cell(cells: pd.DataFrame) -> str:
    """The cell whose runs are shown: by a click, from this list, or by the link."""
    options = [_NONE, *cells["cell"]]
    start, _ = parts.remembered("cell", options, [_NONE])
    st.session_state["cell"] = (start or options)[0]
    name = st.selectbox(
        "Cell",
        options,
        key="cell",
        format_func=lambda name: name or "Click a cell, or choose one here",
        on_change=_turned,
        persist_state="session",
    )
    if name:
        st.query_params["cell"] = name
    else:
        st.query_params.pop("cell", None)
    return name


def _runs_of_cell(snapshot: Snapshot, shown: Section, chosen: str) -> None:
    found = shown.cells[shown.cells["cell"] == chosen]
    if found.empty:
        return
    names = list(found["run_ids"].iloc[0])
    values = shown.lines.drop_duplicates("run_id").set_index("run_id")["value"].reindex(names)
    frame = table(summaries(snapshot, names))[["Run", "Status", "Best accuracy"]]
    columns = {
        "Best accuracy": st.column_config.NumberColumn(format="%.2f%%"),
        "Change": st.column_config.NumberColumn(format="%+.2f", help="In points"),
    }
    st.dataframe(
        frame.assign(Change=values.to_numpy()) if shown.against else frame,
        hide_index=True,
        column_config=columns,
        alt="The runs of the cell",
    )
    _open(names, "cell")


def _open(names: list[str], key: str) -> None:
    label = "Compare this run" if len(names) == 1 else f"Compare these {len(names)} runs"
    if st.button(label, type="primary", key=f"open-{key}"):
        parts.go("compare", runs=names)


def _legend(shown: Section) -> str:
    several = int(shown.cells["runs"].max()) > 1
    mean = "Each cell is the mean of its runs. " if several else ""
    if shown.against is None:
        return f"{mean}The bluer, the higher."
    tested = int((shown.cells["p"] != "").sum())
    if tested == 0:
        return f"{mean}Blue is better, orange worse."
    star = f"An asterisk marks what is beyond chance, adjusted for {tested} cells"
    any_star = shown.cells["text"].str.endswith("*").any()
    return f"{mean}Blue is better, orange worse. {star}{'' if any_star else '; here none is'}."


# --- the rest ---------------------------------------------------------------------------------


def _schedules(shown: Section) -> None:
    names = list(shown.schedule_means["schedule"])
    if len(names) < 2:
        st.caption(
            "All runs with a result used one schedule. To compare, sweep several: "
            "--schedule constant exponential step cosine"
        )
        return
    left, right = st.columns(2, gap="medium")
    with left:
        drawn = schedule_dots(shown.schedules, shown.schedule_means, measure(shown.against))
        parts.chart(drawn, "schedules", f"{measure(shown.against)} of each run by schedule")
        st.caption("Each run, the mean over them and its 95% interval over the photos.")
    with right:
        title = "Epochs since unfreezing" if shown.against else "Epoch"
        drawn = schedule_curves(shown.curves, title)
        parts.chart(drawn, "schedule-curves", "Mean validation accuracy by epoch and schedule")
        st.caption("Mean validation accuracy over the runs of each schedule.")
    if not shown.balanced:
        st.caption("The schedules were not tried with the same settings: compare with care.")


def _parallel(shown: Section) -> None:
    chosen = shown.cells.loc[shown.cells["cell"] == st.session_state.get("cell"), "run_ids"]
    names = list(chosen.iloc[0]) if len(chosen) else []
    drawn = parallel(shown.lines, measure(shown.against), names)
    parts.chart(
        drawn,
        "parallel",
        f"Parallel coordinates: {', '.join(shown.settings)} and the result of each run; the "
        "ranking holds the same numbers",
    )
    st.caption(
        "Each line is a run, from its settings down to its result. Point at one to bring it out; "
        "the runs of the chosen cell stand out. Runs with the same setting lie beside each other "
        "by their result."
    )


def _ranking(shown: Section) -> None:
    if shown.ranking.empty:
        st.caption("No run is done yet.")
        return
    ticked = _ticked(shown.ranking.drop(columns="run_ids"))
    runs = [name for place in ticked for name in shown.ranking["run_ids"].iloc[place]]
    if runs:
        _open(runs, "ranking")
    else:
        st.caption("Tick settings to lay the curves of their runs over each other.")


def _ticked(frame: pd.DataFrame) -> list[int]:
    """Show the ranking; returns the places of the rows that are ticked."""
    blank = frame.isna() | frame.eq("")
    state = st.dataframe(
        frame.loc[:, ~blank.all()],
        hide_index=True,
        key=f"ranking-{hash(tuple(frame['Setting']))}",  # ticks are kept by place
        on_select="rerun",
        selection_mode="multi-row",
        placeholder="",
        alt="The settings, best first, with their evidence",
        column_config={
            "Place": st.column_config.NumberColumn(format="%d", width="small"),
            "Best accuracy": st.column_config.NumberColumn(format="%.2f%%"),
            "Change": st.column_config.NumberColumn(format="%+.2f", help="In points"),
            "95% interval": st.column_config.TextColumn(help="Of the change, in points"),
            "p": st.column_config.TextColumn(help="Adjusted for the number of settings (Holm)"),
            "Fixed": st.column_config.NumberColumn(
                help="Photos that it has right and the reference has wrong, over all its runs"
            ),
            "Broken": st.column_config.NumberColumn(
                help="Photos that it has wrong and the reference has right, over all its runs"
            ),
            "Spread": st.column_config.NumberColumn(
                format="%.2f", help="Between its best and its worst run, in points"
            ),
            "Done": st.column_config.TextColumn(help="Runs that are done, of all with it"),
        },
    )
    return [place for place in state["selection"]["rows"] if place < len(frame)]

"""The table of all runs: find some, sort them, note what they are, choose what to do with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal

import pandas as pd
import streamlit as st

from explorer import access
from explorer.annotations import (
    MAX_NAME,
    MAX_NOTE,
    MAX_TAGS,
    clean,
    load_annotation,
    save_annotation,
)
from explorer.data import Snapshot, command_of
from explorer.manage import archive, bytes_on_disk, delete, left_without_parent
from explorer.overview import BOTH, SORTS, Overview, View, constants_line, folded, sendable, shown
from explorer.pages import parts
from trainer.cache import format_size
from trainer.reproduce import ReproduceError
from trainer.runlog import RunError
from trainer.schema import PHASES

Kind = Literal["command", "edit", "delete"]

_STATUS: Final = ("running", "done", "interrupted", "failed")
_ORDERS: Final = ("Descending", "Ascending")
_FILTERS: Final = ("status", "phase", "data", "tags")
_WIDTH: Final = 160  # two beside each other on a phone
_PERCENT: Final = "%.2f%%"
_TABLE: Final = "runs-table"
_ROWS: Final = "runs-rows"  # the ids of the table's rows as they were last shown
_TICKED: Final = "ticked"  # the ids of those ticked, also in the link
_MOST_IN_LINK: Final = 40  # servers refuse much longer links
_ASKED: Final = "runs-asked"  # the dialog that is open: its kind and the runs that it is about


def page() -> None:
    snapshot = parts.opened("Which runs are there, and what came of them?")
    if snapshot is None:
        return
    with st.spinner("Comparing what the runs predicted"):
        frame = _frame(snapshot)
    view = _choose_view(frame)
    if _ASKED in st.session_state:
        st.fragment(_live)(snapshot, view)  # a refresh takes the focus from a dialog
    else:
        parts.live(snapshot, _live, view)
    parts.problems(snapshot)
    _open_dialog(snapshot)


def _frame(snapshot: Snapshot) -> pd.DataFrame:
    return _overview(str(parts.library().runs_dir)).frame(snapshot)


@st.cache_resource(show_spinner=False, max_entries=4)
def _overview(path: str) -> Overview:
    """The rows of this runs folder, made once for all sessions."""
    return Overview()


def _choose_view(frame: pd.DataFrame) -> View:
    with st.container(horizontal=True, gap="small", vertical_alignment="bottom"):
        words = st.text_input(
            "Search",
            key="search",
            placeholder="Name, setting, tag or note",
            bind="query-params",
            persist_state="session",
        )
        status, phase, data, tags = _choose_filters(frame)
        sort = _one("Sort by", "sort", SORTS)
        order = _one("Order", "order", _ORDERS)
        archived = bool(frame["Archived"].notna().any()) and st.toggle(
            "Archived too", key="archived", bind="query-params", persist_state="session"
        )
    ascending = order == _ORDERS[1]
    return View(words or "", status, phase, data, tags, archived, sort, ascending)


def _choose_filters(frame: pd.DataFrame) -> list[tuple[str, ...]]:
    phases = frame["Phase"].dropna().str.split(BOTH, regex=False).explode()
    return [
        _several("Status", "status", frame["Status"], _STATUS),
        _several("Phase", "phase", phases, PHASES),
        _several("Data", "data", frame["Data"].dropna()),
        _several("Tags", "tags", frame["Tags"].dropna().explode(), least=1),
    ]


def _several(
    label: str, key: str, present: Iterable[str], options: Sequence[str] = (), least: int = 2
) -> tuple[str, ...]:
    """A filter, where it makes a difference; all that a link may ask for can be chosen."""
    found = set(present)
    asked = st.session_state.get(key) or st.query_params.get_all(key)
    if len(found) < least and not asked:
        return ()
    chosen = st.multiselect(
        label,
        options or sorted(found.union(asked)),
        key=key,
        placeholder="Any",
        width=_WIDTH,
        bind="query-params",
        persist_state="session",
    )
    return tuple(chosen)


def _one(label: str, key: str, options: Sequence[str]) -> str:
    return st.selectbox(
        label, options, key=key, width=_WIDTH, bind="query-params", persist_state="session"
    )


# --- the table ----------------------------------------------------------------------------------


def _live(snapshot: Snapshot, view: View) -> None:
    whole = _frame(snapshot)
    rows = shown(whole, view)
    ticked = [name for name in _ticked() if name in snapshot.runs]
    if rows.empty:
        _nothing_fits(bool(whole["Archived"].notna().all()))
    else:
        frame, constants = folded(rows)
        found = "" if len(frame) == len(whole) else f"{len(frame)} of {len(whole)} runs. "
        st.text(found + constants_line(constants))
        _table(frame, ticked)
    st.session_state[_ROWS] = list(rows.index)
    _remember(ticked)
    hidden = len(set(ticked) - set(rows.index))
    if ticked:
        _actions(snapshot, ticked, hidden)
    else:
        st.caption("Tick runs to compare them, or for what else can be done with them.")


def _nothing_fits(all_archived: bool) -> None:
    st.info("No run fits the search and the filters.")
    if st.button("Show all runs", on_click=_clear, args=(all_archived,)):
        st.rerun()  # the filters belong to the whole page


def _clear(archived_too: bool) -> None:
    st.session_state["search"] = ""
    for key in _FILTERS:
        st.session_state[key] = []
    if archived_too:
        st.session_state["archived"] = True


def _ticked() -> list[str]:
    """The ids of the runs that are ticked, also of those that the filters hide just now.

    The table itself keeps places, and other runs get these when rows come, go or change order.
    """
    remembered = st.session_state.get(_TICKED, st.query_params.get_all(_TICKED))
    table, rows = st.session_state.get(_TABLE), st.session_state.get(_ROWS)
    if table is None or not rows:
        return list(remembered)
    places = table["selection"]["rows"]
    inside = [rows[place] for place in sorted(places) if place < len(rows)]
    return inside + [name for name in remembered if name not in rows]


def _remember(ticked: list[str]) -> None:
    st.session_state[_TICKED] = ticked
    linked = ticked if len(ticked) <= _MOST_IN_LINK else []
    if st.query_params.get_all(_TICKED) != linked:
        st.query_params[_TICKED] = linked


def _untick() -> None:
    st.session_state[_TICKED] = st.session_state[_ROWS] = []


def _table(frame: pd.DataFrame, ticked: Sequence[str]) -> None:
    places = sorted(frame.index.get_indexer(ticked))
    places = [int(place) for place in places if place >= 0]
    now = st.session_state.get(_TABLE)
    if places != (sorted(now["selection"]["rows"]) if now else []):
        st.session_state[_TABLE] = {"selection": {"rows": places}}
    st.dataframe(
        frame,
        hide_index=True,
        key=_TABLE,
        on_select="rerun",
        selection_mode="multi-row",
        placeholder="",
        column_config=_COLUMNS,
        alt="All runs: their settings and what they reached",
    )


_COLUMNS: Final = {
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
    "Test accuracy": st.column_config.NumberColumn(
        format=_PERCENT, help="On photos that nothing was chosen by: python -m trainer test"
    ),
    "Tags": st.column_config.ListColumn(width=150),
    "Learning rate": st.column_config.NumberColumn(format="%.1e"),
    "At epoch": st.column_config.NumberColumn(format="%d"),
    "Best loss": st.column_config.NumberColumn(format="%.4f"),
    "Time": st.column_config.NumberColumn(format="%.0f s"),
    "Memory": st.column_config.NumberColumn(format="%.0f MB"),
    "Note": st.column_config.TextColumn(width="medium"),
}


# --- what to do with them -----------------------------------------------------------------------


def _actions(snapshot: Snapshot, ticked: list[str], hidden: int) -> None:
    if hidden:
        st.caption(f"Ticked but not shown: {hidden} of {len(ticked)}.")
    read_only = parts.is_read_only("Runs cannot be renamed, archived or deleted here.")
    with st.container(horizontal=True, gap="small"):
        if st.button(f"Compare ({len(ticked)})", type="primary"):
            parts.go("compare", runs=ticked)
        if len(ticked) == 1:
            _of_one(ticked[0])
        if not read_only:
            _archive_or_back(snapshot, ticked)
            if st.button("Delete"):
                _ask("delete", ticked)
        if st.button("Untick", type="tertiary"):
            _untick()
            st.rerun()


def _of_one(name: str) -> None:
    if st.button("Classify"):
        parts.go("classify", run=name)
    if st.button("What changed"):
        parts.go("changed", run=name)
    if st.button("Export"):
        parts.go("exporting", run=name)
    if st.button("Command"):
        _ask("command", [name])
    if not access.read_only_because() and st.button("Edit"):
        _ask("edit", [name])


def _archive_or_back(snapshot: Snapshot, ticked: Sequence[str]) -> None:
    back = all(snapshot.annotations[name].archived for name in ticked)
    if not st.button("Unarchive" if back else "Archive"):
        return
    try:
        for name in ticked:
            archive(snapshot.runs[name], not back)
    except RunError as error:
        st.text(str(error))
        return
    _untick()
    st.rerun()


def _ask(kind: Kind, names: list[str]) -> None:
    """Open a dialog; it belongs to the whole page, so that it stays while the table refreshes."""
    st.session_state[_ASKED] = kind, names
    st.rerun()


def _close() -> None:
    st.session_state.pop(_ASKED, None)


def _open_dialog(snapshot: Snapshot) -> None:
    kind, names = st.session_state.get(_ASKED, ("", []))
    there = [name for name in names if name in snapshot.runs]
    if not there:
        _close()
    elif kind == "delete":
        _delete(snapshot, there)
    elif kind == "edit":
        _edit(snapshot, there[0])
    else:
        _command(snapshot, there[0])


@st.dialog("Train this run again", width="medium", on_dismiss=_close)
def _command(snapshot: Snapshot, name: str) -> None:
    run = snapshot.runs[name]
    try:
        st.code(command_of(run), language="bash", wrap_lines=True)
    except ReproduceError as error:
        st.text(sendable(str(error)))
        return
    alone = (
        " It was trained in a sweep, beside others; alone it differs by no more than rounding."
        if "sweep" in run.info
        else ""
    )
    st.caption(
        "To be typed in the folder of Thaw. The same machine and the same versions give the same "
        f"figures.{alone}"
    )


@st.dialog("Name, tags and note", on_dismiss=_close)
def _edit(snapshot: Snapshot, name: str) -> None:
    path = snapshot.runs[name].path
    noted = load_annotation(path)
    with st.form("edit", border=False):
        title = st.text_input("Name", noted.name, max_chars=MAX_NAME, placeholder=name)
        tags = st.text_input(
            "Tags", ", ".join(noted.tags), help=f"At most {MAX_TAGS}, separated by commas"
        )
        note = st.text_area("Note", noted.note, max_chars=MAX_NOTE)
        saved = st.form_submit_button("Save", type="primary")
    if not saved:
        return
    try:
        save_annotation(path, clean(title, note, tags.split(","), noted.archived))
    except RunError as error:
        st.text(str(error))
        return
    _close()
    st.rerun()


@st.dialog("Delete for good?", on_dismiss=_close)
def _delete(snapshot: Snapshot, names: list[str]) -> None:
    sizes = [bytes_on_disk(snapshot.runs[name].path) for name in names]
    lines = [
        f"{snapshot.labels[name]}, {format_size(size)}"
        for name, size in zip(names, sizes, strict=True)
    ]
    st.text("\n".join(_shortened(lines, 10)))
    for warning in _consequences(snapshot, names):
        st.text(warning)
    with st.container(horizontal=True, gap="small"):
        what = "this run" if len(names) == 1 else f"these {len(names)} runs"
        sure = st.button(f"Delete {what}, {format_size(sum(sizes))}", type="primary")
        if st.button("Keep"):
            _close()
            st.rerun()
    if not sure:
        return
    problems = delete(parts.library().runs_dir, names)
    if not problems:
        _close()
        st.rerun()
    st.text("\n".join(problems))


def _consequences(snapshot: Snapshot, names: Sequence[str]) -> list[str]:
    warnings = ["Checkpoints, predictions and exported models go with the log."]
    children = [snapshot.labels[name] for name in left_without_parent(snapshot, names)]
    if children:
        start = "One run starts" if len(children) == 1 else f"{len(children)} runs start"
        warnings.append(
            f"{start} from here: {', '.join(_shortened(children, 4))}. Compare will draw them "
            "alone, and their network before unfreezing can be neither classified with nor "
            "exported."
        )
    if snapshot.running.intersection(names):
        warnings.append("One of them is being trained: it is not deleted before that has ended.")
    return warnings


def _shortened(lines: list[str], most: int) -> list[str]:
    more = len(lines) - most
    return lines if more <= 0 else [*lines[:most], f"and {more} more"]

"""The import page: logs of other tools, shown before they become runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pandas as pd
import streamlit as st

from explorer.charts import overlay, run_colours
from explorer.compare import summaries
from explorer.data import DEFAULT_SHOWN, Snapshot, epochs_frame, lineage
from explorer.importing import (
    Reading,
    Wish,
    bring_in,
    command,
    labelled,
    preview,
    read_uploads,
    table,
)
from explorer.pages import parts
from explorer.render import printable
from trainer.imports.find import Skipped
from trainer.imports.logs import FORMATS, TITLES, Format, Log
from trainer.imports.plan import ONE_PHASE, NewRun, OnePhase, alone, family, halves
from trainer.imports.read import Found, read_all
from trainer.imports.write import absolute, holder, without_known
from trainer.runlog import Run
from trainer.schema import ThawError

_SOURCES: Final = ("A path on this machine", "Files")
_ONE_EACH: Final = "One run each"
_FAMILY: Final = "A transfer phase and its finetunes"
_BOTH: Final = "Both phases in one log"
_JOIN: Final = "Finetunes of a run that is here"
_KEPT_SECONDS: Final = 15
_DONE: Final = "imported"


def page() -> None:
    parts.style()
    st.header("Have you trained elsewhere? Bring the logs here.", anchor=False)
    snapshot = parts.current()
    if parts.is_read_only("Nothing can be imported here."):
        st.caption("Where you may write to a runs folder, the command line does it:")
        _commands()
        parts.problems(snapshot)
        return
    where, reading, read = _choose_logs()
    _done(snapshot, where)
    if read is None:
        _explain()
    else:
        try:
            with st.spinner("Reading the logs"):
                found = read()
            _show(snapshot, found, where, reading)
        except ThawError as error:
            st.error("These logs cannot be imported.")
            st.text(str(error))
    parts.problems(snapshot)


def _choose_logs() -> tuple[Path | None, Reading, Callable[[], Found] | None]:
    """The path, if any, how to read, and what reads the logs; None as long as none are named."""
    source = parts.one_of("Logs from", _SOURCES, key="logs-from")
    left, middle, right = st.columns([3, 1, 1])
    with middle:
        title = st.selectbox(
            "Format",
            ["Recognised", *TITLES.values()],
            key="format",
            bind="query-params",
            persist_state="session",
        )
    with right:
        accuracy = st.text_input(
            "Accuracy tag",
            key="accuracy",
            placeholder="Guessed",
            bind="query-params",
            persist_state="session",
            help="The tag or column of the validation accuracy, where its name tells nothing. "
            "none: import a log without accuracy.",
        )
    wanted = next((name for name in FORMATS if TITLES[name] == title), None)
    reading = Reading(wanted, (accuracy or "").strip())
    with left:
        if source == _SOURCES[0]:
            return _from_path(reading)
        return _from_files(reading)


def _from_path(reading: Reading) -> tuple[Path | None, Reading, Callable[[], Found] | None]:
    typed = st.text_input(
        "File or folder",
        key="path",
        placeholder="/home/me/logs",
        bind="query-params",
        persist_state="session",
        help="A folder is searched with all folders in it.",
    )
    if not (typed or "").strip():
        return None, reading, None
    path = Path(typed.strip()).expanduser()
    return path, reading, lambda: _read_path(str(path), reading.format, reading.accuracy)


@st.cache_data(ttl=_KEPT_SECONDS, max_entries=8, show_spinner=False)
def _read_path(path: str, wanted: Format | None, accuracy: str) -> Found:
    """Kept for a moment, so that another click on the page does not read all logs again."""
    found = read_all([Path(path)], wanted, accuracy or None)
    return Found(tuple(map(absolute, found.logs)), found.skipped)


def _from_files(reading: Reading) -> tuple[Path | None, Reading, Callable[[], Found] | None]:
    files = st.file_uploader(
        "CSV files, trainer_state.json, hparams.yaml",
        type=["csv", "json", "yaml"],
        accept_multiple_files=True,
        key="log-files",
        help="TensorBoard logs by their path: a single event file does not say whether it is "
        "training or validation, its folder does.",
    )
    if not files:
        return None, reading, None
    return None, reading, lambda: read_uploads([(f.name, f.getvalue()) for f in files], reading)


def _explain() -> None:
    st.caption(
        "Thaw reads TensorBoard event folders (Keras's train and validation become one run), "
        "Keras CSVLogger, Lightning metrics.csv, fastai CSVLogger and Hugging Face "
        "trainer_state.json. You see what was found before anything is written. The command line "
        "does the same:"
    )
    _commands()


def _commands() -> None:
    st.code("python -m trainer import PATH/TO/LOGS", language="bash")
    st.code("python -m trainer import FROZEN --then UNFROZEN-1 UNFROZEN-2", "bash", wrap_lines=True)


def _show(snapshot: Snapshot, found: Found, where: Path | None, reading: Reading) -> None:
    labels = labelled(found.logs)
    logs = _found_table(snapshot, labels)
    again = _again(snapshot, logs)
    kept, known = without_known(list(logs.values()), [] if again else _runs(snapshot))
    held = {log.path for log in logs.values() if holder(_runs(snapshot), log)}
    # What is here already is in the table.
    _skipped([*found.skipped, *(one for one in known if one.path not in held)])
    if not kept:
        _all_here(snapshot, list(logs.values()))
        return
    chosen = _assign(snapshot, {label: log for label, log in logs.items() if log in kept})
    if chosen is None:
        return
    _preview(chosen.runs)
    renamed = any(log.name != labels[label].name for label, log in logs.items())
    _type(replace(chosen.wish, again=again, renamed=renamed), len(kept), where, reading)
    count = f"{len(chosen.runs)} runs" if len(chosen.runs) > 1 else "this run"
    if st.button(f"Import {count}", type="primary"):
        ids = bring_in(parts.library().runs_dir, chosen.runs)
        st.session_state[_DONE] = where, ids
        st.rerun()


def _runs(snapshot: Snapshot) -> list[Run]:
    return list(snapshot.runs.values())


def _type(wish: Wish, importable: int, where: Path | None, reading: Reading) -> None:
    """The same on the command line; files from a browser have no path to name."""
    if where is None:
        return
    all_of_them = len(wish.first) == importable > 1 and not (wish.then or wish.renamed)
    whole = where if all_of_them else None
    st.caption("The command line does the same")
    st.code(command(wish, reading, whole, parts.library().runs_dir), "bash", wrap_lines=True)


def _found_table(snapshot: Snapshot, logs: dict[str, Log]) -> dict[str, Log]:
    """Show what was found; returns the logs with the names that the user gave them."""
    frame = table(logs, snapshot)
    percent = st.column_config.NumberColumn(format="%.2f%%")
    st.text(f"{len(logs)} logs found." if len(logs) != 1 else "One log found.")
    edited = st.data_editor(
        frame.dropna(axis="columns", how="all"),
        hide_index=True,
        key=f"logs-{hash(tuple(str(log.path) for log in logs.values()))}",
        disabled=[name for name in frame.columns if name != "Name"],
        column_config={
            "Name": st.column_config.TextColumn(
                required=True, max_chars=60, help="Click twice to give another name"
            ),
            "Best accuracy": percent,
            "Last accuracy": percent,
            "Begun": st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm"),
            "Here as": st.column_config.TextColumn(help="The run that holds this log already"),
        },
    )
    names: pd.Series[str] = edited["Name"]
    return {label: replace(log, name=str(names[label])) for label, log in logs.items()}


def _again(snapshot: Snapshot, logs: dict[str, Log]) -> bool:
    if not any(holder(_runs(snapshot), log) for log in logs.values()):
        return False
    return st.toggle("Also import what is here already", key="again")


def _skipped(skipped: Sequence[Skipped]) -> None:
    if skipped:
        with st.expander(f"{len(skipped)} left out"):
            # Not st.table, which takes a path for Markdown and fetches the picture it names.
            st.dataframe(
                {
                    "Path": [printable(str(one.path)) for one in skipped],
                    "Why": [printable(one.reason) for one in skipped],
                },
                hide_index=True,
            )


def _all_here(snapshot: Snapshot, logs: Sequence[Log]) -> None:
    held = [holder(_runs(snapshot), log) for log in logs]
    ids = list(dict.fromkeys(run.run_id for run in held if run is not None))
    _, just_imported = st.session_state.get(_DONE, (None, []))
    if not set(ids) <= set(just_imported):
        st.info("All of these logs are here already.")
        _compare(ids)


def _done(snapshot: Snapshot, where: Path | None) -> None:
    """What was imported last from the same place, as long as it is there."""
    imported_from, names = st.session_state.get(_DONE, (None, []))
    ids = [name for name in names if name in snapshot.runs]
    if ids and imported_from == where:
        st.success("Imported one run." if len(ids) == 1 else f"Imported {len(ids)} runs.")
        st.text(", ".join(snapshot.labels[name] for name in ids))
        _compare(ids)


def _compare(ids: list[str]) -> None:
    if ids and st.button("Compare them" if len(ids) > 1 else "Compare it", type="primary"):
        parts.go("compare", runs=ids)


# --- which log is which phase -------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """What the user chose, as the command line has it and as runs."""

    wish: Wish
    runs: list[NewRun]


def _assign(snapshot: Snapshot, logs: dict[str, Log]) -> Chosen | None:
    """Ask what the logs are; None as long as something is missing."""
    options = [_ONE_EACH, *([_FAMILY] if len(logs) > 1 else []), _BOTH]
    trunks = any(run.epochs for run in snapshot.runs.values())
    kind = parts.one_of("What they are", [*options, *([_JOIN] if trunks else [])], key="as")
    if kind == _FAMILY:
        return _family(logs)
    if kind == _BOTH:
        return _both(logs)
    if kind == _JOIN:
        return _join(snapshot, logs)
    chosen = _several("Logs", "logs", list(logs), list(logs))
    return _one_each([logs[label] for label in chosen]) if chosen else None


def _one_each(logs: Sequence[Log]) -> Chosen | None:
    typed = parts.one_of(
        "Phase",
        ONE_PHASE,
        key="phase",
        help="transfer: the backbone was frozen; finetune: layers were unfrozen; scratch: random "
        "weights, everything trained",
    )
    phase: OnePhase = next(name for name in ONE_PHASE if name == typed)
    # A phase that was chosen here is one that the command line is told.
    given = phase if phase != ONE_PHASE[0] or any(log.seams for log in logs) else None
    runs = [alone(log, phase) for log in logs]
    for log in logs:
        if log.seams:
            st.text(
                f"{log.name} holds {len(log.seams) + 1} fits. If layers were unfrozen in between, "
                f'choose "{_BOTH}".'
            )
    return Chosen(Wish(tuple(logs), phase=given), runs)


def _family(logs: dict[str, Log]) -> Chosen | None:
    left, right = st.columns([1, 2])
    with left:
        trunk_label = _one("Transfer phase", "trunk", list(logs), _earliest(logs))
    others = [label for label in logs if label != trunk_label]
    with right:
        chosen = _several("Finetunes of it", "finetunes", others, others)
    if not chosen:
        st.info("Choose one finetune or more.")
        return None
    log = logs[trunk_label]
    trunk = alone(log, "transfer")
    then = tuple(logs[label] for label in chosen)
    boundary = _boundary(1, log.last_epoch, log.last_epoch)
    wish = Wish((log,), then, boundary=None if boundary == log.last_epoch else boundary)
    return Chosen(wish, [trunk, *family(trunk, then, boundary)])


def _earliest(logs: dict[str, Log]) -> str:
    return min(logs, key=lambda label: logs[label].started)


def _both(logs: dict[str, Log]) -> Chosen | None:
    fitting = [label for label, log in logs.items() if log.last_epoch > log.epochs[0].epoch]
    if not fitting:
        st.info("A log of a single epoch holds one phase.")
        return None
    seamed = [label for label in fitting if logs[label].seams]
    log = logs[_one("Log", "trunk", fitting, (seamed or fitting)[0])]
    first = max(1, log.epochs[0].epoch)
    if log.last_epoch == first:
        st.info("A log of a single epoch holds one phase.")
        return None
    middle = (first + log.last_epoch) // 2
    boundary = _boundary(first, log.last_epoch - 1, log.seams[0] if log.seams else middle)
    return Chosen(Wish((log,), boundary=boundary), list(halves(log, boundary)))


def _join(snapshot: Snapshot, logs: dict[str, Log]) -> Chosen | None:
    trunk = parts.choose_run(snapshot, lambda run: run.phase == "transfer")
    chosen = _several("Finetunes of it", "finetunes", list(logs), list(logs))
    if not trunk.epochs or not chosen:
        st.info("Choose a run with epochs, and one finetune of it or more.")
        return None
    last = trunk.epochs[-1].epoch
    boundary = _boundary(1, last, last)
    first = tuple(logs[label] for label in chosen)
    wish = Wish(first, parent=trunk.run_id, boundary=None if boundary == last else boundary)
    return Chosen(wish, list(family(trunk, first, boundary)))


def _boundary(low: int, high: int, default: int) -> int:
    """The epoch after which layers were unfrozen; one that does not fit these logs is forgotten."""
    if not low <= st.session_state.get("boundary", default) <= high:
        del st.session_state["boundary"]
    if low == high:
        st.text(f"Layers were unfrozen after epoch {low}.")
        return low
    return int(
        st.slider(
            "Layers were unfrozen after epoch",
            low,
            high,
            default,
            key="boundary",
            bind="query-params",
            persist_state="session",
        )
    )


def _one(label: str, key: str, options: Sequence[str], default: str) -> str:
    start, _ = parts.remembered(key, options, [default])
    st.session_state[key] = (start or [default])[0]
    chosen = st.selectbox(label, options, key=key, persist_state="session")
    st.query_params[key] = chosen
    return chosen


def _several(label: str, key: str, options: Sequence[str], default: Sequence[str]) -> list[str]:
    start, lost = parts.remembered(key, options, default)
    st.session_state[key] = list(default) if lost and not start else start
    chosen = st.multiselect(label, options, key=key, persist_state="session")
    # All of them is what a link without this shows.
    st.query_params[key] = [] if chosen == list(default) else chosen
    return chosen


# --- the preview --------------------------------------------------------------------------------


def _preview(planned: Sequence[NewRun]) -> None:
    """The runs as Compare will show them."""
    snapshot, names = preview(planned)
    shown = names[:DEFAULT_SHOWN]
    frame = epochs_frame(snapshot, lineage(snapshot, shown)[0])
    parts.verdicts(summaries(snapshot, shown), run_colours(frame), {})
    if len(names) > len(shown):
        st.text(f"The first {len(shown)} of {len(names)} runs are drawn.")
    known = frame["val_acc"].notna().any() or frame["train_acc"].notna().any()
    drawn = overlay(frame, "accuracy" if known else "loss", "total")
    what = "Accuracy" if known else "Loss"
    parts.chart(drawn, "preview", f"{what} by epoch of {len(shown)} runs before they are imported")

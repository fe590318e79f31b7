"""The classify page: photos through a run's networks, before and after unfreezing and exported."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

import streamlit as st

from explorer.classify import Classifier, Exported, Look, Slot, exported, slots
from explorer.desk import Desk, Ready, Row, Upload, changes, difference, median_seconds, to_csv
from explorer.exporting import command
from explorer.gradcam import RAMP, GradCamError
from explorer.mirror import brought
from explorer.pages import parts
from explorer.shipped import small
from trainer.preprocess import PHOTO_SUFFIXES
from trainer.runlog import Run
from trainer.schema import ThawError

_MOST: Final = 1000  # photos at once; more belong on the command line
_PER_PAGE: Final = 10
_SHOWN: Final = ("All photos", "Answers differ")
_DESK: Final = "classify-desk"
_MOST_CHANGES: Final = 20
_NOT_EXPORTED: Final = "There is no exported model.onnx yet. To see it answer too, export it:"
_STYLE: Final = """<style>
.thaw-tables {display: flex; flex-wrap: wrap; gap: 1rem 4rem; align-items: flex-start}
.thaw-table {border-collapse: collapse; font-size: .875rem; max-width: 100%}
.thaw-table caption {text-align: left; font-weight: 600; padding-bottom: .3rem}
.thaw-table :is(th, td) {text-align: left; padding: .25rem 1.5rem .25rem 0; min-width: 4rem;
  border-top: 1px solid rgba(124, 135, 146, .35); overflow-wrap: anywhere; vertical-align: top}
.thaw-table th {font-weight: 600}
.thaw-ramp {display: inline-block; width: 6rem; height: .6rem; border-radius: .3rem;
  margin: 0 .4rem}
</style>"""


def page() -> None:
    snapshot = parts.opened("What does the network see, before and after?")
    if snapshot is None:
        return
    st.html(_STYLE)
    left, right = st.columns([3, 1])
    with left:
        run = parts.choose_run(snapshot, lambda run: run.boundary is not None)
    with right:
        source = parts.one_of("Photos from", ["Files", "Camera"], key="source")
    heat, label = _choose_heat(run)
    uploads = _photos(source)
    st.caption("Photos stay in this app's memory, as long as you show them, and are never stored.")
    before = st.empty()  # in one place, so that it goes as soon as there are photos
    if uploads:
        _results(run, uploads, heat, label)
    else:
        st.session_state.pop(_DESK, None)
        with before.container():
            _explain(run)
    parts.problems(snapshot)


# --- what the user chooses ----------------------------------------------------------------------


def _choose_heat(run: Run) -> tuple[bool, str]:
    """Whether to show where the networks looked, and for which class ("": each for its answer)."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        heat = st.toggle(
            "Where it looked (Grad-CAM)",
            key="heat",
            bind="query-params",
            persist_state="session",
            help="Computed on demand: it takes longer than the answers themselves.",
        )
        return heat, _choose_class(run) if heat else ""


def _choose_class(run: Run) -> str:
    """A class, kept in the link by hand: names of classes must not pass for Markdown."""
    options = ["", *run.classes]
    start, _ = parts.remembered("heat_class", options, [""])
    st.session_state["heat_class"] = start[0] if start else ""
    label = st.selectbox(
        "Looked for",
        options,
        key="heat_class",
        format_func=lambda name: name or "What each network answered",
        persist_state="session",
        width=320,
    )
    if label:
        st.query_params["heat_class"] = label
    else:
        st.query_params.pop("heat_class", None)
    return label


def _photos(source: str) -> list[Upload]:
    if source == "Camera":
        shot = st.camera_input(
            "Take a photo (the browser allows it on localhost or https only)", width=480
        )
        return [Upload(shot.file_id, "camera", shot.getvalue())] if shot else []
    suffixes = sorted(suffix.removeprefix(".") for suffix in PHOTO_SUFFIXES)
    files = st.file_uploader("Photos", type=suffixes, accept_multiple_files=True, key="files")
    if len(files) > _MOST:
        st.warning(
            f"Only the first {_MOST} of {len(files)} photos are classified here. For more, use the "
            "exported model: python -m export.infer model.onnx FOLDER"
        )
    return [Upload(file.file_id, file.name, file.getvalue()) for file in files[:_MOST]]


# --- networks -----------------------------------------------------------------------------------


def _explain(run: Run) -> None:
    """What will answer, before there are photos."""
    networks = slots(run)
    for slot in networks:
        if slot.reason:
            st.text(f"{slot.title}: {slot.reason}")
    names = "before and after unfreezing" if len(networks) == 2 else "as it was trained"
    if exported(run):
        st.text(f"Side by side: the network {names}, and the exported model.onnx.")
    else:
        st.text(f"The network {names} will answer.")
        _how_to_export(run, _NOT_EXPORTED)


def _how_to_export(run: Run, why: str) -> None:
    st.text(why)
    typed = command(run, "after", None, parts.typed_dir())
    st.code(shlex.join(typed), language="bash", wrap_lines=True)
    if st.button("Open the Export page", key="to-export"):
        parts.go("exporting")  # the run is chosen there already: all pages share the choice


def _load_all(run: Run) -> list[Ready]:
    """The networks of a run that can be loaded; the page says why the others cannot."""
    ready = [each for slot in slots(run) if (each := _load(slot)) is not None]
    path = exported(run)
    if path is None:
        _how_to_export(run, _NOT_EXPORTED)
        return ready
    try:
        with st.spinner("Loading the network: model.onnx"):
            stamp = _stamp(brought(path))
            model = _exported(str(path), stamp)
    except (ThawError, OSError) as error:
        _how_to_export(run, f"{error} Export it anew:")
        return ready
    if model.note:
        st.text(f"model.onnx: {model.note}")
    for network in [each.network for each in ready if each.name == "after"]:
        if isinstance(network, Classifier) and (old := model.outdated(network.sha256)):
            _how_to_export(run, f"{old} Export it anew:")
    return [*ready, Ready("onnx", "model.onnx", model, stamp)]


def _load(slot: Slot) -> Ready | None:
    problem = slot.reason
    if slot.path is not None:
        try:
            with st.spinner(f"Loading the network: {slot.title}"):
                stamp = _stamp(brought(slot.path))
                network = _classifier(str(slot.path), stamp)
            return Ready(slot.which, slot.title, network, stamp)
        except (ThawError, OSError) as error:
            problem = str(error)
    st.text(f"{slot.title}: {problem}")
    return None


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{path} {status.st_mtime_ns} {status.st_size}"


@st.cache_resource(max_entries=6, show_spinner=False)
def _classifier(path: str, stamp: str) -> Classifier:
    """`stamp` makes a checkpoint that was written anew load anew."""
    return Classifier(Path(path))


@st.cache_resource(max_entries=3, show_spinner=False)
def _exported(path: str, stamp: str) -> Exported:
    return Exported(Path(path))


# --- results ------------------------------------------------------------------------------------


def _results(run: Run, uploads: Sequence[Upload], heat: bool, label: str) -> None:
    networks = _load_all(run)
    if not networks:
        return
    desk: Desk = st.session_state.setdefault(_DESK, Desk())
    _work(desk, uploads, networks)
    rows = [desk.row(upload, networks) for upload in uploads]
    read = [row for row in rows if not row.error]
    _summary(rows, read, networks)
    _unreadable([row for row in rows if row.error])
    shown = _page_of(_wanted(read))
    looks = _looks(desk, shown, networks, label) if heat else {}
    for row in shown:
        _photo(row, networks, looks)


def _work(desk: Desk, uploads: Sequence[Upload], networks: Sequence[Ready]) -> None:
    place = st.empty()
    for done, total in desk.work(uploads, networks):
        place.progress(done / total, f"Classifying: {done} of {total} photos done")
    place.empty()


def _summary(rows: Sequence[Row], read: Sequence[Row], networks: Sequence[Ready]) -> None:
    if len(rows) > 1:
        st.text(f"{len(read)} of {len(rows)} photos were read. {_agreement(read)}")
        tables = _changes(changes(read)) + _times(read, networks)
        st.html(f'<div class="thaw-tables">{tables}</div>')
        st.caption(_notes(read))
    names = [each.name for each in networks]
    st.download_button(
        "Results as CSV",
        lambda: to_csv(rows, names),
        file_name="thaw-classify.csv",
        mime="text/csv",
        key="csv",
        on_click="ignore",
        icon=":material/download:",
    )


def _agreement(read: Sequence[Row]) -> str:
    marks = [row.agreement for row in read if row.agreement]
    if not marks:
        return ""
    return f"Same answer on {marks.count('same answer')} of {len(marks)} photos."


def _changes(changed: Sequence[tuple[str, str, int]]) -> str:
    if not changed:
        return ""
    photos = sum(count for _, _, count in changed)
    rows = [(before, after, str(count)) for before, after, count in changed[:_MOST_CHANGES]]
    if rest := changed[_MOST_CHANGES:]:
        rows.append((f"and {len(rest)} more pairs", "", str(sum(count for *_, count in rest))))
    caption = f"Class changed by unfreezing: {photos} photo{'s' if photos > 1 else ''}"
    return _table(caption, ("Before", "After", "Photos"), rows)


def _times(read: Sequence[Row], networks: Sequence[Ready]) -> str:
    taken = [(each, median_seconds(read, each.name)) for each in networks]
    rows = [
        (each.title, each.network.engine, f"{1000 * seconds:.0f} ms")
        for each, seconds in taken
        if seconds is not None
    ]
    return _table("Median time per photo", ("Network", "Runs on", "Time"), rows) if rows else ""


def _notes(read: Sequence[Row]) -> str:
    said = "Times are from decoded pixels to probabilities; of a batch, each photo's share."
    gaps = [gap for row in read if (gap := difference(row)) is not None]
    return f"{said} model.onnx: {_gap(max(gaps))}." if gaps else said


def _unreadable(rows: Sequence[Row]) -> None:
    if not rows:
        return
    photos = f"{len(rows)} photo{'s' if len(rows) > 1 else ''}"
    with st.expander(f"{photos} could not be read", expanded=len(rows) <= 5):
        lines = [(row.upload.name, row.error) for row in rows]
        st.html(_table("", ("File", "Reason"), lines))


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: st.table would take names for Markdown."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(line(cells, "td") for cells in rows)
    head = f"<thead>{line(heads, 'th')}</thead>"
    return f'<table class="thaw-table">{title}{head}<tbody>{body}</tbody></table>'


def _wanted(read: Sequence[Row]) -> Sequence[Row]:
    if not any(row.agreement for row in read) or len(read) < 2:
        return read
    if parts.one_of("Show", _SHOWN, key="answers") == _SHOWN[0]:
        return read
    differing = [row for row in read if row.agreement == "answers differ"]
    if not differing:
        st.info("The networks agree on every photo.")
    return differing


def _page_of(rows: Sequence[Row]) -> Sequence[Row]:
    pages = -(-len(rows) // _PER_PAGE)
    if pages < 2:
        return rows
    chosen = st.pagination(pages, key="photo_page", bind="query-params", persist_state="session")
    return rows[(chosen - 1) * _PER_PAGE : chosen * _PER_PAGE]


# --- one photo ----------------------------------------------------------------------------------

Looks = dict[tuple[str, str], Look]  # by the photo's key and the network's name


def _looks(desk: Desk, rows: Sequence[Row], networks: Sequence[Ready], label: str) -> Looks:
    """Where each network looked in each photo, for the class `label` or for what it answered."""
    looks: Looks = {}
    place = st.empty()
    try:
        for number, row in enumerate(rows):
            place.progress(number / len(rows), f"Grad-CAM: {number} of {len(rows)} photos done")
            for each in networks:
                answer = row.predictions.get(each.name)
                look = answer and desk.look(row.upload, each, label or answer.label)
                if look:
                    looks[row.upload.key, each.name] = look
    except GradCamError as error:
        st.text(str(error))
    place.empty()
    if looks:
        _explain_heat()
    return looks


def _explain_heat() -> None:
    colours = ", ".join(RAMP)
    st.html(
        '<div class="thaw-small">Grad-CAM: the parts of the photo that spoke for the class, least'
        f'<span class="thaw-ramp" style="background:linear-gradient(90deg, {colours})"></span>'
        "most, in the photo as the network sees it. It is coarse, each picture has a scale of its "
        "own, and it shows neither why nor what spoke against the class.</div>"
    )


def _photo(row: Row, networks: Sequence[Ready], looks: Looks) -> None:
    with st.container(border=True):
        picture, *columns = st.columns([1.1, *[2] * len(networks)], gap="medium")
        with picture:
            st.image(row.picture, width=220, alt=f"The photo {row.upload.name}")
            st.html(f'<div class="thaw-says">{escape(row.upload.name)}</div>')
            parts.mark(row.agreement)
        for column, each in zip(columns, networks, strict=True):
            with column:
                _answer(row, each)
                if look := looks.get((row.upload.key, each.name)):
                    _look(each, look)


def _answer(row: Row, each: Ready) -> None:
    answer = row.answers[each.name]
    title = f"{each.title}, {each.network.engine}"
    if isinstance(answer, str):
        st.html(f'<div class="thaw-small">{escape(title)}: {escape(answer)}</div>')
        return
    parts.prediction(title, answer)
    if each.name == "onnx" and (gap := difference(row)) is not None:
        st.html(f'<div class="thaw-small">{escape(_gap(gap))}</div>')


def _gap(difference: float) -> str:
    return f"probabilities within {small(difference)} of PyTorch's"


def _look(each: Ready, look: Look) -> None:
    where = f"strongest in the {look.strongest}" if look.strongest else "nothing spoke for it"
    said = f"{look.label}: {where}"
    st.image(look.jpeg, width=220, alt=f"Grad-CAM, {each.title}. {said}")
    st.html(f'<div class="thaw-small thaw-says">{escape(said)}</div>')

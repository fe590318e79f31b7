"""The export page: one run's model, how equal it is to what was measured, and the way to get it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Final, Literal

import pandas as pd
import streamlit as st

from explorer.data import Snapshot
from explorer.exporting import ExportingError, Job, Jobs, Report, command, runnable
from explorer.pages import parts
from explorer.shipped import (
    Figures,
    Shipped,
    Verdict,
    checkpoint_or_reason,
    exported_table,
    meaning,
    measured_as,
    model_path,
    parity_path,
    shipped,
    small,
    snippet,
)
from export.metadata import ModelFileError, ModelMetadata, Which
from trainer.runlog import Run

_CHECKPOINTS: Final[dict[str, Which]] = {
    "After unfreezing": "after",
    "Before unfreezing": "before",
}
_BADGES: Final[Mapping[Verdict, tuple[str, str, Literal["green", "orange", "red"]]]] = {
    "proven": ("Proven equal", ":material/verified:", "green"),
    "outdated": ("Equal, but out of date", ":material/history:", "orange"),
    "unproven": ("Not proven", ":material/help:", "red"),
}
_FACTS_STYLE: Final = """<style>
dl.thaw-facts {display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 2fr);
  gap: .3rem 1rem; padding: 0; font-size: .875rem}
.thaw-facts dt {opacity: .75}
.thaw-facts dd {margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums}
</style>"""


@st.cache_resource(show_spinner=False)
def _jobs() -> Jobs:
    """All exports that this app has started, whoever asked for them."""
    return Jobs()


def page() -> None:
    snapshot = parts.opened("Is the model you ship the one you measured?")
    if snapshot is None:
        return
    run, which = _choose(snapshot)
    model = _model(run, which)
    _export(run, which, model)
    _all(snapshot)
    parts.problems(snapshot)


def _choose(snapshot: Snapshot) -> tuple[Run, Which]:
    left, right = st.columns([3, 2])
    with left:
        run = parts.choose_run(
            snapshot, lambda run: isinstance(checkpoint_or_reason(run, "after"), Path)
        )
    if run.boundary is None:
        return run, "after"
    with right:
        chosen = parts.one_of("Checkpoint", list(_CHECKPOINTS), key="checkpoint")
    return run, _CHECKPOINTS[chosen]


# --- the model that there is ------------------------------------------------------------------


def _model(run: Run, which: Which) -> Shipped | None:
    """Show what was exported of this checkpoint, if anything was."""
    try:
        model = shipped(run, which)
    except ModelFileError as error:
        st.error("The model cannot be checked.", icon=":material/error:")
        st.text(str(error))
        return None
    if model is None:
        st.badge("Not exported yet", icon=":material/radio_button_unchecked:", color="gray")
        return None
    _verdict(run, model)
    _downloads(run, which, model)
    _details(model)
    st.subheader("Export it again", anchor=False)
    return model


def _verdict(run: Run, model: Shipped) -> None:
    text, icon, color = _BADGES[model.verdict]
    st.badge(text, icon=icon, color=color)
    for doubt in model.doubts:
        st.text(doubt)
    if model.doubts:
        st.text("Export it again to know.")
    elif model.figures and model.about:
        st.text(f"{meaning(model, model.figures)} {measured_as(run, model.about)}".rstrip())
        _figures(model.figures)
    if not model.doubts and model.checkpoint == "changed":
        st.text("The checkpoint has changed since. Export it again to ship what the run holds now.")


def _figures(figures: Figures) -> None:
    allowed = f"allowed {small(figures.tolerance)}"
    values = {
        "Largest |Δlogit|": (small(figures.max_abs_logit_difference), allowed),
        "Between batch sizes": (small(figures.max_abs_batch_difference), allowed),
        "Same class": (f"{figures.top1_agreement:.0%}", "top-1 agreement"),
        "Photos compared": (f"{figures.photos:,}", f"{figures.photos_missing:,} missing"),
    }
    with st.container(horizontal=True, gap="medium"):
        for label, (value, below) in values.items():
            st.metric(label, value, below, delta_color="off", delta_arrow="off", width=150)


def _downloads(run: Run, which: Which, model: Shipped) -> None:
    parity = parity_path(run, which)
    with st.container(horizontal=True):
        _download(model.path, f"Model, {model.size / 1e6:.1f} MB", f"{run.run_id}.onnx")
        if parity.is_file():
            _download(parity, "Figures, JSON", f"{run.run_id}-{parity.name}")
    st.caption("In a terminal, without PyTorch")
    typed = ["python", "-m", "export.infer", str(model.path), "PHOTOS"]
    st.code(shlex.join(typed), language="bash", wrap_lines=True)
    st.caption("In Python")
    st.code(snippet(model.path), language="python", wrap_lines=True)


def _download(path: Path, label: str, name: str) -> None:
    """The file is read when it is asked for, not at every look at the page."""
    st.download_button(
        label,
        path.read_bytes,
        file_name=name,
        mime="application/octet-stream",
        key=f"download-{path.name}",
        on_click="ignore",
        icon=":material/download:",
    )


def _details(model: Shipped) -> None:
    with st.expander("What was measured, and what the file says of itself"):
        facts = {"File": str(model.path), "Written": _time(model.written)}
        facts |= {"SHA-256": model.sha256}
        if model.figures:
            facts |= _measured(model.figures)
        if model.about:
            facts |= _inside(model.about)
        st.html(_FACTS_STYLE + _list(facts))
        if model.about:
            st.caption("Classes, in the order of the outputs")
            classes = pd.DataFrame({"Class": model.about.classes})
            st.dataframe(classes, height="content" if len(classes) < 8 else 280)


def _measured(figures: Figures) -> dict[str, str]:
    return {
        "Computed by": figures.provider,
        "Largest difference of a probability": small(figures.max_abs_probability_difference),
        "Largest logit": f"{figures.max_abs_logit:.3g}",
        "Ties that count as the same class": f"{figures.ties:,}",
        "Versions": _versions(figures.versions),
    }


def _inside(about: ModelMetadata) -> dict[str, str]:
    side, seen = about.preprocess.resize, about.preprocess.crop
    return {
        "Network": about.arch,
        "Checkpoint": f"{about.phase}, epoch {about.epoch}, {about.checkpoint} unfreezing",
        "SHA-256 of the checkpoint": about.checkpoint_sha256,
        "Preprocessing": f"shorter side to {side} pixels ({about.preprocess.interpolation}), centre"
        f" {seen} x {seen}; the mean and deviation of the colours are inside the graph",
    }


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _list(facts: Mapping[str, str]) -> str:
    items = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f'<dl class="thaw-facts">{"".join(items)}</dl>'


def _time(seconds: float) -> str:
    return pd.Timestamp(seconds, unit="s", tz="UTC").strftime("%Y-%m-%d %H:%M UTC")


# --- a new one --------------------------------------------------------------------------------


def _export(run: Run, which: Which, model: Shipped | None) -> None:
    source = checkpoint_or_reason(run, which)
    if isinstance(source, str):
        st.text(source)
        return
    if run.status == "running":
        st.text("This run is still training: what is exported is its best epoch so far.")
    data, problem = _moved(run)
    typed = command(run, which, data, parts.runs_dir())
    path = model_path(run, which)
    job = _jobs().of(path)
    running = job is not None and job.report().state == "running"
    st.code(shlex.join(typed), language="bash", wrap_lines=True)
    if problem:
        st.text(problem)
    if not running:
        _button(path, typed, model, disabled=bool(problem))
    if job is None:
        st.caption("A minute or so. The file is written only if it gives what PyTorch gives.")
    else:
        st.fragment(_watch, run_every=1.0 if running else None)(job, running)


def _moved(run: Run) -> tuple[Path | None, str]:
    """Where the photos are now, if a user says so, and what is wrong with that."""
    recorded = str(run.info.get("dataset", {}).get("root") or "")
    gone = bool(recorded) and not Path(recorded).is_dir()
    named = st.session_state.get("data") or st.query_params.get("data")
    with st.expander("The photos have moved", expanded=gone or bool(named)):
        st.text(f"The comparison needs the validation photos. They were in {recorded or '?'}.")
        text = st.text_input(
            "Folder where they are now",
            key="data",
            bind="query-params",
            persist_state="session",
        )
    if not text:
        return None, ""
    try:
        folder = Path(text).expanduser().absolute()
        return folder, "" if folder.is_dir() else f"There is no folder {folder}."
    except (RuntimeError, ValueError, OSError):  # no such user, a null character, too long
        return None, f"There is no folder {text}."


def _button(path: Path, typed: list[str], model: Shipped | None, disabled: bool) -> None:
    label = "Export again" if model else "Export"
    settled = model is not None and model.verdict == "proven"
    if not st.button(label, type="secondary" if settled else "primary", disabled=disabled):
        return
    try:
        _jobs().start(path, runnable(typed))
    except ExportingError as error:
        st.error("The export did not start.", icon=":material/error:")
        st.text(str(error))
    else:
        st.rerun()


def _watch(job: Job, was_running: bool) -> None:
    report = job.report()
    if was_running and report.state != "running":
        st.rerun()  # the model belongs to the whole page
    if report.state == "running":
        _progress(job, report)
    elif report.state == "done":
        st.caption(f"The export took {report.seconds:.0f} s.")
    elif report.state == "cancelled":
        st.info("The export was cancelled. An earlier model is as it was.")
    else:
        st.error("The export failed.", icon=":material/error:")
        st.code(report.message, language=None, wrap_lines=True)
        if report.remedy:
            st.caption(report.remedy)


def _progress(job: Job, report: Report) -> None:
    seconds = f"{report.seconds:.0f} s"
    if report.compared is None:
        st.progress(0.0, text=f"Making the ONNX file, {seconds}")
    else:
        done, total = report.compared
        text = f"Comparing with PyTorch: {done:,} of {total:,} photos, {seconds}"
        st.progress(done / max(total, 1), text=text)
    st.button("Cancel", on_click=job.cancel)


def _all(snapshot: Snapshot) -> None:
    table = exported_table(snapshot)
    if len(table) < 2:
        return
    with st.expander(f"Exported so far: {len(table)} models"):
        st.dataframe(
            table,
            hide_index=True,
            placeholder="",
            column_config={
                "Run": st.column_config.TextColumn(pinned=True),
                "Same class": st.column_config.NumberColumn(format="%.0f%%"),
                "Largest |Δlogit|": st.column_config.NumberColumn(format="%.1e"),
                "Size": st.column_config.NumberColumn(format="%.1f MB"),
                "Written": st.column_config.DatetimeColumn(format="localized"),
            },
        )
        st.caption("As their parity.json says. Choose a run above to have its file checked.")

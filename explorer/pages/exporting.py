"""The export page: one run's model, how equal it is to what was measured, and the way to get it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final, Literal

import pandas as pd
import streamlit as st

from explorer.data import Snapshot
from explorer.exported import exported_table
from explorer.exporting import ExportingError, Job, Jobs, Report, Step, command, runnable
from explorer.figures import Figures
from explorer.mirror import brought, url_of
from explorer.pages import parts
from explorer.shipped import (
    PROVEN,
    PURPOSES,
    Card,
    Shipped,
    Verdict,
    checkpoint_or_reason,
    kept,
    key_figures,
    meaning,
    measured_as,
    model_path,
    parity_path,
    share,
    shipped,
    small,
    snippet,
)
from export.card import card_path
from export.metadata import ModelFileError, ModelMetadata, Which
from export.precision import LARGEST_LOSS, PRECISIONS, Precision
from trainer.runlog import Run

_CHECKPOINTS: Final[dict[str, Which]] = {
    "After unfreezing": "after",
    "Before unfreezing": "before",
}
_BADGES: Final[Mapping[Verdict, tuple[str, Literal["green", "orange", "red"]]]] = {
    "proven": (":material/verified:", "green"),
    "outdated": (":material/history:", "orange"),
    "unproven": (":material/help:", "red"),
}
# Words of these two hold for every precision; what was proven differs.
_VERDICTS: Final[Mapping[Verdict, str]] = {
    "outdated": "Proven, but out of date",
    "unproven": "Not proven",
}
_CARDS: Final[Mapping[Card, str]] = {
    "missing": "There is no model card beside this model. Export it again to get one.",
    "other": "The model card beside this model is about another file. Export it again to get its "
    "own.",
}
_EXPECT: Final[Mapping[Precision, str]] = {
    "fp32": "A minute or so. The file is written only if it gives what PyTorch gives.",
    "fp16": "A minute or so. The file is written only if it gives nearly what PyTorch gives.",
    "int8": "A few minutes. The file is written only if it costs at most "
    f"{100 * LARGEST_LOSS:.0f} point of accuracy.",
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


@dataclass(frozen=True)
class _Chosen:
    """Which model the page is about."""

    run: Run
    which: Which
    precision: Precision

    @property
    def model(self) -> Path:
        return model_path(self.run, self.which, self.precision)

    @property
    def parity(self) -> Path:
        return parity_path(self.run, self.which, self.precision)


def page() -> None:
    snapshot = parts.opened("Is the model you ship the one you measured?")
    if snapshot is None:
        return
    chosen = _choose(snapshot)
    model = _model(chosen)
    _export(chosen, model)
    _all(snapshot)
    parts.problems(snapshot)


def _choose(snapshot: Snapshot) -> _Chosen:
    left, right = st.columns([3, 2])
    with left:
        run = parts.choose_run(
            snapshot, lambda run: isinstance(checkpoint_or_reason(run, "after"), Path)
        )
    which: Which = "after"
    if run.boundary is not None:
        with right:
            which = _CHECKPOINTS[parts.one_of("Checkpoint", list(_CHECKPOINTS), key="checkpoint")]
    return _Chosen(run, which, _precision())


def _precision() -> Precision:
    """Unlike other choices among few, each says what it is for before it is made."""
    precision: Precision | None = st.radio(
        "Precision",
        PRECISIONS,
        key="precision",
        horizontal=True,
        captions=[PURPOSES[each] for each in PRECISIONS],
        bind="query-params",
        persist_state="session",
    )
    return precision or PRECISIONS[0]


# --- the model that there is ------------------------------------------------------------------


def _model(chosen: _Chosen) -> Shipped | None:
    """Show what was exported of this checkpoint in this precision, if anything was."""
    try:
        with st.spinner("Checking the model"):
            model = shipped(chosen.run, chosen.which, chosen.precision)
    except ModelFileError as error:
        st.error("The model cannot be checked.", icon=":material/error:")
        st.text(str(error))
        return None
    if model is None:
        _absent(chosen)
        return None
    _verdict(chosen.run, model)
    _downloads(chosen, model)
    _details(model)
    st.subheader("Export it again", anchor=False)
    return model


def _absent(chosen: _Chosen) -> None:
    job = _jobs().of(chosen.model)
    if job is not None and job.report().state == "refused":
        st.badge("Refused", icon=":material/block:", color="orange")
    else:
        st.badge("Not exported yet", icon=":material/radio_button_unchecked:", color="gray")


def _verdict(run: Run, model: Shipped) -> None:
    icon, color = _BADGES[model.verdict]
    st.badge(_VERDICTS.get(model.verdict, PROVEN[model.precision]), icon=icon, color=color)
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
    with st.container(horizontal=True, gap="medium"):
        for label, (value, below) in key_figures(figures.parity).items():
            st.metric(label, value, below, delta_color="off", delta_arrow="off", width=150)
    if stays := kept(figures):
        st.text(stays)


def _downloads(chosen: _Chosen, model: Shipped) -> None:
    run, card = chosen.run, card_path(model.path)
    with st.container(horizontal=True):
        _download(model.path, f"Model, {model.size / 1e6:.1f} MB", run)
        if model.card == "there":
            _download(card, "Model card, Markdown", run)
        if chosen.parity.is_file():
            _download(chosen.parity, "Figures, JSON", run)
    if model.card in _CARDS:
        st.text(_CARDS[model.card])
    st.caption("In a terminal, without PyTorch")
    # What was fetched from elsewhere goes again: then the one that is downloaded.
    path = Path(_file_name(model.path, run)) if url_of(model.path) else model.path
    typed = ["python", "-m", "export.infer", str(path), "PHOTOS"]
    st.code(shlex.join(typed), language="bash", wrap_lines=True)
    st.caption("In Python")
    st.code(snippet(path), language="python", wrap_lines=True)


def _file_name(path: Path, run: Run) -> str:
    return f"{run.run_id}-{path.name}"


def _download(path: Path, label: str, run: Run) -> None:
    """The file is read when it is asked for, not at every look at the page."""
    st.download_button(
        label,
        lambda: brought(path).read_bytes(),
        file_name=_file_name(path, run),
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
            _listed("Classes, in the order of the outputs", "Class", model.about.classes)
        if model.figures and model.figures.kept_layers:
            _listed("Layers in float32", "Layer", model.figures.kept_layers)


def _listed(caption: str, title: str, names: tuple[str, ...]) -> None:
    st.caption(caption)
    table = pd.DataFrame({title: names})
    st.dataframe(table, height="content" if len(table) < 8 else 280)


def _measured(figures: Figures) -> dict[str, str]:
    parity = figures.parity
    return {
        "Computed by": parity.provider,
        "Largest difference of a logit": small(parity.max_abs_logit_difference),
        "Largest difference of a probability": small(parity.max_abs_probability_difference),
        "Largest difference between batch sizes": small(parity.max_abs_batch_difference),
        "Largest logit": f"{parity.max_abs_logit:.3g}",
        "Right of the photos compared": f"{share(parity.accuracy)}, "
        f"PyTorch {share(parity.accuracy_pytorch)}",
        "Ties that count as the same class": f"{parity.ties:,}",
        "Versions": _versions(figures.versions),
    }


def _inside(about: ModelMetadata) -> dict[str, str]:
    side, seen = about.preprocess.resize, about.preprocess.crop
    return {
        "Network": f"{about.arch}, in {about.precision}",
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


def _export(chosen: _Chosen, model: Shipped | None) -> None:
    source = checkpoint_or_reason(chosen.run, chosen.which)
    if isinstance(source, str):
        st.text(source)
        return
    if chosen.run.status == "running":
        st.text("This run is still training: what is exported is its best epoch so far.")
    read_only = parts.is_read_only("No export can be started here.")
    data, problem = (None, "") if read_only else _moved(chosen)
    typed = command(chosen.run, chosen.which, data, parts.typed_dir(), chosen.precision)
    job = _jobs().of(chosen.model)
    running = job is not None and job.report().state == "running"
    if read_only:
        st.caption("In a terminal, where you may write to the runs folder")
    st.code(shlex.join(typed), language="bash", wrap_lines=True)
    if problem:
        st.text(problem)
    if not (running or read_only):
        _button(chosen.model, typed, model, disabled=bool(problem))
    if job is None:
        st.caption(_EXPECT[chosen.precision])
    else:
        st.fragment(_watch, run_every=1.0 if running else None)(job, running)


def _moved(chosen: _Chosen) -> tuple[Path | None, str]:
    """Where the photos are now, if a user says so, and what is wrong with that."""
    recorded = str(chosen.run.info.get("dataset", {}).get("root") or "")
    gone = bool(recorded) and not Path(recorded).is_dir()
    named = st.session_state.get("data") or st.query_params.get("data")
    with st.expander("The photos have moved", expanded=gone or bool(named)):
        both = "training and validation" if chosen.precision == "int8" else "validation"
        st.text(f"The export needs the {both} photos. They were in {recorded or '?'}.")
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
    elif report.state == "refused":
        st.info("The model was refused and not written.")
        st.text(report.message)
    else:
        st.error("The export failed.", icon=":material/error:")
        st.code(report.message, language=None, wrap_lines=True)
    if report.remedy:
        st.caption(report.remedy)


def _progress(job: Job, report: Report) -> None:
    step = report.step or Step("Making the ONNX file", 0.0)
    st.progress(step.done, text=f"{step.text}, {report.seconds:.0f} s")
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
                "Same class": st.column_config.NumberColumn(format="%.2f%%"),
                "Accuracy": st.column_config.NumberColumn(format="%.2f%%"),
                "Against PyTorch": st.column_config.NumberColumn(format="%+.2f points"),
                "Largest |Δlogit|": st.column_config.NumberColumn(format="%.1e"),
                "Size": st.column_config.NumberColumn(format="%.1f MB"),
                "Written": st.column_config.DatetimeColumn(format="localized"),
            },
        )
        st.caption("As their parity.json says. Choose a run above to have its file checked.")

"""What the pages share: the runs, what to say without any, and pieces of HTML.

Names of runs, classes and files are whatever a user typed. They reach the page only through
`html.escape`, `st.text`, `st.code`, a table or a chart, never as Markdown.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Final, Literal, NoReturn

import streamlit as st
from altair.typing import ChartType

from explorer import access
from explorer.classify import Prediction
from explorer.compare import Summary, verdict
from explorer.data import Library, Snapshot, runs_dir_from
from explorer.mirror import Mirror
from explorer.remote import is_url, runs_place
from explorer.render import to_svg
from trainer.runlog import Run

PageName = Literal[
    "compare", "runs", "sweep", "results", "changed", "classify", "exporting", "importing"
]

_ASKED: Final = "asked"  # what another page wants chosen here
_UNFIT: Final = re.compile(r"[^\w.-]+")  # for the name of a file
_WHILE_RUNNING: Final = 2.0
_WHILE_IDLE: Final = 15.0  # only to notice a run that has just been started
_FIRST_RUNS: Final = 10.0  # how long a page waits for runs that are elsewhere
_ELSEWHERE: Final = 5.0
_STYLE: Final = """<style>
.stMainBlockContainer {padding-top: 4.5rem; padding-bottom: 3rem}
.stElementContainer[data-stale="true"] {opacity: 1 !important}  /* no dimming while refreshing */
.thaw-verdicts {display: grid; gap: .4rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr))}
.thaw-verdict {display: flex; gap: .6rem; align-items: baseline}
.thaw-swatch {flex: none; width: .75rem; height: .75rem; border-radius: 50%;
  position: relative; top: .05rem}
.thaw-name {font-weight: 600; margin-right: .6rem}
.thaw-small {font-size: .875rem; opacity: .68; margin-bottom: .2rem}
.thaw-headline {font-size: 1.2rem; font-weight: 600; margin-bottom: .2rem; overflow-wrap: anywhere}
.thaw-says {overflow-wrap: anywhere}
.thaw-label {font-size: 1.35rem; font-weight: 600; line-height: 1.25; overflow-wrap: anywhere}
.thaw-bar {display: grid; grid-template-columns: minmax(0, 9rem) minmax(0, 1fr) 3.6rem;
  gap: .6rem; align-items: center; font-size: .875rem; margin: .3rem 0}
.thaw-bar > :first-child {overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
.thaw-bar > :last-child {text-align: right; font-variant-numeric: tabular-nums}
.thaw-track {height: .6rem; border-radius: .3rem; background: rgba(124, 135, 146, .2)}
.thaw-fill {height: 100%; border-radius: .3rem; background: #7c8792; min-width: 2px}
.thaw-bar.first .thaw-fill {background: #0a84c6}
.thaw-mark {display: inline-block; font-size: .875rem; font-weight: 600; padding: .1rem .6rem;
  border-radius: 1rem; border: 1px solid currentColor}
.thaw-mark.same {color: #12966f}
.thaw-mark.differ {color: #d9622b}
</style>"""


def runs_dir() -> Path:
    return runs_dir_from(sys.argv[1:], os.environ)


def typed_dir() -> Path:
    """The runs folder that a command to type can use: of runs elsewhere, where a copy would be."""
    return Path("runs") if is_url(runs_place(sys.argv[1:], os.environ)) else runs_dir()


@st.cache_resource(show_spinner=False, max_entries=4)
def _library(place: str, path: str) -> Library:
    return Library.at(place)


def library() -> Library:
    """The one library of this runs folder, shared by all sessions."""
    return _library(runs_place(sys.argv[1:], os.environ), str(runs_dir()))


def style() -> None:
    """Put the page's own few rules of CSS in place; once per page."""
    st.html(_STYLE)


def opened(title: str) -> Snapshot | None:
    """Begin a page: its style and title, and the runs; without any, says what to type."""
    style()
    st.header(title, anchor=False)
    snapshot = current()
    if snapshot.runs:
        return snapshot
    mirror = library().mirror
    if mirror is None:
        no_runs(library().runs_dir)
    else:
        _no_runs_elsewhere(mirror)
    problems(snapshot)
    return None


def current() -> Snapshot:
    """The runs as they are now; of those elsewhere the page says where that is and how old."""
    mirror = library().mirror
    if mirror is None:
        return library().snapshot()
    with st.spinner("Fetching the runs"):
        mirror.refresh(_FIRST_RUNS)
    snapshot = library().snapshot()
    st.fragment(_elsewhere, run_every=_ELSEWHERE)(mirror, bool(snapshot.runs))
    return snapshot


def _elsewhere(mirror: Mirror, any_runs: bool) -> None:
    """Of runs elsewhere, where that is, how old what is shown is, and why it is not newer."""
    now = mirror.standing
    if now.problem:
        st.error("The runs cannot be read where they are.", icon=":material/cloud_off:")
        st.text(now.problem)
    if now.fetched is not None:
        when = f"as of {_ago(time.time() - now.fetched)}"
    else:
        when = "being fetched" if any_runs else "nothing fetched yet"
    coming = f" Still to come: {now.left:,} files." if now.left else ""
    said = f"Runs at {now.url}, {when}. Only read here.{coming}"
    st.html(f'<div class="thaw-small thaw-says">{escape(said)}</div>')
    if not any_runs:
        mirror.refresh()
        if library().snapshot().runs:
            st.rerun()


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def _no_runs_elsewhere(mirror: Mirror) -> None:
    """What to do where nothing was fetched."""
    now = mirror.standing
    if not now.problem and now.fetched is None:
        st.info("The runs are being fetched.")
    elif not now.problem:
        st.subheader("No runs yet")
        st.text(f"There is nothing to show at {now.url}. Train, then copy the runs there:")
        st.code("python -m trainer --phase finetune --data PATH/TO/PHOTOS", language="bash")
        st.code(_copying(now.url), language="bash", wrap_lines=True)
    st.button("Look again")


def _copying(url: str) -> str:
    if url.startswith("s3://"):
        return f"aws s3 sync runs {shlex.quote(url)}"
    return f"rclone sync runs REMOTE:PATH  # what {url} is to rclone"


def live(shown: Snapshot, draw: Callable[..., None], *arguments: object) -> None:
    """Call `draw(snapshot, *arguments)` with the newest snapshot, now and again from time to time,
    while the rest of the page stays as it is."""
    every = _WHILE_RUNNING if shown.running else _WHILE_IDLE
    st.fragment(_redraw, run_every=every)(library(), shown, draw, arguments)


def _redraw(
    library: Library, shown: Snapshot, draw: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    snapshot = library.snapshot()
    if snapshot.runs.keys() != shown.runs.keys() or snapshot.running != shown.running:
        st.rerun()  # the list of runs and the pace of this fragment belong to the whole page
    draw(snapshot, *arguments)


def said_where() -> str:
    """What to add to a command so that it uses this runs folder; empty where it does anyway."""
    folder = typed_dir()
    return "" if folder == Path("runs") else f" --runs-dir {shlex.quote(str(folder))}"


def no_runs(folder: Path) -> None:
    """What to type where there is nothing to show yet."""
    where = said_where()
    st.subheader("No runs yet")
    st.text(f"There is nothing to show in the folder {folder}. Train first:")
    st.caption("On your own photographs, one folder per class")
    st.code(f"python -m trainer --phase finetune --data PATH/TO/PHOTOS{where}", language="bash")
    st.caption("Or on the sample that comes with Thaw, without any data of your own")
    st.code(f"python -m trainer --phase finetune{where}", language="bash")
    st.caption("Both train the head first, then unfreeze. Afterwards, look again.")
    st.button("Look again")


def is_read_only(consequence: str) -> bool:
    """Whether nothing may be changed; if so, says what that means here, and why it is so."""
    reason = access.read_only_because()
    if reason:
        st.html(f'<div class="thaw-small">{escape(f"{consequence} {reason}")}</div>')
    return bool(reason)


def problems(snapshot: Snapshot) -> None:
    """List runs that could not be read, wholly or in part."""
    partial = {name: run.problem for name, run in snapshot.runs.items() if run.problem}
    found = dict(snapshot.broken) | partial
    if not found:
        return
    count = "One run has" if len(found) == 1 else f"{len(found)} runs have"
    with st.expander(f"{count} a problem"):
        st.dataframe({"Run": list(found), "Problem": list(found.values())}, hide_index=True)


def remembered(key: str, options: Sequence[str], default: Sequence[str]) -> tuple[list[str], int]:
    """The selection to start a widget with: what another page asked for, else this session's, else
    the link's, else `default`.

    Also returns how many of the link's entries are not there (any more). Streamlit's own binding to
    the URL would write the labels, which change when another run gets the same name, and would
    leave a default selection out, so that a link showed something else the day after.
    """
    known = _wanted(key)
    wanted = list(default) if known is None else known
    # Once: from then on the choice is the widget's own.
    st.session_state.get(_ASKED, {}).pop(key, None)
    present = [name for name in wanted if name in options]
    return present, len(wanted) - len(present)


def go(page: PageName, **state: str | list[str]) -> NoReturn:
    """Open another page with these choices made there, such as run="20260101-120000-name"."""
    st.session_state[_ASKED] = state
    # Named, or Streamlit would have to clear a link in which widgets keep their values, and fails.
    st.switch_page(st.Page(opener(page), url_path=page), query_params=state)


def opener(page: PageName) -> Callable[[], None]:
    """The page, imported when it is first opened: the start does not wait for all of them, and
    pages can lead to each other."""

    def open_page() -> None:
        import_module(f"explorer.pages.{page}").page()

    return open_page


def one_of(label: str, options: Sequence[str], key: str, help: str | None = None) -> str:
    """A choice among few; kept in the link, where it is not the first."""
    choice = st.segmented_control(
        label,
        options,
        default=options[0],
        required=True,
        key=key,
        bind="query-params",
        persist_state="session",
        help=help,
    )
    return choice or options[0]


def choose_runs(snapshot: Snapshot, default: Sequence[str]) -> list[str]:
    """A choice of several runs, the same on every page that asks for it; kept in the link."""
    options = _offered(snapshot, "runs")
    start, lost = remembered("runs", options, default)
    st.session_state["runs"] = start
    selected = st.multiselect(
        "Runs",
        options,
        key="runs",
        format_func=lambda name: snapshot.labels[name],
        placeholder="Choose runs to lay over each other",
        persist_state="session",
    )
    st.query_params["runs"] = selected
    if lost:
        st.caption("Not every run of this link or selection is in the runs folder any more.")
    return selected


def choose_run(snapshot: Snapshot, suitable: Callable[[Run], bool]) -> Run:
    """A choice of one run, the same on every page that asks for it; kept in the link.

    Starts with the newest suitable one; all others can be chosen too.
    """
    options = _offered(snapshot, "run")
    fitting = [name for name in options if suitable(snapshot.runs[name])]
    start, lost = remembered("run", options, (fitting or options)[:1])
    st.session_state["run"] = (start or fitting or options)[0]
    name = st.selectbox(
        "Run",
        options,
        key="run",
        format_func=lambda name: snapshot.labels[name],
        persist_state="session",
    )
    st.query_params["run"] = name
    if lost:
        st.caption("The run of this link is not in the runs folder any more.")
    return snapshot.runs[name]


def _offered(snapshot: Snapshot, key: str) -> list[str]:
    """Archived runs are offered only where a link or another page names them."""
    offered = {*(snapshot.current or snapshot.newest_first), *(_wanted(key) or ())}
    return [name for name in snapshot.newest_first if name in offered]


def _wanted(key: str) -> list[str] | None:
    """What is to be chosen, also if it is nothing; None where nobody says."""
    linked = st.query_params.get_all(key) or None
    asked = st.session_state.get(_ASKED, {})
    wanted = asked.get(key, st.session_state.get(key, linked))
    return [wanted] if isinstance(wanted, str) else wanted


def chart(drawn: ChartType, key: str, alt_text: str) -> None:
    """Show a chart, described for who cannot see it, with its SVG to download."""
    st.altair_chart(drawn, key=key, alt=alt_text)
    svg_of(drawn, key)


def svg_of(drawn: ChartType, key: str) -> None:
    """A small button that downloads a chart as SVG; it is drawn only then."""
    st.download_button(
        "SVG",
        lambda: to_svg(drawn).encode(),
        file_name=f"thaw-{_UNFIT.sub('-', key)}.svg",
        mime="image/svg+xml",
        key=f"svg-{key}",
        type="tertiary",
        on_click="ignore",
        icon=":material/download:",
        help="This chart as a vector graphic",
    )


def headline(text: str, warning: str) -> None:
    """What all runs together say, in a line of its own, with a warning where one belongs to it."""
    lines = [("thaw-headline", text), ("thaw-small", warning)]
    said = "".join(f'<div class="{kind}">{escape(line)}</div>' for kind, line in lines if line)
    if said:
        st.html(said)


def verdicts(
    rows: Sequence[Summary], colours: Mapping[str, str], notes: Mapping[str, Sequence[str]]
) -> None:
    """For each run its colour, its name, what unfreezing did, and what else there is to say of it;
    colours and notes are by run id."""
    items = "".join(
        _verdict(row, colours.get(row.run_id, "currentColor"), notes.get(row.run_id, ()))
        for row in rows
    )
    st.html(f'<div class="thaw-verdicts" role="list">{items}</div>')


def _verdict(row: Summary, colour: str, notes: Sequence[str]) -> str:
    lines = "".join(f'<div class="thaw-small">{escape(line)}</div>' for line in notes)
    return (
        '<div class="thaw-verdict" role="listitem">'
        f'<span class="thaw-swatch" style="background:{colour}"></span>'
        f'<span class="thaw-says"><span class="thaw-name">{escape(row.label)}</span>'
        f"{escape(verdict(row) or _stayed(row))}{lines}</span></div>"
    )


def _stayed(row: Summary) -> str:
    """What there is to say of a run that was never unfrozen."""
    if row.best_acc is None:
        known = "no validation accuracy" if row.status == "done" else "no evaluation yet"
        return f"{row.phase or 'not started'}: {known}."
    return f"{row.phase}: best accuracy {row.best_acc:.1%} at epoch {row.best_epoch}."


def prediction(title: str, result: Prediction) -> None:
    """One network's answer in clear text, with its top classes as bars and the time it took."""
    bars = "".join(
        f'<div class="thaw-bar{" first" if place == 0 else ""}">'
        f'<span title="{escape(guess.label)}">{escape(guess.label)}</span>'
        f'<div class="thaw-track"><div class="thaw-fill" style="width:{guess.probability:.1%}">'
        f"</div></div><span>{guess.probability:.1%}</span></div>"
        for place, guess in enumerate(result.guesses)
    )
    timing = f"{1000 * result.seconds:.0f} ms"
    st.html(
        f'<div class="thaw-small">{escape(title)}</div>'
        f'<div class="thaw-label" data-testid="answer">{escape(result.label)}</div>{bars}'
        f'<div class="thaw-small">{timing}</div>'
    )


def mark(text: str) -> None:
    """Whether the networks agree, as a small badge."""
    if text:
        kind = "same" if text.startswith("same") else "differ"
        st.html(f'<span class="thaw-mark {kind}">{escape(text)}</span>')

"""What a report says of some runs, section by section, from the numbers and charts of the pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TypeVar

import altair as alt
import pandas as pd

from explorer.calibration import calibration_lines, few_photos
from explorer.changed import (
    Change,
    Names,
    change_between,
    class_headline,
    class_table,
    confused_pairs,
    confusion,
    ordered,
    per_class,
)
from explorer.changed import headline as change_headline
from explorer.changed_charts import confidence_counts, dumbbell, matrix, reliability_chart
from explorer.charts import overlay, run_colours
from explorer.compare import Summary, group_table, resolution, summaries, table, verdict
from explorer.conclusions import flags, gained_most, headline, warning
from explorer.curves import (
    PHOTOS,
    RUN,
    SPLITS,
    Axis,
    Look,
    Metric,
    Panel,
    Split,
    panel,
    seed_means,
)
from explorer.data import Snapshot, epochs_frame, lineage
from explorer.evidence import Findings, adjusted, evidence_lines, findings
from explorer.report_html import FULL, HALF, Figure, Line, Report, Section, Table
from explorer.report_origin import commands_of, environment_of, problems_of, settings_of
from explorer.settings import SETTINGS, settings, varied, with_settings, without_seed
from explorer.sweep import measure, section
from explorer.sweep_charts import heatmap, schedule_curves, schedule_dots
from explorer.sweep_members import SEED, members
from explorer.sweep_members import varied as varied_in_sweep
from trainer.evidence import Evidence, EvidenceError
from trainer.runlog import Run
from trainer.schema import ThawError

_FEW: Final = 6  # runs; of more, the commands come last and only validation is drawn
_MOST_COLOURS: Final = 10  # lines; of more, colours stand for a setting
_GRID: Final = 3  # runs from which settings are ranked
_MOST_CLASSES: Final = 30  # in the dumbbell
_TITLE: Final = 30  # pixels
_SPARE: Final = 120  # pixels that curves need less than in the app: more of them fit on a page
_NARROW: Final = 5  # rates; a heatmap of more needs the whole width
_NARROW_MATRIX: Final = 8  # classes; a matrix of more needs the whole width
_NAMES: Final[Names] = ("Before unfreezing", "After unfreezing")
_FORMATS: Final = {
    "Best accuracy": "{:.2f}%",
    "At the boundary": "{:.2f}%",
    "Change": "{:+.2f}",
    "Lowest change": "{:+.2f}",
    "Highest change": "{:+.2f}",
    "From": "{:+.2f}",
    "To": "{:+.2f}",
    "Against control": "{:+.2f}",
    "Spread": "{:.2f}",
    "Best loss": "{:.4f}",
    "Time": "{:.0f} s",
    "p": "{:.2g}",
    "p against control": "{:.2g}",
}


class ReportError(ThawError):
    """A report that cannot be made: says why, and what to do."""


@dataclass(frozen=True)
class _Material:
    """What the sections are made of. `selected` are the runs that were asked for and can be read,
    `drawn` these with their trunks, `compared` the selected ones that are no trunk of another."""

    snapshot: Snapshot
    selected: list[str]
    drawn: list[str]
    compared: list[str]
    frame: pd.DataFrame
    missing: list[str]
    rows: list[Summary]
    found: Mapping[str, Findings]

    @property
    def runs(self) -> list[Run]:
        return [self.snapshot.runs[name] for name in self.drawn]

    def label(self, run_id: str) -> str:
        return self.snapshot.labels[run_id]


def build(snapshot: Snapshot, run_ids: Sequence[str], made: datetime | None = None) -> Report:
    """The report on these runs, in their order. Raises ReportError where none can be read."""
    material = _material(snapshot, list(dict.fromkeys(run_ids)))
    drawn = material.drawn
    origin = [commands_of(snapshot, drawn), settings_of(snapshot, drawn)]
    curves, verdicts, numbers = _curves(material), _verdicts(material), _numbers(material)
    together = [_sweep(material), _per_class(material)]
    # Of few runs all is told in turn; of many, first what they say together.
    few = [*origin, curves, verdicts, numbers, *together]
    many = [curves, *together, verdicts, numbers, *origin[::-1]]
    sections = [
        *(few if len(drawn) <= _FEW else many),
        _method(material),
        environment_of(material.runs),
        problems_of(snapshot, [*run_ids, *drawn]),
    ]
    return Report(
        title="Did unfreezing help?",
        answer=_answer(material),
        caution=_caution(material),
        about=_about(material),
        made=made or datetime.now(UTC),
        sections=tuple(section for section in sections if section is not None),
    )


def _material(snapshot: Snapshot, run_ids: Sequence[str]) -> _Material:
    for name in run_ids:
        if name not in snapshot.runs and name not in snapshot.broken:
            raise ReportError(f"There is no run {name} any more. Choose others.")
    selected = [name for name in run_ids if name in snapshot.runs]
    if not selected:
        reasons = "\n".join(snapshot.broken[name] for name in run_ids)
        raise ReportError(f"A report needs a run that can be read. {reasons}".strip())
    curves, missing = lineage(snapshot, selected)
    trunks = {curve.run.run_id for curve in curves if curve.role == "trunk"}
    return _Material(
        snapshot=snapshot,
        selected=selected,
        drawn=list(dict.fromkeys(curve.run.run_id for curve in curves)),
        compared=[name for name in selected if name not in trunks],
        frame=with_settings(epochs_frame(snapshot, curves), snapshot),
        missing=missing,
        rows=summaries(snapshot, selected),
        found=findings(snapshot, selected),
    )


# --- the answer ---------------------------------------------------------------------------------


def _answer(material: _Material) -> str:
    rows = material.rows
    if several := headline(rows, material.found):
        return several
    for row in rows:
        if row.phase == "finetune":
            return verdict(row)
    reached = [row for row in rows if pd.notna(row.best_acc)]
    if not reached:
        return "No epoch of these runs has been evaluated yet."
    best = max(reached, key=lambda row: row.best_acc or 0.0)
    return (
        "No layer was unfrozen in these runs. "
        f"Best accuracy: {best.best_acc:.1%}, {best.label} at epoch {best.best_epoch}."
    )


def _caution(material: _Material) -> str:
    """What to know before believing the answer."""
    if len(material.found) == 1:
        [lines] = evidence_lines(material.found).values()
        return " ".join(lines)
    return warning(material.found)


def _about(material: _Material) -> str:
    runs = material.selected
    known = [settings(run) for run in material.runs]
    what = [
        ", ".join(dict.fromkeys(each[name] for each in known if each[name]))
        for name in ("Network", "Data")
    ]
    counted = "One run" if len(runs) == 1 else f"{len(runs)} runs"
    on = " on ".join(text for text in what if text)
    return f"{counted}{f': {on}' if on else ''}."


# --- curves -------------------------------------------------------------------------------------


def _curves(material: _Material) -> Section:
    if material.frame.empty:
        return Section("Curves", ["No epoch has been evaluated yet.", *material.missing])
    frame, look, splits = _drawn(material)
    metrics: tuple[Metric, Metric] = ("accuracy", "loss")
    sides: tuple[tuple[Panel, Axis], ...] = (("before", "total"), ("after", "since"))
    joined = [_curve(frame, metric, "total", splits, look, "by epoch") for metric in metrics]
    panels = [
        _curve(part, metric, axis, splits, look, f"{side} unfreezing")
        for metric in metrics
        for side, axis in sides
        if not (part := panel(frame, side)).empty
    ]
    if all(run.boundary is None for run in material.runs):
        panels = []  # all is before
    return Section(
        "Curves",
        [*_explained(material, look, splits), *material.missing],
        figures=[*panels, *joined],
        footnotes=["Ring: the evaluation at the boundary. Filled shape: the best epoch."],
    )


def _drawn(material: _Material) -> tuple[pd.DataFrame, Look, tuple[Split, ...]]:
    """What is drawn so that lines can be told apart: means over seeds, and of many lines only those
    of validation, coloured by their settings."""
    telling = [name for name in varied(material.snapshot, material.compared) if name != SEED]
    frame = material.frame
    if _several_seeds(material):
        frame = seed_means(frame, without_seed(material.snapshot, material.compared))
    lines = frame["run"].nunique()
    look = Look()
    if lines > _MOST_COLOURS and telling:
        colour, dash = [*telling, PHOTOS][:2]
        look = Look(colour, dash)
    return frame, look, SPLITS if lines <= _FEW else SPLITS[1:]


def _several_seeds(material: _Material) -> bool:
    """Whether runs differ in nothing but their seed."""
    groups = without_seed(material.snapshot, material.compared)
    differs = SEED in varied(material.snapshot, material.compared)
    return differs and len(set(groups.values())) < len(groups)


def _explained(material: _Material, look: Look, splits: Sequence[Split]) -> Iterator[str]:
    if _several_seeds(material):
        yield "Lines are means over seeds; the band behind a line is their range."
    if look.colour != RUN:
        dashes = f", dashes for {look.dash.lower()}" if look.dash in SETTINGS else ""
        yield f"Colours stand for {look.colour.lower()}{dashes}."
    if len(splits) < len(SPLITS):
        yield "Only validation is drawn; there are too many lines for both."


def _curve(
    frame: pd.DataFrame,
    metric: Metric,
    axis: Axis,
    splits: Sequence[Split],
    look: Look,
    when: str,
) -> Figure:
    title = f"{metric.capitalize()} {when}"
    if not (frame["role"] == "run").any():
        look = Look()  # trunks have no settings to tell apart
    drawn = overlay(frame, metric, axis, splits, look, title)
    drawn = drawn.properties(height=drawn.height - _SPARE)
    runs = frame["run"].nunique()
    said = f"{title}: {runs} {'line' if runs == 1 else 'lines'}. Numbers are in the tables below."
    return Figure(_name(title), drawn, said)


def _name(title: str) -> str:
    return title.lower().replace(" ", "-")


# --- verdicts and numbers -----------------------------------------------------------------------


def _verdicts(material: _Material) -> Section | None:
    frame, look, _ = _drawn(material)
    palette = run_colours(frame, look.colour) if len(frame) else {}
    said = evidence_lines(material.found)
    lines = [
        Line(
            row.label,
            verdict(row),
            [*said.get(row.run_id, ()), *flags(material.snapshot.runs[row.run_id])],
            palette.get(row.run_id, ""),
        )
        for row in material.rows
        if verdict(row)
    ]
    return Section("Verdicts", lines=lines) if lines else None


def _numbers(material: _Material) -> Section:
    tables = [Table("numbers", "Numbers of each run", table(material.rows), _FORMATS)]
    if _several_seeds(material) and not _is_grid(material):
        groups = without_seed(material.snapshot, material.compared)
        rows = [row for row in material.rows if row.run_id in groups]
        frame = group_table(rows, groups)
        tables.append(Table("means", "Means over seeds", frame, _FORMATS))
    tested = _evidence_table(material)
    if len(tested):
        tables.append(Table("evidence", "Evidence for each run", tested, _FORMATS))
    return Section(
        "Numbers",
        tables=tables,
        footnotes=[
            "Accuracies of the validation photos. Changes are in points: best after unfreezing "
            f"minus boundary. {resolution(material.rows)}"
        ],
    )


def _evidence_table(material: _Material) -> pd.DataFrame:
    """One row for each run that saved its predictions: changes and intervals in points."""
    p = adjusted(material.found)
    columns = ("Run", "Change", "From", "To", "Fixed", "Broken", "p", "Against control")
    rows = []
    for name, found in material.found.items():
        one, control = found.boundary, found.control
        if isinstance(one, Evidence):
            interval = (100 * one.change, 100 * one.low, 100 * one.high)
            head = 100 * control.change if isinstance(control, Evidence) else None
            rows.append((material.label(name), *interval, one.fixed, one.broken, p[name], head))
    frame = pd.DataFrame(rows, columns=list(columns))
    return frame.astype({"Against control": "float64"}).dropna(axis="columns", how="all")


# --- sweep --------------------------------------------------------------------------------------


def _is_grid(material: _Material) -> bool:
    """Whether the runs have one trunk, or are of one sweep, and differ in more than the seed."""
    found = members(material.snapshot, material.compared)
    starts = {one.run.parent_run_id or _sweep_id(one.run) for one in found}
    telling = set(varied_in_sweep(found)) - {SEED}
    return len(found) >= _GRID and len(starts) == 1 and None not in starts and bool(telling)


def _sweep_id(run: Run) -> str | None:
    entry = run.info.get("sweep")
    return str(entry["id"]) if isinstance(entry, dict) and "id" in entry else None


def _sweep(material: _Material) -> Section | None:
    if not _is_grid(material):
        return None
    shown = section(material.snapshot, material.compared)
    title = measure(shown.against)
    figures = [
        Figure(
            "heatmap",
            _titled(heatmap(shown.cells, title, shown.row), "Learning rate and layers"),
            f"{title} by {' and '.join(filter(None, ['learning rate', shown.row.lower()]))}, as "
            "numbers in coloured cells. The settings are ranked in the table below.",
            HALF if shown.cells["rate"].nunique() <= _NARROW else FULL,
        )
    ]
    if len(shown.schedule_means) > 1:
        dots = schedule_dots(shown.schedules, shown.schedule_means, title)
        dots = _titled(dots, "Runs by schedule")
        lines = schedule_curves(shown.curves, "Epoch after unfreezing")
        lines = _titled(lines, "Mean accuracy by schedule")
        figures += [
            Figure("schedules", dots, f"{title} of each run, by schedule, with the means."),
            Figure("schedule-curves", lines, "Mean accuracy by epoch of each schedule."),
        ]
    ranking = shown.ranking.drop(columns="run_ids").dropna(axis="columns", how="all")
    return Section(
        "Sweep",
        [shown.headline],
        figures=figures,
        tables=[Table("ranking", "Settings by their best accuracy", ranking, _FORMATS)],
        footnotes=[
            *shown.details,
            "A star marks a change beyond chance. Of several seeds, the mean counts.",
        ],
    )


_Titled = TypeVar("_Titled", alt.Chart, alt.LayerChart)


def _titled(chart: _Titled, title: str) -> _Titled:
    """The chart with a title of its own: the page around it is missing where the file is used."""
    heading = alt.Title(title, anchor="start", offset=12)
    room = _TITLE if chart.title is alt.Undefined else 0
    return chart.properties(title=heading, height=chart.height + room)


# --- classes ------------------------------------------------------------------------------------


def _per_class(material: _Material) -> Section | None:
    best = gained_most(material.rows)
    if best is None:
        return None
    run = material.snapshot.runs[best.run_id]
    heading = "Classes"
    which = f"Of {best.label}, the run that gained most."
    try:
        change = change_between(run.predictions("before"), run.predictions("after"), run.classes)
    except EvidenceError as error:
        return Section(heading, [which, str(error)])
    classes = per_class(change)
    # The p of one run among several is adjusted for them: the verdicts have it.
    alone = len(material.found) == 1
    return Section(
        heading,
        [change_headline(change, _NAMES) if alone else which, class_headline(classes)],
        figures=_class_figures(change, classes),
        tables=_class_tables(change, classes),
        footnotes=[*calibration_lines(change, _NAMES), *filter(None, [few_photos(change)])],
    )


def _class_figures(change: Change, classes: pd.DataFrame) -> list[Figure]:
    rows = ordered(classes, "change", _MOST_CLASSES)
    cells = matrix(confusion(change), change.classes, "difference", False, _NAMES)
    return [
        Figure(
            "classes",
            _titled(dumbbell(rows, _NAMES), "Recall of each class"),
            f"Recall of {len(rows)} classes before and after unfreezing.",
        ),
        Figure(
            "confusions",
            _titled(cells, "Confusions: after minus before unfreezing"),
            "How many photos of each true class were given each class more or less often after "
            "unfreezing.",
            HALF if len(change.classes) <= _NARROW_MATRIX else FULL,
        ),
        Figure(
            "reliability",
            _titled(reliability_chart(change, _NAMES), "Accuracy by confidence"),
            "Accuracy by confidence before and after unfreezing.",
        ),
        Figure(
            "confidence",
            _titled(confidence_counts(change, _NAMES), "Photos by confidence"),
            "Number of photos by confidence before and after unfreezing.",
        ),
    ]


def _class_tables(change: Change, classes: pd.DataFrame) -> list[Table]:
    frame = class_table(classes, _NAMES)
    shares = [name for name in frame if name.startswith(("Recall", "Precision", "F1"))]
    formats = {**_FORMATS, **dict.fromkeys(shares, "{:.1f}%"), "Change": "{:+.1f}"}
    pairs = confused_pairs(confusion(change), _NAMES)
    tables = [Table("classes", "Classes", frame, formats)]
    if len(pairs):
        said = "Pairs of classes confused most"
        tables.append(Table("confusions", said, pairs, {"Change": "{:+d}"}))
    return tables


# --- method and environment ---------------------------------------------------------------------


def _method(material: _Material) -> Section | None:
    if all(row.change is None for row in material.rows):
        return None
    tested = len(adjusted(material.found))
    many = f", adjusted for the {tested} runs tested (Holm)" if tested > 1 else ""
    evidence = [
        "Two networks are compared photo by photo. Intervals hold 95% of the bootstrap resamples "
        "of the validation photos and are not adjusted for the number of runs. p is McNemar's "
        f"exact test on the photos fixed and broken{many}. Both say what other photos might have "
        "shown, not what another training would have: that takes several seeds."
    ]
    return Section(
        "Method",
        [
            "The change of a run is its best validation accuracy after unfreezing minus the last "
            "evaluation before it, in points (percent of the photos). The best epoch was chosen "
            "on the photos that it is measured on, and the best of several flatters. A control "
            "trains the head alone for as many epochs: what it gains too is not due to unfreezing.",
            *(evidence if tested else []),
        ],
    )

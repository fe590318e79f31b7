"""Experiments that were run from a recipe: their tables, as `python -m trainer run` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import altair as alt
import pandas as pd

from explorer.charts import NOTE_COLOUR, RUN_COLOURS, SHAPES
from explorer.data import Snapshot
from explorer.overview import sendable
from trainer.experiment import FIGURES
from trainer.results import HEADS, Row, Table, markdown, row, to_csv
from trainer.runlog import RunError

# Figures that are accuracies, as the chart names and draws them, in this order.
_DRAWN: Final = {"train_acc": "Training", "val_acc": "Validation", "test_acc": "Test"}
_PUBLISHED: Final = "published"
_TITLES: Final = {
    name: title[0].upper() + title[1:].replace(" acc", " accuracy") for name, title in HEADS.items()
}
_LINE: Final = 30
_AROUND: Final = 90


@dataclass(frozen=True)
class Results:
    """A table with what its runs reached by now. `gone` counts those that were deleted; `problems`
    says what could not be read."""

    table: Table
    rows: tuple[Row, ...] = field(repr=False)
    gone: int
    problems: tuple[str, ...]

    @property
    def run_ids(self) -> list[str]:
        return [row.entry.run_id for row in self.rows]

    @property
    def as_csv(self) -> str:
        return to_csv(self.rows)

    @property
    def as_markdown(self) -> str:
        return markdown(self.rows)


def results(snapshot: Snapshot, table: Table) -> Results:
    """The rows of a table whose runs are there."""
    rows, problems = [], []
    there = [entry for entry in table.entries if entry.run_id in snapshot.runs]
    for entry in there:
        try:
            rows.append(row(entry, snapshot.runs[entry.run_id]))
        except RunError as error:
            problems.append(str(error))
    return Results(table, tuple(rows), len(table.entries) - len(there), tuple(problems))


def frame(shown: Results) -> pd.DataFrame:
    """A row for each run: its name in the experiment, its figures and the published ones, each
    column only where some row has it. Accuracies in percent, times in seconds, memory in MB."""
    lines = []
    for one in shown.rows:
        line: dict[str, str | float] = {"Model": sendable(one.entry.model)}
        line |= {_TITLES[name]: _scaled(name, value) for name, value in one.figures.items()}
        line |= {
            published(name): _scaled(name, value) for name, value in one.entry.published.items()
        }
        lines.append(line | {"Run": sendable(one.entry.run_id)})
    order = ["Model"]
    for name in HEADS:
        order += [_TITLES[name], *([published(name)] if name in FIGURES else [])]
    found = pd.DataFrame(lines)
    return found[[name for name in [*order, "Run"] if name in found]]


def published(name: str) -> str:
    return f"{_TITLES[name]}, {_PUBLISHED}"


def _scaled(name: str, value: float) -> float:
    return 100 * value if name in _DRAWN else value


def headline(shown: Results) -> str:
    """Which run was best and which worst, by the test photos where there are some."""
    for name, where in (("test_acc", "on the test photos"), ("val_acc", "in validation")):
        known = [row for row in shown.rows if name in row.figures]
        if len(known) < 2:
            continue
        best = max(known, key=lambda row: row.figures[name])
        worst = min(known, key=lambda row: row.figures[name])
        return (
            f"Best {where}: {best.entry.model}, {best.figures[name]:.2%}. "
            f"Lowest: {worst.entry.model}, {worst.figures[name]:.2%}."
        )
    return ""


def accuracies(shown: Results) -> pd.DataFrame:
    """One row for each accuracy: model, split, accuracy in percent, and whose figure it is."""
    lines = [
        {"model": sendable(row.entry.model), "split": split, "accuracy": 100 * of[name], "by": by}
        for row in shown.rows
        for of, by in ((row.figures, "measured here"), (row.entry.published, _PUBLISHED))
        for name, split in _DRAWN.items()
        if name in of
    ]
    return pd.DataFrame(lines, columns=["model", "split", "accuracy", "by"])


def dots(points: pd.DataFrame) -> alt.LayerChart:
    """Training, validation and test accuracy of each model on one line, from `accuracies`;
    published figures are hollow."""
    models: Sequence[str] = list(points["model"].unique())
    splits = [split for split in _DRAWN.values() if split in set(points["split"])]
    colours = RUN_COLOURS[: len(splits)]
    y = alt.Y("model:N", title=None, sort=models, axis=alt.Axis(labelLimit=170, ticks=False))
    low, high = points["accuracy"].min(), points["accuracy"].max()
    room = max((high - low) / 20, 0.5)
    domain = [max(0.0, low - room), min(100.0, high + room)]
    scale = alt.Scale(domain=domain, nice=False, zero=False)
    x = alt.X("accuracy:Q", title="Accuracy (%)", scale=scale, axis=alt.Axis(tickCount=8))
    legend = alt.Legend(orient="top", title=None)
    base = alt.Chart(points)
    marks = base.encode(
        x=x,
        y=y,
        color=alt.Color("split:N", scale=alt.Scale(domain=splits, range=colours), legend=legend),
        shape=alt.Shape(
            "split:N", scale=alt.Scale(domain=splits, range=SHAPES[: len(splits)]), legend=legend
        ),
        tooltip=["model:N", "split:N", alt.Tooltip("accuracy:Q", format=".2f"), "by:N"],
    )
    here = alt.datum.by != _PUBLISHED
    line = base.mark_rule(color=NOTE_COLOUR, opacity=0.5).encode(
        x=alt.X("min(accuracy):Q", scale=scale), x2="max(accuracy):Q", y=y
    )
    ours = marks.transform_filter(here).mark_point(filled=True, size=70, opacity=1)
    theirs = marks.transform_filter(~here).mark_point(filled=False, size=110, strokeWidth=2)
    return alt.LayerChart(layer=[line, theirs, ours]).properties(
        height=_AROUND + _LINE * len(models)
    )

"""What a report is made of, and how it becomes one HTML file or many small files.

The HTML needs nothing else: charts are in it as SVG, and what can be downloaded is in its links. It
runs no script and asks nothing of any server, and says so to the browser. Names of runs, classes
and photos are whatever a user typed: they go through `_text` or a drawing of explorer.render.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from typing import Any, Final

import pandas as pd
from altair.typing import ChartType
from pandas.api.types import is_numeric_dtype

from explorer.render import INK, printable, to_png, to_svg
from trainer.cli import inert_cell

_SHORT: Final = 22  # characters that stay in one line of a cell, rows that stay on one page
_NOTHING: Final = re.compile(r"[+-]([0.]+\D*$)")
HALF: Final = 470  # pixels: two charts side by side
FULL: Final = 940


@dataclass(frozen=True)
class Figure:
    """A chart, described for who cannot see it; `name` is that of its files."""

    name: str
    chart: ChartType = field(repr=False)
    alt: str
    width: int = HALF

    @functools.cached_property
    def svg(self) -> str:
        return to_svg(self.chart, self.width, self.alt, prefix=f"{self.name}-")

    @functools.cached_property
    def png(self) -> bytes:
        return to_png(self.svg)


@dataclass(frozen=True)
class Table:
    """`formats` say how a column's numbers are printed, such as {"Change": "{:+.2f}"}; the CSV has
    them in full."""

    name: str
    caption: str
    frame: pd.DataFrame = field(repr=False)
    formats: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """What is said of one run: its name, the colour of its curve, and what else there is to say."""

    name: str
    text: str
    notes: Sequence[str] = ()
    colour: str = ""
    code: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a report, in the order in which it is shown."""

    heading: str
    paragraphs: Sequence[str] = ()
    lines: Sequence[Line] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    footnotes: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    title: str
    answer: str
    caution: str
    about: str
    made: datetime
    sections: Sequence[Section]

    @property
    def figures(self) -> list[Figure]:
        return [figure for section in self.sections for figure in section.figures]

    @property
    def tables(self) -> list[Table]:
        return [table for section in self.sections for table in section.tables]


# --- tables as CSV ------------------------------------------------------------------------------


def to_csv(frame: pd.DataFrame) -> str:
    """The table with full precision. No text in it is a formula to a spreadsheet."""
    safe = frame.rename(columns=_cell).map(_cell)
    return str(safe.to_csv(index=False, lineterminator="\r\n"))


def _cell(value: Any) -> Any:
    if not isinstance(value, str) or _is_number(value):
        return value
    return inert_cell(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# --- HTML ---------------------------------------------------------------------------------------

_POLICY: Final = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)
_STYLE: Final = """
:root {color-scheme: light dark; --ground: #fff; --ink: #1c2733; --soft: #55636f;
  --line: #d8dfe5; --wash: #f3f6f8; --link: #0f6f93}
@media (prefers-color-scheme: dark) {:root {--ground: #12181e; --ink: #e3e9ee; --soft: #a3b0bb;
  --line: #33404b; --wash: #1c252d; --link: #5fb6d6}}
* {box-sizing: border-box}
body {margin: 0 auto; padding: 2.2rem 1rem 4rem; max-width: 64rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.5 system-ui, "Segoe UI", "Liberation Sans", Arial, sans-serif;
  overflow-wrap: anywhere}
h1 {font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem}
h2 {font-size: 1.3rem; margin: 2.4rem 0 .5rem; padding-top: .9rem;
  border-top: 1px solid var(--line)}
p {margin: .5rem 0; max-width: 46rem}
a {color: var(--link)}
.answer {font-size: 1.2rem; font-weight: 600}
.soft {color: var(--soft); font-size: .875rem}
nav {display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .875rem; margin-top: 1rem}
ul {list-style: none; margin: .7rem 0; padding: 0; columns: 27rem; column-gap: 2rem}
ul.code {columns: auto}
li {break-inside: avoid; padding-bottom: .7rem}
li b {margin-right: .5rem}
.dot {display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .5rem;
  print-color-adjust: exact; -webkit-print-color-adjust: exact}
pre {margin: .2rem 0; padding: .6rem .8rem; background: var(--wash); border-radius: .4rem;
  font: .8125rem/1.45 ui-monospace, "Liberation Mono", Menlo, monospace; white-space: pre-wrap}
pre span {display: inline-block; max-width: 100%}
.charts {display: grid; gap: 1.4rem 1.5rem; margin: 1rem 0;
  grid-template-columns: repeat(2, minmax(0, 1fr))}
figure {margin: 0; min-width: 0; break-inside: avoid}
figure.full {grid-column: 1 / -1}
.box {overflow-x: auto}
.box svg {display: block; width: 100%; height: auto}
svg > rect:first-child {fill: none}
svg text[fill="@INK@"] {fill: var(--ink)}
.get {display: flex; gap: .8rem; font-size: .8125rem; margin-top: .2rem}
table {border-collapse: collapse; font-size: .875rem; line-height: 1.35}
caption {text-align: left; font-weight: 600; padding: 1rem 0 .3rem}
th, td {padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; overflow-wrap: normal;
  border-bottom: 1px solid var(--line); font-weight: normal; min-width: 3rem}
thead th {color: var(--soft); vertical-align: bottom}
td:not(.whole) {overflow-wrap: anywhere; min-width: 9rem; max-width: 32rem}
.number {text-align: right; font-variant-numeric: tabular-nums}
.whole {white-space: nowrap}
.hidden {position: absolute; clip-path: inset(50%); white-space: nowrap}
@media (max-width: 44rem) {
  .charts {grid-template-columns: minmax(0, 1fr)}
  figure.full svg {min-width: 40rem}
}
@media print {
  @page {size: A4; margin: 15mm}
  :root {--ground: #fff; --ink: #000; --soft: #444; --line: #bbb; --wash: #f3f6f8; --link: #000}
  body {padding: 0; font-size: 10pt; max-width: none}
  nav, .get {display: none}
  h1 {font-size: 17pt} h2 {font-size: 13pt; break-after: avoid; margin-top: 1.4rem}
  .answer {font-size: 12pt}
  .soft, .get {font-size: 8.5pt}
  ul:not(.code) {columns: 2}
  p:has(+ .box), p:has(+ .charts) {break-after: avoid}
  .charts {grid-template-columns: repeat(2, minmax(0, 1fr))}
  figure.full svg {min-width: 0}
  .box {overflow: visible}
  table {font-size: 8pt; width: 100%}
  th, td {padding-right: .5rem; min-width: 0}
  td:not(.whole) {min-width: 7rem}
  caption {break-after: avoid}
  tr, .short, p {break-inside: avoid}
  pre {font-size: 8pt}
}
""".replace("@INK@", INK)


def to_html(report: Report) -> str:
    """One file to read, print and hand on: light or dark as the reader's system has it."""
    links = "".join(
        f'<a href="#part-{place}">{_text(section.heading)}</a>'
        for place, section in enumerate(report.sections)
    )
    parts = "\n".join(map(_section, range(len(report.sections)), report.sections))
    caution = f"<p>{_text(report.caution)}</p>\n" if report.caution else ""
    day = report.made.strftime("%Y-%m-%d %H:%M %Z")
    made = f'<time datetime="{report.made.isoformat()}">{day}</time>'
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{_text(report.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{_text(report.title)}</h1>
<p class="answer">{_text(report.answer)}</p>
{caution}<p class="soft">{_text(report.about)} Made {made} by Thaw.</p>
</header>
<nav aria-label="Sections">{links}</nav>
<main>
{parts}
</main>
</body>
</html>
"""


def _text(text: str) -> str:
    return escape(printable(text))


def _section(place: int, section: Section) -> str:
    return "\n".join(
        [
            f'<section id="part-{place}">',
            f"<h2>{_text(section.heading)}</h2>",
            *(f"<p>{_text(text)}</p>" for text in section.paragraphs),
            *_lines(section.lines),
            *_figures(section.figures),
            # A single table goes by the heading.
            *(_table(table, hidden=len(section.tables) == 1) for table in section.tables),
            *(f'<p class="soft">{_text(text)}</p>' for text in section.footnotes),
            "</section>",
        ]
    )


def _lines(lines: Sequence[Line]) -> Iterator[str]:
    if lines:
        kind = ' class="code"' if any(line.code for line in lines) else ""
        yield f"<ul{kind}>"
        yield from map(_line, lines)
        yield "</ul>"


def _line(line: Line) -> str:
    dot = f'<span class="dot" style="background:{line.colour}"></span>' if line.colour else ""
    said = _command(line.text) if line.code else _text(line.text)
    notes = "".join(f'<div class="soft">{_text(note)}</div>' for note in line.notes)
    return f"<li>{dot}<b>{_text(line.name)}</b>{said}{notes}</li>"


def _command(text: str) -> str:
    """Broken between its flags only, where that is possible, and copied as one line."""
    words = " ".join(f"<span>{_text(flag)}</span>" for flag in re.split(" (?=--)", text))
    return f"<pre>{words}</pre>"


def _figures(figures: Sequence[Figure]) -> Iterator[str]:
    if figures:
        yield '<div class="charts">'
        yield from map(_figure, figures)
        yield "</div>"


def _figure(figure: Figure) -> str:
    full = ' class="full"' if figure.width > HALF else ""
    links = [
        _download(f"{figure.name}.svg", "image/svg+xml", figure.svg.encode(), "SVG"),
        _download(f"{figure.name}.png", "image/png", figure.png, "PNG"),
    ]
    # Focusable, so that the arrow keys can move what is wider than a phone.
    box = f'<div class="box" tabindex="0">{figure.svg}</div>' if full else _boxed(figure.svg)
    return f'<figure{full}>{box}<div class="get">{"".join(links)}</div></figure>'


def _boxed(svg: str) -> str:
    return f'<div class="box">{svg}</div>'


def _download(name: str, kind: str, content: bytes, label: str) -> str:
    data = base64.b64encode(content).decode("ascii")
    return (
        f'<a download="thaw-{_text(name)}" href="data:{kind};base64,{data}" '
        f'aria-label="{_text(name)}">{label}</a>'
    )


def _table(table: Table, hidden: bool) -> str:
    frame = table.frame
    numbers = [is_numeric_dtype(frame[name].dtype) for name in frame.columns]
    head = "".join(
        f'<th scope="col"{_kind(False, number)}>{_text(str(name))}</th>'
        for name, number in zip(frame.columns, numbers, strict=True)
    )
    forms = [table.formats.get(name, "{}") for name in frame.columns]
    rows = "".join(
        f"<tr>{''.join(map(_cell_html, row, forms, numbers))}</tr>"
        for row in frame.itertuples(index=False, name=None)
    )
    kind = ' class="hidden"' if hidden else ""
    box = "box short" if len(frame) <= _SHORT else "box"
    link = _download(f"{table.name}.csv", "text/csv", to_csv(frame).encode(), "CSV")
    return (
        f'<div class="{box}" tabindex="0" role="region" aria-label="{_text(table.caption)}"><table>'
        f"<caption{kind}>{_text(table.caption)}</caption><thead><tr>{head}</tr></thead>"
        f'<tbody>{rows}</tbody></table></div><div class="get">{link}</div>'
    )


def _cell_html(value: Any, form: str, number: bool) -> str:
    missing = not isinstance(value, str) and pd.isna(value)
    shown = value if isinstance(value, str) else "" if missing else form.format(value)
    if number:
        # No sign of nothing, and a minus as wide as a plus.
        shown = _NOTHING.sub(r"\1", shown).replace("-", "\u2212")
    return f"<td{_kind(number or len(shown) <= _SHORT, number)}>{_text(shown)}</td>"


def _kind(whole: bool, number: bool) -> str:
    kinds = [name for name, is_so in (("whole", whole), ("number", number)) if is_so]
    return f' class="{" ".join(kinds)}"' if kinds else ""

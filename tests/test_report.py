"""The report: one HTML file that says what the pages say, and that nothing in it can act."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import altair as alt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from explorer.data import Library, Snapshot
from explorer.render import printable, to_png, to_svg
from explorer.report import main, report_html
from explorer.report_build import ReportError, build
from explorer.report_html import Figure, Report, Section, Table, to_csv, to_html
from tests.explorer_runs import record, write_finetune, write_run, write_trunk

MADE = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
EVIL = "</svg><script>alert(1)</script>\x1b\u202e"
SVG = "{http://www.w3.org/2000/svg}"
SHAPES = {"svg", "g", "defs", "clipPath", "linearGradient", "stop", "path", "rect", "line", "text"}
DRAWN = {SVG + name for name in SHAPES}
ROOT = Path(__file__).resolve().parents[1]


def save_predictions(path: Path, wrong: int, photos: int = 100) -> None:
    """Two classes in turn; the first `wrong` photos are predicted as the other one."""
    labels = np.arange(photos) % 2
    predicted = (labels + (np.arange(photos) < wrong)) % 2
    logits = 3 * np.eye(2, dtype=np.float32)[predicted]
    names = np.array([f"{number}.jpg" for number in range(photos)])
    np.savez(path, logits=logits, labels=labels, files=names)


def finetune(runs_dir: Path, parent: str, name: str, accuracy: float, **settings: object) -> str:
    """A run from 70% to `accuracy` (the third epoch), with its predictions; returns its id."""
    given = {"phase": "finetune", "lr": 1e-4, "unfreeze": "20", "seed": 0, "epochs": 3}
    schedule = {"name": settings.pop("schedule", "constant")}
    writer = write_run(
        runs_dir,
        name,
        (0.70, 0.72, 0.74, accuracy),
        "finetune",
        3,
        parent_run_id=parent,
        config=given | {"schedule": schedule} | settings,
        classes=["rose", EVIL],
        distributed={"world_size": 2, "nodes": 1, "job": "a"},
        environment={"versions": {"thaw": "0.1.0"}, "device": "cpu", "git": "abc123"},
    )
    save_predictions(writer.predictions("before"), wrong=30)
    save_predictions(writer.predictions("after"), wrong=round(100 * (1 - accuracy)))
    return writer.run_id


def snapshot(runs_dir: Path) -> Snapshot:
    return Library(runs_dir).snapshot()


def section(report: Report, heading: str) -> Section:
    return next(each for each in report.sections if each.heading == heading)


def frame(report: Report, name: str) -> pd.DataFrame:
    return next(table.frame for table in report.tables if table.name == name)


class Page(HTMLParser):
    """The elements of a page, and its text outside of style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk and two finetunes, the better of which has a name that would like to act."""
    runs_dir = tmp_path_factory.mktemp("runs")
    parent = write_trunk(runs_dir)
    finetune(runs_dir, parent, "gentle", 0.71, lr=1e-5)
    bold = finetune(runs_dir, parent, "bold", 0.90)
    (runs_dir / bold / "annotations.json").write_text('{"name": "<script>x</script>"}')
    return runs_dir


@pytest.fixture(scope="module")
def report(runs: Path) -> Report:
    shown = snapshot(runs)
    return build(shown, list(shown.runs), MADE)


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(to_html(report))


# --- what it says -------------------------------------------------------------------------------


def test_the_answer_comes_first_and_the_origin_last(report: Report) -> None:
    assert "Of 2 runs, unfreezing made 1 better beyond chance." in report.answer
    assert [each.heading for each in report.sections] == [
        "Commands",
        "Settings",
        "Curves",
        "Verdicts",
        "Numbers",
        "Classes",
        "Method",
        "Environment and data",
    ]


def test_settings_that_are_the_same_are_one_line_and_the_others_columns(report: Report) -> None:
    said = section(report, "Settings")
    [table] = said.tables
    assert table.frame["Learning rate"].tolist() == ["", "1e-5", "1e-4"]
    assert "data flowers" in said.paragraphs[0]
    assert "Data" not in table.frame


def test_curves_are_there_before_and_after_and_joined(report: Report) -> None:
    names = [figure.name for figure in section(report, "Curves").figures]
    assert names == [
        "accuracy-before-unfreezing",
        "accuracy-after-unfreezing",
        "loss-before-unfreezing",
        "loss-after-unfreezing",
        "accuracy-by-epoch",
        "loss-by-epoch",
    ]


def test_verdicts_come_with_their_evidence_and_what_stands_out(report: Report) -> None:
    bold = section(report, "Verdicts").lines[1]
    assert bold.text.startswith("+20.0 points at epoch 3 of 3 after unfreezing")
    assert "beyond chance" in bold.notes[0]
    assert "Best at the last epoch: more epochs may gain more." in bold.notes


def test_numbers_and_evidence_are_tables(report: Report) -> None:
    assert frame(report, "numbers")["Change"].tolist()[1:] == pytest.approx([4.0, 20.0])
    tested = frame(report, "evidence")
    assert tested["Fixed"].tolist() == [1, 20]
    assert "Against control" not in tested  # there is none


def test_classes_are_those_of_the_run_that_gained_most(report: Report) -> None:
    said = section(report, "Classes")
    assert said.paragraphs[0] == "Of <script>x</script>, the run that gained most."
    assert frame(report, "classes")["Fixed"].tolist() == [10, 10]
    assert {figure.name for figure in said.figures} >= {"classes", "confusions", "reliability"}


def test_a_run_that_cannot_be_trained_again_says_why(runs: Path, report: Report) -> None:
    trunk = section(report, "Commands").lines[0]
    assert trunk.text == ""
    assert "was trained by another program" in trunk.notes[0]


def test_a_grid_of_many_runs_is_a_sweep_with_means_over_seeds(tmp_path: Path) -> None:
    parent = write_trunk(tmp_path)
    for rate in (1e-5, 1e-4):
        for schedule in ("constant", "cosine"):
            for seed in (0, 1):
                accuracy = 0.8 + 0.05 * (rate == 1e-4) + 0.01 * seed
                name = f"{rate}-{schedule}-{seed}"
                finetune(tmp_path, parent, name, accuracy, lr=rate, seed=seed, schedule=schedule)
    shown = snapshot(tmp_path)
    report = build(shown, list(shown.runs), MADE)
    assert "in one case of twenty" in report.caution
    assert [each.heading for each in report.sections][:2] == ["Curves", "Sweep"]
    assert (
        "Lines are means over seeds; the band behind a line is their range."
        in section(report, "Curves").paragraphs
    )
    said = section(report, "Sweep")
    assert [figure.name for figure in said.figures] == ["heatmap", "schedules", "schedule-curves"]
    ranking = frame(report, "ranking")
    assert ranking["Setting"][0].startswith("lr 1e-4")
    assert ranking["Change"].max() == pytest.approx(15.5)
    assert all("Setting" not in text for text in said.paragraphs)


def test_repeats_with_other_seeds_alone_get_a_table_of_their_means(tmp_path: Path) -> None:
    parent = write_trunk(tmp_path)
    for seed in (0, 1):
        finetune(tmp_path, parent, f"seed{seed}", 0.8 + 0.1 * seed, seed=seed)
    shown = snapshot(tmp_path)
    means = frame(build(shown, list(shown.runs)), "means")
    assert means[["Runs", "Change"]].to_numpy().tolist() == [[2, pytest.approx(15.0)]]


def test_one_run_is_answered_with_its_verdict_and_the_evidence_for_it(runs: Path) -> None:
    shown = snapshot(runs)
    [name] = [name for name in shown.runs if name.endswith("bold")]
    report = build(shown, [name])
    assert report.answer.startswith("+20.0 points at epoch 3 of 3 after unfreezing")
    assert report.caution.startswith("Against its boundary: +20.0 points, 95% interval")
    assert report.about.startswith("One run: ")
    assert section(report, "Classes").paragraphs[0].startswith("Accuracy 70.0%")


def test_runs_that_were_never_unfrozen_have_no_verdict(tmp_path: Path) -> None:
    write_trunk(tmp_path)
    shown = snapshot(tmp_path)
    report = build(shown, list(shown.runs))
    assert report.answer == (
        "No layer was unfrozen in these runs. Best accuracy: 70.0%, trunk at epoch 3."
    )
    headings = {each.heading for each in report.sections}
    assert not headings & {"Verdicts", "Sweep", "Classes", "Method"}


def test_a_run_without_an_epoch_is_reported_as_such(tmp_path: Path) -> None:
    write_run(tmp_path, "new", (), done=False)
    shown = snapshot(tmp_path)
    report = build(shown, list(shown.runs))
    assert report.answer == "No epoch of these runs has been evaluated yet."
    assert Page(to_html(report)).all("svg") == []


def test_a_running_run_is_so_far(tmp_path: Path) -> None:
    write_finetune(tmp_path, write_trunk(tmp_path), "going", (0.7, 0.8), done=False)
    shown = snapshot(tmp_path)
    assert "so far" in build(shown, list(shown.runs)).answer


def test_runs_that_cannot_be_read_are_named_and_alone_refused(runs: Path, tmp_path: Path) -> None:
    write_trunk(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    shown = snapshot(tmp_path)
    found = frame(build(shown, [*shown.runs, "broken"]), "problems")
    assert found["Run"].tolist() == ["broken"]
    with pytest.raises(ReportError, match="not valid JSON"):
        build(shown, ["broken"])
    with pytest.raises(ReportError, match="no run gone"):
        build(shown, ["gone"])


# --- the file -----------------------------------------------------------------------------------


def test_the_page_runs_nothing_and_asks_nobody(page: Page) -> None:
    assert page.all("script") == []
    policy = page.all("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith("default-src 'none';")
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, name)


def test_names_are_text_whatever_they_hold(report: Report, page: Page) -> None:
    assert page.text.count("<script>x</script>") > 3
    assert "</svg><script>alert(1)</script>\\x1b\\u202e" in page.text
    assert not {"\x1b", "\u202e"} & set(page.text)
    svgs = [figure.svg for figure in report.figures]
    assert any("&lt;script&gt;" in svg for svg in svgs)
    for svg in svgs:
        tags = {element.tag for element in ElementTree.fromstring(svg).iter()}
        assert tags <= DRAWN


def test_charts_are_described_and_share_no_ids(page: Page) -> None:
    svgs = page.all("svg")
    assert len(svgs) == 10
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 20 for svg in svgs)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in page.all("nav a"):
        assert link["href"][1:] in ids
    used = {
        value[5:-1]
        for _, attributes in page.elements
        for value in attributes.values()
        if value.startswith("url(#")
    }
    assert used and used <= set(ids)


def test_every_chart_and_table_can_be_saved(report: Report, page: Page) -> None:
    links = {each["download"]: each["href"] for each in page.all("a") if "download" in each}
    assert len(links) == 2 * len(report.figures) + len(report.tables)
    png = links["thaw-accuracy-by-epoch.png"].removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(png))).width == 940
    svg = links["thaw-classes.svg"].removeprefix("data:image/svg+xml;base64,")
    assert ElementTree.fromstring(base64.b64decode(svg)).tag == f"{SVG}svg"
    table = links["thaw-numbers.csv"].removeprefix("data:text/csv;base64,")
    again = pd.read_csv(io.BytesIO(base64.b64decode(table)))
    assert again["Change"].tolist()[1:] == pytest.approx([4.0, 20.0])


def test_the_page_holds_every_number_as_it_is_shown(page: Page) -> None:
    for shown in ("+20.00", "90.00%", "Made 2026-01-02 03:04 UTC", "abc123", "Processes"):
        assert shown in page.text


def test_no_sign_of_nothing() -> None:
    values = pd.DataFrame({"Change": [0.001, -0.001, 0.67, -20.0, float("nan")]})
    table = Table("t", "T", values, {"Change": "{:+.2f}"})
    text = Page(to_html(Report("R", "", "", "", MADE, [Section("S", tables=[table])]))).text
    assert "0.000.00+0.67\u221220.00" in text
    assert "nan" not in text


# --- tables as CSV ------------------------------------------------------------------------------


def test_no_cell_is_a_formula_and_numbers_stay_numbers() -> None:
    cells = ["=1+1", "+cmd", "-x", "@y", "-0.5", "1e-5", "plain", "a\nb", 'say "hi", you']
    table = pd.DataFrame({"=head": cells, "n": np.arange(9) - 4.5})
    again = pd.read_csv(io.StringIO(to_csv(table)), dtype={0: str}, header=0)
    assert list(again) == ["'=head", "n"]
    assert again["n"].tolist() == table["n"].tolist()
    assert again["'=head"].tolist() == [
        *("'=1+1", "'+cmd", "'-x", "'@y", "-0.5", "1e-5", "plain", "a\\nb", 'say "hi", you'),
    ]


# --- charts as files ----------------------------------------------------------------------------


def hostile_chart() -> alt.Chart:
    rows = pd.DataFrame({"name": [EVIL, "b"], "value": [1, 2]})
    return alt.Chart(rows, title=EVIL).mark_bar().encode(x="value:Q", y="name:N", tooltip="name")


def test_a_drawing_holds_shapes_and_text_only_and_is_the_same_again() -> None:
    svg = to_svg(hostile_chart(), alt_text=EVIL, prefix="a-")
    drawn = ElementTree.fromstring(svg)
    assert drawn.attrib["aria-label"] == "</svg><script>alert(1)</script>\\x1b\\u202e"
    texts = [element.text for element in drawn.iter(f"{SVG}text")]
    assert "</svg><script>alert(1)</script>\\x1b\\u202e" in texts
    assert not list(drawn.iter(f"{SVG}script"))
    assert svg == to_svg(hostile_chart(), alt_text=EVIL, prefix="a-")


def test_a_drawing_is_as_wide_as_asked_and_its_picture_twice_that() -> None:
    svg = to_svg(hostile_chart().properties(height=200), width=500)
    assert ElementTree.fromstring(svg).attrib["width"] == "500"
    assert Image.open(io.BytesIO(to_png(svg))).size == (1000, 400)


def test_a_chart_of_many_rows_is_drawn_too() -> None:
    rows = pd.DataFrame({"x": np.arange(6000), "y": np.arange(6000)})
    figure = Figure("many", alt.Chart(rows).mark_line().encode(x="x", y="y"), "Many rows")
    assert figure.svg.startswith("<svg")


def test_what_no_document_can_hold_is_written_as_its_escape() -> None:
    assert printable("a\0\x85\udc80\u2067é\u2212") == "a\\x00\\x85\\udc80\\u2067é\u2212"


# --- the command line ---------------------------------------------------------------------------


def test_the_command_writes_the_file_and_all_charts(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, charts = tmp_path / "deep" / "r.html", tmp_path / "charts"
    flags = ["--runs-dir", str(runs), "-o", str(output), "--charts", str(charts)]
    assert main(["trunk", *flags]) == 0
    assert output.read_text().startswith("<!doctype html>")
    names = {path.name for path in charts.iterdir()}
    assert names >= {"accuracy-by-epoch.svg", "accuracy-by-epoch.png", "numbers.csv"}
    said = capsys.readouterr().out
    assert f"report: {output} (" in said and f"charts: {charts} ({len(names)} files, " in said


def test_runs_are_named_by_a_part_of_their_id_or_by_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, "bare", (), done=False).path
    output = tmp_path / "r.html"
    for where in ([str(path)], ["bare", "--runs-dir", str(tmp_path)]):
        assert main([*where, "-o", str(output)]) == 0
        assert "One run" in output.read_text()
        output.unlink()


def test_mistakes_are_explained(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = str(write_run(tmp_path, "bare", (), done=False).path)
    (tmp_path / "taken").write_text("")
    mistakes = {
        ("nothing", "--runs-dir", str(runs)): "No run 'nothing'",
        ("all", "--runs-dir", str(tmp_path / "none")): "There are no runs in",
        ("gentle", bare, "--runs-dir", str(runs)): "several folders",
        (bare, "-o", str(tmp_path / "taken" / "r.html")): "cannot be written",
        (bare, "-o", str(tmp_path)): "cannot be written",
    }
    for flags, reason in mistakes.items():
        assert main(list(flags)) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and reason in said


def test_help_waits_for_no_library() -> None:
    code = (
        "import sys, explorer.report\n"
        "try: explorer.report.main(['--help'])\n"
        "except SystemExit: print({'pandas', 'altair', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("set()\n")


def test_the_app_gets_the_same_file_as_bytes(tmp_path: Path) -> None:
    name = write_run(tmp_path, "bare", (), done=False).run_id
    assert report_html(snapshot(tmp_path), [name]).startswith(b"<!doctype html>")


def test_a_record_of_an_import_that_lacks_numbers(tmp_path: Path) -> None:
    writer = write_run(tmp_path, "imported", (), done=False)
    writer.imported_epoch(replace(record("transfer", 1, 1, 0.5), val_acc=float("nan")))
    writer.close("done")
    shown = snapshot(tmp_path)
    assert "nan" not in Page(to_html(build(shown, list(shown.runs)))).text

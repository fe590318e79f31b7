"""Names of runs, classes, files and folders stay names: on every page, in charts, in the report, in
CSV and in a terminal. tests/browser/test_hostile_names.py asks a browser the same."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from explorer.changed import change_between, class_table, per_class
from explorer.data import Library
from explorer.desk import Row, Upload
from explorer.desk import to_csv as answers_csv
from explorer.report import report_html
from explorer.report_html import to_csv
from tests.hostile_runs import MARK, PAGES, hostile_names, write_hostile
from trainer.cli import inert
from trainer.runlog import Run

ORIGIN = "http://127.0.0.1:9"
NAMES = hostile_names(ORIGIN)
# Where Streamlit's front end shows text as it is; everything else it takes for Markdown.
PLAIN = {
    "text.body",
    "code.code_text",
    "selectbox.options",
    "selectbox.raw_value",
    "multiselect.options",
    "multiselect.raw_values",
    "text_input.default",
    "text_input.value",
    "text_input.placeholder",
    "text_area.default",
    "text_area.value",
}
# Columns of a table that Streamlit makes links, pictures and formatted text of.
ACTIVE_COLUMNS = ('"type": "link"', '"type": "image"', '"type": "markdown"')


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_hostile(tmp_path_factory.mktemp("hostile"), NAMES)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of other tools in folders and files of such names."""
    root = tmp_path_factory.mktemp("logs")
    for name in (name for name in NAMES if "/" not in name):
        (root / name).mkdir()
        (root / name / f"{name[:60]}.csv").write_text("epoch,val_accuracy\n0,0.4\n1,0.5\n")
        (root / name / "other.csv").write_text("photo,label\n")
    return root


def _page(name: str) -> None:
    from importlib import import_module

    import_module(f"explorer.pages.{name}").page()


def opened(name: str, run: Run, logs: Path, link: dict[str, str]) -> AppTest:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THAW_RUNS_DIR", str(run.path.parent))
        patch.setattr("sys.argv", ["streamlit_app.py"])
        app = AppTest.from_function(_page, default_timeout=60, args=(name,))
        app.query_params.update(link | ({"path": str(logs)} if name == "importing" else {}))
        if name in ("changed", "classify", "exporting"):
            app.query_params["run"] = run.run_id
        if name == "runs":
            app.query_params["ticked"] = run.run_id
        app.run()
    assert not app.exception, app.exception[0].value
    return app


def texts_of(message: Any, path: str) -> Iterator[tuple[str, str]]:
    """All texts of a protocol buffer with the names of their fields."""
    for field, value in message.ListFields():
        here = f"{path}.{field.name}"
        for one in value if field.is_repeated else [value]:
            if field.message_type is None:
                if isinstance(one, str):
                    yield here, one
            elif hasattr(one, "ListFields"):
                yield from texts_of(one, here)


def elements(node: Any) -> Iterator[tuple[str, Any]]:
    for child in getattr(node, "children", {}).values():
        if getattr(child, "proto", None) is not None:
            yield child.type, child.proto
        yield from elements(child)


class Tags(HTMLParser):
    """The tags and attributes of some HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def assert_harmless(html: str) -> None:
    for tag, attributes in Tags(html).found:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form"), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        assert MARK not in f"{attributes.get('style')} {attributes.get('class')}"
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            target = attributes.get(name) or ""
            assert not target or target.startswith(("data:", "#")), attributes


@pytest.mark.parametrize(
    ("page", "link"), [(name, link) for name, links in PAGES.items() for link in links]
)
def test_no_name_is_markdown_html_or_an_expression(
    run: Run, logs: Path, page: str, link: dict[str, str]
) -> None:
    app = opened(page, run, logs, link)
    seen = 0
    for kind, proto in elements(app.main):
        assert kind not in ("table", "arrow_table"), "st.table takes its cells for Markdown"
        for path, text in texts_of(proto, kind):
            seen += MARK in text
            if path.endswith(("html.body", "html.html")) or kind == "html":
                assert_harmless(text)
            elif path.endswith(".spec"):
                assert_only_data(json.loads(text))
            elif path.endswith(".columns"):
                assert not [kind for kind in ACTIVE_COLUMNS if kind in text]
            elif MARK in text and not path.endswith((".id", ".element_id", ".alt")):
                assert ".".join(path.split(".")[-2:]) in PLAIN, (path, text)
    assert seen or page in ("classify",), "the page shows none of the names: what is tested?"


def assert_only_data(spec: Any, key: str = "") -> None:
    """No name is in a place that Vega evaluates, or in one that it fetches."""
    if isinstance(spec, dict):
        for name, value in spec.items():
            assert name not in ("href", "url"), spec
            assert_only_data(value, name)
    elif isinstance(spec, list):
        for value in spec:
            assert_only_data(value, key)
    elif key in ("expr", "calculate", "filter", "test", "labelExpr", "update", "signal", "as"):
        assert MARK not in str(spec), (key, spec)


@pytest.mark.slow  # test_report.py asks the same of one name
def test_the_report_says_names_and_nothing_else(run: Run) -> None:
    snapshot = Library(run.path.parent).snapshot()
    html = report_html(snapshot, [name for name in snapshot.runs if "child" in name]).decode()
    assert html.count(MARK) > 50
    assert_harmless(html)
    assert "default-src 'none'" in html


def test_no_cell_of_a_csv_is_a_formula(run: Run) -> None:
    frame = pd.DataFrame({name: [name] for name in NAMES})
    change = change_between(run.predictions("before"), run.predictions("after"), run.classes)
    table = class_table(per_class(change), ("Before unfreezing", "After unfreezing"))
    uploads = [Row(Upload(str(n), name, b""), error=name) for n, name in enumerate(NAMES)]
    for text in (to_csv(frame), to_csv(table), answers_csv(uploads, []).decode()):
        for row in csv.reader(io.StringIO(text, newline="")):
            for cell in row:
                if MARK in cell:
                    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")), cell
                    assert cell.isprintable(), cell


def test_no_name_moves_the_cursor_of_a_terminal() -> None:
    for name in NAMES:
        assert inert(name).isprintable()

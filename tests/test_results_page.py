"""The results page: an experiment's table as it was written, with what its runs reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from explorer.data import Library
from explorer.overview import Overview
from explorer.results import Results, accuracies, dots, frame, headline, results
from tests.explorer_runs import write_run
from trainer import tested
from trainer.results import Entry, Table, list_tables, table_path, write_table
from trainer.runlog import list_runs, read_run


def _results() -> None:
    from explorer.pages import results

    results.page()


def results_page(**link: str) -> AppTest:
    app = AppTest.from_function(_results, default_timeout=30)
    for name, value in link.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception
    return app


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of an experiment, the second tested and with published figures; a third is gone."""
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.setenv("THAW_RUNS_DIR", str(folder))
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    write_run(folder, "a", [0.2, 0.5, 0.7])
    write_run(folder, "b", [0.2, 0.6])
    one, two = list_runs(folder)
    tested.write_tested(two, tested.Tested(40, 0.25, 2.5, 0.5, 0.2, 3, "0" * 64))
    entries = (
        Entry("head", one.run_id, {}),
        Entry("<b>whole</b>", two.run_id, {"test_acc": 0.28, "test_loss": 10.4}),
        Entry("gone", "20200101-000000-gone", {}),
    )
    write_table(folder, Table("lab", "What helps?", "flowers (standing in for oregon)", entries))
    return folder


def shown(runs: Path) -> Results:
    tables, broken = list_tables(runs)
    assert not broken
    return results(Library(runs).snapshot(), tables["lab"])


def test_a_row_for_each_run_that_is_there_with_published_figures_beside_ours(runs: Path) -> None:
    found = shown(runs)
    table = frame(found)
    assert found.gone == 1
    assert list(table["Model"]) == ["head", "<b>whole</b>"]
    assert list(table["Val accuracy"]) == pytest.approx([70, 60])
    assert table["Test accuracy"].isna().tolist() == [True, False]
    columns = list(table)
    place = columns.index("Test accuracy")
    assert columns[place : place + 2] == ["Test accuracy", "Test accuracy, published"]
    assert table["Test accuracy, published"][1] == pytest.approx(28)
    assert "Val accuracy, published" not in columns
    assert headline(found) == "Best in validation: head, 70.00%. Lowest: <b>whole</b>, 60.00%."
    assert "test acc, published" in found.as_csv


def test_the_chart_tells_the_published_figures_from_ours(runs: Path) -> None:
    points = accuracies(shown(runs))
    assert set(points["split"]) == {"Training", "Validation", "Test"}
    theirs = points[points["by"] == "published"]
    assert theirs[["model", "split", "accuracy"]].values.tolist() == [
        ["<b>whole</b>", "Test", pytest.approx(28)]
    ]
    layers = dots(points).to_dict()["layer"]
    assert layers[1]["mark"]["filled"] is False
    # One layer without it would draw the axis of all from zero.
    assert all(layer["encoding"]["x"]["scale"]["zero"] is False for layer in layers)


def test_the_page_shows_the_table_and_says_what_stands_in(runs: Path) -> None:
    app = results_page(experiment="lab")
    said = " ".join(str(element.value) for element in app.get("html"))
    assert "flowers (standing in for oregon)" in said
    assert "1 of its runs are not in the runs folder any more." in said
    assert "<b>whole" not in said
    assert len(app.dataframe) == 1
    assert any("hollow in the chart" in caption.value for caption in app.caption)


def test_without_experiments_the_page_says_how_to_run_one(runs: Path) -> None:
    table_path(runs, "lab").unlink()
    app = results_page()
    assert "trainer run oregon-finetune-sweep" in app.code[0].value


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[" * 100_000,
        "3",
        json.dumps({"title": "x", "data": "y", "entries": [{"model": 3}]}),
        json.dumps(
            {
                "title": "x",
                "data": "y",
                "entries": [{"model": "m", "run_id": "r", "published": {"test_acc": 1e400}}],
            }
        ),
    ],
)
def test_a_damaged_table_is_named_and_the_others_are_shown(runs: Path, damage: str) -> None:
    table_path(runs, "broken").write_text(damage)
    app = results_page(experiment="broken")
    assert app.selectbox[0].value == "lab"
    assert any("broken.results.json is damaged" in text.value for text in app.text)


def test_the_runs_page_has_the_test_accuracy_as_soon_as_there_is_one(runs: Path) -> None:
    overview, library = Overview(), Library(runs)
    before = overview.frame(library.snapshot())["Test accuracy"]
    assert before.notna().sum() == 1
    one = next(run for run in list_runs(runs) if run.run_id.endswith("-a"))
    tested.write_tested(read_run(one.path), tested.Tested(40, 0.75, 2.5, 0.5, 0.2, 3, "0" * 64))
    after = overview.frame(library.snapshot())["Test accuracy"]
    assert after[one.run_id] == pytest.approx(75)

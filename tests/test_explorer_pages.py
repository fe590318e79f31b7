"""The pages, run by Streamlit's own AppTest."""

from __future__ import annotations

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from tests.explorer_runs import write_finetune, write_run, write_trunk
from tests.test_evidence import predictions, save

APP = str(Path(__file__).resolve().parents[1] / "explorer/pages/app.py")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THAW_RUNS_DIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    return tmp_path


def compare_page(**link: str | list[str]) -> AppTest:
    app = AppTest.from_file(APP, default_timeout=30)
    for name, value in link.items():
        app.query_params[name] = value
    return app.run()


def _classify() -> None:
    from explorer.pages import classify

    classify.page()


def classify_page() -> AppTest:
    return AppTest.from_function(_classify, default_timeout=30).run()


def verdicts(app: AppTest) -> str:
    return "".join(block.value for block in app.html if 'role="list"' in block.value)


def test_without_runs_each_page_says_what_to_type(runs: Path) -> None:
    for app in (compare_page(), classify_page()):
        assert not app.exception
        typed = [block.value for block in app.code]
        assert f"python -m trainer --phase finetune --runs-dir {runs}" in typed
        assert any("--data" in line for line in typed)


def test_compare_shows_the_newest_family(runs: Path) -> None:
    trunk = write_trunk(runs)
    ids = [write_finetune(runs, trunk, n, [0.70, 0.74]).run_id for n in ("a", "b")]
    app = compare_page()
    assert not app.exception
    assert app.multiselect(key="runs").value == ids
    assert "+4.0 points at epoch 1 of 1" in verdicts(app)
    assert len(app.get("vega_lite_chart")) == 2
    assert app.dataframe[0].value["Run"].tolist() == ["a", "b"]
    assert app.query_params["runs"] == ids


def test_the_link_decides_what_is_shown(runs: Path) -> None:
    trunk = write_trunk(runs)
    first, second = (write_finetune(runs, trunk, n, [0.70, 0.74]).run_id for n in ("a", "b"))
    app = compare_page(runs=[first, "gone"], axis="Since unfreeze")
    assert app.multiselect(key="runs").value == [first]
    assert app.segmented_control(key="axis").value == "Since unfreeze"
    assert any("not every run" in note.value.lower() for note in app.caption)
    app.multiselect(key="runs").set_value([first, second]).run()
    assert not app.exception
    assert app.query_params["runs"] == [first, second]


def test_compare_says_whether_a_change_is_more_than_chance(runs: Path) -> None:
    trunk = write_trunk(runs)
    for name, wrong in (("good", set[int]()), ("same", {0, 1, 2})):
        writer = write_finetune(runs, trunk, name, [0.70, 0.74])
        save(writer.predictions("before"), predictions({0, 1, 3, *range(40, 60)}))
        save(writer.predictions("after"), predictions(wrong))
    app = compare_page()
    assert not app.exception
    assert "fixed 23, broke 0: better, beyond chance (p &lt; 0.001)" in verdicts(app)
    assert any("adjusted for the 2 runs shown" in note.value for note in app.caption)


def test_nothing_chosen_is_not_an_error(runs: Path) -> None:
    write_trunk(runs)
    app = compare_page()
    app.segmented_control(key="photos").set_value([]).run()
    assert "training or validation" in app.info[0].value
    app.multiselect(key="runs").set_value([]).run()
    assert not app.exception
    assert "Choose one run" in app.info[0].value


def test_a_run_that_has_only_begun(runs: Path) -> None:
    write_run(runs, "new", [], done=False)
    app = compare_page()
    assert not app.exception
    assert "No epoch has been evaluated yet" in app.info[0].value


def test_broken_runs_are_listed_and_the_others_load(runs: Path) -> None:
    good = write_trunk(runs)
    broken = write_run(runs, "broken", [0.1]).path
    (broken / "run.json").write_text("{")
    torn = write_run(runs, "torn", [0.1])
    with (torn.path / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n")
    for app in (compare_page(), classify_page()):
        assert not app.exception
        assert app.expander[0].label == "2 runs have a problem"
        assert set(app.expander[0].dataframe[0].value["Run"]) == {broken.name, torn.run_id}
    assert good in compare_page().multiselect(key="runs").value


def test_a_missing_parent_is_told(runs: Path) -> None:
    write_finetune(runs, "20260101-000000-gone", "child", [0.70, 0.74])
    app = compare_page()
    assert not app.exception
    assert any("drawn alone" in line.value for line in app.text)


def test_names_are_shown_as_they_are(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ids cannot hold markup, but a label must not depend on that."""
    write_trunk(runs)
    monkeypatch.setattr("explorer.data._labels", lambda noted: dict.fromkeys(noted, "<b>x</b>"))
    assert "&lt;b&gt;x&lt;/b&gt;" in verdicts(compare_page())

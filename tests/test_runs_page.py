"""The Runs page, run by Streamlit's own AppTest."""

from __future__ import annotations

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from explorer.annotations import Annotation, load_annotation, save_annotation
from tests.explorer_runs import record, write_finetune, write_run, write_trunk
from trainer.config import Config
from trainer.runlog import read_run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THAW_RUNS_DIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    return tmp_path


def _runs() -> None:
    from explorer.pages import runs

    runs.page()


def runs_page(**link: str | list[str]) -> AppTest:
    app = AppTest.from_function(_runs, default_timeout=30)
    for name, value in link.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception
    return app


def write_two(runs: Path) -> tuple[str, str]:
    """A trunk and its finetune, which is newer and so the first row."""
    trunk = write_trunk(runs)
    return trunk, write_finetune(runs, trunk, "child", [0.70, 0.74]).run_id


def names(app: AppTest) -> list[str]:
    return app.dataframe[0].value["Run"].tolist() if app.dataframe else []


def press(app: AppTest, label: str) -> None:
    next(button for button in app.button if button.label == label).click().run()
    assert not app.exception


def labels(app: AppTest) -> list[str]:
    return [button.label for button in app.button]


def texts(app: AppTest) -> str:
    return "\n".join(line.value for line in app.text)


def ticked(app: AppTest) -> list[str]:
    found: list[str] = app.session_state["ticked"]
    return found


def tick(app: AppTest, *places: int) -> None:
    """As a click on the boxes of these rows does."""
    app.session_state["runs-table"] = {"selection": {"rows": list(places)}}
    app.run()
    assert not app.exception


# --- what is shown ------------------------------------------------------------------------------


def test_without_runs_it_says_what_to_type(runs: Path) -> None:
    typed = [block.value for block in runs_page().code]
    assert f"python -m trainer --phase finetune --runs-dir {runs}" in typed


def test_the_table_of_runs_can_be_searched(runs: Path) -> None:
    write_two(runs)
    app = runs_page()
    assert names(app) == ["child", "trunk"]
    assert "Data" not in app.dataframe[0].value.columns
    assert "data flowers" in app.text[0].value
    app.text_input(key="search").set_value("finetune").run()
    assert names(app) == ["child"]
    assert app.text[0].value.startswith("1 of 2 runs.")


def test_where_nothing_fits_one_button_shows_all_again(runs: Path) -> None:
    write_two(runs)
    app = runs_page(search="nothing such", status="failed", phase="transfer", sort="Run")
    assert "No run fits" in app.info[0].value
    press(app, "Show all runs")
    assert names(app) == ["trunk", "child"]
    assert "search" not in app.query_params
    assert "status" not in app.query_params


def test_the_link_decides_what_is_shown(runs: Path) -> None:
    trunk, child = write_two(runs)
    save_annotation(runs / trunk, Annotation(tags=("paper",)))
    write_run(runs, "signs", [0.9], dataset={"name": "signs"})
    save_annotation(runs / child, Annotation(archived=True))
    assert names(runs_page()) == ["signs", "trunk"]
    assert names(runs_page(archived="true")) == ["signs", "child", "trunk"]
    assert names(runs_page(tags="paper")) == ["trunk"]
    assert names(runs_page(data="flowers")) == ["trunk"]
    assert names(runs_page(phase="finetune", archived="true")) == ["child"]
    link = {"sort": "Best accuracy", "order": "Ascending", "archived": "true"}
    assert names(runs_page(**link)) == ["trunk", "child", "signs"]
    assert names(runs_page(sort="no such", status="odd", phase="x")) == ["signs", "trunk"]


def test_only_filters_that_can_make_a_difference_are_there(runs: Path) -> None:
    write_trunk(runs)
    assert [choice.label for choice in runs_page().multiselect] == []
    write_run(runs, "other", [0.5], "scratch", dataset={"name": "signs"})
    assert [choice.label for choice in runs_page().multiselect] == ["Phase", "Data"]
    # What a link asks for can be seen, and taken back.
    assert runs_page(status="failed").multiselect(key="status").value == ["failed"]
    assert runs_page(data="gone").multiselect(key="data").value == ["gone"]


def test_broken_runs_are_listed(runs: Path) -> None:
    write_trunk(runs)
    broken = write_run(runs, "broken", [0.1]).path
    (broken / "run.json").write_text("{")
    app = runs_page()
    assert names(app) == ["trunk"]
    assert app.expander[0].label == "One run has a problem"


# --- ticks --------------------------------------------------------------------------------------


def test_ticks_are_in_the_link(runs: Path) -> None:
    trunk, child = write_two(runs)
    app = runs_page()
    assert labels(app) == []
    tick(app, 0, 1)
    assert app.query_params["ticked"] == [child, trunk]
    assert labels(app) == ["Compare (2)", "Archive", "Delete", "Untick"]
    again = runs_page(ticked=[trunk, "gone"])
    assert ticked(again) == [trunk]
    assert {"Compare (1)", "Classify", "What changed", "Export"} < set(labels(again))
    press(again, "Untick")
    assert "ticked" not in again.query_params
    assert labels(again) == []


def test_ticks_stay_with_their_runs(runs: Path) -> None:
    """New runs, another order, a filter: the places change, what is ticked does not."""
    trunk, _ = write_two(runs)
    app = runs_page()
    tick(app, 1)
    assert ticked(app) == [trunk]
    running = write_run(runs, "new", [0.1], done=False)
    app.run()
    assert names(app) == ["new", "child", "trunk"]
    assert ticked(app) == [trunk]
    app.selectbox(key="order").set_value("Ascending").run()
    assert names(app) == ["trunk", "child", "new"]
    assert ticked(app) == [trunk]
    app.selectbox(key="sort").set_value("Best accuracy").run()
    running.epoch(record("transfer", 1, 1, 0.99))
    app.run()
    assert names(app) == ["trunk", "child", "new"]
    app.text_input(key="search").set_value("child").run()
    assert ticked(app) == [trunk]
    assert any("Ticked but not shown: 1 of 1" in line.value for line in app.caption)
    tick(app, 0)
    assert len(ticked(app)) == 2
    app.text_input(key="search").set_value("").run()
    assert len(ticked(app)) == 2


def test_a_link_is_never_too_long(runs: Path) -> None:
    for number in range(41):
        write_run(runs, f"run-{number}", [0.5])
    app = runs_page()
    tick(app, *range(41))
    assert "Compare (41)" in labels(app)
    assert "ticked" not in app.query_params


def test_a_ticked_run_opens_on_the_other_pages(runs: Path) -> None:
    trunk, child = write_two(runs)
    for label in ("Classify", "What changed", "Export"):
        app = runs_page(ticked=child)
        press(app, label)
        assert app.session_state["asked"] == {"run": child}
    app = runs_page(ticked=[child, trunk])
    press(app, "Compare (2)")
    assert app.session_state["asked"] == {"runs": [child, trunk]}


# --- what is done with a run --------------------------------------------------------------------


def test_the_command_that_trains_a_run_again(runs: Path) -> None:
    config = Config("transfer", epochs=3, run_name="a b").to_dict()
    run = write_run(runs, "mine", [0.5], config=config, sweep={"id": "x"})
    app = runs_page(ticked=run.run_id)
    press(app, "Command")
    assert "  --epochs 3 \\\n  --run-name 'a b'" in app.code[0].value
    assert any("in a sweep" in line.value for line in app.caption)


def test_where_no_command_does_the_reason_is_told(runs: Path) -> None:
    app = runs_page(ticked=write_trunk(runs))
    press(app, "Command")
    assert len(app.code) == 0
    assert "only its log was imported" in texts(app)


def test_a_run_is_renamed_tagged_and_noted(runs: Path) -> None:
    trunk, child = write_two(runs)
    app = runs_page(ticked=child)
    press(app, "Edit")
    name, tags = app.text_input[1:3]
    name.set_value("**best** <b>run</b>")
    tags.set_value(" paper,, to keep ,paper")
    app.text_area[0].set_value("a note")
    press(app, "Save")
    noted = load_annotation(runs / child)
    assert noted == Annotation("**best** <b>run</b>", "a note", ("paper", "to keep"))
    assert names(app) == ["**best** <b>run</b>", "trunk"]
    assert app.dataframe[0].value["Tags"].iloc[0].tolist() == ["paper", "to keep"]
    assert ticked(app) == [child]
    assert "Save" not in labels(app)
    press(app, "Edit")
    assert [one.value for one in app.text_input[1:3]] == [noted.name, "paper, to keep"]
    assert load_annotation(runs / trunk) == Annotation()


def test_what_cannot_be_saved_is_told(runs: Path) -> None:
    run = write_trunk(runs)
    app = runs_page(ticked=run)
    press(app, "Edit")
    (runs / run / "annotations.json").mkdir()
    press(app, "Save")
    assert f"Cannot write {runs / run / 'annotations.json'}" in texts(app)
    app = runs_page(ticked=run)
    press(app, "Archive")
    assert "Cannot write" in texts(app)
    assert ticked(app) == [run]


def test_archived_runs_go_and_come_back(runs: Path) -> None:
    trunk, child = write_two(runs)
    app = runs_page(ticked=[trunk, child])
    press(app, "Archive")
    assert names(app) == []
    assert ticked(app) == []
    press(app, "Show all runs")
    assert app.toggle(key="archived").value
    assert app.dataframe[0].value["Archived"].tolist() == ["yes", "yes"]
    tick(app, 0)
    press(app, "Unarchive")
    assert not load_annotation(runs / child).archived
    assert load_annotation(runs / trunk).archived


def test_delete_asks_first(runs: Path) -> None:
    trunk, child = write_two(runs)
    app = runs_page(ticked=trunk)
    press(app, "Delete")
    assert "trunk, " in texts(app)
    assert "One run starts from here: child." in texts(app)
    press(app, "Keep")
    assert read_run(runs / trunk).epochs
    assert "Keep" not in labels(app)
    press(app, "Delete")
    sure = next(label for label in labels(app) if label.startswith("Delete this run, "))
    press(app, sure)
    assert [path.name for path in runs.iterdir()] == [child]
    assert names(app) == ["child"]
    assert ticked(app) == []
    assert "Keep" not in labels(app)


def test_several_are_deleted_at_once(runs: Path) -> None:
    app = runs_page(ticked=list(write_two(runs)))
    press(app, "Delete")
    assert "start from here" not in texts(app)  # the child goes too
    sure = next(label for label in labels(app) if label.startswith("Delete these 2 runs, "))
    press(app, sure)
    assert list(runs.iterdir()) == []
    assert app.subheader[0].value == "No runs yet"


def test_a_run_that_is_being_written_is_not_deleted(runs: Path) -> None:
    writer = write_run(runs, "busy", [0.5], done=False)
    app = runs_page(ticked=writer.run_id)
    press(app, "Delete")
    assert "being trained" in texts(app)
    press(app, next(label for label in labels(app) if label.startswith("Delete this run")))
    assert "stop the training first" in texts(app)
    assert read_run(writer.path).epochs


def test_a_dialog_about_a_run_that_is_gone_closes(runs: Path) -> None:
    trunk, _ = write_two(runs)
    app = runs_page(ticked=trunk)
    press(app, "Edit")
    (runs / trunk / "run.json").unlink()
    app.run()
    assert not app.exception
    assert "Save" not in labels(app)
    assert names(app) == ["child"]

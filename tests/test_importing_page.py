"""The import page: what it shows of logs before they are imported, and what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from explorer.data import Library, Snapshot
from explorer.importing import Reading, Wish, command, labelled, preview, read_uploads, table
from tests.conftest import shared
from tests.explorer_runs import write_trunk
from tests.test_imports import DAY, write_keras
from trainer.__main__ import main
from trainer.imports.logs import LogError
from trainer.imports.plan import alone, family, halves
from trainer.imports.read import read_all
from trainer.runlog import list_runs


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THAW_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    return tmp_path / "runs"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A transfer phase of three epochs and two finetunes of it."""
    write_keras(tmp_path / "logs/frozen", [0.5, 0.6, 0.7])
    write_keras(tmp_path / "logs/gentle", [0.72, 0.74], start=DAY + 1000)
    write_keras(tmp_path / "logs/bold", [0.65], start=DAY + 2000)
    return tmp_path / "logs"


def _page() -> None:
    from explorer.pages import importing

    importing.page()


def open_page(**link: str | list[str]) -> AppTest:
    app = AppTest.from_function(_page, default_timeout=30)
    for name, value in link.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception
    return app


def clicked(app: AppTest, label: str) -> AppTest:
    next(button for button in app.button if button.label == label).click()
    app.run()
    assert not app.exception
    return app


def verdicts(app: AppTest) -> str:
    return "".join(block.value for block in app.html if 'role="list"' in block.value)


FAMILY = "A transfer phase and its finetunes"


def test_without_a_path_the_page_says_what_it_reads(runs: Path) -> None:
    app = open_page()
    assert app.header[0].value == "Have you trained elsewhere? Bring the logs here."
    assert any("Keras CSVLogger" in caption.value for caption in app.caption)
    assert any("python -m trainer import" in block.value for block in app.code)


def test_a_family_is_shown_imported_and_led_to_compare(runs: Path, logs: Path) -> None:
    app = open_page(path=str(logs), **{"as": FAMILY})
    assert app.selectbox(key="trunk").value == "frozen"
    assert "+4.0 points at epoch 2 of 2 after unfreezing" in verdicts(app)
    assert len(app.get("vega_lite_chart")) == 1
    assert not runs.exists()
    typed = app.code[0].value
    assert typed.startswith(f"python -m trainer import {logs}/frozen --then {logs}/bold")
    clicked(app, "Import 3 runs")
    assert app.success[0].value == "Imported 3 runs."
    assert {run.phase: run.boundary for run in list_runs(runs)} == {"transfer": None, "finetune": 3}
    names = [run.run_id for run in list_runs(runs)]
    next(button for button in app.button if button.label == "Compare them").click().run()
    assert sorted(app.session_state["asked"]["runs"]) == sorted(names)


def test_the_command_line_shown_does_the_same(runs: Path, logs: Path, tmp_path: Path) -> None:
    app = open_page(path=str(logs), boundary="2", finetunes=["gentle"], **{"as": FAMILY})
    words = app.code[0].value.split()[3:]
    words[words.index("--runs-dir") + 1] = str(tmp_path / "other")
    assert main(words) == 0
    clicked(app, "Import 2 runs")
    here, there = list_runs(runs), list_runs(tmp_path / "other")
    assert [run.epochs for run in here] == [run.epochs for run in there]
    assert [run.boundary for run in here] == [None, 2]


def test_both_phases_in_one_log_are_divided_where_the_slider_stands(
    runs: Path, tmp_path: Path
) -> None:
    both = write_keras(tmp_path / "both", [0.5, 0.6, 0.7])
    write_keras(both, [0.8, 0.9], start=DAY + 1000)
    app = open_page(path=str(both), **{"as": "Both phases in one log"})
    assert app.slider(key="boundary").value == 3
    app.slider(key="boundary").set_value(2).run()
    assert "--boundary 2" in app.code[0].value
    clicked(app, "Import 2 runs")
    assert [len(run.epochs) for run in list_runs(runs)] == [2, 4]


def test_a_finetune_joins_a_run_that_is_here(runs: Path, tmp_path: Path) -> None:
    trunk = write_trunk(runs)
    log = write_keras(tmp_path / "later", [0.9])
    app = open_page(path=str(log), **{"as": "Finetunes of a run that is here"})
    assert f"--from {trunk}" in app.code[0].value
    clicked(app, "Import this run")
    run = next(run for run in list_runs(runs) if run.parent_run_id == trunk)
    assert run.boundary == 3


def test_what_is_here_already_is_said_and_not_imported_again(runs: Path, logs: Path) -> None:
    assert main(["import", str(logs), "--runs-dir", str(runs)]) == 0
    app = open_page(path=str(logs))
    assert app.info[0].value == "All of these logs are here already."
    assert not any(button.label.startswith("Import") for button in app.button)
    app.toggle(key="again").set_value(True).run()
    assert "--again" in app.code[0].value
    clicked(app, "Import 3 runs")
    assert len(list_runs(runs)) == 6


def test_another_path_forgets_a_boundary_that_does_not_fit(
    runs: Path, tmp_path: Path, logs: Path
) -> None:
    long = write_keras(tmp_path / "long", [0.1 + n / 100 for n in range(30)])
    app = open_page(path=str(long), boundary="25", **{"as": "Both phases in one log"})
    assert app.slider(key="boundary").value == 25
    app.text_input(key="path").set_value(str(logs / "frozen")).run()
    assert not app.exception
    assert app.slider(key="boundary").value == 2


@pytest.mark.parametrize("path", ["/no/such/folder", "x" * 5000, "\0", "/dev/null", "~nobody/logs"])
def test_a_path_without_logs_is_an_error_with_words(runs: Path, path: str) -> None:
    app = open_page(path=path)
    assert app.error[0].value == "These logs cannot be imported."
    assert not runs.exists()


def test_logs_that_are_left_out_are_listed(runs: Path, logs: Path) -> None:
    (logs / "data.csv").write_text("photo,label\n")
    app = open_page(path=str(logs))
    assert app.expander[0].label == "1 left out"
    [left_out] = [one.value for one in app.dataframe if "Why" in one.value]
    assert "without a column named epoch" in left_out["Why"].iloc[0]


def test_an_accuracy_that_is_not_known_can_be_named(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "lab.csv"
    path.write_text("epoch,loss,dice\n0,1.0,0.5\n1,0.9,0.6\n")
    app = open_page(path=str(path))
    assert "loss, dice" in app.text[0].value
    app.text_input(key="accuracy").set_value("dice").run()
    assert not app.exception
    assert "best accuracy 60.0% at epoch 2" in verdicts(app)
    assert "--accuracy dice" in app.code[0].value


def test_uploaded_files(runs: Path) -> None:
    app = open_page(**{"logs-from": "Files"})
    app.file_uploader[0].set_value(
        ("../../lab.csv", b"epoch,val_accuracy\n0,0.5\n1,0.75\n", "text/csv")
    ).run()
    assert not app.exception
    assert "best accuracy 75.0% at epoch 2" in verdicts(app)
    assert not app.code
    clicked(app, "Import this run")
    [run] = list_runs(runs)
    assert run.path.parent == runs
    assert run.info["imported"]["path"] == "lab.csv"


# --- without the page ---------------------------------------------------------------------------


def test_the_table_says_what_was_found(logs: Path, runs: Path) -> None:
    assert main(["import", str(logs / "gentle"), "--runs-dir", str(runs)]) == 0
    frame = table(labelled(read_all([logs]).logs), Library(runs).snapshot())
    assert frame["Name"].tolist() == ["bold", "frozen", "gentle"]
    assert frame["Best accuracy"].tolist() == pytest.approx([65, 70, 74])
    assert frame["At epoch"].tolist() == [1, 3, 2]
    assert frame["Here as"].fillna("").tolist() == ["", "", "gentle"]


def test_the_preview_draws_a_family_as_compare_would(logs: Path) -> None:
    found = labelled(read_all([logs]).logs)
    trunk = alone(found["frozen"])
    snapshot, names = preview([trunk, *family(trunk, [found["gentle"]])])
    assert [snapshot.labels[name] for name in names] == ["frozen", "gentle"]
    assert snapshot.runs[names[1]].parent_run_id == names[0]
    assert snapshot.runs[names[1]].boundary == 3


def test_logs_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    write_keras(tmp_path / "a/owl", [0.5])
    write_keras(tmp_path / "b/owl", [0.6], start=DAY + 9)
    logs = read_all([tmp_path / "a/owl", tmp_path / "b/owl"]).logs
    found = labelled(logs)
    assert len(found) == 2
    snapshot, names = preview([alone(log) for log in logs])
    assert len({snapshot.labels[name] for name in names}) == 2


def test_the_command_is_quoted(tmp_path: Path) -> None:
    log = read_all([write_keras(tmp_path / "my logs; rm", [0.5, 0.6])]).logs[0]
    typed = command(Wish((log,), boundary=1, renamed=True), Reading("tensorboard"), None, Path("r"))
    assert f"'{tmp_path}/my logs; rm'" in typed
    assert typed.endswith("--boundary 1 --format tensorboard --runs-dir r --run-name 'my logs; rm'")
    assert len(halves(log, 1)) == 2


def test_two_uploads_of_one_name_are_both_read() -> None:
    table_ = b"epoch,val_acc\n0,0.5\n"
    found = read_uploads([("history.csv", table_), ("history.csv", table_ + b"1,1\n")], Reading())
    assert [log.last_epoch for log in found.logs] == [2, 1]
    with pytest.raises(LogError, match=r"^It holds nothing that Thaw knows"):
        read_uploads([("..", b"")], Reading())


def test_food_101_lab_5_on_the_page(runs: Path) -> None:
    lab = shared("logs/CNN-food-101/lab5/logs")
    app = open_page(path=str(lab), **{"as": FAMILY})
    said = verdicts(app)
    assert "best accuracy 55.3%" in said
    assert "+0.4 points at epoch 9 of 15 after unfreezing (55.3%\u00a0→\u00a055.7%)" in said
    assert isinstance(Library(runs).snapshot(), Snapshot)

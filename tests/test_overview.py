"""The table of all runs: what is in it, which rows are shown in which order, what is folded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from explorer.annotations import Annotation, save_annotation
from explorer.data import Library
from explorer.overview import Overview, View, constants_line, folded, search, shown
from tests.explorer_runs import record, write_finetune, write_run, write_trunk
from tests.test_evidence import predictions, save
from trainer.schema import PhaseRecord


def table(runs_dir: Path) -> pd.DataFrame:
    return Overview().frame(Library(runs_dir).snapshot())


def write_many(runs_dir: Path) -> dict[str, str]:
    """A trunk and two finetunes that differ in rate and layers; ids by name."""
    trunk = write_trunk(runs_dir)
    ids = {"trunk": trunk}
    for name, lr, layers in (("slow", 1e-6, "20"), ("fast", 1e-4, "all")):
        config = {"lr": lr, "unfreeze": layers, "seed": 0, "schedule": {"name": "static"}}
        info: dict[str, Any] = {"parent_run_id": trunk, "config": config, "model": {"arch": "b0"}}
        writer = write_run(runs_dir, name, [0.70, 0.74, 0.72], "finetune", 3, **info)
        save(writer.predictions("before"), predictions(set(range(60))))
        save(writer.predictions("after"), predictions(set(range(20))))
        ids[name] = writer.run_id
    return ids


def names(frame: pd.DataFrame) -> list[str]:
    return frame["Run"].tolist()


# --- the rows -----------------------------------------------------------------------------------


def test_a_row_says_what_was_trained_and_what_came_of_it(tmp_path: Path) -> None:
    ids = write_many(tmp_path)
    frame = table(tmp_path)
    assert frame.index.tolist() == [ids["fast"], ids["slow"], ids["trunk"]]  # newest first
    row = frame.loc[ids["slow"]]
    assert (row["Run"], row["From"], row["Data"]) == ("slow", "trunk", "flowers")
    assert (row["Layers"], row["Learning rate"], row["Schedule"]) == ("20", 1e-6, "static")
    assert row["Best accuracy"] == pytest.approx(74)
    assert row["At epoch"] == 4
    assert row["Change"] == pytest.approx(4)
    assert row["95% interval"] == "+14.5 to +25.5"
    assert row["Curve"] == pytest.approx([70, 74, 72])
    assert (row["Time"], row["Memory"]) == (6, 100)
    trunk = frame.loc[ids["trunk"]]
    assert pd.isna(trunk["Layers"])
    assert pd.isna(trunk["Change"])


def test_a_run_of_two_phases_names_both(tmp_path: Path) -> None:
    writer = write_run(tmp_path, "both", [0.5, 0.6], done=False)
    writer.start_phase(PhaseRecord("finetune", 1, None, ("all",), 10))
    writer.epoch(record("finetune", 2, 1, 0.7))
    writer.close("done")
    write_trunk(tmp_path)
    frame = table(tmp_path)
    assert frame["Phase"].tolist() == ["transfer", "transfer + finetune"]
    assert names(shown(frame, View(phase=("finetune",)))) == ["both"]
    assert len(shown(frame, View(phase=("transfer",)))) == 2


def test_runs_without_settings_are_rows_too(tmp_path: Path) -> None:
    bare = write_run(tmp_path, "bare", [], done=False, config={"augmentation": 3, "lr": "x"})
    write_finetune(tmp_path, "gone", "lost", [0.7])
    frame = table(tmp_path)
    row = frame.loc[bare.run_id]
    assert row["Status"] == "running"
    assert row["Curve"] == []
    assert pd.isna(row["Best accuracy"])
    assert frame["From"].dropna().tolist() == ["gone"]


@pytest.mark.parametrize("odd", [{}, [1], 3, 10**400, True, "\udcfc", {"name": []}])
def test_a_run_json_that_holds_odd_values(tmp_path: Path, odd: Any) -> None:
    config = dict.fromkeys(("lr", "unfreeze", "schedule", "augmentation", "seed", "epochs"), odd)
    info: dict[str, Any] = {"config": config, "recipe": odd, "model": odd, "status": odd}
    for phase in ("finetune", "transfer"):
        write_run(tmp_path, phase, [0.5], phase, done=False, **info)
    frame = shown(table(tmp_path), View(words="flowers", sort="Learning rate"))
    assert constants_line(folded(frame)[1]).encode()
    assert len(shown(table(tmp_path), View(sort="Status", ascending=True))) == 2


def test_what_users_noted(tmp_path: Path) -> None:
    run = tmp_path / write_trunk(tmp_path)
    save_annotation(run, Annotation("mine", "keep for the paper", ("good", "b 0"), True))
    row = table(tmp_path).iloc[0]
    assert (row["Run"], row["Note"], row["Archived"]) == ("mine", "keep for the paper", "yes")
    assert row["Tags"] == ["good", "b 0"]


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    """Linux allows any bytes; half a character can reach no browser."""
    write_run(tmp_path, "odd", [0.5], dataset={"name": "gr\udcfcn"})
    assert table(tmp_path)["Data"].tolist() == ["gr?n"]


def test_a_row_is_made_again_only_when_its_run_was_read_again(tmp_path: Path) -> None:
    write_many(tmp_path)
    running = write_run(tmp_path, "running", [0.5], done=False)
    library, overview = Library(tmp_path), Overview()
    before = overview.frame(library.snapshot())
    running.epoch(record("transfer", 1, 1, 0.6))
    after = overview.frame(library.snapshot())
    kept = [a is b for a, b in zip(before["Curve"], after["Curve"], strict=True)]
    assert kept == [False, True, True, True]
    assert after["Curve"].iloc[0] == pytest.approx([50, 60])


def test_what_comes_from_elsewhere_is_always_new(tmp_path: Path) -> None:
    """Names, notes, predictions that are saved later, deleted runs: no run is read again."""
    trunk = write_trunk(tmp_path)
    child = write_finetune(tmp_path, trunk, "child", [0.7, 0.74])
    library, overview = Library(tmp_path), Overview()
    assert overview.frame(library.snapshot())["95% interval"].isna().all()
    save_annotation(tmp_path / trunk, Annotation("renamed"))
    save(child.predictions("before"), predictions(set(range(60))))
    save(child.predictions("after"), predictions(set(range(20))))
    frame = overview.frame(library.snapshot())
    assert frame.loc[child.run_id, "From"] == "renamed"
    assert frame.loc[child.run_id, "95% interval"] == "+14.5 to +25.5"
    (tmp_path / trunk / "run.json").unlink()
    assert overview.frame(library.snapshot()).index.tolist() == [child.run_id]


# --- which, and in which order ------------------------------------------------------------------


def test_a_search_finds_all_words_in_any_setting(tmp_path: Path) -> None:
    ids = write_many(tmp_path)
    save_annotation(tmp_path / ids["slow"], Annotation(note="For the Paper", tags=("oregon",)))
    frame = table(tmp_path)
    assert search(frame, " ").index.tolist() == frame.index.tolist()
    assert names(search(frame, "FINETUNE all")) == ["fast"]
    assert names(search(frame, "oregon paper")) == ["slow"]
    assert names(search(frame, ids["trunk"])) == ["trunk"]
    assert search(frame, "finetune nowhere").empty
    assert search(frame, "(").empty  # no pattern
    assert search(frame, "nan").empty  # what is missing is no word
    assert search(frame, "finetune none").empty


def test_filters_let_through_what_has_one_of_their_values(tmp_path: Path) -> None:
    ids = write_many(tmp_path)
    write_run(tmp_path, "other", [0.1], done=False, dataset={"name": "signs"})
    save_annotation(tmp_path / ids["slow"], Annotation(tags=("a", "b")))
    save_annotation(tmp_path / ids["fast"], Annotation(tags=("c",)))
    frame = table(tmp_path)
    assert names(shown(frame, View(status=("running",)))) == ["other"]
    assert names(shown(frame, View(status=("done", "running"), data=("signs",)))) == ["other"]
    assert names(shown(frame, View(phase=("finetune",)))) == ["fast", "slow"]
    assert names(shown(frame, View(tags=("b", "c")))) == ["fast", "slow"]
    assert names(shown(frame, View(tags=("b",), words="static"))) == ["slow"]
    nothing = shown(frame, View(words="x", status=("failed",), phase=("finetune",), tags=("b",)))
    assert nothing.columns.tolist() == frame.columns.tolist()
    assert nothing.empty


def test_archived_runs_are_shown_when_asked_for(tmp_path: Path) -> None:
    ids = write_many(tmp_path)
    save_annotation(tmp_path / ids["slow"], Annotation(archived=True))
    frame = table(tmp_path)
    assert names(shown(frame, View())) == ["fast", "trunk"]
    assert names(shown(frame, View(archived=True))) == ["fast", "slow", "trunk"]


@pytest.mark.parametrize(
    ("column", "descending", "ascending"),
    [
        ("Started", ["all", "9", "20", "trunk"], ["trunk", "20", "9", "all"]),
        ("Run", ["trunk", "all", "20", "9"], ["9", "20", "all", "trunk"]),
        ("Change", ["9", "all", "20", "trunk"], ["20", "all", "9", "trunk"]),
        ("Layers", ["all", "20", "9", "trunk"], ["9", "20", "all", "trunk"]),
        ("Recipe", ["all", "9", "20", "trunk"], ["all", "9", "20", "trunk"]),
    ],
)
def test_sorting(tmp_path: Path, column: str, descending: list[str], ascending: list[str]) -> None:
    """Numbers by size also where they are words; what is missing comes last, both ways."""
    trunk = write_trunk(tmp_path)
    for layers, best in (("20", 0.71), ("9", 0.80), ("all", 0.75)):
        config = {"unfreeze": layers}
        write_run(tmp_path, layers, [0.7, best], "finetune", 3, parent_run_id=trunk, config=config)
    frame = table(tmp_path)
    assert names(shown(frame, View(sort=column))) == descending
    assert names(shown(frame, View(sort=column, ascending=True))) == ascending


# --- folding ------------------------------------------------------------------------------------


def test_what_all_runs_share_is_folded_away(tmp_path: Path) -> None:
    ids = write_many(tmp_path)
    whole = table(tmp_path)
    frame, constants = folded(whole)
    assert constants == {"Status": "done", "Data": "flowers"} | constants
    assert not {"Status", "Data", "Recipe"} & set(frame.columns)
    assert {"Layers", "Learning rate", "Phase", "Network"} <= set(frame.columns)
    assert constants_line(constants).startswith("All: ")
    finetunes, constants = folded(search(whole, "finetune"))
    assert constants["Network"] == "b0"
    assert "Layers" in finetunes.columns
    alone, constants = folded(search(whole, "slow"))
    assert alone.index.tolist() == [ids["slow"]]
    assert constants == {}  # of one run everything is shown
    assert constants_line(constants) == ""


def test_notes_have_columns_where_there_are_any(tmp_path: Path) -> None:
    ids = write_many(tmp_path)
    frame, _ = folded(table(tmp_path))
    assert not {"Tags", "Note", "Archived"} & set(frame.columns)
    save_annotation(tmp_path / ids["slow"], Annotation(note="x", tags=("a",), archived=True))
    frame, _ = folded(table(tmp_path))
    assert {"Tags", "Note", "Archived"} <= set(frame.columns)
    alone, _ = folded(shown(table(tmp_path), View(phase=("transfer",))))
    assert not {"Change", "95% interval"} & set(alone.columns)

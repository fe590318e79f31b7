"""The table of all runs: what is in it, what is folded away, what a search finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from explorer.data import Library
from explorer.evidence import findings
from explorer.overview import constants_line, folded, overview, search, selected_ids
from tests.explorer_runs import write_finetune, write_run, write_trunk
from tests.test_evidence import predictions, save


def table(runs_dir: Path) -> pd.DataFrame:
    snapshot = Library(runs_dir).snapshot()
    return overview(snapshot, findings(snapshot, snapshot.runs))


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


def test_what_all_runs_share_is_folded_away(tmp_path: Path) -> None:
    ids = write_many(tmp_path)
    whole = table(tmp_path)
    shown, constants = folded(whole)
    assert constants == {"Status": "done", "Data": "flowers"} | constants
    assert not {"Status", "Data", "Recipe"} & set(shown.columns)
    assert {"Layers", "Learning rate", "Phase", "Network"} <= set(shown.columns)
    assert constants_line(constants).startswith("All: ")
    finetunes, constants = folded(search(whole, "finetune"))
    assert constants["Network"] == "b0"
    assert "Layers" in finetunes.columns
    alone, constants = folded(search(whole, "slow"))
    assert alone.index.tolist() == [ids["slow"]]
    assert constants == {}  # of one run everything is shown
    assert constants_line(constants) == ""


def test_a_search_finds_all_words_in_any_setting(tmp_path: Path) -> None:
    ids = write_many(tmp_path)
    frame = table(tmp_path)
    assert search(frame, "").index.tolist() == frame.index.tolist()
    assert search(frame, "FINETUNE all").index.tolist() == [ids["fast"]]
    assert search(frame, "finetune nowhere").empty
    assert search(frame, "(").empty  # no pattern


def test_runs_without_settings_are_rows_too(tmp_path: Path) -> None:
    bare = write_run(tmp_path, "bare", [], done=False, config={"augmentation": 3, "lr": "x"})
    write_finetune(tmp_path, "gone", "lost", [0.7])
    frame = table(tmp_path)
    row = frame.loc[bare.run_id]
    assert row["Status"] == "running"
    assert row["Curve"] == []
    assert pd.isna(row["Best accuracy"])
    assert frame["From"].dropna().tolist() == ["gone"]


def test_ticks_beyond_the_table_are_left_out(tmp_path: Path) -> None:
    ids = write_many(tmp_path)
    assert selected_ids(table(tmp_path), [0, 2, 7]) == [ids["fast"], ids["trunk"]]

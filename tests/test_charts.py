"""Charts: what is drawn, by the frame and by the Vega-Lite specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from explorer.charts import (
    RUN_COLOURS,
    SPLITS,
    TRUNK_COLOURS,
    around_boundary,
    boundaries,
    colours,
    long_frame,
    overlay,
)
from explorer.data import Library, epochs_frame, lineage
from tests.explorer_runs import write_finetune, write_run, write_trunk


def frame_of(runs_dir: Path, *selected: str) -> pd.DataFrame:
    found = Library(runs_dir).snapshot()
    return epochs_frame(found, lineage(found, selected)[0])


@pytest.fixture
def frame(tmp_path: Path) -> pd.DataFrame:
    """Two finetunes of two epochs from one trunk of three."""
    trunk = write_trunk(tmp_path)
    a = write_finetune(tmp_path, trunk, "a", [0.70, 0.75, 0.72]).run_id
    b = write_finetune(tmp_path, trunk, "b", [0.70, 0.60, 0.65]).run_id
    return frame_of(tmp_path, a, b)


def layers(spec: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for layer in spec["layer"]:
        found.setdefault(layer["mark"]["type"], []).append(layer)
    return found


def test_points_that_were_not_measured_are_not_drawn(frame: pd.DataFrame) -> None:
    rows = long_frame(frame, "accuracy", "total", SPLITS)
    assert len(rows[rows["split"] == "Validation"]) == 10
    train = rows[rows["split"] == "Train"]
    assert sorted(train["phase_epoch"].unique()) == [1, 2, 3]
    assert not rows["value"].isna().any()


def test_axes(frame: pd.DataFrame) -> None:
    total = long_frame(frame, "loss", "total", ["Validation"])
    since = long_frame(frame, "loss", "since", ["Validation"])
    assert (total["x"].min(), total["x"].max()) == (0, 5)
    assert (since["x"].min(), since["x"].max()) == (-3, 2)


def test_best_and_start_are_marked(frame: pd.DataFrame) -> None:
    for metric in ("accuracy", "loss"):
        rows = long_frame(frame, metric, "total", SPLITS)
        best = rows[rows["mark"] == "best"]
        assert list(zip(best["run"], best["epoch"], strict=True)) == [("a", 4), ("b", 5)]
        assert (best["split"] == "Validation").all()
        assert rows[rows["mark"] == "start"]["epoch"].tolist() == [3, 3]


def test_boundary_is_a_rule_and_a_band_with_a_label(frame: pd.DataFrame) -> None:
    assert boundaries(frame, "total").to_dict("records") == [
        {"start": 3.0, "end": 5.0, "text": "unfrozen"}
    ]
    assert boundaries(frame, "since")[["start", "end"]].values.tolist() == [[0.0, 2.0]]
    found = layers(overlay(frame, "accuracy", "total").to_dict())
    assert found["rect"][0]["encoding"]["x2"]["field"] == "end"
    assert "rule" in found
    assert found["text"][0]["encoding"]["text"]["field"] == "text"


def test_a_run_just_unfrozen_has_a_band(tmp_path: Path) -> None:
    run = write_finetune(tmp_path, "gone", "new", [0.7], done=False).run_id
    assert boundaries(frame_of(tmp_path, run), "total")[["start", "end"]].values.tolist() == [
        [3, 4]
    ]


def test_no_boundary_no_band(tmp_path: Path) -> None:
    frame = frame_of(tmp_path, write_trunk(tmp_path))
    assert boundaries(frame, "total").empty
    overlay(frame, "loss", "since").to_dict()


def test_colour_is_the_run_and_dash_the_split(frame: pd.DataFrame) -> None:
    palette = colours(frame)
    assert palette == {"trunk": TRUNK_COLOURS[0], "a": RUN_COLOURS[0], "b": RUN_COLOURS[1]}
    [line] = layers(overlay(frame, "accuracy", "total").to_dict())["line"]
    encoding = line["encoding"]
    assert encoding["color"]["field"] == "run"
    assert encoding["color"]["scale"] == {
        "domain": list(palette),
        "range": list(palette.values()),
    }
    dash = encoding["strokeDash"]
    assert (dash["field"], dash["scale"]["domain"]) == ("split", ["Validation", "Train"])
    assert dash["scale"]["range"][0] == [1, 0]


def test_the_legend_selects_from_the_first_layer_that_has_it(frame: pd.DataFrame) -> None:
    """Otherwise Vega-Lite draws a legend on which clicks do nothing."""
    spec = overlay(frame, "accuracy", "total").to_dict()
    chosen = next(param for param in spec["params"] if param["name"] == "chosen")
    assert chosen["bind"] == "legend"
    assert chosen["select"]["fields"] == ["run"]
    first = next(layer for layer in spec["layer"] if "color" in layer.get("encoding", {}))
    assert chosen["views"] == [first["name"]]
    assert first["mark"]["type"] == "line"
    assert first["encoding"]["opacity"]["condition"]["param"] == "chosen"


def test_the_pointer_finds_the_nearest_point_on_top(frame: pd.DataFrame) -> None:
    spec = overlay(frame, "accuracy", "total").to_dict()
    hover = next(param for param in spec["params"] if param["name"] == "hover")
    assert hover["select"]["nearest"] is True
    assert hover["views"] == [spec["layer"][-1]["name"]]


def test_scales_follow_the_data(frame: pd.DataFrame) -> None:
    [line] = layers(overlay(frame, "accuracy", "total").to_dict())["line"]
    y = line["encoding"]["y"]
    assert y["scale"]["zero"] is False
    assert "domain" not in y["scale"]  # a live run must not change the specification
    assert y["axis"]["format"] == ".0%"
    assert line["encoding"]["x"]["axis"]["tickMinStep"] == 1
    near = frame.assign(val_acc=0.701, train_acc=0.702)
    [line] = layers(overlay(near, "accuracy", "total").to_dict())["line"]
    assert line["encoding"]["y"]["axis"]["format"] == ".1%"


def test_a_live_run_changes_data_and_not_the_specification(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path)
    specs = []
    for accuracies in ([0.70, 0.72], [0.70, 0.72, 0.74]):
        run = write_finetune(tmp_path, trunk, "live", accuracies, done=False)
        spec = overlay(frame_of(tmp_path, run.run_id), "accuracy", "total").to_dict()
        specs.append(_without_data(spec, run.run_id))
        (run.path / "run.json").unlink()
    assert specs[0] == specs[1]


def _without_data(spec: dict[str, Any], run_id: str) -> dict[str, Any]:
    del spec["datasets"]
    names: dict[str, str] = {}
    for layer in spec["layer"]:
        name = layer["data"]["name"]
        layer["data"] = names.setdefault(name, str(len(names)))
        layer.pop("name", None)
        scale = layer["encoding"].get("color", {}).get("scale", {})
        scale.pop("domain", None)  # two runs in this test, so two names
    for param in spec["params"]:
        param.pop("views")
    return spec


def test_one_split_needs_no_dash_legend(frame: pd.DataFrame) -> None:
    [line] = layers(overlay(frame, "loss", "total", ["Validation"]).to_dict())["line"]
    assert line["encoding"]["strokeDash"]["legend"] is None


def test_around_the_boundary(frame: pd.DataFrame) -> None:
    assert around_boundary(frame, before=1)["since_unfreeze"].min() == -1
    assert len(around_boundary(frame, before=1)) == 8


def test_a_direct_run_is_a_dot(tmp_path: Path) -> None:
    frame = frame_of(tmp_path, write_run(tmp_path, "direct", [0.4], "direct").run_id)
    assert long_frame(frame, "accuracy", "total", SPLITS)["mark"].tolist() == ["best"]


def test_more_runs_than_colours(tmp_path: Path) -> None:
    ids = [write_run(tmp_path, f"r{i}", [0.1, 0.2]).run_id for i in range(14)]
    palette = colours(frame_of(tmp_path, *ids))
    assert palette["r12"] == palette["r0"]
    overlay(frame_of(tmp_path, *ids), "accuracy", "since").to_dict()


def test_nothing_to_draw_is_still_a_chart(tmp_path: Path) -> None:
    overlay(frame_of(tmp_path), "accuracy", "total").to_dict()

"""Charts: what is drawn, by the frame and by the Vega-Lite specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from explorer.charts import RUN_COLOURS, SHAPES, TRUNK_COLOURS, colours, overlay, run_colours
from explorer.curves import (
    SPLITS,
    Look,
    around_boundary,
    boundaries,
    long_frame,
    panel,
    seed_means,
)
from explorer.data import Library, epochs_frame, lineage
from explorer.settings import varied, with_settings, without_seed
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
    assert encoding["color"]["field"] == "colour"
    assert encoding["color"]["scale"] == {
        "domain": list(palette),
        "range": list(palette.values()),
    }
    dash = encoding["strokeDash"]
    assert (dash["field"], dash["scale"]["domain"]) == ("dash", ["Validation", "Train"])
    assert dash["scale"]["range"][0] == [1, 0]


def test_the_legend_selects_from_the_first_layer_that_has_it(frame: pd.DataFrame) -> None:
    """Otherwise Vega-Lite draws a legend on which clicks do nothing."""
    spec = overlay(frame, "accuracy", "total").to_dict()
    chosen = next(param for param in spec["params"] if param["name"] == "chosen")
    assert chosen["bind"] == "legend"
    assert chosen["select"]["fields"] == ["colour"]
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


def test_flat_curves_are_flat_and_no_two_ticks_are_called_the_same(frame: pd.DataFrame) -> None:
    """Accuracies of 2 in 24 and 6 in 72 differ in the last bit: six ticks used to say 8.3%."""
    flat = frame.assign(val_acc=2 / 24, train_acc=6 / 72 + 1e-9)
    [line] = layers(overlay(flat, "accuracy", "total").to_dict())["line"]
    y = line["encoding"]["y"]
    assert y["scale"]["domain"] == pytest.approx([0.081, 0.085])
    assert (y["axis"]["format"], y["axis"]["tickMinStep"]) == (".1%", 0.001)
    none = frame.assign(val_acc=0.0, train_acc=0.0)
    [line] = layers(overlay(none, "accuracy", "total").to_dict())["line"]
    assert line["encoding"]["y"]["scale"]["domain"][0] == 0


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
    for part in (spec, *spec["layer"]):
        if "data" in part:
            name = part["data"]["name"]
            part["data"] = names.setdefault(name, str(len(names)))
    for layer in spec["layer"]:
        layer.pop("name", None)
        for channel in ("color", "shape"):  # two runs in this test, so two names
            layer["encoding"].get(channel, {}).get("scale", {}).pop("domain", None)
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


def test_more_runs_than_colours_differ_in_shape(tmp_path: Path) -> None:
    ids = [write_run(tmp_path, f"r{i}", [0.1, 0.2]).run_id for i in range(14)]
    spec = overlay(frame_of(tmp_path, *ids), "accuracy", "total").to_dict()
    [best] = [layer for layer in spec["layer"] if "shape" in layer.get("encoding", {})]
    shape, colour = (best["encoding"][channel]["scale"] for channel in ("shape", "color"))
    drawn = list(zip(shape["range"], colour["range"], strict=True))
    assert len(set(drawn)) == 14
    assert set(shape["range"]) == set(SHAPES)


# --- by settings ------------------------------------------------------------------------------


@pytest.fixture
def seeds(tmp_path: Path) -> pd.DataFrame:
    """Two learning rates with two seeds each, from one trunk."""
    found = Library(_write_seeds(tmp_path)).snapshot()
    selected = [name for name in found.runs if found.runs[name].phase == "finetune"]
    assert varied(found, selected) == ["Learning rate", "Seed"]
    frame = with_settings(epochs_frame(found, lineage(found, selected)[0]), found)
    return seed_means(frame, without_seed(found, selected))


def _write_seeds(runs_dir: Path) -> Path:
    trunk = write_trunk(runs_dir)
    for rate, seed, last in ((1e-3, 0, 0.8), (1e-3, 1, 0.6), (1e-5, 0, 0.71), (1e-5, 1, 0.73)):
        config = {"lr": rate, "unfreeze": "20", "seed": seed}
        write_run(
            runs_dir,
            f"lr{rate}-{seed}",
            [0.7, last],
            "finetune",
            3,
            parent_run_id=trunk,
            config=config,
        )
    return runs_dir


def test_seeds_are_drawn_as_their_mean_and_range(seeds: pd.DataFrame) -> None:
    rows = long_frame(seeds, "accuracy", "since", ["Validation"])
    last = rows[rows["x"] == 1].set_index("run")
    assert sorted(last.index) == ["lr 1e-3", "lr 1e-5"]
    assert last.loc["lr 1e-3", ["value", "low", "high"]].tolist() == pytest.approx([0.7, 0.6, 0.8])
    assert last["seeds"].tolist() == [2, 2]
    assert (last["mark"] == "best").all()
    assert rows.groupby("run")["mark"].apply(lambda m: (m == "start").sum()).loc["lr 1e-3"] == 1
    areas = layers(overlay(seeds, "accuracy", "since").to_dict())["area"]
    assert (areas[0]["encoding"]["y"]["field"], areas[0]["encoding"]["y2"]["field"]) == (
        "low",
        "high",
    )


def test_the_mean_of_equal_seeds_is_one_of_them(seeds: pd.DataFrame) -> None:
    frame = seeds[(seeds["role"] == "trunk") | seeds["run_id"].str.endswith("lr0.001-0")]
    each = long_frame(frame.drop(columns="group"), "loss", "total", SPLITS)
    mean = long_frame(frame, "loss", "total", SPLITS)
    assert mean["value"].tolist() == pytest.approx(each["value"].tolist())
    assert mean["mark"].tolist() == each["mark"].tolist()


def test_colour_and_dash_can_stand_for_settings(seeds: pd.DataFrame) -> None:
    frame = seeds.drop(columns="group")
    look = Look(colour="Learning rate", dash="Seed")
    [line] = layers(overlay(frame, "accuracy", "since", SPLITS, look).to_dict())["line"]
    assert line["encoding"]["color"]["scale"]["domain"] == ["before unfreezing", "1e-5", "1e-3"]
    dash = line["encoding"]["strokeDash"]["scale"]
    assert dash["domain"] == ["0", "1", "before unfreezing"]
    assert dash["range"][0] != dash["range"][1]
    assert line["encoding"]["strokeWidth"]["field"] == "split"
    drawn = run_colours(frame, "Learning rate")
    assert len(set(drawn.values())) == 3  # the trunk, and two rates


def test_smoothing_stays_within_a_phase(tmp_path: Path) -> None:
    run = write_trunk(tmp_path)
    child = write_finetune(tmp_path, run, "a", [0.7, 0.9, 0.5]).run_id
    frame = frame_of(tmp_path, child)
    rows = long_frame(frame, "accuracy", "total", ["Validation"], Look(smoothing=0.5))
    first = rows[(rows["phase"] == "finetune") & (rows["phase_epoch"] == 0)].iloc[0]
    assert first["value"] == first["raw"] == 0.7
    after = rows[rows["phase"] == "finetune"]
    # Weights 1/2 and 1, then 1/4, 1/2 and 1, as TensorBoard's without bias.
    assert after["value"].tolist() == pytest.approx(
        [0.7, (0.35 + 0.9) / 1.5, (0.175 + 0.45 + 0.5) / 1.75]
    )
    assert after["raw"].tolist() == [0.7, 0.9, 0.5]
    look = Look(smoothing=0.5)
    found = layers(overlay(frame, "accuracy", "total", SPLITS, look).to_dict())
    assert [line["encoding"]["y"]["field"] for line in found["line"]] == ["value", "raw"]


def test_a_logarithmic_loss(frame: pd.DataFrame) -> None:
    for metric, kind in (("loss", "log"), ("accuracy", None)):
        spec = overlay(frame, metric, "total", SPLITS, Look(log=True)).to_dict()  # type: ignore[arg-type]
        [line] = layers(spec)["line"]
        assert line["encoding"]["y"]["scale"].get("type") == kind


def test_panels_hold_each_epoch_once(frame: pd.DataFrame) -> None:
    before = long_frame(panel(frame, "before"), "accuracy", "total", ["Validation"])
    after = long_frame(panel(frame, "after"), "accuracy", "since", ["Validation"])
    assert before[["run", "x"]].values.tolist() == [["trunk", x] for x in range(4)]
    assert after[after["run"] == "a"]["x"].tolist() == [0, 1, 2]
    assert after["x"].min() == 0


def test_the_wheel_zooms_only_with_a_key(frame: pd.DataFrame) -> None:
    spec = overlay(frame, "accuracy", "total").to_dict()
    zoom = next(param for param in spec["params"] if param["name"] == "zoom")
    assert zoom["bind"] == "scales"
    assert "ctrlKey" in zoom["select"]["zoom"]
    assert "touch" in zoom["select"]["translate"]


def test_long_curves_are_thinned_but_keep_marks_and_ends(tmp_path: Path) -> None:
    accuracies = [0.5] * 3001
    accuracies[1777] = 0.9
    run = write_run(tmp_path, "long", accuracies).run_id
    rows = long_frame(frame_of(tmp_path, run), "accuracy", "total", ["Validation"])
    assert len(rows) < 600
    assert {0, 1777, 3000} <= set(rows["epoch"])
    assert rows[rows["mark"] == "best"]["epoch"].tolist() == [1777]


def test_nothing_to_draw_is_still_a_chart(tmp_path: Path) -> None:
    overlay(frame_of(tmp_path), "accuracy", "total").to_dict()

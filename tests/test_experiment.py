"""Recipes, their table of results, and the test split."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from typing import Any

import pytest

from trainer.__main__ import main
from trainer.experiment import ExperimentError, find_experiment, packaged, read_experiment
from trainer.grid import SweepError
from trainer.results import Entry, Row, data_of, list_tables, markdown, to_csv
from trainer.runlog import Run, RunError, list_runs
from trainer.tested import read_tested

RECIPE = """
title = "Does it help?"
data = "{data}"
arch = "mobilenet_v3_small"
weights = "none"
batch-size = 8

[[stage]]
name = "head"
phase = "transfer"
epochs = 1
published = [{{ test_acc = 0.5, val_loss = 1.5 }}]

[[stage]]
name = "rates"
phase = "finetune"
from = "head"
epochs = 1
unfreeze = 3
lr = [1e-3, 1e-4]
published = [{{ lr = 1e-4, val_acc = 0.25 }}]

[[stage]]
name = "all"
phase = "finetune"
from = "head"
epochs = 1
unfreeze = "all"
"""


@pytest.fixture
def split_photos(photos: Path, tmp_path: Path) -> Path:
    """The photos of conftest as train/ and test/."""
    root = tmp_path / "data"
    for folder in sorted(p for p in photos.iterdir() if p.is_dir()):
        for number, photo in enumerate(sorted(folder.iterdir())):
            place = root / ("test" if number % 4 == 0 else "train") / folder.name
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(photo, place)
    return root


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_recipe_runs_tests_once_and_goes_on(
    split_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path / "mine.toml", RECIPE.format(data=split_photos))
    runs_dir = tmp_path / "runs"
    command = ["run", str(recipe), "--runs-dir", str(runs_dir), "--cache-dir", str(tmp_path / "c")]
    assert main(command) == 0
    runs = list_runs(runs_dir)
    assert [run.info["recipe"] for run in runs] == ["mine/head", *["mine/rates"] * 3, "mine/all"]
    head = runs[0]
    assert {run.parent_run_id for run in runs[1:]} == {head.run_id}
    tested = [read_tested(run) for run in runs]
    photos = len(list(split_photos.glob("test/*/*")))
    assert all(one is not None and one.photos == photos for one in tested)
    rows = list(csv.DictReader(io.StringIO((runs_dir / "mine.csv").read_text())))
    assert [row["model"] for row in rows] == [
        "head",
        "rates: lr 0.0001",
        "rates: lr 0.001",
        "rates: control",
        "all",
    ]
    assert rows[0]["test acc, published"] == "0.5000"
    assert [row["val acc, published"] for row in rows] == ["–", "0.2500", "–", "–", "–"]
    assert "| head |" in (runs_dir / "mine.md").read_text()
    written, _ = list_tables(runs_dir)
    assert [one.run_id for one in written["mine"].entries] == [row["run"] for row in rows]
    assert written["mine"].entries[0].published == {"test_acc": 0.5, "val_loss": 1.5}
    times = [(run.path / "test.json").stat().st_mtime_ns for run in runs]
    assert main(command) == 0
    assert [run.run_id for run in list_runs(runs_dir)] == [run.run_id for run in runs]
    assert [(run.path / "test.json").stat().st_mtime_ns for run in runs] == times
    # Where and how fast is no other training.
    assert main([*command, "--cache-limit", "1GB", "--device", "cpu"]) == 0
    assert [run.run_id for run in list_runs(runs_dir)] == [run.run_id for run in runs]
    assert main([*command, "--epochs", "2", "--limit", "6"]) == 0
    assert "published" not in (runs_dir / "mine.csv").read_text()
    assert "5 runs" not in capsys.readouterr().err


def test_a_run_is_tested_by_itself(
    split_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--runs-dir", str(tmp_path / "runs")]
    flags = ["--arch", "mobilenet_v3_small", "--weights", "none", "--epochs", "1", "--no-cache"]
    assert main(["--phase", "transfer", "--data", str(split_photos), *flags, *place]) == 0
    (run,) = list_runs(tmp_path / "runs")
    assert read_tested(run) is None
    assert main(["test", run.run_id, *place]) == 0
    assert "test photos" in capsys.readouterr().out
    (run.path / "test.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        read_tested(run)
    (run.path / "test.json").unlink()
    shutil.move(split_photos, tmp_path / "moved")
    assert main(["test", run.run_id, "--data", str(tmp_path / "moved"), *place]) == 0
    shutil.rmtree(tmp_path / "moved" / "test")
    (run.path / "test.json").unlink()
    assert main(["test", run.run_id, "--data", str(tmp_path / "moved"), *place]) == 2
    assert "has no test photos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[stage]", "not valid TOML"),
        ("title = 1\n", "title must be a text"),
        ("photos = 0\n[[stage]]\nname = 'a'\n", "photos must be a whole number"),
        ("stage = 3", "no \\[\\[stage\\]\\]"),
        ("[[stage]]\nphase = 'transfer'\n", "a name of its own"),
        ("[[stage]]\nname = 'a'\n[[stage]]\nname = 'a'\n", "a name of its own"),
        ("[[stage]]\nname = 'a'\nfrom = 'b'\n", "no single training before it"),
        ("[[stage]]\nname = 'a'\nepoch = 3\n", "Did you mean epochs"),
        ("[[stage]]\nname = 'a'\nepochs = 'x'\n", "whole number"),
        ("[[stage]]\nname = 'a'\npublished = [{ lr = 1e-3 }]\n", "needs numbers"),
        ("[[stage]]\nname = 'a'\npublished = [{ val_acc = inf }]\n", "needs numbers"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SweepError, match=message):
        read_experiment(write(tmp_path / "r.toml", text))


def test_random_weights_stay_random_whatever_is_chosen_for_all() -> None:
    chosen = packaged()["oregon-scratch-vs-transfer"].with_settings({"weights": "f.pth"})
    assert [stage.settings.get("weights") for stage in chosen.stages] == ["none", "f.pth"]
    (cnn10, direct, *_) = (
        packaged()["signs-transfer-modes"].with_settings({"arch": "resnet18"}).stages
    )
    assert (cnn10.settings["arch"], direct.settings["arch"]) == ("cnn10", "resnet18")


def test_runs_say_what_their_data_stands_in_for() -> None:
    experiment = packaged()["oregon-transfer"]
    (own,) = experiment.with_settings({"data": "oregon"}).stages
    (other,) = experiment.with_settings({"data": "/photos/flowers"}).stages
    assert "stand_in_for" not in own.settings
    assert other.settings["stand_in_for"] == "oregon"
    run = Run(Path("x"), {"dataset": {"name": "flowers"}})  # trained before the recipe asked for it
    assert data_of(run, "oregon") == "flowers (standing in for oregon)"
    assert data_of(run, None) == "flowers"


@pytest.mark.parametrize(
    ("data", "train", "rejected", "limit", "same"),
    [
        ("oregon", 70, 0, None, True),  # by its name, whatever could be read
        ("/my/wildlife", 8_950, 0, None, True),  # by the number of its photos and classes
        ("/my/wildlife", 8_949, 1, None, True),
        ("/my/wildlife", 8_949, 0, None, False),
        ("oregon", 8_950, 0, 20, False),
    ],
)
def test_published_figures_are_for_the_recipe_s_own_data(
    data: str, train: int, rejected: int, limit: int | None, same: bool
) -> None:
    experiment = packaged()["oregon-transfer"]
    (stage,) = experiment.stages
    dataset = {"counts": {"train": train, "val": 3_836}, "rejected": [{}] * rejected}
    info = {"config": {"data": data, "limit": limit}, "dataset": dataset, "classes": ["c"] * 20}
    assert bool(experiment.published(stage, Run(Path("x"), info))) == same


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(ExperimentError, match="oregon-transfer"):
        find_experiment("oregon")


def test_names_cannot_act_in_the_table() -> None:
    rows = [Row(Entry("a|b<script>", "=1", {}), {"val_acc": 0.5})]
    assert "a\\|b&lt;script>" in markdown(rows)
    assert "'=1" in to_csv(rows)


# --- the labs, as /work/shared/labs.md restates them --------------------------------------------


def settings(name: str, stage: str) -> dict[str, Any]:
    (found,) = [one for one in packaged()[name].stages if one.name == stage]
    return dict(found.settings)


def test_lab_1() -> None:
    pairs = settings("oregon-finetune-sweep", "pairs")
    assert set(pairs["pairs"]) == {
        (1e-10, "20"),
        (1e-8, "20"),
        (1e-6, "20"),
        (1e-4, "20"),
        (1e-6, "all"),
        (1e-8, "10"),
    }
    assert (pairs["epochs"], pairs["name"]) == (20, ("constant",))
    for name, epochs in (("oregon-finetune-sweep", 25), ("oregon-transfer", 50)):
        transfer = settings(name, "transfer")
        photos = [transfer[key] for key in ("contrast", "brightness", "noise", "rotation")]
        assert photos == [(2.0,), (0.3,), (0.6,), (0.02,)]
        assert transfer["crop_from"] == (235,)
        assert (transfer["lr"], transfer["name"], transfer["decay"]) == (
            (0.01,),
            ("exponential",),
            (0.3,),
        )
        assert (transfer["epochs"], transfer["batch_size"]) == (epochs, 512)


def test_the_recipe_that_gains_starts_from_lab_1_s_head() -> None:
    ours, theirs = (
        settings("oregon-finetune-gain", "transfer"),
        settings("oregon-finetune-sweep", "transfer"),
    )
    assert ours == theirs


def test_labs_2_3_and_5() -> None:
    assert settings("oregon-scratch-vs-transfer", "scratch")["weights"] == "none"
    food = settings("food101-finetune", "all")
    assert (food["lr"], food["unfreeze"], food["epochs"]) == ((1e-7, 1e-8), ("all",), 15)
    assert food["batch_size"] == 32
    static = settings("oregon-lr-policies", "static")
    assert {1e-8, 1e-9, 1e-10} < set(static["lr"]) and len(static["lr"]) == 4
    exponential = settings("oregon-lr-policies", "exponential")
    assert (exponential["lr"], exponential["decay"]) == ((1e-8,), (0.3, 0.5, 0.7, 0.9))
    assert settings("oregon-lr-policies", "step")["name"] == ("step",)


@pytest.mark.parametrize("name", ["signs-transfer-modes", "signs-transfer-modes-b0"])
def test_lab_4(name: str) -> None:
    for side, head, pool in ((32, (512, 256, 128), None), (256, (1024, 256), "max")):
        features = settings(name, f"features-{side}")
        assert (features["head"], features.get("pool")) == (head, pool)
        assert (features["lr"], features["batch_size"], features["epochs"]) == ((1e-3,), 128, 10)
        assert settings(name, f"structure-{side}")["outputs"] == 1000
        assert settings(name, f"direct-{side}")["phase"] == "direct"
        assert settings(name, f"whole-{side}")["unfreeze"] == ("all",)
    if name == "signs-transfer-modes":
        assert settings(name, "cnn10")["arch"] == "cnn10"

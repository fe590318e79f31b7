"""The size of the photos and the number of outputs: asked for, recorded, inherited."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from export.to_onnx import export_run
from tests.conftest import TINY, PhotoFolder, Train
from trainer.__main__ import main
from trainer.checkpoint import load_checkpoint
from trainer.runlog import list_runs
from trainer.schema import ThawError
from trainer.start import with_unused


@pytest.mark.slow
def test_the_network_sees_photos_of_the_size_asked_for(train: Train, tmp_path: Path) -> None:
    small = train("--phase", "transfer", "--size", "48", "--epochs", "1")
    assert (small.info["preprocess"]["resize"], small.info["preprocess"]["crop"]) == (48, 48)
    assert load_checkpoint(small.checkpoint("transfer-last")).preprocess.crop == 48
    tuned = train("--phase", "finetune", "--epochs", "1", "--from", small.run_id)
    assert tuned.info["preprocess"] == small.info["preprocess"]
    path = export_run(tuned, output=tmp_path / "model.onnx").path
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [48, 48, 3]


def test_a_parent_of_another_size_is_not_taken(
    train: Train, capsys: pytest.CaptureFixture[str], tmp_path: Path, photos: Path
) -> None:
    small = train("--phase", "transfer", "--size", "48", "--epochs", "1")
    flags = ("--epochs", "1", "--transfer-epochs", "1", "--unfreeze", "8")
    found = train("--phase", "finetune", "--size", "48", *flags)
    assert found.parent_run_id == small.run_id
    other = train("--phase", "finetune", "--size", "40", *flags)
    assert other.parent_run_id != small.run_id
    assert other.info["preprocess"]["crop"] == 40
    capsys.readouterr()
    argv = ["--phase", "finetune", "--from", small.run_id, "--size", "64", "--data", str(photos)]
    assert main([*argv, "--runs-dir", str(tmp_path / "runs")]) == 2
    assert f"--size 64: run {small.run_id} has size 48" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--size 0", "--size 5000", "--outputs 1"])
def test_nonsense_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--phase", "transfer", *flag.split()]) == 2
    assert flag in capsys.readouterr().err


def test_a_size_that_the_network_refuses_costs_no_wait(
    capsys: pytest.CaptureFixture[str], photos: Path
) -> None:
    argv = ["--arch", "timm:vit_tiny_patch16_224", "--weights", "none", "--size", "100"]
    assert main(["--phase", "transfer", "--data", str(photos), *argv]) == 2
    assert "does not take photos of 100 x 100 pixels" in capsys.readouterr().err


@pytest.mark.slow
def test_outputs_without_a_class(
    train: Train, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trunk = train("--phase", "transfer", "--size", "32", "--outputs", "10", "--epochs", "1")
    assert trunk.info["model"]["num_classes"] == 10
    assert trunk.classes == ("blue", "green", "red", *(f"unused {i}" for i in range(3, 10)))
    tuned = train("--phase", "finetune", "--epochs", "1", "--from", trunk.run_id)
    assert tuned.classes == trunk.classes
    exported = export_run(tuned, output=tmp_path / "model.onnx")
    assert exported.metadata.classes == trunk.classes
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    photo = np.zeros((1, 32, 32, 3), np.uint8)
    assert session.run(None, {session.get_inputs()[0].name: photo})[0].shape == (1, 10)
    scratch = train("--phase", "scratch", "--size", "32", "--outputs", "10", "--epochs", "1")
    assert scratch.info["config"]["outputs"] == 10
    assert scratch.epochs[-1].val_macro_f1 <= 1


def test_too_few_outputs_and_names_that_clash_are_refused(
    make_photos: PhotoFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_photos(tmp_path / "photos", photos=3)
    argv = [*TINY, "--phase", "scratch", "--data", str(data), "--runs-dir", str(tmp_path / "runs")]
    assert main([*argv, "--outputs", "2"]) == 2
    assert "--outputs 2: the data has 3 classes" in capsys.readouterr().err
    assert list_runs(tmp_path / "runs") == []
    with pytest.raises(ThawError, match="name of the class unused 2"):
        with_unused(("a", "unused 2"), 3)

"""The command line of the trainer: help, and errors that name flag, value and remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY
from trainer.__main__ import build_parser, main
from trainer.config import Config
from trainer.weights import find_weights

ROOT = Path(__file__).resolve().parents[1]


def error_of(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(list(flags)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_help_is_grouped_and_needs_no_torch() -> None:
    code = "import sys; from trainer.__main__ import build_parser; build_parser().format_help(); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
    text = build_parser().format_help()
    for group in ("data:", "model:", "training:", "schedule", "photos", "run:", "examples:"):
        assert group in text
    assert len(text.splitlines()) < 160


def test_every_flag_of_the_parser_is_a_setting(photos: Path) -> None:
    """A flag that Config does not know would be a crash."""
    flags = {action.dest for action in build_parser()._actions} - {"help", "resume"}
    nested = {"name", "decay", "drop", "epochs_drop", "warmup"}
    nested |= {"brightness", "contrast", "color", "rotation", "crop_from", "noise"}
    assert flags - nested <= set(Config.__dataclass_fields__)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--phase", "fine-tune"], "--phase fine-tune: choose one of direct, scratch, transfer"),
        (["--phase", "transfer", "--lr", "-1"], "--lr -1.0: must be above zero"),
        (["--phase", "transfer", "--epochs", "0"], "--epochs 0"),
        (["--phase", "direct", "--from", "x"], "--from belongs to --phase transfer or finetune"),
        (["--phase", "transfer", "--views", "0"], "--views 0: must be exact, auto, or a number"),
        (["--phase", "transfer", "--optimizer", "lion"], "--optimizer lion: choose one of adam"),
        (["--phase", "transfer", "--schedule", "poly"], "--schedule poly"),
        (["--phase", "transfer", "--arch", "efficientnet_b9"], "Did you mean efficientnet_b"),
        (["--phase", "transfer", "--arch", "timm:resnet_18"], "Did you mean resnet18"),
        (["--phase", "finetune", "--arch", "efficientnet_b9"], "Did you mean efficientnet_b"),
        (["--phase", "transfer", "--arch", "densenet121", "--pool", "max"], "--pool max"),
        (["--phase", "transfer", "--data", "/nowhere"], "There is no folder /nowhere"),
        (["--phase", "transfer", "--weights", "/nowhere.pth"], "--weights /nowhere.pth"),
        (["--phase", "finetune", "--from", "nothing"], "There is no runs folder"),
    ],
)
def test_user_errors(
    tmp_path: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    common = ["--data", str(photos), "--runs-dir", str(tmp_path / "runs")]
    weights = [] if "--weights" in flags or "--arch" in flags else ["--weights", "none"]
    assert message in error_of(capsys, *common, *weights, *flags)
    assert not (tmp_path / "runs").exists()


def test_a_wrong_head_says_what_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--phase", "transfer", "--head", "big"])
    assert stopped.value.code == 2
    assert "--head: big: must be linear or sizes such as 512,256" in capsys.readouterr().err


def test_weights_that_cannot_be_had(
    tmp_path: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchvision's real download code, with its host made unreachable."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    message = error_of(capsys, "--phase", "transfer", "--data", str(photos))
    assert "efficientnet_b0_rwightman-7f5810bc.pth" in message
    assert str(tmp_path / "hub") in message
    assert "--weights FILE" in message
    assert "--weights none" in message


def test_weights_of_another_architecture(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from torchvision.models import squeezenet1_1

    torch.save(squeezenet1_1().state_dict(), tmp_path / "w.pth")
    flags = ["--phase", "transfer", "--data", str(photos), "--weights", str(tmp_path / "w.pth")]
    message = error_of(capsys, *flags)
    assert "belong to another architecture: the network needs features.0.0.weight" in message


def test_unwritable_runs_folder(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    flags = ["--phase", "transfer", "--data", str(photos), "--epochs", "1", *TINY]
    message = error_of(capsys, *flags, "--runs-dir", str(tmp_path / "file"))
    assert "Cannot write to the runs folder" in message
    assert "--runs-dir" in message


def test_cuda_without_a_gpu_is_said_before_anything_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = error_of(capsys, "--phase", "transfer", "--data", "/nowhere", "--device", "cuda")
    assert "nvidia-smi" in message


def test_the_packaged_weights_are_found() -> None:
    found = find_weights("timm:tf_efficientnet_lite0", "imagenet")
    assert found.tensors is not None
    assert found.tensors["classifier.weight"].shape == (1000, 1280)


def test_reference_weights_load_into_b0() -> None:
    from tests.conftest import shared
    from trainer.model import ModelSpec, build_model
    from trainer.weights import load_weights

    path = shared("weights/efficientnet_b0_imagenet_features_bnrecal.pth")
    found = find_weights("efficientnet_b0", str(path))
    assert found.sha256 is not None
    assert found.sha256.startswith("f245b681")
    network = build_model(ModelSpec("efficientnet_b0", 5))
    load_weights(network, found, with_head=False)

"""Label smoothing and class weights: they change what training minimises and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import trainer.loop
from tests.conftest import TINY, PhotoFolder, Train, draw_photo
from tests.test_resume import check_alike, interrupt
from tests.test_together import figures, sweep
from trainer.config import Config, ConfigError
from trainer.grid import plan
from trainer.loop import Objective, objective_of
from trainer.recipe import parse

CPU = torch.device("cpu")
SMOOTH = ("--label-smoothing", "0.2", "--class-weights", "balanced")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory, make_photos: PhotoFolder) -> Path:
    """Three classes of which one has more than twice the photos of the others."""
    root = make_photos(tmp_path_factory.mktemp("uneven"))
    for number in range(8, 20):
        draw_photo(root / "red" / f"{number:03d}.jpg", (200, 40, 40), number)
    return root


def test_the_loss_as_its_formula_says() -> None:
    """Towards 1 - e + e/k on the label and e/k elsewhere; a photo counts by its class."""
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 2, 2])
    weights = torch.tensor([2.0, 1.5, 0.5])
    logs = logits.log_softmax(dim=1)
    target = 0.8 * functional.one_hot(labels, 3) + 0.2 / 3
    smoothed = -(target * logs).sum(dim=1).mean()
    assert torch.allclose(Objective(0.2)(logits, labels), smoothed)
    counted = -logs[range(6), labels] * weights[labels]
    assert torch.allclose(
        Objective(0.0, weights)(logits, labels), counted.sum() / weights[labels].sum()
    )
    assert torch.equal(Objective()(logits, labels), functional.cross_entropy(logits, labels))


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    """n / (k * n_c), so that every class counts for as much as any other."""
    labels = np.array([0] * 6 + [1] * 3 + [2])
    objective = objective_of(Config("transfer", class_weights="balanced"), labels, 3, CPU)
    assert objective.weights is not None
    assert objective.weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    counted = [float(objective.weights[c]) * n for c, n in enumerate((6, 3, 1))]
    assert counted == pytest.approx([10 / 3] * 3)
    assert objective_of(Config("transfer"), labels, 3, CPU).plain


@pytest.mark.parametrize("flags", [SMOOTH[:2], SMOOTH[2:]])
def test_only_the_gradients_change(
    train_awake: Train, uneven: Path, flags: tuple[str, ...]
) -> None:
    """All that is recorded of the first step is the same; the epoch then ends elsewhere."""
    common = ("--phase", "transfer", "--epochs", "1", "--lr", "0.01", "--batch-size", "64")
    plain, other = (train_awake(*common, *more, data=uneven) for more in ((), flags))
    assert plain.epochs[1].train_loss == other.epochs[1].train_loss  # one batch, before its step
    assert plain.epochs[1].val_loss != other.epochs[1].val_loss
    for run in (plain, other):
        with np.load(run.predictions("after"), allow_pickle=False) as saved:
            loss = functional.cross_entropy(
                torch.from_numpy(saved["logits"]), torch.from_numpy(saved["labels"])
            )
        assert run.epochs[1].val_loss == pytest.approx(float(loss))
    assert other.info["config"]["label_smoothing"] == (0.2 if flags == SMOOTH[:2] else 0)
    assert other.info["config"]["class_weights"] == ("off" if flags == SMOOTH[:2] else "balanced")


def test_without_them_the_loss_is_computed_once(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> list[float]:
        raise AssertionError("computed again")

    monkeypatch.setattr(trainer.loop, "_plain_losses", refused)
    assert train("--phase", "transfer", "--epochs", "1").status == "done"


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["transfer", "finetune"])
def test_members_with_different_losses_share_their_batches(
    train_awake: Train, tmp_path: Path, uneven: Path, awake: str, phase: str
) -> None:
    common = ["--phase", phase, "--epochs", "2", "--lr", "0.01", "--data", str(uneven)]
    base: list[str] = [*TINY, "--weights", awake]
    if phase == "finetune":
        trunk = train_awake("--phase", "transfer", "--epochs", "1", data=uneven)
        base = ["--from", str(trunk.path), "--batch-size", "8"]
    members = ["--label-smoothing", "0", "0.2", "--class-weights", "off", "balanced"]
    together = sweep(tmp_path / "sweep", *base, *common, *members)
    assert len(together) == (5 if phase == "finetune" else 4)
    found = set()
    for smoothing in ("0", "0.2"):
        for weights in ("off", "balanced"):
            words = f"label smoothing {float(smoothing):g}, class weights {weights}"
            flags = ("--label-smoothing", smoothing, "--class-weights", weights)
            alone = train_awake(*base, *common, *flags, data=uneven)
            assert figures(together[words]) == pytest.approx(figures(alone), rel=1e-4)
            found.add(tuple(figures(alone)))
    assert len(found) == 4


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_its_loss(
    train_awake: Train, tmp_path: Path, uneven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = train_awake("--phase", "transfer", "--epochs", "1", data=uneven)
    flags = ["--from", str(trunk.path), "--data", str(uneven), "--epochs", "4"]
    flags += ["--batch-size", "8", *SMOOTH]
    expected = sweep(tmp_path / "whole", *flags)
    with monkeypatch.context() as patched:
        interrupt(patched, after=2 * 4 + 1)
        sweep(tmp_path / "torn", *flags, status=130)
    check_alike(sweep(tmp_path / "torn", *flags), expected)


def test_the_control_goes_on_with_the_loss_of_its_parent(
    train_awake: Train, uneven: Path, tmp_path: Path
) -> None:
    trunk = train_awake("--phase", "transfer", "--epochs", "1", *SMOOTH, data=uneven)
    runs = sweep(tmp_path / "s", "--from", str(trunk.path), "--epochs", "1", "--layer-decay", "0.5")
    (control,) = (run for name, run in runs.items() if name == "control")
    config = control.info["config"]
    assert (config["label_smoothing"], config["class_weights"]) == (0.2, "balanced")
    assert (config["layer_decay"], config["gradual"]) == (1, None)


def test_off_leaves_the_keys_of_sweeps_as_they_were() -> None:
    """A sweep of an earlier version goes on: these are what that version made of its flags."""
    made = plan(parse(["--phase", "transfer", "--data", "sample", "--lr", "1e-3", "1e-2"]), None)
    assert [place.key for place in made.info.places] == ["e9b1bd74358518ed", "6387841713c94a19"]


@pytest.mark.parametrize("flags", ["--label-smoothing 1", "--label-smoothing -0.1"])
def test_nonsense_is_refused_with_the_flag(flags: str) -> None:
    with pytest.raises(ConfigError, match="--label-smoothing"):
        parse(["--phase", "transfer", *flags.split()])
    with pytest.raises(ConfigError, match="--class-weights some: choose one of off, balanced"):
        Config("transfer", class_weights="some")  # type: ignore[arg-type]

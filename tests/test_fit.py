"""The real training loop on a tiny network and a few photos: what the phases promise."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import TINY, PhotoFolder, Train, shared
from trainer.__main__ import main, parse
from trainer.checkpoint import load_checkpoint, load_model
from trainer.data import load_photos
from trainer.model import InputNormalize
from trainer.phase import make_optimizer
from trainer.runlog import Run, checkpoint_path, list_runs, read_run
from trainer.schema import EPOCH_FIELDS, PHASES, Preprocess

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def lineage(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> tuple[Run, Run]:
    """A transfer run of two epochs and a finetune run of two from it; read only."""
    runs = tmp_path_factory.mktemp("lineage")
    common = [*TINY, "--data", str(photos), "--runs-dir", str(runs), "--epochs", "2"]
    assert main([*common, "--phase", "transfer", "--lr", "0.01"]) == 0
    assert main([*common, "--phase", "finetune", "--lr", "0.001", "--unfreeze", "20"]) == 0
    transfer, finetune = list_runs(runs)
    return transfer, finetune


def weights(run: Run, name: str) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(run.checkpoint(name)).state_dict)


def test_epochs_count_over_the_lineage(lineage: tuple[Run, Run]) -> None:
    transfer, finetune = lineage
    assert [(e.epoch, e.phase_epoch) for e in transfer.epochs] == [(0, 0), (1, 1), (2, 2)]
    assert [(e.epoch, e.phase_epoch) for e in finetune.epochs] == [(2, 0), (3, 1), (4, 2)]
    assert finetune.boundary == 2
    assert finetune.parent_run_id == transfer.run_id
    assert [run.status for run in lineage] == ["done", "done"]


def test_epoch_0_is_an_evaluation_of_the_network_the_parent_ended_with(
    lineage: tuple[Run, Run],
) -> None:
    transfer, finetune = lineage
    last, first = transfer.epochs[-1], finetune.epochs[0]
    assert first.val_loss == pytest.approx(last.val_loss, rel=1e-5)
    assert (first.val_acc, first.train_loss) == (last.val_acc, None)
    assert first.lr_head == 0.001


def test_the_log_holds_every_field_of_the_contract(lineage: tuple[Run, Run]) -> None:
    for run in lineage:
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").open()]
        assert [line["event"] for line in lines] == ["phase", *["epoch"] * 3, "stop"]
        assert all(set(EPOCH_FIELDS) <= set(line) for line in lines if line["event"] == "epoch")
        wanted = """schema_version run_id parent_run_id status config recipe classes dataset
            preprocess phases environment started ended""".split()  # noqa: SIM905
        assert set(wanted) <= set(run.info)
        assert run.info["dataset"]["counts"] == {"train": 18, "val": 6}
        assert Preprocess.from_dict(run.info["preprocess"]) == Preprocess(interpolation="bilinear")


def test_only_unfrozen_layers_change_and_batchnorm_never(lineage: tuple[Run, Run]) -> None:
    transfer, finetune = lineage
    before, after = weights(transfer, "transfer-last"), weights(finetune, "finetune-last")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    unfrozen = set(finetune.info["phases"][0]["unfrozen_layers"])
    assert {name.rpartition(".")[0] for name in changed} == unfrozen
    assert not any("running" in name for name in changed)


def test_the_transfer_phase_changes_the_head_only(train: Train) -> None:
    run = train("--phase", "transfer", "--epochs", "1")
    torch.manual_seed(0)
    head = {"classifier.3.weight", "classifier.3.bias"}
    trained = weights(run, "transfer-last")
    again = weights(train("--phase", "transfer", "--epochs", "2"), "transfer-last")
    assert {name for name in trained if not torch.equal(trained[name], again[name])} == head


def test_from_scratch_batchnorm_statistics_move(train: Train) -> None:
    run = train("--phase", "scratch", "--epochs", "1")
    fresh = weights(train("--phase", "transfer", "--epochs", "1"), "transfer-last")
    trained = weights(run, "scratch-last")
    assert not torch.equal(trained["features.0.1.running_mean"], fresh["features.0.1.running_mean"])


def test_each_phase_starts_with_a_fresh_optimizer() -> None:
    network = torch.nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    optimizer = make_optimizer(network, "adam", 0.1)
    assert not optimizer.state
    assert [p for group in optimizer.param_groups for p in group["params"]] == [network.weight]


def test_same_seed_same_metrics(train: Train, tmp_path: Path) -> None:
    flags = ("--phase", "transfer", "--epochs", "2", "--rotation", "0.05", "--noise", "2")
    one, two = train(*flags), train(*flags)
    other = train(*flags, "--seed", "1")

    def figures(run: Run) -> list[tuple[float | None, float]]:
        return [(epoch.train_loss, epoch.val_loss) for epoch in run.epochs]

    assert figures(one) == figures(two)
    assert figures(one) != figures(other)


def test_the_best_checkpoint_is_the_network_that_was_measured(lineage: tuple[Run, Run]) -> None:
    for run, which in ((lineage[0], "transfer-best"), (lineage[1], "finetune-best")):
        _, checkpoint = load_model(run.checkpoint(which))
        best = max(run.epochs[1:], key=lambda e: (e.val_acc, -e.val_loss))
        assert checkpoint.epoch == best.epoch
        with np.load(run.predictions("after"), allow_pickle=False) as saved:
            accuracy = (saved["logits"].argmax(axis=1) == saved["labels"]).mean()
            assert len(saved["files"]) == 6
        assert accuracy == pytest.approx(best.val_acc)


def test_predictions_of_before_are_those_of_the_boundary(lineage: tuple[Run, Run]) -> None:
    _, finetune = lineage
    network, checkpoint = load_model(checkpoint_path(finetune, "before"))
    with np.load(finetune.predictions("before"), allow_pickle=False) as saved:
        config = parse(["--phase", "transfer", "--data", finetune.info["dataset"]["root"]])
        val = load_photos(config, checkpoint.preprocess).val
        assert list(saved["files"]) == list(val.files)
        pixels = torch.from_numpy(val.photos[:])
        with torch.inference_mode():
            logits = network(InputNormalize(checkpoint.preprocess)(pixels))
        assert np.allclose(logits, saved["logits"], atol=1e-4)


def test_tensorboard_shows_the_same_scalars(lineage: tuple[Run, Run]) -> None:
    _, finetune = lineage
    events = EventAccumulator(str(finetune.path)).Reload()
    accuracy = [(e.step, e.value) for e in events.Scalars("validation/accuracy")]
    assert accuracy == [(e.epoch, pytest.approx(e.val_acc)) for e in finetune.epochs]
    assert {e.value for e in events.Scalars("phase_id")} == {PHASES.index("finetune")}
    assert len(events.Scalars("train/loss")) == 2  # none at epoch 0


def test_finetune_without_a_parent_trains_one_first_and_says_so(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune = train("--phase", "finetune", "--epochs", "1", "--transfer-epochs", "2")
    assert "running the transfer phase first" in capsys.readouterr().out
    transfer = list_runs(tmp_path / "runs")[0]
    assert finetune.parent_run_id == transfer.run_id
    assert [e.epoch for e in finetune.epochs] == [2, 3]
    again = train("--phase", "finetune", "--epochs", "1")
    assert again.parent_run_id == transfer.run_id


def test_finetune_takes_data_and_network_from_its_parent(
    lineage: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    transfer, _ = lineage
    runs = str(transfer.path.parent)
    flags = ["--phase", "finetune", "--runs-dir", runs, "--from", transfer.run_id]
    assert main([*flags, "--epochs", "1", "--unfreeze", "all"]) == 0
    assert "since unfreezing" in capsys.readouterr().out
    assert list_runs(transfer.path.parent)[-1].info["model"] == transfer.info["model"]


def test_finetune_takes_the_split_from_its_parent(
    train: Train, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = tmp_path / "split.csv"
    files = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.jpg"))
    rows = [f"{file},{'val' if file.endswith('7.jpg') else 'train'}" for file in files]
    split.write_text("\n".join(["path,split", *rows]))
    by_file = ("--split-file", str(split))
    for flags in (by_file, ("--split-seed", "3", "--val-fraction", "0.5"), ("--limit", "4")):
        parent = train("--phase", "transfer", "--epochs", "1", *flags)
        argv = ["--phase", "finetune", "--epochs", "1", "--from", parent.run_id]
        assert main([*argv, "--runs-dir", str(tmp_path / "runs")]) == 0
        run = list_runs(tmp_path / "runs")[-1]
        assert run.info["dataset"]["fingerprint"] == parent.info["dataset"]["fingerprint"]
    assert "Warning" not in capsys.readouterr().out


def test_summary_has_three_lines(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("--phase", "transfer", "--epochs", "1")
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("transfer done"))
    assert "Best epoch: 1" in lines[start]
    assert f"accuracy {run.epochs[1].val_acc:.2%}, loss" in lines[start + 1]


def test_schedule_reaches_the_log(train: Train) -> None:
    run = train(
        *("--phase", "transfer", "--epochs", "3", "--lr", "0.01"),
        *("--schedule", "exponential", "--decay", "0.5"),
    )
    expected = [0.01 * math.exp(-0.5 * epoch) for epoch in (0, 0, 1, 2)]
    assert [epoch.lr_head for epoch in run.epochs] == pytest.approx(expected)
    assert {epoch.lr_backbone for epoch in run.epochs} == {0.0}


def test_early_stop(train: Train) -> None:
    run = train("--phase", "transfer", "--epochs", "30", "--early-stop", "2", "--lr", "1e-9")
    assert len(run.epochs) < 30
    assert run.info["phases"][0]["last_epoch"] == run.epochs[-1].epoch
    assert run.status == "done"


def test_a_diverging_loss_stops_the_run_and_says_where(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--phase", "scratch", "--epochs", "3", "--lr", "1e30", "--optimizer", "sgd"]
    flags += [*TINY, "--data", str(photos), "--runs-dir", str(tmp_path)]
    assert main(flags) == 2
    message = capsys.readouterr().err
    assert "epoch 1, batch" in message
    assert "smaller --lr" in message
    (run,) = list_runs(tmp_path)
    assert run.status == "failed"
    assert run.problem is None  # every line parses


def test_direct_needs_a_whole_network(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--phase", "direct", "--data", str(photos), "--runs-dir", str(tmp_path)]
    assert main([*flags, "--weights", "none"]) == 2
    assert "--weights none" in capsys.readouterr().err


def test_direct_is_one_evaluation_with_the_pretrained_classes(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--phase", "direct", "--data", str(photos), "--runs-dir", str(tmp_path)]
    assert main([*flags, "--arch", "timm:tf_efficientnet_lite0"]) == 0
    assert "class number i is compared with its output i" in capsys.readouterr().out
    (run,) = list_runs(tmp_path)
    assert [(e.epoch, e.train_loss, e.trainable_params) for e in run.epochs] == [(0, None, 0)]
    assert run.info["phases"][0]["last_epoch"] == 0
    assert len(run.classes) == 1000
    load_model(checkpoint_path(run, "after"))


def test_direct_on_photos_named_by_imagenet_class(tmp_path: Path) -> None:
    """The pretrained head reads real photographs: names and preprocessing are right."""
    for photo in sorted(shared("photos/imagenet-samples").iterdir()):
        for number in (0, 1):  # a class needs a training photo too, which direct never opens
            target = tmp_path / "data" / photo.stem / f"{number}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(photo)
    flags = ["--phase", "direct", "--data", str(tmp_path / "data"), "--runs-dir", str(tmp_path)]
    assert main([*flags, "--arch", "timm:tf_efficientnet_lite0"]) == 0
    (run,) = list_runs(tmp_path)
    assert len(run.classes) == 1000
    assert run.epochs[0].val_acc > 0.75


@pytest.mark.slow
def test_a_terminated_run_keeps_its_checkpoint_and_says_interrupted(
    tmp_path: Path, photos: Path
) -> None:
    command = [sys.executable, "-m", "trainer", "--phase", "transfer", "--epochs", "500", *TINY]
    command += ["--data", str(photos), "--runs-dir", str(tmp_path / "runs")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        runs = list_runs(tmp_path / "runs")
        if runs and len(runs[0].epochs) > 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    (run,) = list_runs(tmp_path / "runs")
    assert run.status == "interrupted"
    load_model(run.checkpoint("transfer-last"))
    load_model(run.checkpoint("transfer-best"))


def test_classes_of_another_data_set_are_refused(
    lineage: tuple[Run, Run],
    tmp_path: Path,
    make_photos: PhotoFolder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    transfer, _ = lineage
    flags = ["--phase", "finetune", "--runs-dir", str(transfer.path.parent)]
    flags += ["--from", transfer.run_id, "--epochs", "1"]
    data = make_photos(tmp_path / "other", classes=4, photos=4)
    assert main([*flags, "--data", str(data)]) == 2
    message = capsys.readouterr().err
    assert "was trained on the classes blue, green, red" in message
    assert main([*flags, "--arch", "resnet18"]) == 2
    assert "--arch resnet18" in capsys.readouterr().err


def test_the_head_of_the_parent_is_taken_unless_asked_otherwise(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = train("--phase", "transfer", "--epochs", "1", "--head", "8")
    run = train("--phase", "finetune", "--epochs", "1")
    assert run.parent_run_id == parent.run_id
    assert run.info["model"]["head"] == [8]
    other = train("--phase", "finetune", "--epochs", "1", "--head", "linear")
    assert other.parent_run_id != parent.run_id
    assert "has another network; choose it with --from" in capsys.readouterr().out


def test_the_sample_trains_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No flags but the phase, and no way to reach torchvision's weights."""
    import trainer.sample

    few = functools.partial(trainer.sample.prepare_sample, per_class=3)
    monkeypatch.setattr(trainer.sample, "prepare_sample", few)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    flags = ["--phase", "finetune", "--epochs", "1", "--runs-dir", str(tmp_path / "runs")]
    assert main(flags) == 0
    assert "EfficientNet-Lite0 instead" in capsys.readouterr().out
    transfer, finetune = list_runs(tmp_path / "runs")
    assert finetune.parent_run_id == transfer.run_id
    assert finetune.info["model"]["arch"] == "timm:tf_efficientnet_lite0"
    assert finetune.info["dataset"]["name"] == "sample"
    other = ["--phase", "transfer", "--epochs", "1", *TINY, "--runs-dir", str(tmp_path / "runs")]
    assert main(other) == 0  # a network that was asked for is not the sample's own
    assert main(flags) == 0
    assert list_runs(tmp_path / "runs")[-1].parent_run_id == transfer.run_id


def test_interrupted_parent_is_not_picked(lineage: tuple[Run, Run], train: Train) -> None:
    run = train("--phase", "transfer", "--epochs", "1")
    info = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps(info | {"status": "interrupted"}))
    assert train("--phase", "finetune", "--epochs", "1").parent_run_id != run.run_id


def test_the_record_round_trips_through_the_reader(lineage: tuple[Run, Run]) -> None:
    run = read_run(lineage[0].path)
    assert all(dataclasses.asdict(epoch)["val_loss"] > 0 for epoch in run.epochs)

"""`python -m trainer import`, on logs written here as each tool writes them, and on real ones."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.summary.writer.record_writer import RecordWriter

from explorer.compare import summarise
from tests.conftest import shared
from trainer.__main__ import main
from trainer.imports import huggingface, tables, write
from trainer.imports.logs import LogError
from trainer.imports.read import read_all
from trainer.imports.tags import choose, take_apart
from trainer.run_writer import RunWriter
from trainer.runlog import Run, list_runs
from trainer.schema import EpochRecord

DAY = 1_600_000_000.0
Row = tuple[int, dict[str, float]]


def write_events(
    folder: Path, rows: Sequence[Row], start: float = DAY, every: float = 60.0, v2: bool = True
) -> Path:
    """An event file with scalars by step, one row every `every` seconds from `start` on."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"events.out.tfevents.{start:.0f}.host.{len(list(folder.iterdir()))}.v2"
    with path.open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=start, file_version="brain.Event:2").SerializeToString())
        for place, (step, values) in enumerate(rows, start=1):
            summary = Summary(value=[_value(tag, x, v2) for tag, x in values.items()])
            event = Event(wall_time=start + place * every, step=step, summary=summary)
            writer.write(event.SerializeToString())
        writer.flush()
    return path


def _value(tag: str, number: float, v2: bool) -> Summary.Value:
    if not v2:
        return Summary.Value(tag=tag, simple_value=number)
    plugin = SummaryMetadata.PluginData(plugin_name="scalars")
    return Summary.Value(
        tag=tag,
        tensor=TensorProto(dtype=1, float_val=[number]),
        metadata=SummaryMetadata(plugin_data=plugin),
    )


def write_keras(
    folder: Path,
    accuracies: Sequence[float],
    first_step: int = 0,
    start: float = DAY,
    streams: Sequence[str] = ("train", "validation"),
) -> Path:
    """As Keras's TensorBoard callback writes one fit; the loss is 1 - accuracy."""
    for delay, stream in enumerate(streams):
        rows = [
            (first_step + n, {"epoch_loss": 1 - a, "epoch_categorical_accuracy": a})
            for n, a in enumerate(accuracies)
        ]
        write_events(folder / stream, rows, start + delay)
    return folder


def run_import(runs: Path, *arguments: object) -> list[Run]:
    assert main(["import", *map(str, arguments), "--runs-dir", str(runs)]) == 0
    return list_runs(runs)


def refused(runs: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of an import that is refused; it must leave nothing behind."""
    before = sorted(runs.rglob("*")) if runs.exists() else []
    assert main(["import", *map(str, arguments), "--runs-dir", str(runs)]) == 2
    assert (sorted(runs.rglob("*")) if runs.exists() else []) == before
    return capsys.readouterr().err


def curve(run: Run) -> list[tuple[int, float]]:
    return [(record.epoch, round(record.val_acc, 4)) for record in run.epochs]


def by_phase(runs: Sequence[Run]) -> tuple[Run, list[Run]]:
    trunk = next(run for run in runs if run.phase == "transfer")
    return trunk, [run for run in runs if run.phase == "finetune"]


# --- the real logs ------------------------------------------------------------------------------


def best(records: Sequence[EpochRecord]) -> EpochRecord:
    return max(records, key=lambda record: record.rank)


def test_food_101_lab_5_shows_its_reported_result(tmp_path: Path) -> None:
    lab = shared("logs/CNN-food-101/lab5/logs")
    rates = [lab / "unfreeze_fine-tune(-7)", lab / "unfreeze_fine-tune(-8)"]
    trunk, finetunes = by_phase(
        run_import(tmp_path, lab / "augmentation_horizontal", "--then", *rates)
    )
    assert len(trunk.epochs) == 50
    assert round(best(trunk.epochs).val_acc, 4) == 0.5533
    assert round(trunk.epochs[-1].val_acc, 4) == 0.5531
    seventh, eighth = sorted(finetunes, key=lambda run: run.run_id)
    for run in (seventh, eighth):
        assert run.parent_run_id == trunk.run_id
        assert run.boundary == 50
        assert [r.epoch for r in run.epochs] == list(range(50, 66))
        assert round(run.epochs[0].val_acc, 4) == 0.5531
    assert round(best(seventh.epochs[1:]).val_acc, 4) == 0.5571
    assert round(seventh.epochs[1].val_acc, 4) == 0.5517
    assert round(seventh.epochs[-1].val_loss, 2) == 2.10
    assert round(best(eighth.epochs[1:]).val_acc, 4) == 0.5546


def test_a_folder_of_real_logs_becomes_one_run_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = run_import(tmp_path, shared("logs/CNN-food-101/lab4"))
    assert len(runs) == 22
    assert any(run.run_id.endswith("rotate-wrap-augmentation_rotate-wrap_0.3") for run in runs)
    assert all(not run.problem and run.status == "done" for run in runs)
    assert run_import(tmp_path, shared("logs/CNN-food-101/lab2"))
    skipped = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert any("broke off before the first epoch" in line for line in skipped)
    assert any("the same files as" in line for line in skipped)


# --- TensorBoard --------------------------------------------------------------------------------


def test_keras_train_and_validation_become_one_run(tmp_path: Path) -> None:
    logs = write_keras(tmp_path / "owl-1615204002.35", [0.5, 0.7, 0.6])
    [run] = run_import(tmp_path / "runs", logs)
    assert run.run_id.endswith("-owl")
    assert run.phase == "transfer"
    assert [r.epoch for r in run.epochs] == [r.phase_epoch for r in run.epochs] == [1, 2, 3]
    second = run.epochs[1]
    assert second.train_acc == pytest.approx(0.7)
    assert second.val_loss == pytest.approx(0.3)
    assert second.seconds == pytest.approx(60)
    assert math.isnan(run.epochs[0].seconds)
    assert math.isnan(second.lr_head)
    assert second.peak_memory_bytes == 0
    assert run.info["started"] == pytest.approx(DAY + 61)
    assert run.info["imported"]["format"] == "tensorboard"
    assert len(run.info["imported"]["files"]) == 2
    assert run.info["config"] == {"epochs": 3}
    assert "dataset" not in run.info


def test_values_of_tensorflow_1_in_one_folder(tmp_path: Path) -> None:
    rows = [(n, {"loss": 1.0, "acc": 0.4, "val_loss": 2.0, "val_acc": 0.3}) for n in range(2)]
    write_events(tmp_path / "old", rows, v2=False)
    [run] = run_import(tmp_path / "runs", tmp_path / "old")
    assert curve(run) == [(1, 0.3), (2, 0.3)]
    assert run.epochs[0].train_acc == pytest.approx(0.4)


@pytest.mark.parametrize("first_step", [0, 3, 2])
def test_two_fits_in_one_folder_are_divided_where_the_user_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], first_step: int
) -> None:
    """Counting from 0 again, from `initial_epoch`, and from the last epoch, as tutorials do."""
    logs, runs = tmp_path / "both", tmp_path / "runs"
    write_keras(logs, [0.5, 0.6, 0.7])
    write_keras(logs, [0.72, 0.74], first_step, DAY + 1000)
    assert "--boundary 3" in refused(runs, capsys, logs)
    trunk, [finetune] = by_phase(run_import(runs, logs, "--boundary", 3))
    assert curve(trunk) == [(1, 0.5), (2, 0.6), (3, 0.7)]
    assert curve(finetune) == [(3, 0.7), (4, 0.72), (5, 0.74)]
    assert finetune.parent_run_id == trunk.run_id
    assert finetune.boundary == 3
    assert finetune.epochs[0].train_acc is None
    assert finetune.info["started"] > trunk.info["started"]


def test_two_fits_can_be_one_phase(tmp_path: Path) -> None:
    logs = write_keras(tmp_path / "resumed", [0.5, 0.6, 0.7, 0.1])
    write_keras(logs, [0.8, 0.9], 2, DAY + 1000)
    [run] = run_import(tmp_path / "runs", logs, "--phase", "scratch")
    # As TensorBoard has it: what a resumed training writes takes the place of what was there.
    assert curve(run) == [(1, 0.5), (2, 0.6), (3, 0.8), (4, 0.9)]


def test_a_finetune_may_count_from_0_or_from_the_boundary(tmp_path: Path) -> None:
    trunk_log = write_keras(tmp_path / "frozen", [0.5, 0.6, 0.7])
    anew = write_keras(tmp_path / "anew", [0.72, 0.74], 0, DAY + 1000)
    on = write_keras(tmp_path / "on", [0.72, 0.74], 3, DAY + 2000, streams=["validation"])
    _, finetunes = by_phase(run_import(tmp_path / "runs", trunk_log, "--then", anew, on))
    for run in finetunes:
        assert curve(run) == [(3, 0.7), (4, 0.72), (5, 0.74)]


def test_a_finetune_may_leave_its_trunk_early_and_join_it_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    trunk_log = write_keras(tmp_path / "frozen", [0.5, 0.6, 0.7])
    first = write_keras(tmp_path / "first", [0.72], 0, DAY + 1000)
    second = write_keras(tmp_path / "second", [0.8], 0, DAY + 2000)
    run_import(runs, trunk_log, "--then", first, "--boundary", 2)
    assert "--from" in refused(runs, capsys, trunk_log, "--then", second)
    _, finetunes = by_phase(run_import(runs, second, "--from", "frozen"))
    assert [curve(run) for run in finetunes] == [[(2, 0.6), (3, 0.72)], [(3, 0.7), (4, 0.8)]]
    assert "holds the epochs 1 to 3" in refused(
        runs, capsys, second, "--from", "frozen", "--boundary", 9, "--again"
    )


def test_lightning_and_hugging_face_events_count_batches(tmp_path: Path) -> None:
    lightning = [
        (99, {"train_loss_step": 9.0, "epoch": 0}),
        (199, {"train_loss_epoch": 1.0, "train_loss_step": 8.0, "epoch": 0}),
        (199, {"val_loss": 0.9, "val_acc": 0.5, "epoch": 0}),
        (399, {"val_loss": 0.8, "val_acc": 0.6, "epoch": 1}),
    ]
    write_events(tmp_path / "lightning", lightning)
    face = [
        (50, {"train/loss": 3.0, "train/epoch": 0.5}),
        (100, {"train/loss": 1.0, "train/epoch": 1.0}),
        (100, {"eval/loss": 0.9, "eval/accuracy": 0.5, "train/epoch": 1.0}),
    ]
    write_events(tmp_path / "face", face)
    logs = {log.name: log for log in read_all([tmp_path]).logs}
    assert [one.epoch for one in logs["lightning"].epochs] == [1, 2]
    assert logs["lightning"].epochs[0].train_loss == 1.0
    assert [one.train_loss for one in logs["face"].epochs] == [2.0]


def test_steps_of_a_training_loop_written_by_hand(tmp_path: Path) -> None:
    batches: list[Row] = [(step, {"Loss/train": step / 100}) for step in range(1, 201)]
    judged: list[Row] = [(100, {"Accuracy/val": 0.5}), (200, {"Accuracy/val": 0.6})]
    write_events(tmp_path / "counted", sorted([*batches, *judged], key=lambda row: row[0]), every=1)
    by_epoch: list[Row] = [(n, {"Accuracy/val": 0.5}) for n in range(1, 4)]
    write_events(tmp_path / "mixed", [*batches, *by_epoch], every=1)
    counted, mixed = read_all([tmp_path]).logs
    assert [one.val_acc for one in counted.epochs] == pytest.approx([0.5, 0.6])
    assert counted.epochs[0].train_loss == pytest.approx(0.505)
    assert any("batches" in note for note in counted.notes)
    assert [one.epoch for one in mixed.epochs] == [1, 2, 3]
    assert any("left out" in note for note in mixed.notes)


def test_a_tensor_that_claims_to_be_huge_is_no_number(tmp_path: Path) -> None:
    logs = write_keras(tmp_path / "bomb", [0.5])
    bomb = _value("epoch_loss", 0.1, v2=True)
    bomb.tensor.tensor_shape.dim.add(size=10**12)
    path = next((logs / "train").iterdir())
    with path.open("ab") as file:
        event = Event(wall_time=DAY + 99, step=1, summary=Summary(value=[bomb]))
        RecordWriter(file).write(event.SerializeToString())
    [run] = run_import(tmp_path / "runs", logs)
    assert len(run.epochs) == 1


def test_logs_that_broke_off_give_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = write_keras(tmp_path / "torn", [0.5, 0.6], streams=["validation"])
    [file] = torn.rglob("*tfevents*")
    file.write_bytes(file.read_bytes()[:-7])
    write_keras(tmp_path / "half", [0.5, 0.6], streams=["train"])
    write_events(tmp_path / "half/validation", [])
    write_events(tmp_path / "empty/train", [])
    (tmp_path / "nothing/train").mkdir(parents=True)
    (tmp_path / "nothing/train/events.out.tfevents.1").touch()
    half, torn_run = sorted(
        run_import(tmp_path / "runs", tmp_path), key=lambda run: run.run_id.split("-")[-1]
    )
    assert curve(torn_run) == [(1, 0.5)]
    assert half.epochs[0].train_acc == 0.5
    assert math.isnan(half.epochs[0].val_acc)
    told = capsys.readouterr().out
    assert "breaks off" in told
    assert f"skipped  {tmp_path / 'empty'}: it holds no numbers" in told
    message = refused(tmp_path / "runs", capsys, tmp_path / "nothing")
    assert str(tmp_path / "nothing") in message
    file.write_bytes(b"no event file at all, but long enough to be one")
    assert "holds no numbers" in refused(tmp_path / "runs", capsys, torn)


# --- tables and JSON ----------------------------------------------------------------------------


def test_keras_csv(tmp_path: Path) -> None:
    path = tmp_path / "lab.csv"
    path.write_text(
        "epoch;accuracy;learning_rate;loss;val_accuracy;val_loss\n"
        "0;0.5;0.01;1.5;0.4;1.6\n1;0.6;0.005;1.2;NA;1.3\n2;0.7;0.0"
    )
    [run] = run_import(tmp_path / "runs", path)
    assert [r.epoch for r in run.epochs] == [1, 2]
    assert run.epochs[0].lr_head == 0.01
    assert math.isnan(run.epochs[1].val_acc)
    assert run.info["config"] == {"epochs": 2, "lr": 0.01}
    assert run.info["started"] == pytest.approx(path.stat().st_mtime)


def test_keras_csv_to_which_a_second_fit_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "lab.csv"
    path.write_text("epoch,val_accuracy,lr\n0,0.5,0.1\n0,0.6,0.2\n1,0.7,0.2\n")
    trunk, [finetune] = by_phase(run_import(tmp_path / "runs", path, "--boundary", 1))
    assert curve(finetune) == [(1, 0.5), (2, 0.6), (3, 0.7)]
    assert (trunk.info["config"]["lr"], finetune.info["config"]["lr"]) == (0.1, 0.2)
    assert finetune.epochs[1].lr_backbone == 0.2


def test_accuracies_in_percent_are_divided_and_others_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "percent.csv"
    path.write_text("epoch,train_acc,val_acc\n1,0.9,50.5\n2,30,61\n")
    [run] = run_import(tmp_path / "runs", path)
    assert curve(run) == [(1, 0.505), (2, 0.61)]
    assert run.epochs[0].train_acc == pytest.approx(0.009)
    assert "percent" in capsys.readouterr().out
    path.write_text("epoch,val_acc\n1,505\n")
    assert "neither a fraction nor percent" in refused(tmp_path / "runs", capsys, path)


def test_lightning_csv_with_its_settings(tmp_path: Path) -> None:
    folder = tmp_path / "birds/lightning_logs/version_3"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(
        "epoch,lr-Adam,step,train_loss_epoch,train_loss_step,val_acc,val_loss\n"
        ",0.001,49,,,,\n0,,49,,2.5,,\n0,,99,,,0.5,1.1\n0,,99,1.5,,,\n"
        "1,,199,,,0.6,1.0\n1,,199,1.2,,,\n1,,199,,,0.61,0.9\n"
    )
    (folder / "hparams.yaml").write_text(
        "batch_size: 64\nlr: 1e-3\noptimizer: Adam\nnet: !!python/object:os.system {}\n"
    )
    [run] = run_import(tmp_path / "runs", folder)
    assert run.run_id.endswith("birds-version_3")
    assert curve(run) == [(1, 0.5), (2, 0.6)]
    assert [r.train_loss for r in run.epochs] == [1.5, 1.2]
    assert run.info["config"] == {"batch_size": 64, "lr": 0.001, "optimizer": "Adam", "epochs": 2}


def test_fastai_csv(tmp_path: Path) -> None:
    path = tmp_path / "pets" / "history.csv"
    path.parent.mkdir()
    header = "epoch,train_loss,valid_loss,error_rate,time\n"
    path.write_text(f"{header}0,1.0,0.5,0.25,01:05\n{header}0,0.8,0.4,0.2,1:00:10\n")
    trunk, [finetune] = by_phase(run_import(tmp_path / "runs", path, "--boundary", 1))
    assert trunk.run_id.endswith("pets-transfer")
    assert curve(finetune) == [(1, 0.75), (2, 0.8)]
    assert [r.seconds for r in finetune.epochs] == [0, 3610]
    assert trunk.epochs[0].seconds == 65
    assert finetune.epochs[1].val_loss == 0.4


def state(entries: Sequence[dict[str, float]]) -> str:
    return json.dumps({"log_history": list(entries), "train_batch_size": 32, "global_step": 9})


def test_hugging_face_trainer_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [
        {"epoch": 0.5, "loss": 3.0, "learning_rate": 2e-5, "step": 50},
        {"epoch": 1.0, "loss": 2.0, "learning_rate": 1e-5, "step": 100},
        {"epoch": 1.0, "eval_loss": 1.9, "eval_accuracy": 0.5, "eval_runtime": 9, "step": 100},
        {"epoch": 1.99, "eval_loss": 1.7, "eval_accuracy": 0.6, "step": 200},
        {"epoch": 2.0, "train_loss": 9.9, "train_runtime": 99.0, "step": 200},
        {"epoch": 2.0, "eval_loss": 1.0, "eval_accuracy": 0.9, "step": 200},
    ]
    for name, count in (("checkpoint-100", 3), ("checkpoint-200", 4), (".", 6)):
        path = tmp_path / "vit" / name / huggingface.STATE_JSON
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(state(entries[:count]))
    [run] = run_import(tmp_path / "runs", tmp_path / "vit")
    assert run.run_id.endswith("-vit")
    # The last entry is the best epoch evaluated once more.
    assert curve(run) == [(1, 0.5), (2, 0.6)]
    assert run.epochs[0].train_loss == 2.5
    assert run.epochs[1].train_loss is None
    assert run.info["config"] == {"batch_size": 32, "epochs": 2, "lr": 2e-5}
    assert capsys.readouterr().out.count("an earlier state") == 2


# --- imported runs elsewhere --------------------------------------------------------------------


def test_an_imported_run_has_no_network_to_finetune(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.csv"
    path.write_text("epoch,accuracy,loss,val_accuracy,val_loss\n0,0.5,1,0.4,1.2\n")
    [run] = run_import(tmp_path / "runs", path)
    argv = ["--phase", "finetune", "--data", photos, "--from", run.run_id]
    assert main([*map(str, argv), "--runs-dir", str(tmp_path / "runs")]) == 2
    assert "was imported: its log is here, its network is not" in capsys.readouterr().err


def test_a_log_without_accuracy_is_compared_by_its_loss(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("epoch,loss,val_loss\n0,2,1.5\n1,1,1.2\n")
    [run] = run_import(tmp_path / "runs", path, "--accuracy", "none")
    summary = summarise(run, "log")
    assert (summary.best_acc, summary.best_loss, summary.change) == (None, 1.2, None)


# --- names of tags ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "split", "metric"),
    [
        ("validation/epoch_categorical_accuracy", "val", "categorical_accuracy"),
        ("train_loss_epoch", "train", "loss"),
        ("Loss/train", "train", "loss"),
        ("eval_top1", "val", "top1"),
        ("test_acc", None, "test_acc"),
        (
            "validation/evaluation_accuracy_vs_iterations",
            "val",
            "evaluation_accuracy_vs_iterations",
        ),
    ],
)
def test_tags_are_taken_apart(tag: str, split: str | None, metric: str) -> None:
    name = take_apart(tag)
    assert (name.split, name.metric) == (split, metric)


def test_the_usual_accuracies_are_known_and_the_plainest_preferred() -> None:
    tags = ["val_top_k_categorical_accuracy", "val_sparse_categorical_accuracy", "val_accuracy"]
    chosen = choose(tags, "train", None)
    assert chosen["val_accuracy"].field == "val_acc"
    assert chosen["val_top_k_categorical_accuracy"].field == "val_top5"
    assert "val_sparse_categorical_accuracy" not in chosen


def test_an_accuracy_of_another_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, path = tmp_path / "runs", tmp_path / "lab.csv"
    path.write_text("epoch,loss,dice,val_dice\n0,1.0,0.5,0.4\n")
    message = refused(runs, capsys, path)
    assert "loss, dice, val_dice" in message
    assert "--accuracy TAG" in message
    assert "no 'jaccard' among its tags" in refused(runs, capsys, path, "--accuracy", "jaccard")
    [run] = run_import(runs, path, "--accuracy", "dice")
    assert (run.epochs[0].train_acc, run.epochs[0].val_acc) == (0.5, 0.4)
    path.write_text("epoch,loss,score\n0,1.0,0.5\n")
    [_, run] = run_import(runs, path, "--accuracy", "score", "--again")
    assert run.epochs[0].val_acc == 0.5
    [*_, run] = run_import(runs, path, "--accuracy", "none", "--again")
    assert math.isnan(run.epochs[0].val_acc)
    assert run.epochs[0].train_loss == 1.0


# --- what is refused ----------------------------------------------------------------------------


def test_the_same_log_is_not_imported_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, path = tmp_path / "runs", tmp_path / "lab.csv"
    path.write_text("epoch,val_acc\n0,0.5\n")
    [run] = run_import(runs, path)
    assert run.run_id in refused(runs, capsys, path)
    path.rename(tmp_path / "moved.csv")
    assert run.run_id in refused(runs, capsys, tmp_path / "moved.csv")
    path.write_text("epoch,val_acc\n0,0.5\n1,0.6\n")
    assert run.run_id in refused(runs, capsys, path)
    assert len(run_import(runs, path, "--again")) == 2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "epoch,val_acc\nzero,0.5\n", "line 2: the epoch 'zero'"),
        ("a.csv", "epoch,val_acc\n1e9,0.5\n", "line 2: the epoch '1e9'"),
        ("a.csv", "epoch,val_acc\n0,good\n", "line 2, column val_acc: 'good'"),
        ("a.csv", "epoch,val_acc\n0,1,2\n1,0.5\n", "line 2 has 3 columns"),
        ("a.csv", "epoch,val_acc,val_acc\n0,1,1\n", "the same name"),
        ("a.csv", "epoch,val_acc\n", "before the first epoch"),
        ("a.csv", "photo,label\na,b\n", "without a column named epoch"),
        ("a.csv", 'epoch,val_acc\n"' + "x" * 200_000, "is not a CSV file"),
        ("trainer_state.json", "[" * 100_000, "is not valid JSON"),
        ("trainer_state.json", "{}", "no list log_history"),
        ("trainer_state.json", state([{"epoch": 1e300, "step": 1, "loss": 1}]), "not plausible"),
        ("trainer_state.json", '{"log_history": [1, {"epoch": "x"}]}', "before the first epoch"),
        ("notes.txt", "hello", "holds nothing that Thaw knows"),
    ],
)
def test_hostile_content_is_refused_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, says: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    message = refused(tmp_path / "runs", capsys, path)
    assert says in message
    assert str(path) in message


def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "huge.csv"
    path.write_text("epoch,val_acc\n0,0.5\n")
    with path.open("r+b") as file:
        file.truncate(tables.MAX_BYTES + 1)  # sparse: takes no space
    assert "up to 64 MB" in refused(tmp_path / "runs", capsys, path)


def test_flags_that_contradict_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, logs = tmp_path / "runs", tmp_path / "logs"
    a, b = write_keras(logs / "a", [0.5, 0.6]), write_keras(logs / "b", [0.7], start=DAY + 9)
    assert "no such file" in refused(runs, capsys, tmp_path / "missing")
    assert "there are 2" in refused(runs, capsys, logs, "--then", b, "--again")
    assert "give one of them" in refused(runs, capsys, a, "--then", b, "--from", "x")
    assert "--phase is for" in refused(runs, capsys, a, "--then", b, "--phase", "scratch")
    assert "holds the epochs 1 to 2" in refused(runs, capsys, a, "--boundary", 2)
    assert "2 names for 1 logs" in refused(runs, capsys, a, "--run-name", "x", "y")
    assert "no runs folder" in refused(runs, capsys, a, "--from", "x")
    assert "a log of the format fastai" in refused(runs, capsys, a, "--format", "fastai")


def test_a_failed_import_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = write_keras(tmp_path / "both", [0.5, 0.6, 0.7])
    real = RunWriter.imported_epoch

    def full(writer: RunWriter, record: EpochRecord) -> None:
        if record.phase == "finetune":
            raise OSError(28, "No space left on device")
        real(writer, record)

    monkeypatch.setattr(write.RunWriter, "imported_epoch", full)
    (tmp_path / "runs").mkdir()
    message = refused(tmp_path / "runs", capsys, logs, "--boundary", 2)
    assert "No space left on device. Nothing was imported." in message


def test_names_from_logs_stay_inside_the_runs_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = write_keras(tmp_path / "x\x1b[2J $(rm)", [0.5])
    runs = run_import(tmp_path / "runs", logs)
    runs = run_import(tmp_path / "runs", logs, "--again", "--run-name", "../../up")
    assert [run.path.parent for run in runs] == [tmp_path / "runs"] * 2
    assert "\x1b" not in capsys.readouterr().out


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = write_keras(tmp_path / "owl", [0.5])
    assert run_import(tmp_path / "runs", logs, "--dry-run") == []
    assert "would import  owl" in capsys.readouterr().out


def test_thaws_own_runs_and_hidden_folders_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs, runs = tmp_path / "logs", tmp_path / "runs"
    run_import(logs, write_keras(tmp_path / "owl", [0.5]))
    write_keras(logs / ".hidden", [0.5], start=DAY + 9)
    assert "it is a run of Thaw" in refused(runs, capsys, logs)


def test_too_many_files_are_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.imports.find.MAX_ENTRIES", 3)
    write_keras(tmp_path, [0.5])
    with pytest.raises(LogError, match="more than 3 files"):
        read_all([tmp_path])


def test_reading_logs_needs_neither_torch_nor_tensorflow(tmp_path: Path) -> None:
    logs = write_keras(tmp_path / "owl", [0.5])
    code = (
        "import sys; from trainer.imports.command import main; "
        f"status = main([{str(logs)!r}, '--runs-dir', {str(tmp_path / 'runs')!r}]); "
        "sys.exit(status or 3 * ('torch' in sys.modules or 'tensorflow' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

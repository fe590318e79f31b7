"""Run folders: what the explorer and export rely on, also while a run is being written."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from trainer.runlog import (
    Run,
    RunError,
    RunWriter,
    checkpoint_path,
    find_run,
    follow,
    list_runs,
    read_run,
)
from trainer.schema import EpochRecord, Phase, PhaseRecord


def record(epoch: int, phase: Phase = "transfer", phase_epoch: int | None = None) -> EpochRecord:
    trained = None if (phase_epoch if phase_epoch is not None else epoch) == 0 else 0.5
    return EpochRecord(
        phase=phase,
        epoch=epoch,
        phase_epoch=epoch if phase_epoch is None else phase_epoch,
        train_loss=trained,
        train_acc=trained,
        val_loss=1.0,
        val_acc=0.5,
        val_top5=1.0,
        val_macro_f1=0.4,
        lr_head=0.1,
        lr_backbone=0.0,
        trainable_params=10,
        seconds=1.0,
        images_per_second=9.0,
        peak_memory_bytes=1,
        time=1.0,
    )


def write(runs: Path, name: str = "t", epochs: int = 3, **info: Any) -> RunWriter:
    writer = RunWriter.create(runs, name, {"classes": ["a", "b"]} | info)
    writer.start_phase(PhaseRecord("transfer", 0, None, ("head",), 10))
    for epoch in range(epochs):
        writer.epoch(record(epoch))
    return writer


def test_what_is_written_is_read(tmp_path: Path) -> None:
    writer = write(tmp_path)
    writer.note("a remark")
    writer.end_phase(2)
    writer.close("done")
    run = read_run(writer.path)
    assert run.epochs == tuple(record(epoch) for epoch in range(3))
    assert (run.status, run.phase, run.classes, run.problem) == (
        "done",
        "transfer",
        ("a", "b"),
        None,
    )
    assert run.info["phases"][0]["last_epoch"] == 2
    events = [json.loads(line)["event"] for line in (run.path / "metrics.jsonl").open()]
    assert events == ["phase", "epoch", "epoch", "epoch", "note", "stop"]


def test_runs_started_in_the_same_second_get_two_folders(tmp_path: Path) -> None:
    assert write(tmp_path).run_id != write(tmp_path).run_id


def test_a_torn_last_line_is_left_for_later(tmp_path: Path) -> None:
    writer = write(tmp_path, epochs=2)
    metrics = writer.path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    run = read_run(writer.path)
    assert len(run.epochs) == 1
    assert run.problem is None


def test_unknown_events_are_skipped_and_damaged_lines_named(tmp_path: Path) -> None:
    writer = write(tmp_path, epochs=1)
    with (writer.path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "from the future", "x": 1}\n')
        file.write('{"event": "epoch", "phase": "transfer", "epoch": "two"}\n')
        file.write("{not json\n[]\n")
    run = read_run(writer.path)
    assert len(run.epochs) == 1
    assert run.problem is not None
    assert "[4, 5, 6]" in run.problem


def test_non_finite_numbers_are_never_written(tmp_path: Path) -> None:
    writer = write(tmp_path, epochs=1)
    with pytest.raises(ValueError):
        writer.epoch(EpochRecord(**{**record(1).__dict__, "val_loss": float("nan")}))
    assert len(read_run(writer.path).epochs) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"a": 1}', "no schema_version"),
        ('{"schema_version": 99}', "newer Thaw"),
        ('{"schema_version": 1, "phases": "x"}', "wrong type"),
        ('{"schema_version": 1, "classes": [1]}', "wrong type"),
        ('{"schema_version": 1, "parent_run_id": "../../etc"}', "wrong type"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_one_bad_run_does_not_hide_the_others(tmp_path: Path, content: str, message: str) -> None:
    good = write(tmp_path)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "run.json").write_text(content)
    runs = {run.run_id: run for run in list_runs(tmp_path)}
    assert runs[good.run_id].problem is None
    assert message in (runs["bad"].problem or "")


def test_a_new_run_without_metrics_is_a_run(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path, "new", {})
    (writer.path / "metrics.jsonl").unlink()
    assert read_run(writer.path).epochs == ()


def test_watching_a_run_while_it_is_written(tmp_path: Path) -> None:
    writer = write(tmp_path, epochs=0)

    def train() -> None:
        for epoch in range(200):
            writer.epoch(record(epoch))
            writer.update(beat=epoch)
        writer.close("done")

    thread = threading.Thread(target=train)
    thread.start()
    seen = [r for r in follow(writer.path) if r is not None]
    thread.join()
    assert [r.epoch for r in seen] == list(range(200))


def test_find_run_by_id_part_and_path(tmp_path: Path) -> None:
    one, two = write(tmp_path, "alpha"), write(tmp_path, "beta")
    assert find_run(tmp_path, "alpha").run_id == one.run_id
    assert find_run(tmp_path, str(two.path)).run_id == two.run_id
    with pytest.raises(RunError, match="matches several"):
        find_run(tmp_path, one.run_id[:8])
    with pytest.raises(RunError, match=r"No run 'gamma'.*alpha"):
        find_run(tmp_path, "gamma")
    with pytest.raises(RunError, match="no runs folder"):
        find_run(tmp_path / "none", "alpha")


def test_a_runs_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--runs-dir"):
        RunWriter.create(tmp_path / "file", "t", {})


def test_no_runs_folder_is_no_runs(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "none") == []


def finetune(runs: Path, parent: RunWriter, file: str = "transfer-last.pt") -> Run:
    info = {"parent_run_id": parent.run_id, "parent_checkpoint": {"file": file}}
    writer = RunWriter.create(runs, "f", info)
    writer.start_phase(PhaseRecord("finetune", 2, None, ("head",), 10))
    writer.checkpoint("finetune-best").touch()
    return read_run(writer.path)


def test_before_is_the_parents_checkpoint_and_after_the_best(tmp_path: Path) -> None:
    parent = write(tmp_path)
    parent.checkpoint("transfer-last").touch()
    run = finetune(tmp_path, parent)
    assert run.boundary == 2
    assert checkpoint_path(run, "after") == run.checkpoint("finetune-best")
    assert checkpoint_path(run, "before") == parent.checkpoint("transfer-last")


def test_what_is_missing_before_is_said(tmp_path: Path) -> None:
    parent = write(tmp_path)
    with pytest.raises(RunError, match="no finetune phase"):
        checkpoint_path(read_run(parent.path), "before")
    with pytest.raises(RunError, match="not there"):
        checkpoint_path(finetune(tmp_path, parent), "before")
    with pytest.raises(RunError, match="does not name"):
        checkpoint_path(finetune(tmp_path, parent, "../../x.pt"), "before")

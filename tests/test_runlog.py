"""Run folders: what the explorer and export rely on, also while a run is being written."""

from __future__ import annotations

import io
import json
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.run_writer import RunWriter
from trainer.runlog import (
    Run,
    RunError,
    RunReader,
    _Log,
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


def line(number: int, **values: Any) -> bytes:
    return json.dumps(record(number).to_dict() | {"time": number} | values).encode() + b"\n"


@pytest.mark.parametrize(
    "values",
    [
        {"val_acc": 10**400},
        {"val_acc": float("inf")},
        {"val_loss": float("nan")},
        {"epoch": None},
        {"epoch": 0.5},
        {"epoch": 10**30},
        {"phase_epoch": -1},
        {"trainable_params": True},
        {"seconds": "1"},
        {"lr_head": [1]},
        {"phase": "thaw"},
        {"phase": ["transfer"]},
    ],
)
def test_a_line_with_an_impossible_value_is_left_out(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    writer = write(tmp_path, epochs=0)
    with (writer.path / "metrics.jsonl").open("ab") as file:
        file.write(line(0) + line(1, **values) + line(2))
    run = read_run(writer.path)
    assert [epoch.epoch for epoch in run.epochs] == [0, 2]
    assert "[3]" in (run.problem or "")


def test_numbers_whose_sum_no_float_holds_are_numbers(tmp_path: Path) -> None:
    writer = write(tmp_path, epochs=0)
    with (writer.path / "metrics.jsonl").open("ab") as file:
        file.write(line(0, val_loss=1e308, train_loss=1.5e308))
    assert [epoch.val_loss for epoch in read_run(writer.path).epochs] == [1e308]


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
        ('{"schema_version": 1, "started": NaN}', "wrong type"),
        ('{"schema_version": 1, "started": 1e308}', "wrong type"),
        ('{"schema_version": 1, "started": -1e12}', "wrong type"),
        (
            f'{{"schema_version": 1, "phases": [{{"name": "direct", "first_epoch": {10**400}}}]}}',
            "wrong type",
        ),
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


# --- reading on ---------------------------------------------------------------------------------


class Log:
    """A metrics.jsonl that things happen to. No two lines are the same, as in real ones."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.random, self.lines = path, random.Random(seed), 0

    def happen(self) -> None:
        often = (self.append, self.append, self.tear, self.drop)
        self.random.choice((*often, *often, self.rewrite, self.edit, self.replace, self.remove))()

    def new_lines(self) -> bytes:
        lines = []
        for _ in range(self.random.randrange(4)):
            self.lines += 1
            note, damaged = b'{"event": "note", "time": %d}\n', b"%d{\n"
            epoch = line(self.lines)
            lines.append(
                self.random.choice((epoch, epoch, note % self.lines, damaged % self.lines))
            )
        return b"".join(lines)

    def content(self) -> bytes:
        return self.path.read_bytes() if self.path.exists() else b""

    def append(self) -> None:
        with self.path.open("ab") as file:
            file.write(self.new_lines())

    def tear(self) -> None:
        new = self.new_lines()
        with self.path.open("ab") as file:
            file.write(new[: self.random.randrange(len(new) + 1)])

    def drop(self) -> None:
        """As a run does that goes on; what it then logs may reach further than before."""
        if content := self.content():
            os.truncate(self.path, self.random.randrange(len(content)))
        self.random.choice((self.append, self.tear, lambda: None))()

    def rewrite(self) -> None:
        """Other lines in the same file."""
        time.sleep(0.01)  # the time of a file advances in steps
        self.path.write_bytes(self.new_lines() + self.new_lines())

    def edit(self) -> None:
        """Another number in the first line, and the same size."""
        time.sleep(0.01)
        self.path.write_bytes(self.edited())

    def edited(self) -> bytes:
        return self.content().replace(b'"val_acc": 0.5', b'"val_acc": 0.6', 1)

    def replace(self) -> None:
        """A longer file that ends like this one."""
        other = self.path.with_suffix(".new")
        other.write_bytes(self.edited() + self.new_lines())
        other.replace(self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


@pytest.mark.parametrize("seed", range(10))
def test_reading_on_is_reading_all(tmp_path: Path, seed: int) -> None:
    writer = write(tmp_path, epochs=0)
    log = Log(writer.path / "metrics.jsonl", seed)
    reader = RunReader(writer.path)
    for _ in range(60):
        log.happen()
        assert reader.read() == read_run(writer.path)


class Counted(io.FileIO):
    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.count += len(found)
        return found

    def readall(self) -> bytes:
        found = super().readall()
        self.count += len(found)
        return found


def test_of_a_long_log_only_what_is_new_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(map(line, range(10_000))))
    with Counted(path) as file:
        log = _Log().read_on(file)
        assert file.count == path.stat().st_size
    new = line(10_000)
    with path.open("ab") as writing:
        writing.write(new + b'{"event": "ep')
    with Counted(path) as file:
        log = log.read_on(file)
        assert file.count < len(new) + 300
    assert [epoch.epoch for epoch in log.epochs] == list(range(10_001))


def test_what_has_not_changed_is_the_same_object(tmp_path: Path) -> None:
    writer = write(tmp_path)
    reader = RunReader(writer.path)
    first = reader.read()
    assert reader.read() is first
    writer.update(beat=1)
    second = reader.read()
    assert second.info["beat"] == 1
    assert second.epochs is first.epochs


def test_a_run_json_that_breaks_and_is_mended(tmp_path: Path) -> None:
    writer = write(tmp_path)
    reader, path = RunReader(writer.path), writer.path / "run.json"
    whole = path.read_bytes()
    path.write_bytes(b"{")
    for _ in range(2):
        with pytest.raises(RunError, match="not valid JSON"):
            reader.read()
        assert reader.read_or_explain().epochs == ()
    path.write_bytes(whole)
    assert len(reader.read().epochs) == 3


def test_a_log_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    writer = write(tmp_path)
    log = writer.path / "metrics.jsonl"
    log.unlink()
    log.mkdir()
    assert "Is a directory" in (read_run(writer.path).problem or "")


# --- finding ------------------------------------------------------------------------------------


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

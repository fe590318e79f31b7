"""`--track mlflow`: what MLflow has of a run, once, and that no training minds if it is away."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Train
from tests.explorer_runs import record, write_finetune, write_run, write_trunk
from tests.faults import wait_for
from trainer.__main__ import main
from trainer.config import Config, ConfigError
from trainer.run_writer import RunWriter
from trainer.runlog import read_run
from trainer.track import Mirror, TrackError, check_tracker, follow, tracking
from trainer.track_command import main as track_main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow's client on an empty store in a folder."""
    mlflow = pytest.importorskip("mlflow", reason="needs requirements-mlflow.txt")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    return mlflow.MlflowClient((tmp_path / "mlruns").as_uri())


def tracked(client: Any, name: str = "thaw") -> dict[str, Any]:
    """The runs that MLflow has, by their Thaw id; no two of one."""
    experiment = client.get_experiment_by_name(name)
    found = client.search_runs([experiment.experiment_id])
    runs = {run.data.tags["thaw.run_id"]: run for run in found}
    assert len(runs) == len(found)
    return runs


def steps(client: Any, run: Any, name: str) -> list[tuple[int, float]]:
    history = client.get_metric_history(run.info.run_id, name)
    return [(one.step, one.value) for one in history]


# --- flags --------------------------------------------------------------------------------------


def test_it_is_off_unless_it_is_asked_for() -> None:
    assert Config("transfer").track is None
    with pytest.raises(ConfigError, match="--track wandb: choose one of mlflow"):
        Config("transfer", track="wandb")  # type: ignore[arg-type]


def test_without_mlflow_it_says_what_to_install_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.track.find_spec", lambda name: None)
    check_tracker(None)
    with pytest.raises(TrackError, match=r"pip install -r requirements-mlflow.txt"):
        check_tracker("mlflow")
    flags = ["--phase", "transfer", "--track", "mlflow", "--runs-dir", str(tmp_path / "runs")]
    assert main(flags) == 2
    assert "requirements-mlflow.txt" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    run = write_trunk(tmp_path)
    assert track_main([run, "--runs-dir", str(tmp_path)]) == 2


# --- what is sent -------------------------------------------------------------------------------


def test_a_run_is_there_with_all_that_it_is(store: Any, tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path)
    sweep = {"id": "abc", "name": "rates", "group": "lr 1e-5", "member": 3, "control": False}
    config = Config("finetune", lr=1e-4, runs_dir=tmp_path).to_dict()
    child = write_run(
        *(tmp_path, "child", [0.70, 0.74, 0.72], "finetune", 3),
        parent_run_id=trunk,
        sweep=sweep,
        config=config,
        recipe=None,
    )
    child.checkpoint("finetune-best").write_bytes(b"weights")
    (child.path / "checkpoints/finetune-best.pt.sha256").write_text("c0ffee  finetune-best.pt\n")
    (child.path / "model-card.md").write_text("card")
    assert Mirror().send(child.path) == 3
    runs = tracked(store)
    run, parent = runs[child.run_id], runs[trunk]  # the trunk came with it
    assert steps(store, run, "finetune/val_acc") == [(3, 0.70), (4, 0.74), (5, 0.72)]
    assert [step for step, _ in steps(store, run, "finetune/train_acc")] == [4, 5]
    assert len(steps(store, parent, "transfer/val_acc")) == 4
    assert run.data.params["lr"] == "0.0001"
    assert run.data.params["schedule.name"] == "constant"
    assert "runs_dir" not in run.data.params
    tags = run.data.tags
    assert tags["mlflow.parentRunId"] == parent.info.run_id
    assert (tags["thaw.boundary"], tags["thaw.phase"], tags["thaw.control"]) == (
        *("3", "finetune"),
        "false",
    )
    assert (tags["thaw.sweep.name"], tags["thaw.sweep.group"]) == ("rates", "lr 1e-5")
    assert run.data.metrics["best_val_acc"] == 0.74
    assert run.data.metrics["change"] == pytest.approx(0.04)
    assert (run.info.status, run.info.run_name) == ("FINISHED", child.run_id)
    files = {file.path for file in store.list_artifacts(run.info.run_id)}
    assert files == {"run.json", "metrics.jsonl", "model-card.md", "checkpoints"}
    kept = {file.path for file in store.list_artifacts(run.info.run_id, "checkpoints")}
    assert kept == {"checkpoints/finetune-best.pt", "checkpoints/finetune-best.pt.sha256"}


def test_nothing_is_sent_twice(
    store: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk = write_trunk(tmp_path)
    command = [trunk, "--runs-dir", str(tmp_path)]
    assert track_main(command) == 0
    assert f"{trunk}: 4 epochs sent, 4 in all" in capsys.readouterr().out
    assert track_main(["all", *command[1:]]) == 0
    assert f"{trunk}: 0 epochs sent, 4 in all" in capsys.readouterr().out
    [run] = tracked(store).values()
    for name in ("transfer/val_acc", "best_val_acc"):
        found = steps(store, run, name)
        assert len(found) == len(set(found))


def test_a_run_that_goes_on_is_the_same_run_there(store: Any, tmp_path: Path) -> None:
    first = write_run(tmp_path, "run", [0.2, 0.3, 0.4], done=False)
    first.close("interrupted")
    Mirror().send(first.path)
    [run] = tracked(store).values()
    assert run.info.status == "KILLED"
    again = RunWriter.reopen(read_run(first.path), 1)  # epoch 2 is trained anew
    mirror = Mirror()
    again.epoch(record("transfer", 2, 2, 0.4))
    mirror.send(again.path, ended=False)
    assert tracked(store)[first.run_id].info.status == "RUNNING"
    again.epoch(record("transfer", 3, 3, 0.5))
    again.close("done")
    mirror.send(again.path)
    [run] = tracked(store).values()
    assert run.info.status == "FINISHED"
    assert steps(store, run, "transfer/val_acc") == [(0, 0.2), (1, 0.3), (2, 0.4), (3, 0.5)]


def test_another_run_of_the_same_name_is_another_run(store: Any, tmp_path: Path) -> None:
    here = write_run(tmp_path / "a", "run", [0.2], dataset={"fingerprint": "1"})
    there = write_run(tmp_path / "b", "run", [0.2], dataset={"fingerprint": "2"})
    there.path.rename(tmp_path / "b" / here.run_id)
    for folder in ("a", "b"):
        Mirror().send(tmp_path / folder / here.run_id)
    experiment = store.get_experiment_by_name("thaw")
    assert len(store.search_runs([experiment.experiment_id])) == 2


def test_numbers_that_a_log_does_not_hold_are_left_out(store: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path, "imported", [], done=False)
    nothing = {"val_top5": float("nan"), "val_macro_f1": float("nan")}
    run.imported_epoch(dataclasses.replace(record("transfer", 1, 1, 0.5), **nothing))
    run.close("done")
    Mirror().send(run.path)
    metrics = tracked(store)[run.run_id].data.metrics
    assert "transfer/val_top5" not in metrics
    assert metrics["transfer/val_acc"] == 0.5


def test_a_run_that_is_its_own_ancestor_is_sent_once(store: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path, "loop", [0.7], "finetune", 3)
    run.update(parent_run_id=run.run_id)
    Mirror().send(run.path)
    assert len(tracked(store)) == 1


def test_where_it_goes_is_named_as_mlflow_has_it(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "flowers")
    run = write_trunk(tmp_path)
    Mirror().send(tmp_path / run)
    assert list(tracked(store, "flowers")) == [run]


# --- while it is trained ------------------------------------------------------------------------


def test_it_follows_a_run_as_it_is_written(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.track._LOOK_SECONDS", 0.01)
    sent: list[int] = []
    send = Mirror.send

    def counted(self: Mirror, path: Path, ended: bool = True) -> int:
        sent.append(send(self, path, ended))
        return sent[-1]

    # MLflow's store of files fails who reads it while it is written.
    monkeypatch.setattr(Mirror, "send", counted)
    with tracking("mlflow"):
        run = write_run(tmp_path, "run", [0.2, 0.3], done=False)
        follow(run.path)
        wait_for(lambda: sum(sent) == 2)
        assert len(steps(store, tracked(store)[run.run_id], "transfer/val_acc")) == 2
        assert tracked(store)[run.run_id].info.status == "RUNNING"
        run.epoch(record("transfer", 2, 2, 0.4))
        run.close("done")
    found = tracked(store)[run.run_id]
    assert found.info.status == "FINISHED"
    assert [step for step, _ in steps(store, found, "transfer/val_acc")] == [0, 1, 2]
    follow(run.path)  # where nothing is tracked, nothing happens


def test_a_server_that_is_away_is_said_once_and_what_is_missing_can_be_sent(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setattr("trainer.track._LOOK_SECONDS", 0.01)
    monkeypatch.setattr("trainer.track._AGAIN_SECONDS", 0.01)
    run = write_run(tmp_path, "run", [0.2, 0.3], done=False)
    with tracking("mlflow"):
        follow(run.path)
        text = ""

        def has_been_said() -> bool:
            nonlocal text
            text += "".join(capsys.readouterr())
            return "Training goes on" in text

        wait_for(has_been_said)
        time.sleep(0.2)  # to say it again, which it shall not
        run.close("done")
    text += "".join(capsys.readouterr())
    assert text.count("Training goes on; what is missing is sent at the end.") == 1
    assert f"python -m trainer track {run.run_id} --runs-dir {tmp_path}" in text
    assert "MLflow at http://127.0.0.1:9 does not take the runs" in text
    assert "secret" not in text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", there)
    assert track_main([run.run_id, "--runs-dir", str(tmp_path)]) == 0
    assert len(steps(store, tracked(store)[run.run_id], "transfer/val_acc")) == 2


def test_one_run_that_is_gone_does_not_keep_the_others(
    store: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_trunk(tmp_path)
    with tracking("mlflow"):
        follow(tmp_path / "gone")
        follow(tmp_path / good)
    assert list(tracked(store)) == [good]
    assert "gone" in capsys.readouterr().out


@pytest.mark.slow
def test_a_training_is_tracked_to_its_end_and_on_from_there(store: Any, train: Train) -> None:
    trunk = train("--phase", "transfer", "--epochs", "2", "--track", "mlflow")
    run = tracked(store)[trunk.run_id]
    assert run.info.status == "FINISHED"
    assert [step for step, _ in steps(store, run, "transfer/val_acc")] == [0, 1, 2]
    assert run.data.params["arch"] == "mobilenet_v3_small"
    child = train("--phase", "finetune", "--from", trunk.run_id, "--epochs", "1", "--track=mlflow")
    found = tracked(store)[child.run_id]
    assert found.data.tags["mlflow.parentRunId"] == run.info.run_id
    assert len(tracked(store)) == 2


# --- MLflow's own server ------------------------------------------------------------------------


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """A real one on SQLite, which serves artefacts too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < until
                time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.slow
def test_a_sweep_on_mlflows_own_server(
    tmp_path: Path, photos: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs requirements-mlflow.txt")
    pytest.importorskip("sqlalchemy", reason="needs MLflow's server")
    runs_dir = tmp_path / "runs"
    trunk = train("--phase", "transfer", "--epochs", "1")  # not tracked
    sweep = ["sweep", "--from", trunk.run_id, "--runs-dir", str(runs_dir), "--data", str(photos)]
    sweep += ["--lr", "1e-5", "1e-4", "--epochs", "2", "--batch-size", "8", "--track", "mlflow"]
    with mlflow_server(tmp_path) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        client = mlflow.MlflowClient(address)
        assert main(sweep) == 0
        runs = tracked(client)
        assert len(runs) == 4
        parent = runs.pop(trunk.run_id)
        for run in runs.values():
            assert run.info.status == "FINISHED"
            assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
            assert "thaw.sweep.name" in run.data.tags
            phase = run.data.tags["thaw.phase"]
            assert [step for step, _ in steps(client, run, f"{phase}/val_acc")] == [1, 2, 3]
            [first, *_] = client.list_artifacts(run.info.run_id)
            assert first.path == "checkpoints"
        assert [run.data.tags["thaw.control"] for run in runs.values()].count("true") == 1
        assert main(["track", "all", "--runs-dir", str(runs_dir)]) == 0
        for run in tracked(client).values():
            for name in run.data.metrics:
                found = steps(client, run, name)
                assert len({step for step, _ in found}) == len(found), name
    write_finetune(runs_dir, trunk.run_id, "later", [0.5, 0.6])
    assert main(["track", "later", "--runs-dir", str(runs_dir)]) == 2  # the server is away

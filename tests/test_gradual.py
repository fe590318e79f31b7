"""Layers that are freed one after the other within a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch

from explorer.charts import overlay
from explorer.curves import SPLITS, boundaries, inner_boundaries
from explorer.data import Library, epochs_frame, lineage
from tests.conftest import Train
from tests.explorer_runs import INFO, record, write_run, write_trunk
from tests.test_resume import check_alike, events, interrupt
from tests.test_together import PHOTOS, figures, sweep
from trainer.__main__ import main
from trainer.checkpoint import load_checkpoint
from trainer.config import Config, ConfigError
from trainer.phase import make_optimizer
from trainer.recipe import parse
from trainer.run_writer import RunWriter
from trainer.runlog import Run, list_runs
from trainer.schema import PhaseRecord

GRADUAL = ("--unfreeze", "1", "--gradual", "5@1,20@3")


@pytest.fixture
def parent(train_awake: Train) -> Run:
    return train_awake("--phase", "transfer", "--epochs", "1", "--lr", "0.01")


def changed(before: Run, after: Run) -> set[str]:
    """The modules whose weights differ between the last epochs of two runs."""
    first, second = (
        load_checkpoint(run.checkpoint(f"{run.phase}-last")).state_dict for run in (before, after)
    )
    different = (name for name in first if not torch.equal(first[name], second[name]))
    return {name.rpartition(".")[0] for name in different}


def test_sgd_takes_what_is_freed_later() -> None:
    network = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(network, "sgd", 0.1, gradual=True)
    for free in (False, True):
        network.bias.requires_grad_(free)
        optimizer.zero_grad()
        network(torch.ones(1, 2)).sum().backward()
        optimizer.step()


def test_more_trains_after_each_boundary(train_awake: Train, parent: Run) -> None:
    flags = ("--phase", "finetune", "--from", parent.run_id, "--lr", "1e-3", "--unfreeze", "1")
    run = train_awake(*flags, "--gradual", "5@1,20@3", "--epochs", "4")
    deeper = [train_awake(*flags[:-1], layers, "--epochs", "1") for layers in ("1", "5", "20")]
    params = [one.epochs[0].trainable_params for one in deeper]
    assert [e.trainable_params for e in run.epochs] == [params[i] for i in (0, 0, 1, 1, 2)]
    (phase,) = run.info["phases"]
    listed = [phase["unfrozen_layers"], *(one["unfrozen_layers"] for one in phase["gradual"])]
    assert listed == [one.info["phases"][0]["unfrozen_layers"] for one in deeper]
    assert [one["epoch"] for one in phase["gradual"]] == [2, 4]
    kinds = [(event["event"], event.get("epoch")) for event in events(run)[:-1]]
    assert kinds == [
        *[("phase", 1), ("epoch", 1), ("epoch", 2), ("unfreeze", 2), ("epoch", 3), ("epoch", 4)],
        *[("unfreeze", 4), ("epoch", 5)],
    ]
    assert changed(parent, run) == set(listed[-1])
    assert "gradual" not in deeper[0].info["phases"][0]


def test_nothing_moves_before_it_is_freed(train_awake: Train, parent: Run) -> None:
    """And what is free keeps its optimizer's state, what is freed begins with a new one."""
    flags = ("--phase", "finetune", "--from", parent.run_id, "--lr", "1e-3", "--batch-size", "6")
    run = train_awake(*flags, "--unfreeze", "1", "--gradual", "5@2", "--epochs", "3")
    checkpoint = load_checkpoint(run.checkpoint("finetune-last"))
    assert checkpoint.optimizer is not None
    steps = sorted(float(state["step"]) for state in checkpoint.optimizer["state"].values())
    assert steps == [3.0] * 2 + [9.0] * 2
    plain = train_awake(*flags, "--unfreeze", "1", "--epochs", "3")
    assert figures(run)[:9] == pytest.approx(figures(plain)[:9], rel=1e-5)
    assert figures(run)[9:] != pytest.approx(figures(plain)[9:], rel=1e-5)


def test_rates_that_fall_with_the_distance_reach_what_is_freed_later(
    train_awake: Train, parent: Run
) -> None:
    flags = ("--phase", "finetune", "--from", parent.run_id, "--lr", "1e-9", "--unfreeze", "1")
    run = train_awake(*flags, "--gradual", "20@1", "--epochs", "2", "--layer-decay", "0.5")
    assert [epoch.lr_backbone for epoch in run.epochs] == [0, 0, 5e-10]
    assert len(run.info["layer_rates"]) == 4


@pytest.mark.parametrize(
    "batches",
    [
        pytest.param(4, marks=pytest.mark.slow),
        2 * 3 + 1,
        pytest.param(3 * 3 + 1, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_goes_on_across_its_boundaries(
    parent: Run, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    """Interrupted in the second epoch, right after a boundary; in the third; in the fourth."""
    flags = ["--from", str(parent.path), "--lr", "1e-3", "1e-2", *GRADUAL, "--epochs", "4"]
    flags += ["--batch-size", "6", "--data", str(photos), *PHOTOS, "--layer-decay", "0.7"]
    expected = sweep(tmp_path / "whole", *flags)
    with monkeypatch.context() as patched:
        interrupt(patched, after=batches)
        sweep(tmp_path / "torn", *flags, status=130)
    found = sweep(tmp_path / "torn", *flags)
    check_alike(found, expected)
    for group, run in found.items():
        kinds = [event["event"] for event in events(run) if event["event"] != "note"]
        assert kinds == [event["event"] for event in events(expected[group])]
        assert kinds.count("unfreeze") == (0 if group == "control" else 2)


def test_members_learn_what_each_would_have_learnt_alone(
    train_awake: Train, parent: Run, tmp_path: Path, photos: Path
) -> None:
    flags = ("--from", str(parent.path), *GRADUAL, "--epochs", "4", "--batch-size", "6")
    flags += ("--data", str(photos))
    together = sweep(tmp_path / "sweep", *flags, "--lr", "1e-3", "1e-2")
    alone = train_awake("--phase", "finetune", *flags, "--lr", "1e-2")
    assert figures(together["lr 0.01"]) == pytest.approx(figures(alone), rel=1e-4)
    assert together["lr 0.01"].info["phases"] == alone.info["phases"]


def test_gradual_says_when_what_is_freed() -> None:
    assert Config("finetune", gradual="20@2, features.7@5,all@9").stages == (
        (0, "20"),
        (2, "20"),
        (5, "features.7"),
        (9, "all"),
    )
    assert Config("finetune").stages == ((0, "20"),)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gradual 20", "must be what is freed @ after which epoch"),
        ("--gradual @3", "such as 20@5,all@10"),
        ("--gradual 20@0", "rising from 1"),
        ("--gradual 20@3,all@3", "rising from 1"),
        ("--gradual 20@3,", "must be"),
        ("--gradual all@10", "frees layers after the last of 10 epochs"),
        ("--phase transfer --gradual all@3", "--gradual belongs to --phase finetune"),
    ],
)
def test_nonsense_is_refused_with_the_flag(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(flags.split())


def test_a_stage_that_frees_nothing_more_is_refused(
    parent: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = parent.path.parent
    flags = ["--phase", "finetune", "--from", parent.run_id, "--runs-dir", str(runs)]
    assert main([*flags, "--unfreeze", "20", "--gradual", "5@1"]) == 2
    assert "5 frees nothing that is not free before it" in capsys.readouterr().err
    assert len(list_runs(runs)) == 1


# --- in the explorer ----------------------------------------------------------------------------


def write_gradual(runs_dir: Path, trunk: str, name: str, params: list[int]) -> str:
    """A finetune run in whose epochs 0, 1 and so on so many parameters train."""
    writer = RunWriter.create(runs_dir, name, INFO | {"parent_run_id": trunk})
    writer.start_phase(PhaseRecord("finetune", 3, None, ("head",), params[0]))
    for number, trained in enumerate(params):
        shown = record("finetune", 3 + number, number, 0.7)
        writer.epoch(dataclasses.replace(shown, trainable_params=trained))
    writer.close("done")
    return writer.run_id


def frame_of(runs_dir: Path, *ids: str) -> pd.DataFrame:
    snapshot = Library(runs_dir).snapshot()
    curves, _ = lineage(snapshot, ids)
    return epochs_frame(snapshot, curves)


def test_each_boundary_within_a_run_has_a_rule(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path)
    one = write_gradual(tmp_path, trunk, "one", [10, 10, 10, 20, 20, 30])
    two = write_gradual(tmp_path, trunk, "two", [10, 10, 10, 20])
    plain = write_run(tmp_path, "p", [0.7, 0.8], "finetune", 3, parent_run_id=trunk).run_id
    frame = frame_of(tmp_path, one, two, plain)
    found = boundaries(frame, "total")
    assert found[["start", "end"]].values.tolist() == [[3, 8]]  # one band, and rules within it
    assert inner_boundaries(frame, "total")["start"].tolist() == [5, 7]
    assert inner_boundaries(frame, "since")["start"].tolist() == [2, 4]
    drawn = overlay(frame, "accuracy", "total", SPLITS).to_dict()
    marks = [layer["mark"]["type"] for layer in drawn["layer"]]
    assert marks.count("rule") == 2
    thin = [layer for layer in drawn["layer"] if layer["mark"]["type"] == "rule"]
    assert sorted(layer["mark"]["strokeWidth"] for layer in thin) == [0.75, 1.5]


def test_without_any_there_is_none(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path)
    plain = write_run(tmp_path, "p", [0.7, 0.8], "finetune", 3, parent_run_id=trunk).run_id
    frame = frame_of(tmp_path, plain)
    assert inner_boundaries(frame, "total").empty
    assert inner_boundaries(frame_of(tmp_path, trunk), "total").empty

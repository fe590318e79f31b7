"""`python -m trainer sweep --search optuna`; in most tests a stand-in for the training writes the
runs."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.test_grid import write_parent
from tests.test_sweep import StandIn
from trainer.config import Config
from trainer.grid import SweepError
from trainer.recipe import parse
from trainer.runlog import list_runs
from trainer.sweep import main

SEARCH = ("--lr", "1e-8", "1", "--unfreeze", "10", "20", "--search", "optuna")


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    pytest.importorskip("optuna", reason="needs requirements-search.txt")
    runs = tmp_path / "runs"
    return ["--from", write_parent(runs).run_id, "--runs-dir", str(runs), "--arch", "resnet18"]


def best_at_1e4(config: Config) -> Sequence[float] | str:
    """The nearer to 1e-4, the better; above 0.3 the loss diverges."""
    if config.phase == "transfer":
        return [0.702]
    if (rate := config.lr or 0.0) > 0.3:
        return "Error: loss is nan"
    return [0.9 - abs(math.log10(rate) + 4) / 20]


def proposed(stand_in: StandIn) -> list[Config]:
    return [config for config in stand_in.trained if config.phase == "finetune"]


def test_it_finds_what_is_good_between_the_ends_of_a_range(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = StandIn(best_at_1e4)
    assert main([*flags, *SEARCH, "--trials", "24"], stand_in.engine) == 0
    rates = [config.lr or 0.0 for config in proposed(stand_in)]
    assert len(rates) == 24
    assert all(1e-8 <= rate <= 1 for rate in rates)
    assert {config.unfreeze for config in proposed(stand_in)} == {"10", "20"}
    assert min(abs(math.log10(rate) + 4) for rate in rates) < 0.5
    # One control beside them all, however many rounds there were.
    assert [config.phase for config in stand_in.trained].count("transfer") == 1
    out = capsys.readouterr().out
    assert "24 members, 4 at once; Optuna chooses lr, unfreeze" in out
    assert "over control" in out


def test_the_members_are_one_sweep_numbered_as_they_were_proposed(flags: list[str]) -> None:
    stand_in = StandIn(best_at_1e4)
    assert main([*flags, *SEARCH, "--trials", "6", "--at-once", "2"], stand_in.engine) == 0
    entries = [run.info["sweep"] for run in list_runs(Path(flags[3])) if run.info.get("sweep")]
    assert len({(entry["id"], entry["name"]) for entry in entries}) == 1
    assert {entry["of"] for entry in entries} == {7}
    assert sorted(entry["member"] for entry in entries) == [1, 2, 3, 4, 5, 6, 7]
    assert [entry["member"] for entry in entries if entry["control"]] == [7]
    members = [entry["group"] for entry in entries if not entry["control"]]
    assert all("lr" in group and "layers" in group for group in members)


def test_an_interrupted_search_goes_on_with_what_it_had_proposed(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*flags, *SEARCH, "--trials", "6", "--at-once", "3"]
    first, second, whole = StandIn(best_at_1e4), StandIn(best_at_1e4), StandIn(best_at_1e4)
    first.stop_after = 2
    assert main(asked, first.engine) == 130
    assert main(asked, second.engine) == 0
    assert "6 members, 3 at once" in capsys.readouterr().out
    done = {config.lr for config in proposed(first)}
    assert len(done) == 2
    assert not done & {config.lr for config in proposed(second)}
    assert len(proposed(second)) == 4
    assert main(asked, whole.engine) == 0  # all are done, and ranked
    assert not whole.trained
    out = capsys.readouterr().out
    assert "6 members, 6 of them known already" in out
    assert out.count(" done\n") == 7


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--search", "optuna", "--lr", "1e-4"], "no flag has several values"),
        (["--search", "optuna", "--lr", "1e-4", "1", "--seed", "0", "1"], "--seed: a search takes"),
        (["--search", "optuna", "--pairs", "1e-4:2", "1e-5:3"], "--pairs: a search chooses"),
        (["--lr", "1e-4", "1e-3", "--trials", "3"], "--trials belongs to --search optuna"),
        ([*SEARCH, "--trials", "0"], "--trials 0: must be 1 or more"),
        ([*SEARCH, "--dry-run"], "--dry-run"),
        ([*SEARCH, "--lr", "-1", "1"], "-1"),
    ],
)
def test_mistakes_are_said(argv: list[str], said: str) -> None:
    with pytest.raises(Exception, match=said):
        parse(["--data", "photos", *argv])


def test_without_optuna_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    parent = write_parent(tmp_path)
    argv = ["--from", parent.run_id, "--runs-dir", str(tmp_path), "--arch", "resnet18", *SEARCH]
    assert main(argv, StandIn(best_at_1e4).engine) == 2
    assert "pip install -r requirements-search.txt" in capsys.readouterr().err


def test_members_below_the_median_of_those_before_them_end_early(flags: list[str]) -> None:
    stand_in = StandIn(lambda config: [score(config)] * 6)
    asked = [*flags, *SEARCH, "--trials", "20", "--at-once", "5"]
    assert main([*asked, "--prune"], stand_in.engine) == 0
    runs = [run for run in list_runs(Path(flags[3])) if run.phase == "finetune"]
    assert len(runs) == 20
    lengths = [len(run.epochs) - 1 for run in runs]
    early = [index for index, length in enumerate(lengths) if length < 6]
    assert early and min(early) >= 5  # there is nothing to hold the first ones against
    scores = [run.epochs[-1].val_acc for run in runs]
    for index in early:
        before = range(index - index % 5)
        as_far = [scores[other] for other in before if lengths[other] >= lengths[index]]
        assert scores[index] < statistics.median(as_far)
        assert lengths[index] >= 3


def score(config: Config) -> float:
    found = best_at_1e4(config)
    return 0.1 if isinstance(found, str) else found[0]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_the_members_of_a_real_search_are_watched(
    tmp_path: Path, photos: Path, engine: str
) -> None:
    optuna = pytest.importorskip("optuna", reason="needs requirements-search.txt")
    if engine == "ray":
        pytest.importorskip("ray", reason="needs requirements-ray.txt")
    argv = [*TINY, "--phase", "transfer", "--data", str(photos), "--runs-dir", str(tmp_path)]
    argv += ["--lr", "1e-4", "1e-1", "--head", "8,8", "--epochs", "3", "--trials", "4"]
    assert main([*argv, "--search", "optuna", "--at-once", "2", "--prune", "--engine", engine]) == 0
    runs = {run.info["sweep"]["member"]: run for run in list_runs(tmp_path)}
    (file,) = tmp_path.glob(".*.search")
    backend = optuna.storages.journal.JournalFileBackend(str(file))
    study = optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))
    assert len(study.trials) == 4
    for number, trial in enumerate(study.trials, 1):
        logged = {epoch.phase_epoch: epoch.val_acc for epoch in runs[number].epochs[1:]}
        assert trial.intermediate_values == logged


def test_a_bad_value_is_refused_before_anything_is_trained(flags: list[str]) -> None:
    with pytest.raises(SweepError):
        parse([*flags, "--search", "optuna", "--epochs", "3"])

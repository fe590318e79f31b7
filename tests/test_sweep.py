"""`python -m trainer sweep` but for the training, where a stand-in writes the runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY
from tests.test_grid import write_parent
from trainer.config import Config
from trainer.grid import Plan, SweepInfo, plan
from trainer.on_ray import _Part, _train
from trainer.predict import Prediction
from trainer.ranking import ranking, standings, verdict
from trainer.recipe import parse
from trainer.run_writer import RunWriter
from trainer.runlog import Run, list_runs, read_run
from trainer.schema import RUN_JSON, EpochRecord, PhaseRecord, Status
from trainer.search import Watch
from trainer.sweep import Engine, earlier, find_parent, main

ROOT = Path(__file__).resolve().parents[1]
BOUNDARY = 0.70


def record(config: Config, phase_epoch: int, accuracy: float) -> EpochRecord:
    """Loss is 1 - accuracy; the boundary is epoch 25."""
    return EpochRecord(
        phase=config.phase,
        epoch=25 + phase_epoch,
        phase_epoch=phase_epoch,
        train_loss=0.5 if phase_epoch else None,
        train_acc=0.5 if phase_epoch else None,
        val_loss=1 - accuracy,
        val_acc=accuracy,
        val_top5=1.0,
        val_macro_f1=accuracy,
        lr_head=0.1,
        lr_backbone=0.0,
        trainable_params=10,
        seconds=1.0,
        images_per_second=9.0,
        peak_memory_bytes=1,
        time=1.0,
    )


def write_run(
    config: Config,
    entry: dict[str, Any] | None,
    accuracies: Sequence[float],
    status: Status = "done",
    reason: str | None = None,
) -> Run:
    """A run whose boundary is at 70%, and whose epochs after it have these accuracies."""
    info = {"sweep": entry, "config": config.to_dict(), "dataset": {"fingerprint": "f"}}
    writer = RunWriter.create(config.runs_dir, config.run_name or "run", info)
    writer.start_phase(PhaseRecord(config.phase, 25, None, ("fc",), 10))
    for phase_epoch, accuracy in enumerate([BOUNDARY, *accuracies]):
        writer.epoch(record(config, phase_epoch, accuracy))
    writer.close(status, reason)
    return read_run(writer.path)


class StandIn:
    """Trains nothing: writes each run with the accuracies that `results` gives for its config.

    A text instead of accuracies is a failure with this reason.
    """

    def __init__(self, results: Callable[[Config], Sequence[float] | str]) -> None:
        self.results = results
        self.trained: list[Config] = []
        self.predicted: list[Plan] = []
        self.stop_after = 1000

    @property
    def engine(self) -> Engine:
        return Engine(self.fit, self.fit_together, self.predict)

    def fit(self, config: Config) -> Run:
        self.trained.append(config)
        return write_run(config, None, [0.7])

    def fit_together(
        self,
        configs: Sequence[Config],
        sweep: SweepInfo,
        interrupted: Mapping[int, Run],
        watch: Watch | None = None,
    ) -> list[Run]:
        self.interrupted = dict(interrupted)
        watch = pickle.loads(pickle.dumps(watch))  # as it comes to another node
        runs = []
        for index, config in enumerate(configs):
            if index == self.stop_after:
                raise KeyboardInterrupt
            self.trained.append(config)
            found = self.results(config)
            entry = sweep.entry(index)
            if isinstance(found, str):
                runs.append(write_run(config, entry, [0.1], "failed", found))
            else:
                told = None if watch is None else partial(watch, index)
                runs.append(write_run(config, entry, _until(told, config, found)))
        return runs

    def predict(self, members: Plan) -> Prediction:
        self.predicted.append(members)
        return Prediction(seconds=5400.0, cache_bytes=37_632_000)


def _until(
    watch: Callable[[EpochRecord], str | None] | None, config: Config, accuracies: Sequence[float]
) -> Sequence[float]:
    """As many of these as there were epochs before the watch saw no hope."""
    for epoch, accuracy in enumerate(accuracies, 1):
        if watch is not None and watch(record(config, epoch, accuracy)) is not None:
            return accuracies[:epoch]
    return accuracies


def by_rate(config: Config) -> Sequence[float] | str:
    """The control gains 0.2 points, 1e-6 a whole one, 1e-8 loses; 1 diverges."""
    if config.phase == "transfer":
        return [0.701, 0.702]
    found = {1e-8: [0.695, 0.69], 1e-6: [0.70, 0.71, 0.705], 1.0: "Error: loss is nan\nmore"}
    return found[config.lr or 0.0]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def flags(runs: Path) -> list[str]:
    """A sweep from a parent that is there."""
    return ["--from", write_parent(runs).run_id, "--runs-dir", str(runs), "--arch", "resnet18"]


def rows_of(text: str) -> dict[str, list[str]]:
    """The lines of the table that begin with a place, by that place."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("place"))
    table = itertools.takewhile(lambda line: line.startswith(" "), lines[start + 1 :])
    return {line.split()[0]: line.split() for line in table}


# --- a sweep from end to end ------------------------------------------------------------------


def test_members_are_trained_ranked_and_compared_with_the_control(
    flags: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = StandIn(by_rate)
    assert main([*flags, "--lr", "1e-8", "1e-6", "1", "--epochs", "20"], stand_in.engine) == 0
    out = capsys.readouterr().out
    assert "3 members and 1 control, from run" in out
    header = next(line for line in out.splitlines() if line.startswith("place"))
    assert header.split() == [
        *("place", "member", "val", "acc", "epoch"),
        *("since", "boundary", "over", "control", "loss", "status"),
    ]
    table = rows_of(out)
    assert table["1"] == ["1", "lr", "1e-06", "71.00%", "2", "+1.00", "+0.80", "0.2900", "done"]
    assert table["*"] == ["*", "control", "70.20%", "2", "+0.20", "–", "0.2980", "done"]
    assert table["2"] == ["2", "lr", "1e-08", "69.50%", "1", "-0.50", "-0.70", "0.3050", "done"]
    assert out.index("1e-06  ") < out.index("* ") < out.index("lr 1e-08  ")
    assert "* the control: 20 further epochs of the head, everything else still frozen" in out
    assert "failed: lr 1: Error: loss is nan (" in out
    assert "more" not in out
    best = next(run for run in list_runs(runs) if run.run_id.endswith("lr1e-06"))
    assert out.splitlines()[-3:] == [
        "Best: lr 1e-06 with 71.00%, 0.80 points above the control. One seed cannot tell a gain "
        "from noise, and the best of 2 looks good by chance: repeat it with --seed 0 1 2.",
        "Compare the runs:  streamlit run streamlit_app.py",
        f"Export the best:   python -m export {best.run_id}",
    ]
    entries = [run.info["sweep"] for run in list_runs(runs) if "sweep" in run.info]
    assert [(e["member"], e["of"], e["group"]) for e in entries] == [
        (1, 4, "lr 1e-08"),
        (2, 4, "lr 1e-06"),
        (3, 4, "lr 1"),
        (4, 4, "control"),
    ]


def test_nothing_but_the_runs_is_written(
    flags: list[str], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*flags, "--lr", "1e-6"], StandIn(by_rate).engine) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert len(list(runs.iterdir())) == 3


def test_the_status_says_whether_anything_is_done(flags: list[str]) -> None:
    failing = StandIn(lambda config: "no")
    assert main([*flags, "--lr", "1e-6"], failing.engine) == 1
    assert main([*flags, "--lr", "0"], failing.engine) == 2
    partly = StandIn(lambda config: [0.7] if config.phase == "transfer" else "no")
    assert main([*flags, "--lr", "1e-5"], partly.engine) == 0


def test_mistakes_are_said_before_anything_is_trained(
    flags: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = StandIn(by_rate)
    wrong = (
        (["--from", "nobody", "--runs-dir", str(runs)], "No run 'nobody'"),
        ([*flags[:4], "--arch", "vgg11"], "--arch vgg11: run"),
        (["none.toml"], "The recipe none.toml cannot be read"),
        ([*flags, "--runs-dir", str(Path(__file__))], "Cannot write to the runs folder"),
        (["--device", "cuda", "--runs-dir", str(runs)], "--device cuda"),
    )
    for argv, message in wrong[: None if no_gpu() else -1]:
        assert main(argv, stand_in.engine) == 2
        assert message in capsys.readouterr().err
    assert not stand_in.trained


def no_gpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def test_a_transfer_sweep_is_ranked_without_boundary_and_control(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--phase", "transfer", "--lr", "0.1", "0.01", "--runs-dir", str(runs)]
    assert main(argv, StandIn(lambda config: [0.5 + (config.lr or 0)]).engine) == 0
    out = capsys.readouterr().out
    assert "2 members, trained together\n" in out
    assert rows_of(out)["1"] == ["1", "lr", "0.1", "60.00%", "1", "0.4000", "done"]
    assert "control" not in out
    assert "Best: lr 0.1 with 60.00%, 9.00 points above the next. One seed" in out


# --- going on ---------------------------------------------------------------------------------


def test_an_interrupted_sweep_goes_on_where_it_was(
    flags: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*flags, "--lr", "1e-8", "1e-6", "--seed", "0", "1"]
    first, second, third = (StandIn(by_rate) for _ in range(3))
    first.stop_after = 3
    assert main(argv, first.engine) == 130
    assert "The same command goes on" in capsys.readouterr().out
    changed = [*flags, "--seed", "1", "0", "--device", "cpu", "--no-cache", "--lr", "1e-6", "1e-8"]
    assert main(changed, second.engine) == 0
    out = capsys.readouterr().out
    assert (
        "3 of these 6 are done already (lr 1e-08, seed 0; lr 1e-08, seed 1; lr 1e-06, seed 0); "
        "--again trains all anew."
    ) in out
    assert [(c.lr, c.seed) for c in second.trained] == [(1e-6, 1), (None, 0), (None, 1)]
    assert len(rows_of(out)) == 3
    assert main(argv, third.engine) == 0
    assert not third.trained
    assert "All of these are done already" in capsys.readouterr().out
    assert main([*argv, "--again"], third.engine) == 0
    assert len(third.trained) == 6
    assert "already" not in capsys.readouterr().out


def test_what_failed_is_trained_again_and_the_newest_counts(flags: list[str]) -> None:
    argv = [*flags, "--lr", "1e-8", "1"]
    assert main(argv, StandIn(by_rate).engine) == 0
    again = StandIn(by_rate)
    assert main(argv, again.engine) == 0
    assert [config.lr for config in again.trained] == [1.0]
    better = StandIn(lambda config: [0.9])
    assert main([*argv, "--again"], better.engine) == 0
    made = made_from(argv)
    assert {run.epochs[1].val_acc for run in earlier(made).values()} == {0.9}


def test_more_seeds_go_on_from_those_that_are_done(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As the last sentence of a sweep with one seed recommends."""
    assert main([*flags, "--lr", "1e-8", "1e-6"], StandIn(by_rate).engine) == 0
    capsys.readouterr()
    more = StandIn(by_rate)
    assert main([*flags, "--lr", "1e-6", "--seed", "0", "1", "2"], more.engine) == 0
    assert [(c.lr, c.seed) for c in more.trained] == [(1e-6, 1), (1e-6, 2), (None, 1), (None, 2)]
    out = capsys.readouterr().out
    assert "2 of these 6 are done already (seed 0; control, seed 0)" in out
    assert rows_of(out)["1"][7:9] == ["0.00", "3"]


def test_other_and_damaged_runs_are_no_members(flags: list[str]) -> None:
    made = made_from([*flags, "--lr", "1e-6"])
    good = made.info.entry(0)
    for entry in (
        good | {"key": "another"},
        good | {"key": [1]},
        good | {"key": 1},
        {name: value for name, value in good.items() if name != "key"},
        ["not", "an", "object"],
        None,
    ):
        write_run(made.configs[0], entry, [0.9])
    write_run(made.configs[0], good, [0.9], "failed")
    assert earlier(made) == {}
    run = write_run(made.configs[0], good, [0.9])
    assert earlier(made) == {0: run}


def test_members_that_were_interrupted_or_killed_are_handed_on(flags: list[str]) -> None:
    made = made_from([*flags, "--lr", "1e-6", "1e-8"])
    killed = write_run(made.configs[0], made.info.entry(0), [0.9], "running")
    write_run(made.configs[1], made.info.entry(1), [0.9], "interrupted")
    newest = write_run(made.configs[1], made.info.entry(1), [0.9], "interrupted")
    assert earlier(made) == {0: killed, 1: newest}
    assert earlier(made, but={killed.run_id}) == {1: newest}
    stand_in = StandIn(by_rate)
    assert main([*flags, "--lr", "1e-6", "1e-8", "--again"], stand_in.engine) == 0
    assert stand_in.interrupted == {}
    done = earlier(made)[0]
    assert done.status == "done"
    write_run(made.configs[0], made.info.entry(0), [0.9], "interrupted")
    assert earlier(made)[0] == done


def test_a_task_of_ray_that_begins_again_knows_its_runs(flags: list[str]) -> None:
    """Also where its node's clock is years behind that of the machine with the command."""
    made = made_from([*flags, "--lr", "1e-6", "1e-8", "--again"])
    before = {
        write_run(config, made.info.entry(index), [0.9]).run_id
        for index, config in enumerate(made.configs)
    }
    since = []
    for index, config in enumerate(made.configs):
        run = write_run(config, made.info.entry(index), [0.8])
        (run.path / RUN_JSON).write_text(json.dumps({**run.info, "started": 0.0}))
        since.append(run.path)
    assert _train(_Part(made, (), {}), frozenset(before)) == since


def made_from(argv: Sequence[str]) -> Plan:
    request = parse(argv)
    return plan(request, find_parent(request.members[0]))


def test_a_terminated_sweep_says_so(runs: Path) -> None:
    """With a process of its own, which stops itself in the middle of training."""
    code = """if True:
        import os, signal, sys, time
        from trainer.sweep import Engine, main
        def fit_together(configs, sweep, interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        sys.exit(main(sys.argv[1:], Engine(fit_together=fit_together)))
    """
    argv = ["--phase", "transfer", "--runs-dir", str(runs)]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 143
    assert "The same command goes on" in done.stdout


# --- dry run ----------------------------------------------------------------------------------


def test_a_dry_run_prints_the_grid_and_writes_nothing(
    flags: list[str], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    stand_in = StandIn(by_rate)
    argv = [*flags, "--pairs", "1e-6:20", "1e-8:all", "--rotation", "0", "0.02", "--schedule"]
    assert main([*argv, "step", "--drop", "0.1", "--dry-run"], stand_in.engine) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Sweep: 4 members and 2 controls, from run ")
    assert lines[0].endswith(", trained together in 2 groups, one for each seed and augmentation")
    header = "number member lr layers schedule augmentation seed"
    assert lines[1].split() == header.split()
    assert "lr 1e-08, all layers, rotation 0.02" in lines[3]
    assert "step, drop 0.1, drop every 10" in lines[3]
    control = "6  control, rotation 0.02               the parent's  head only  the parent's"
    assert control in lines[7]
    assert lines[-2:] == [
        "Predicted: 1 h 30 min, and 37.6 MB of cache; less where some of it is in the cache "
        "already.",
        "Nothing was trained (--dry-run).",
    ]
    assert sorted(tmp_path.rglob("*")) == before
    assert not stand_in.trained


def test_a_dry_run_predicts_what_is_left(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = StandIn(by_rate)
    argv = [*flags, "--lr", "1e-6", "1"]
    assert main(argv, stand_in.engine) == 0
    assert main([*argv, "--dry-run"], stand_in.engine) == 0
    assert stand_in.predicted[0].labels == ("lr 1",)
    assert "2 of these 3 are done already" in capsys.readouterr().out
    assert main([*argv, "--dry-run", "--again"], stand_in.engine) == 0
    assert len(stand_in.predicted[1].members) == 3


def test_a_dry_run_without_a_parent_says_that_one_is_trained_first(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = StandIn(by_rate)
    argv = ["--lr", "1e-6", "--runs-dir", str(runs), "--data", "/nowhere", "--dry-run"]
    assert main(argv, stand_in.engine) == 0
    assert "one is trained first" in capsys.readouterr().out
    assert not runs.exists()


# --- the parent -------------------------------------------------------------------------------


def test_a_parent_is_trained_first_where_there_is_none(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = StandIn(by_rate)
    argv = ["--lr", "1e-6", "1e-8", "--runs-dir", str(runs), "--epochs", "4"]
    argv += ["--transfer-epochs", "7", "--transfer-lr", "0.01", "--run-name", "mine"]
    assert main(argv, stand_in.engine) == 0
    assert "it is trained first" in capsys.readouterr().out
    parent, *members = stand_in.trained
    assert (parent.phase, parent.epochs, parent.lr, parent.run_name) == ("transfer", 7, 0.01, None)
    trunk = list_runs(runs)[0].run_id
    assert [config.parent for config in members] == [trunk] * 3
    assert {config.transfer_epochs for config in members} == {None}


# --- with the real training -------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> tuple[list[str], Path]:
    """The flags and runs of a sweep over the whole command line, one member of which diverges."""
    from trainer.__main__ import main as trainer_main

    runs = tmp_path_factory.mktemp("swept")
    argv = ["sweep", *TINY, "--data", str(photos), "--runs-dir", str(runs), "--epochs", "2"]
    argv += ["--lr", "1e-3", "1e30", "--head", "8,8", "--transfer-epochs", "1"]
    assert trainer_main(argv) == 0
    return argv, runs


def test_a_real_sweep(swept: tuple[list[str], Path]) -> None:
    trunk, *members = list_runs(swept[1])
    assert (trunk.phase, len(trunk.epochs)) == ("transfer", 2)
    by_group = {run.info["sweep"]["group"]: run for run in members}
    assert {group: run.status for group, run in by_group.items()} == {
        "lr 0.001": "done",
        "lr 1e+30": "failed",
        "control": "done",
    }
    assert {run.parent_run_id for run in members} == {trunk.run_id}
    control, member = by_group["control"], by_group["lr 0.001"]
    assert control.phase == "transfer"
    assert [e.epoch for e in control.epochs] == [e.epoch for e in member.epochs] == [1, 2, 3]
    assert control.epochs[0].val_acc == pytest.approx(member.epochs[0].val_acc)
    assert control.epochs[1].lr_head == trunk.epochs[1].lr_head
    assert control.epochs[1].trainable_params < member.epochs[1].trainable_params


def test_a_real_sweep_goes_on(
    swept: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The parent is found again, though the control is a newer transfer run of the same data."""
    from trainer.__main__ import main as trainer_main

    argv, runs = swept
    before = {run.run_id for run in list_runs(runs)}
    assert trainer_main(argv) == 0
    out = capsys.readouterr().out
    assert "2 of these 3 are done already (lr 0.001; control)" in out
    (again,) = [run for run in list_runs(runs) if run.run_id not in before]
    assert again.info["sweep"]["group"] == "lr 1e+30"
    assert "failed: lr 1e+30: " in out
    assert "smaller --lr" in out


def test_a_real_transfer_sweep(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--phase", "transfer", *TINY, "--data", str(photos), "--runs-dir", str(tmp_path)]
    assert main([*argv, "--epochs", "1", "--lr", "1e-3", "1e-2"]) == 0
    assert "One seed cannot tell a gain from noise" in capsys.readouterr().out
    assert [run.status for run in list_runs(tmp_path)] == ["done"] * 2


def test_an_infinite_validation_loss_ends_its_own_member_only(tmp_path: Path, photos: Path) -> None:
    """The training losses are still finite: there is one batch only."""
    argv = ["--phase", "transfer", *TINY, "--data", str(photos), "--runs-dir", str(tmp_path)]
    argv += ["--head", "8,8", "--batch-size", "18", "--epochs", "1"]
    assert main([*argv, "--lr", "1e-3", "1e30"]) == 0
    assert [run.status for run in list_runs(tmp_path)] == ["done", "failed"]


# --- ranking ----------------------------------------------------------------------------------


def trained(made: Plan, results: Callable[[Config], Sequence[float] | str]) -> dict[int, Run]:
    return dict(enumerate(StandIn(results).fit_together(made.configs, made.info, {})))


def seeded(config: Config) -> Sequence[float] | str:
    """1e-6: 71, 72, 73; 1e-8: 75 and two failures; control: 70, 71, 72."""
    base = 0.70 if config.phase == "transfer" else 0.71
    if config.lr == 1e-8:
        return [0.75] if config.seed == 0 else "OutOfMemoryError: no"
    return [0.1, base + config.seed / 100]


@pytest.fixture
def three_seeds(flags: list[str]) -> Plan:
    return made_from([*flags, "--lr", "1e-8", "1e-6", "--seed", "0", "1", "2"])


def test_seeds_are_one_line_with_mean_and_spread(three_seeds: Plan) -> None:
    text = ranking(three_seeds, trained(three_seeds, seeded))
    table = rows_of(text)
    header = "place member val acc min…max sd seeds epoch since boundary over control loss status"
    assert text.splitlines()[0].split() == header.split()
    assert table["1"][3:] == [
        *("75.00%", "75.00%…75.00%", "–", "1", "1", "+5.00", "+5.00", "0.2500"),
        *("1", "of", "3", "done"),
    ]
    assert table["2"][3:] == [
        *("72.00%", "71.00%…73.00%", "1.00", "3", "2", "+2.00", "+1.00", "0.2800", "done"),
    ]
    assert table["*"][1:4] == ["control", "71.00%", "70.00%…72.00%"]
    failed = [line for line in text.splitlines() if line.startswith("failed: ")]
    assert [line.partition(" (")[0] for line in failed] == [
        "failed: lr 1e-08, seed 1: OutOfMemoryError: no",
        "failed: lr 1e-08, seed 2: OutOfMemoryError: no",
    ]
    assert "over several seeds: means" in text


def test_the_difference_to_the_control_is_paired_by_seed(three_seeds: Plan) -> None:
    """The control of seed 1 failed: its members count in the mean, not in the difference."""

    def results(config: Config) -> Sequence[float] | str:
        return "no" if config.phase == "transfer" and config.seed == 1 else seeded(config)

    rows = {row.group: row for row in standings(three_seeds, trained(three_seeds, results))}
    assert rows["lr 1e-06"].over_control == pytest.approx((1.0, 1.0))
    assert len(rows["lr 1e-06"].outcomes) == 3


def test_equal_accuracies_are_ranked_by_loss(flags: list[str]) -> None:
    made = made_from([*flags, "--lr", "1e-8", "1e-6"])
    runs = trained(made, lambda config: [0.8])
    run = runs[1]
    epochs = [dataclasses.replace(epoch, val_loss=0.01) for epoch in run.epochs]
    runs[1] = dataclasses.replace(run, epochs=tuple(epochs))
    assert standings(made, runs)[0].group == "lr 1e-06"


def test_the_boundary_is_never_the_best_epoch(flags: list[str]) -> None:
    made = made_from([*flags, "--lr", "1e-6"])
    (first, second) = standings(made, trained(made, lambda config: [0.6, 0.65]))
    assert first.gain == pytest.approx(-5.0)
    assert {first.outcomes[0].best.phase_epoch, second.outcomes[0].best.phase_epoch} == {2}


@pytest.mark.parametrize(
    ("best", "control", "said"),
    [
        ((0.74,), 0.70, "4.00 points above the control. One seed cannot tell a gain from noise, "
         "and the best of 2 looks good by chance: repeat it with --seed 0 1 2."),
        ((0.70,), 0.70, "no better than the control: unfreezing did not help here. One seed cannot "
         "tell a gain from noise: repeat it"),
        ((0.69,), 0.70, "1.00 points below the control: unfreezing did not help here. One seed"),
        ((0.70, 0.73), 0.70, "1.50 points above the control. That is within the spread of the "
         "seeds (3.00 points), and the best of 2 looks good by chance."),
        ((0.74, 0.75), 0.70, "4.50 points above the control. The spread of the seeds is 1.00"),
        ((0.68, 0.70), 0.70, "1.00 points below the control: unfreezing did not help here. That is "
         "within the spread of the seeds (2.00 points)."),
    ],
)  # fmt: skip
def test_the_last_sentence(
    flags: list[str], best: tuple[float, ...], control: float, said: str
) -> None:
    seeds = [str(seed) for seed in range(len(best))]
    made = made_from([*flags, "--lr", "1e-8", "1e-6", "--seed", *seeds])

    def results(config: Config) -> Sequence[float]:
        if config.phase == "transfer":
            return [control]
        return [best[config.seed] if config.lr == 1e-6 else 0.1]

    sentence = verdict(standings(made, trained(made, results)))
    assert sentence.startswith(f"Best: lr 1e-06 with {sum(best) / len(best):.2%}, ")
    assert said in sentence


def test_one_candidate_is_not_the_best_of_many(flags: list[str]) -> None:
    made = made_from([*flags, "--lr", "1e-6"])
    sentence = verdict(standings(made, trained(made, by_rate)))
    assert "by chance" not in sentence
    assert "One seed cannot tell a gain from noise: repeat it" in sentence


def test_without_its_control_nothing_is_claimed(flags: list[str]) -> None:
    made = made_from([*flags, "--lr", "1e-6"])

    def results(config: Config) -> Sequence[float] | str:
        return "no" if config.phase == "transfer" else [0.9]

    text = ranking(made, trained(made, results))
    assert "its control is not done, so nothing says whether unfreezing helped." in text
    assert "failed: control: no" in text


def test_all_failed(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--lr", "1", "10"], StandIn(lambda config: "Error: nan").engine) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines[-4:]] == [
        "failed: lr 1: Error: nan",
        "failed: lr 10: Error: nan",
        "failed: control: Error: nan",
        "No member is done: there is nothing to rank.",
    ]


def test_each_augmentation_is_compared_with_its_own_control(flags: list[str]) -> None:
    made = made_from([*flags, "--lr", "1e-6", "--noise", "0", "1"])

    def results(config: Config) -> Sequence[float]:
        noisy = 0.05 if config.augmentation.noise else 0.0
        return [(0.70 if config.phase == "transfer" else 0.71) + noisy]

    rows = {row.group: row for row in standings(made, trained(made, results))}
    assert rows["noise 0"].over_control == pytest.approx((1.0,))
    assert rows["noise 1"].over_control == pytest.approx((1.0,))
    assert "noise 1 with 76.00%, 1.00 points above the control" in verdict(list(rows.values())[::1])


def test_a_damaged_log_does_not_hide_the_ranking(flags: list[str]) -> None:
    made = made_from([*flags, "--lr", "1e-8", "1e-6", "1"])
    runs = trained(made, by_rate)
    (runs[0].path / "metrics.jsonl").write_bytes(b"\xff\n[1]\n{\n")
    (runs[2].path / "metrics.jsonl").unlink()
    text = ranking(made, {index: read_run(run.path) for index, run in runs.items()})
    assert "unreadable: lr 1e-08: " in text
    assert "metrics.jsonl: unreadable lines" in text
    assert "failed: lr 1: no reason was logged" in text
    assert "Best: lr 1e-06" in text


def test_a_reason_cannot_move_the_cursor(flags: list[str]) -> None:
    made = made_from([*flags, "--lr", "1"])
    text = ranking(made, trained(made, lambda config: "Error: \x1b[2J"))
    assert "\x1b" not in text


def test_members_on_different_photos_are_not_compared_in_silence(flags: list[str]) -> None:
    made = made_from([*flags, "--lr", "1e-6"])
    runs = trained(made, by_rate)
    assert "Warning" not in ranking(made, runs)
    path = runs[0].path / "run.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"dataset": {"fingerprint": "other"}}))
    changed = runs | {0: read_run(runs[0].path)}
    assert "Warning: the members were not all trained on the same photos" in ranking(made, changed)

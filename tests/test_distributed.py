"""Several processes that train one run together: it is the run of one process."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import trainer.portions
import trainer.process
import trainer.ranks
from tests.conftest import TINY
from tests.faults import kill_at, litter, replace_call, run, wait_for
from tests.ranks import run_ranks, start_ranks
from trainer.__main__ import main, parse
from trainer.checkpoint import load_checkpoint
from trainer.distributed import _DrawnForAll, check_divisible, shares
from trainer.loop import Objective
from trainer.process import prepare_process
from trainer.ranks import RanksError, about, from_first, my_pieces, pieces
from trainer.run_writer import RunWriter
from trainer.runlog import Run, RunError, list_runs
from trainer.torchrun import earlier, job_key

ROOT = Path(__file__).resolve().parents[1]
VIEWS = ("--rotation", "0.05", "--noise", "2")


# --- dividing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("photos", "most", "size"), [(7, 7, 2), (9, 4, 3), (1, 8, 2), (5, 2, 4)])
def test_every_photo_counts_once(photos: int, most: int, size: int) -> None:
    found = [shares(photos, most, rank, size) for rank in range(size)]
    counted = [p for mine in found for share in mine if share.counts for p in share.positions]
    assert sorted(counted) == list(range(photos))
    assert len({len(mine) for mine in found}) == 1  # who takes fewer steps than others stops them
    assert all(len(share.positions) for mine in found for share in mine)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 3.0])])
@pytest.mark.parametrize(("photos", "most"), [(7, 7), (7, 3), (1, 1)])
def test_the_mean_of_the_shares_gradients_is_that_of_the_batch(
    weights: Tensor | None, photos: int, most: int
) -> None:
    torch.manual_seed(0)
    network, objective = nn.Linear(5, 3), Objective(0.1, weights)
    inputs, labels = torch.rand(photos, 5), torch.randint(3, (photos,))
    expected = torch.autograd.grad(objective(network(inputs), labels), network.weight)[0]
    found = torch.zeros_like(expected)
    for rank in range(3):
        for share in shares(photos, most, rank, 3):
            mine = labels[share.positions]
            counts = objective.share(mine, labels) if share.counts else 0.0
            loss = objective(network(inputs[share.positions]), mine) * counts
            found += torch.autograd.grad(loss * 3, network.weight)[0] / 3
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("most", [8, 3])
def test_dropout_draws_what_one_process_draws(most: int) -> None:
    photos = torch.rand(8, 16, 4, 4).to(memory_format=torch.channels_last)

    def dropped(part: Tensor) -> Tensor:
        part = functional.dropout(part, 0.3)
        paths = torch.empty(len(part), 1, 1, 1).bernoulli_(0.5)  # as StochasticDepth has it
        return functional.dropout2d(part * paths, 0.4)

    torch.manual_seed(3)
    whole = torch.cat([dropped(photos[start : start + most]) for start in range(0, 8, most)])
    for rank in range(3):
        torch.manual_seed(3)
        for share in shares(8, most, rank, 3):
            with _DrawnForAll(share):
                mine = dropped(photos[share.positions])
            assert torch.equal(mine, whole[share.positions])


def test_what_cannot_be_divided_is_refused() -> None:
    (share,) = shares(4, 4, 0, 2)
    values = torch.rand(1, 2, 4, 4)
    with _DrawnForAll(share):
        functional.scaled_dot_product_attention(values, values, values)  # draws nothing
        with pytest.raises(RanksError, match="cannot be divided over processes"):
            torch.rand(2)
    with pytest.raises(RanksError, match=r"1 is a BatchNorm that trains"):
        check_divisible(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    check_divisible(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval())


@pytest.mark.parametrize(("count", "most", "size"), [(9, 4, 2), (5, 32, 4), (2, 32, 4), (64, 8, 3)])
def test_every_validation_photo_is_evaluated_once(count: int, most: int, size: int) -> None:
    found = pieces(count, most, size)
    assert np.concatenate(found).tolist() == list(range(count))
    assert max(map(len, found)) <= most
    assert len(found) >= min(count, size) - 1  # hardly anybody has nothing to do


def test_alone_nothing_is_divided() -> None:
    assert [rows.tolist() for rows in my_pieces(5, 2)] == [[0, 1], [2, 3], [4]]
    assert from_first(lambda: 3) == 3
    assert about({}) == {}


# --- torchrun -------------------------------------------------------------------------------------


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """as_rank(WORLD_SIZE="2", ...): what torchrun tells a process."""

    def set_(**values: str) -> None:
        given = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
        given |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"), "1")
        for name, value in (given | values).items():
            monkeypatch.setenv(name, value)

    return set_


@pytest.mark.parametrize("command", ["sweep", "lr-find", "run", "test", "data", "cache", "import"])
def test_other_commands_are_the_work_of_one_process(
    command: str, as_rank: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(WORLD_SIZE="2")
    assert main([command, "--lr", "1"]) == 2
    assert f"`python -m trainer {command}` is the work of one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cores", "here", "given", "expected"),
    [(16, 4, "1", "4"), (16, 4, None, "4"), (2, 2, "1", "1"), (2, 4, None, "1"), (16, 4, "2", "2")],
)
def test_the_ranks_of_a_machine_share_its_cores(
    as_rank: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    here: int,
    given: str | None,
    expected: str,
) -> None:
    as_rank(WORLD_SIZE="8", LOCAL_WORLD_SIZE=str(here))
    monkeypatch.setattr(trainer.process, "_allowed_cores", lambda: cores)
    monkeypatch.setattr(trainer.process, "usable_cores", lambda: cores)
    monkeypatch.setattr(trainer.process, "keep_freed_memory", lambda: True)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)  # 1 is what torchrun sets by itself
    prepare_process()
    assert os.environ["OMP_NUM_THREADS"] == expected


def test_a_job_knows_its_own_run(
    as_rank: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(["--phase", "transfer", "--runs-dir", str(tmp_path), "--lr", "0.1"])
    other = parse(["--phase", "transfer", "--runs-dir", str(tmp_path), "--lr", "0.2"])
    as_rank()
    monkeypatch.setattr(trainer.ranks, "_job", job_key(config))
    info: dict[str, Any] = {"config": config.to_dict()}
    RunWriter.create(tmp_path, "mine", info | about(info)).close("interrupted")
    assert earlier(config) is None  # no name, and not a restart: maybe another job
    as_rank(TORCHELASTIC_RESTART_COUNT="1")
    found = earlier(config)
    assert found is not None
    assert found.info["distributed"]["world_size"] == 1
    assert earlier(other) is None
    as_rank(TORCHELASTIC_RUN_ID="night", TORCHELASTIC_RESTART_COUNT="1")
    assert earlier(config) is None


# --- several processes, with gloo -----------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, photos: Path, awake: str) -> list[str]:
    """A two-phase training on 18 photos in batches of 7, 7 and 4, or as a test has it."""
    cache = tmp_path_factory.mktemp("cache")
    return [
        *("--phase", "finetune", *TINY, "--weights", awake, "--data", str(photos)),
        *("--cache-dir", str(cache), "--batch-size", "7", "--lr", "1e-3", "--transfer-lr", "1e-2"),
        *("--epochs", "2", "--transfer-epochs", "2", "--device", "cpu"),
    ]


def check_alike(found: Path, expected: Path) -> None:
    ours, theirs = list_runs(found), list_runs(expected)
    assert [one.phase for one in ours] == [one.phase for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert (one.status, one.problem, litter(one.path)) == ("done", None, [])
        assert one.info["phases"] == other.info["phases"]
        for a, b in zip(one.epochs, other.epochs, strict=True):
            assert (a.epoch, a.trainable_params, a.lr_head) == (
                b.epoch,
                b.trainable_params,
                b.lr_head,
            )
            losses = (a.train_loss or 0, a.val_loss), (b.train_loss or 0, b.val_loss)
            assert losses[0] == pytest.approx(losses[1], rel=1e-4)
            assert (a.train_acc, a.val_acc, a.val_top5) == (b.train_acc, b.val_acc, b.val_top5)
        for kind in ("best", "last"):
            check_same_weights(one, other, f"{one.phase}-{kind}")
        a, b = (np.load(run.predictions("after")) for run in (one, other))
        assert (a["files"] == b["files"]).all()
        np.testing.assert_allclose(a["logits"], b["logits"], rtol=1e-3, atol=1e-4)


def check_same_weights(one: Run, other: Run, name: str) -> None:
    ours, theirs = (load_checkpoint(run.checkpoint(name)) for run in (one, other))
    assert ours.epoch == theirs.epoch
    for key, value in ours.state_dict.items():
        # Adam makes a whole step of a gradient that is nothing but rounding, so a few weights of
        # half a million may differ by that.
        away = (value.double() - theirs.state_dict[key].double()).norm()
        assert away <= 1e-4 * value.double().norm(), key


def small_portions() -> None:
    """A fault: a step takes four photos at a time."""
    trainer.portions.bytes_kept = lambda network, inputs: 10**9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "more"),
    [
        (2, VIEWS),
        (2, ("--batch-size", "17", "--class-weights", "balanced", "--label-smoothing", "0.1")),
        (3, ("--unfreeze", "5", "--gradual", "20@1", "--layer-decay", "0.8", "--no-cache")),
        (2, ("--unfreeze", "all", "--optimizer", "sgd", "--head", "16", *VIEWS)),
        (2, ("--phase", "direct")),
    ],
)
def test_several_processes_train_what_one_trains(
    flags: list[str], tmp_path: Path, size: int, more: tuple[str, ...]
) -> None:
    command = [*flags, *more]
    if "direct" in more:
        command = ["--phase", "direct", *flags[2:12]]
    assert run([*command, "--runs-dir", str(tmp_path / "one")]) == (0, "")
    statuses, errors = run_ranks([*command, "--runs-dir", str(tmp_path / "many")], size)
    assert (statuses, errors) == ([0] * size, [""] * size)
    if "direct" not in more:
        check_alike(tmp_path / "many", tmp_path / "one")
    runs = list_runs(tmp_path / "many")
    assert all(one.info["distributed"]["world_size"] == size for one in runs)
    assert "distributed" not in list_runs(tmp_path / "one")[0].info
    last = [[one.epochs[-1].val_loss for one in list_runs(tmp_path / n)] for n in ("one", "many")]
    assert last[0] == pytest.approx(last[1], rel=1e-4)


@pytest.mark.slow
def test_a_batch_in_portions_is_divided_portion_by_portion(
    flags: list[str], tmp_path: Path
) -> None:
    command = [*flags, "--transfer-epochs", "1"]
    assert run([*command, "--runs-dir", str(tmp_path / "one")], small_portions) == (0, "")
    every: dict[int, Any] = dict.fromkeys(range(2), (small_portions, ()))
    many = [*command, "--runs-dir", str(tmp_path / "many")]
    assert run_ranks(many, 2, faults=every) == ([0, 0], ["", ""])
    check_alike(tmp_path / "many", tmp_path / "one")


@pytest.mark.slow
def test_each_rank_fills_its_share_of_the_cache(flags: list[str], tmp_path: Path) -> None:
    """And nothing is computed twice: neither by two, nor in the phase that follows."""
    cache, counts = tmp_path / "cache", [tmp_path / "rank-0", tmp_path / "rank-1"]
    command = [*flags, "--cache-dir", str(cache), "--runs-dir", str(tmp_path / "runs")]
    every: dict[int, Any] = {rank: (count_computed, (path,)) for rank, path in enumerate(counts)}
    assert run_ranks(command, 2, faults=every)[0] == [0, 0]
    shares_of_24 = [sum(map(int, path.read_text().split())) for path in counts]
    # Two stretches of the network are cached, one for each phase.
    assert sum(shares_of_24) == 2 * 24
    assert min(shares_of_24) >= 20


def count_computed(path: Path) -> None:
    """A fault: the photos that pass the frozen part are counted in a file."""
    from trainer.frozen import Source

    compute = Source._compute

    def counted(self: Source, rows: Any) -> Any:
        with path.open("a") as file:
            file.write(f"{len(rows)} ")
        return compute(self, rows)

    Source._compute = counted  # type: ignore[method-assign]


# --- what happens to them -------------------------------------------------------------------------


def newest(folder: Path) -> Run:
    return list_runs(folder)[-1]


def stopped_because(found: Run) -> str:
    line = (found.path / "metrics.jsonl").read_text().splitlines()[-1]
    event = json.loads(line)
    assert (event["event"], event["status"]) == ("stop", found.status)
    return event["reason"] or ""


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes(flags: list[str], tmp_path: Path) -> None:
    assert run([*flags, "--epochs", "4", "--runs-dir", str(tmp_path / "whole")])[0] == 0
    where = ["--runs-dir", str(tmp_path / "torn")]
    # In the third, and then in the fifth, of six epochs that are trained.
    fault = kill_at, ("trainer.journal:Journal.write", 4)
    statuses, _ = run_ranks([*flags, "--epochs", "4", *where], 2, faults={0: fault})
    assert statuses == [-9, 2]
    resume = ["--resume", "auto", *where]
    assert run(resume, kill_at, "trainer.journal:Journal.write", 2)[0] == -9
    assert newest(tmp_path / "torn").info["distributed"]["world_size"] == 1
    assert run_ranks(resume, 3)[0] == [0, 0, 0]
    check_alike(tmp_path / "torn", tmp_path / "whole")
    assert newest(tmp_path / "torn").info["distributed"]["world_size"] == 3


@pytest.mark.slow
def test_a_rank_that_is_killed_interrupts_the_run_which_a_restart_goes_on_with(
    flags: list[str], tmp_path: Path
) -> None:
    assert run([*flags, "--runs-dir", str(tmp_path / "whole")])[0] == 0
    command = [*flags, "--runs-dir", str(tmp_path / "torn")]
    for step, restarts in ((5, 0), (3, 1)):  # in the trunk; then in its second epoch
        fault = kill_at, ("trainer.loop:take_divided_step", step)
        (first, killed), (said, _) = run_ranks(command, 2, restarts=restarts, faults={1: fault})
        assert (first, killed) == (2, -9)
        assert said.startswith("error: Another process of this training has ended")
        assert newest(tmp_path / "torn").status == "interrupted"
        assert "Another process" in stopped_because(newest(tmp_path / "torn"))
    for _ in range(2):  # one more restart finds it done
        assert run_ranks(command, 2, restarts=2)[0] == [0, 0]
        check_alike(tmp_path / "torn", tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_to_one_ends_all_at_the_same_step(flags: list[str], tmp_path: Path) -> None:
    command = [*flags, "--epochs", "500", "--unfreeze", "all", "--runs-dir", str(tmp_path)]
    processes = start_ranks(command, 2)
    wait_for(lambda: len(list_runs(tmp_path)) == 2 and len(newest(tmp_path).epochs) > 2)
    assert processes[1].pid is not None
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [143, 143]
    found = newest(tmp_path)
    assert (found.status, stopped_because(found), litter(found.path)) == ("interrupted", "", [])
    last = load_checkpoint(found.checkpoint("finetune-last"))
    assert last.epoch == found.epochs[-1].epoch


def cannot_write(*given: Any) -> NoReturn:
    raise RunError("Cannot write it: no space left on device.")


@pytest.mark.slow
def test_a_disk_that_is_full_ends_all(flags: list[str], tmp_path: Path) -> None:
    command = [*flags, "--runs-dir", str(tmp_path)]
    for call in (1, 3):
        fault = replace_call, ("trainer.run_writer:RunWriter.epoch", call, cannot_write)
        statuses, (said, other) = run_ranks(command, 2, faults={0: fault})
        assert statuses == [2, 2]
        assert said.strip().splitlines()[-1] == "error: Cannot write it: no space left on device."
        assert other == ""
        assert newest(tmp_path).status == "failed"


def other_photos(folder: str) -> None:
    """A fault: this machine has other photos in the data's folder, or none."""
    import trainer.fit

    load = trainer.fit.load_photos
    replaced = dataclasses.replace
    trainer.fit.load_photos = lambda config, given: load(replaced(config, data=folder), given)


@pytest.mark.slow
def test_mistakes_are_said_once(flags: list[str], tmp_path: Path, make_photos: Any) -> None:
    other = str(make_photos(tmp_path / "other", photos=9))
    where = ["--runs-dir", str(tmp_path / "runs")]
    scratch = ["--phase", "scratch", *TINY, "--data", other]
    for settings, faults, said in (
        (flags, {1: (other_photos, (other,))}, "reads other photos than rank 0"),
        (flags, {1: (other_photos, ("nowhere",))}, "Rank 1 on "),
        ([*flags, "--batch-size", "1"], {}, "has fewer photos than there are processes (2)"),
        (scratch, {}, "is a BatchNorm that trains"),
        ([*flags, "--from", "none"], {}, "There is no runs folder"),
    ):
        statuses, errors = run_ranks([*settings, *where], 2, faults=faults)
        assert (statuses, errors[1]) == ([2, 2], "")
        assert said in errors[0]
        assert errors[0].count("error:") == 1
    assert not list_runs(tmp_path / "runs")


@pytest.mark.slow
def test_torchrun_starts_a_job_anew_and_it_goes_on(flags: list[str], tmp_path: Path) -> None:
    """The real one: rank 0 is killed, then the job is told to stop."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", "-m", "trainer", *flags, "--epochs", "500"]
    log = tmp_path / "log"
    with log.open("w") as file:
        job = subprocess.Popen(
            [*command, "--unfreeze", "all", "--runs-dir", str(tmp_path / "runs")],
            cwd=ROOT,
            stdout=file,
            stderr=file,
        )
    try:
        wait_for(lambda: trained(tmp_path / "runs") > 2)
        os.kill(newest(tmp_path / "runs").info["pid"], signal.SIGKILL)
        wait_for(lambda: "Going on with run" in log.read_text())
        before = trained(tmp_path / "runs")
        wait_for(lambda: trained(tmp_path / "runs") > before)
        job.terminate()
        job.wait(60)
    finally:
        job.kill()
    _, found = list_runs(tmp_path / "runs")
    assert (found.status, litter(found.path)) == ("interrupted", [])
    assert "Resumed after epoch" in (found.path / "metrics.jsonl").read_text()


def trained(folder: Path) -> int:
    """Epochs of the finetune phase."""
    return len(newest(folder).epochs) if len(list_runs(folder)) == 2 else 0

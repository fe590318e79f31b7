"""The command that trains a run again: the same settings, and with them the same figures."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Train
from tests.explorer_runs import write_finetune, write_run, write_trunk
from tests.test_grid import CHANGES, NESTED
from trainer.__main__ import main, parse
from trainer.config import Augmentation, Config, Schedule
from trainer.reproduce import ReproduceError, command, flags
from trainer.runlog import Run, list_runs, read_run

# Flags for what no sweep has, or what does not change what is trained.
MORE = {
    "phase": "--phase scratch",
    "parent": "--from some-run",
    "transfer_epochs": "--transfer-epochs 3",
    "transfer_lr": "--transfer-lr 0.01",
    "device": "--device cpu",
    "cache": "--no-cache",
    "cache_dir": "--cache-dir elsewhere",
    "cache_limit": "--cache-limit 1.5GB",
    "runs_dir": "--runs-dir elsewhere",
    "run_name": "--run-name mine",
    "track": "--track mlflow",
    "head": "--head linear",
}
GIVEN = [given for given in (*CHANGES.values(), *NESTED.values(), *MORE.values()) if given]


def config_of(given: str) -> Config:
    return parse(["--phase", "finetune", *given.split()])


def words_of(line: str) -> list[str]:
    """The arguments that a shell makes of a command line, behind `python -m trainer`."""
    script = f"python() {{ printf '%s\\0' \"$@\"; }}; {line}"
    said = subprocess.run(["bash", "-c", script], capture_output=True, check=True, text=True)
    arguments = said.stdout.split("\0")[:-1]
    assert arguments[:2] == ["-m", "trainer"]
    return arguments[2:]


def described(config: Config, runs_dir: Path, **info: Any) -> Run:
    return read_run(write_run(runs_dir, "run", [0.5, 0.6], config=config.to_dict(), **info).path)


@pytest.mark.parametrize("given", GIVEN)
def test_flags_make_the_same_config_again(given: str) -> None:
    config = config_of(given)
    assert parse(list(itertools.chain(*flags(config)))) == config


def test_all_settings_together_make_the_same_config_again() -> None:
    scratch = MORE["phase"]
    config = config_of(" ".join(given for given in GIVEN if given != scratch))
    assert parse(list(itertools.chain(*flags(config)))) == config


def test_every_setting_is_varied_above() -> None:
    """A new setting fails here until its flag is among those tried."""
    configs = [config_of(given) for given in GIVEN]
    default = Config("finetune")
    for field in dataclasses.fields(Config):
        if field.name in ("recipe", "stand_in_for"):
            continue  # no flags: a recipe says it of the trainings that it asks for
        values = [getattr(config, field.name) for config in configs]
        assert any(value != getattr(default, field.name) for value in values), field.name
    for name in Schedule.__dataclass_fields__:
        assert any(getattr(c.schedule, name) != getattr(default.schedule, name) for c in configs)
    for name in Augmentation.__dataclass_fields__:
        own = getattr(default.augmentation, name)
        assert any(getattr(c.augmentation, name) != own for c in configs)


def test_defaults_are_not_named(tmp_path: Path) -> None:
    run = described(Config("transfer", runs_dir=tmp_path), tmp_path)
    assert words_of(command(run)) == ["--phase", "transfer", "--runs-dir", str(tmp_path)]


@pytest.mark.parametrize(
    "name", ['it\'s $(date) `x` "y" \\ *', "-dash", "--lr=3", "", "two\nlines", "größe ✓", " "]
)
def test_a_shell_reads_the_same_words(tmp_path: Path, name: str) -> None:
    config = Config("direct", run_name=name, runs_dir=tmp_path)
    assert parse(words_of(command(described(config, tmp_path)))) == config


def test_photos_are_named_by_their_folder_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "my photos"
    photos.mkdir()
    config = Config("transfer", data="my photos", runs_dir=tmp_path)
    run = described(config, tmp_path, dataset={"name": "my photos", "root": str(photos)})
    assert parse(words_of(command(run))).data == str(photos)


def test_a_finetune_names_its_parent_and_not_what_that_decides(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path)
    start = tmp_path / trunk / "checkpoints" / "transfer-last.pt"
    given = "--arch resnet18 --weights gone.pth --transfer-epochs 3 --unfreeze all --lr 1e-6"
    info: dict[str, Any] = {"parent_checkpoint": {"file": start.name}, "parent_run_id": trunk}
    run = described(config_of(given), tmp_path, **info)
    with pytest.raises(ReproduceError, match=f"started from {trunk}, whose last epoch is not in"):
        command(run)
    start.touch()
    assert words_of(command(run)) == [
        *("--phase", "finetune", "--from", trunk, "--lr", "1e-06", "--unfreeze", "all"),
        *("--runs-dir", str(tmp_path)),
    ]


def test_a_parent_in_another_folder_is_named_by_its_path(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path / "there")
    path = tmp_path / "there" / trunk
    (path / "checkpoints" / "transfer-last.pt").touch()
    info = {"parent_checkpoint": {"file": "transfer-last.pt"}, "parent_run_id": trunk}
    run = described(Config("finetune", parent=str(path)), tmp_path / "here", **info)
    assert parse(words_of(command(run))).parent == str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "/gone/photos"}, "The photos that the run was trained with are not at /gone"),
        ({"split_file": "/gone/split.csv"}, "The split that the run was trained with"),
        ({"weights": "/gone/net.pth"}, "The weights that the run was trained with"),
        ({"data": "~nobody-here/photos"}, "are not at ~nobody-here/photos any more"),
        ({"run_name": "gr\udcfcn"}, "whose name is no text"),
        ({"ema": 0.9}, "are not those of this version of Thaw"),
        ({"epochs": "many"}, "are not those of this version of Thaw"),
        ({"schedule": 3}, "are not those of this version of Thaw"),
        ({"phase": "thaw"}, "--phase thaw: choose one of"),
        ({"phase": ["transfer"]}, "are not those of this version of Thaw"),
        ({"phase": "thaw", "lr": None}, "--phase thaw: choose one of"),
        ({"phase": None}, "trained by another program"),
    ],
)
def test_what_cannot_be_trained_again_is_said(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = Config("transfer").to_dict() | change
    run = read_run(write_run(tmp_path, "run", [0.5], config=config).path)
    with pytest.raises(ReproduceError, match=message):
        command(run)


def test_an_imported_log_names_no_command(tmp_path: Path) -> None:
    run = described(Config("transfer"), tmp_path, imported={"format": "keras-csv"})
    with pytest.raises(ReproduceError, match="only its log was imported"):
        command(run)


def test_a_run_without_any_settings(tmp_path: Path) -> None:
    bare = read_run(write_finetune(tmp_path, "gone", "bare", [0.7]).path)
    with pytest.raises(ReproduceError, match="another program"):
        command(bare)


@pytest.mark.slow
def test_the_command_gives_the_same_figures(train: Train, tmp_path: Path) -> None:
    """Each kind of run, by the real trainer; twice the same random draws, so exactly."""
    schedule = ("--schedule", "cosine", "--warmup", "1", "--epochs", "2", "--run-name", "a b")
    train("--phase", "transfer", "--lr", "0.01", "--noise", "3", *schedule)
    [trunk] = list_runs(tmp_path / "runs")
    more = ("--phase", "transfer", "--from", trunk.run_id, "--epochs", "2")
    train(*more)
    train(*more, "--lr", "0.01", *schedule)
    train("--phase", "finetune", "--from", trunk.run_id, "--unfreeze", "3", "--epochs", "1")
    train("--phase", "scratch", "--epochs", "1", "--limit", "3", "--split-seed", "2")
    first = list_runs(tmp_path / "runs")
    assert "--lr" not in command(first[1])
    assert "--schedule" in command(first[2])
    for run in first:
        assert main(words_of(command(run))) == 0
        again = list_runs(tmp_path / "runs")[-1]
        assert [e.val_loss for e in again.epochs] == [e.val_loss for e in run.epochs]
        assert [e.lr_head for e in again.epochs] == [e.lr_head for e in run.epochs]


def test_it_needs_no_torch() -> None:
    code = "import sys, trainer.reproduce; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

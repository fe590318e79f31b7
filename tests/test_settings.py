"""Settings as text: to tell runs apart, and to name their groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from explorer.data import Library
from explorer.settings import in_order, settings, varied, without_seed
from tests.explorer_runs import write_run, write_trunk
from trainer.runlog import read_run


def finetune(runs_dir: Path, name: str, trunk: str, **config: Any) -> str:
    chosen = {"lr": 1e-5, "unfreeze": "20", "seed": 0, "schedule": {"name": "constant"}} | config
    accuracies = [0.7, 0.8]
    return write_run(
        runs_dir, name, accuracies, "finetune", 3, parent_run_id=trunk, config=chosen
    ).run_id


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"name": "constant", "decay": 0.3, "warmup": 0}, "constant"),
        ({"name": "exponential", "decay": 0.7, "drop": 0.5}, "exponential 0.7"),
        ({"name": "step", "drop": 0.5, "epochs_drop": 10}, "step 0.5 every 10"),
        ({"name": "cosine", "warmup": 2}, "cosine, warmup 2"),
    ],
)
def test_a_schedule_is_named_with_what_shapes_it(
    schedule: dict[str, Any], said: str, tmp_path: Path
) -> None:
    run = finetune(tmp_path, "a", "gone", schedule=schedule)
    assert settings(read_run(tmp_path / run))["Schedule"] == said


def test_groups_differ_in_more_than_the_seed(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path)
    ids = [
        finetune(tmp_path, "a0", trunk),
        finetune(tmp_path, "a1", trunk, seed=1),
        finetune(tmp_path, "b0", trunk, lr=1e-4),
        finetune(tmp_path, "b1", trunk, lr=1e-4, unfreeze="all", seed=1),
    ]
    snapshot = Library(tmp_path).snapshot()
    assert varied(snapshot, ids) == ["Learning rate", "Layers", "Seed"]
    names = without_seed(snapshot, ids)
    assert names[ids[0]] == names[ids[1]] == "lr 1e-5, 20 layers"
    assert names[ids[2]] == "lr 1e-4, 20 layers"
    assert names[ids[3]] == "lr 1e-4, all layers"


def test_values_come_in_order() -> None:
    assert in_order(["all", "1e-4", "20", "1e-6", "10"]) == ["1e-6", "1e-4", "10", "20", "all"]


def test_a_damaged_config_is_no_error(tmp_path: Path) -> None:
    run = write_run(tmp_path, "odd", [0.1], config={"schedule": 3, "augmentation": [], "lr": None})
    assert settings(read_run(run.path))["Schedule"] == ""

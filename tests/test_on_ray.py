"""Sweeps on a Ray cluster: how members are divided, and, with nodes that die, that none is lost.

Several nodes on one machine are several of Ray's node processes (`ray.cluster_utils.Cluster`)."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from trainer.config import Config
from trainer.grid import Cluster, SweepError, grid
from trainer.on_ray import RayEngine, _nodes, pieces
from trainer.ray_cluster import connected
from trainer.recipe import parse
from trainer.runlog import Run, list_runs
from trainer.schema import ThawError
from trainer.sweep import main


def members(**values: Any) -> Sequence[Config]:
    return grid({"lr": (1e-4, 1e-3), "data": Path("photos")} | values)


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 100])
def test_each_member_is_in_one_task(nodes: int) -> None:
    configs = members(seed=(0, 1, 2), unfreeze=("5", "20"))
    found = sorted(index for piece in pieces(configs, nodes) for index in piece)
    assert found == list(range(len(configs)))


def test_members_on_the_same_batches_share_a_node_as_long_as_there_are_no_more_nodes() -> None:
    configs = members(seed=(0, 1), unfreeze=("5", "20"))
    for nodes in (1, 2):
        for piece in pieces(configs, nodes):
            assert len({configs[index].seed for index in piece}) == 1
        assert len(pieces(configs, nodes)) == 2


def test_more_nodes_than_seeds_divide_between_depths() -> None:
    configs = members(unfreeze=("5", "20"))
    depths = [{configs[i].unfreeze for i in piece} for piece in pieces(configs, 2)]
    assert depths == [{"20"}, {"5"}]


def test_the_flags_of_the_cluster() -> None:
    argv = ["--data", "photos", "--lr", "1e-4", "1e-3"]
    assert parse(argv).cluster is None
    asked = ["--engine", "ray", "--address", "host:6379", "--worker-cpus", "2"]
    assert parse([*argv, *asked]).cluster == Cluster("host:6379", 2, None)
    with pytest.raises(SweepError, match="--worker-cpus belongs to --engine ray"):
        parse([*argv, "--worker-cpus", "2"])
    with pytest.raises(SweepError, match="--worker-cpus 0"):
        parse([*argv, "--engine", "ray", "--worker-cpus", "0"])


def test_a_recipe_does_not_choose_the_machine(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[sweep]\nengine = "ray"\nlr = [1e-4, 1e-3]\n')
    with pytest.raises(SweepError, match="engine is no setting of a sweep"):
        parse([str(recipe)])


def test_without_ray_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ThawError, match=r"pip install -r requirements-ray\.txt"):
        RayEngine(Cluster()).fit(Config(phase="transfer", data=Path("photos")))


# --- with Ray ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each; tests may add nodes, and take those away that they added."""
    pytest.importorskip("ray", reason="needs requirements-ray.txt")
    from ray.cluster_utils import Cluster as Nodes

    small = {"num_cpus": 1, "object_store_memory": 80_000_000}
    nodes = Nodes(initialize_head=True, head_node_args=small | {"include_dashboard": False})
    nodes.add_node(**small)
    yield nodes
    nodes.shutdown()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> tuple[list[str], Path]:
    """A sweep by this process, with the flags that made it."""
    runs = tmp_path_factory.mktemp("local")
    argv = ["--data", str(photos), "--runs-dir", str(runs), "--cache-dir", str(runs / "cache")]
    argv += ["--arch", "resnet18", "--weights", "none", "--batch-size", "8", "--device", "cpu"]
    argv += ["--epochs", "2", "--transfer-epochs", "1", "--lr", "1e-4", "1e-3"]
    argv += ["--unfreeze", "2", "5", "--seed", "0", "1"]
    assert main(argv) == 0
    return argv, runs


def elsewhere(local: tuple[list[str], Path], runs: Path) -> list[str]:
    """The same command in another runs folder, from the same parent."""
    argv, origin = local
    (parent,) = [run for run in list_runs(origin) if run.phase == "transfer" and not sweep_of(run)]
    shutil.copytree(parent.path, runs / parent.run_id)
    found = list(argv)
    found[found.index("--runs-dir") + 1] = str(runs)
    return [*found, "--from", parent.run_id]


def sweep_of(run: Run) -> dict[str, Any]:
    return run.info.get("sweep", {})


def figures(runs: Path) -> dict[int, list[tuple[Any, ...]]]:
    """What each member logged, but how long it took, by its place in the sweep."""
    fields = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr_head")
    return {
        sweep_of(run)["member"]: [
            tuple(getattr(e, name) for name in fields) for e in run.epochs[1:]
        ]
        for run in list_runs(runs)
        if sweep_of(run)
    }


@pytest.mark.slow
def test_ray_gives_the_metrics_of_one_process(
    cluster: Any, local: tuple[list[str], Path], tmp_path: Path
) -> None:
    argv = list(local[0])
    argv[argv.index("--runs-dir") + 1] = str(tmp_path)  # the parent too is trained on a node
    assert main([*argv, "--engine", "ray", "--address", cluster.address]) == 0
    ours, theirs = figures(tmp_path), figures(local[1])
    assert ours.keys() == theirs.keys() and len(ours) == 10
    for member, epochs in ours.items():
        for one, other in zip(epochs, theirs[member], strict=True):
            # One CPU a task here, all of them there: sums are in another order.
            assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_members_of_a_node_that_dies_are_trained_on_another(
    cluster: Any, local: tuple[list[str], Path], tmp_path: Path
) -> None:
    argv = elsewhere(local, tmp_path)
    argv[argv.index("--epochs") + 1] = "12"
    third = cluster.add_node(num_cpus=4, object_store_memory=80_000_000)

    def kill() -> None:
        while not any(len(run.epochs) > 2 for run in list_runs(tmp_path) if sweep_of(run)):
            time.sleep(0.1)
        cluster.remove_node(third, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert main([*argv, "--engine", "ray", "--address", cluster.address]) == 0
    killer.join(timeout=1)
    assert not killer.is_alive()
    found = [run for run in list_runs(tmp_path) if sweep_of(run)]
    assert [run.status for run in found] == ["done"] * 10
    assert all([e.phase_epoch for e in run.epochs] == list(range(13)) for run in found)


def _refuse(nodes: set[str]) -> list[Path]:
    import ray

    if ray.get_runtime_context().get_node_id() in nodes:
        raise ThawError("no photos here")
    return [Path("somewhere")]


@pytest.mark.slow
def test_what_one_node_cannot_train_is_tried_on_the_others(
    cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Cluster(cluster.address, cpus=1, gpus=0)
    with connected(cluster.address, 0) as ray:
        first, second = (node.id for node in _nodes(ray))
        found = RayEngine(asked)._run(ray, [partial(_refuse, {first})] * 4)
        assert [len(some) for some in found] == [1, 1, 1, 1]
        assert "The task is tried on" in capsys.readouterr().out
        with pytest.raises(ThawError, match="no photos here"):
            RayEngine(asked)._run(ray, [partial(_refuse, {first, second})])


@pytest.mark.slow
def test_no_cluster_at_an_address(
    local: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="needs requirements-ray.txt")
    argv = elsewhere(local, tmp_path)
    assert main([*argv, "--engine", "ray", "--address", "127.0.0.1:1"]) == 2
    assert "No Ray cluster answers at 127.0.0.1:1" in capsys.readouterr().err

"""The members of a sweep as tasks of a Ray cluster: Ray places them, and restarts those that die.

A task trains its members together, as one process does without Ray, and writes their runs into the
same runs folder. All nodes must see that folder, the photos and Thaw itself under the same paths.
Ray is optional: requirements-ray.txt.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from trainer.cli import inert
from trainer.config import Config
from trainer.grid import Cluster, Plan, SweepInfo, batches_of
from trainer.ranking import count
from trainer.ray_cluster import RayError, connected
from trainer.runlog import Run, read_run, run_folders
from trainer.schema import ThawError
from trainer.search import Watch, only

# How often Ray begins a task again whose process or node has died.
_RESTARTS: Final = 3
# How many training steps of a tail take as long as the frozen part of a view (docs/benchmarks.md).
_FROZEN_STEPS: Final = 2
# Results are names of folders.
_STORE_BYTES: Final = 100_000_000
# How long tasks that were told to stop may take to keep what they have.
_STOP_SECONDS: Final = 20.0

Work = Callable[[], list[Path]]


class RayEngine:
    """Trains a sweep on a cluster; the methods are those of `trainer.sweep.Engine`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def fit(self, config: Config) -> Run:
        """Train the parent on one node. Raises ThawError."""
        with connected(self._cluster.address, _STORE_BYTES) as ray:
            ((folder,),) = self._run(ray, [functools.partial(_fit, config)])
        return read_run(folder)

    def fit_together(
        self,
        configs: Sequence[Config],
        sweep: SweepInfo,
        interrupted: Mapping[int, Run],
        watch: Watch | None = None,
    ) -> list[Run]:
        """As `trainer.fit.fit_together`; `watch` is asked on the nodes. Raises ThawError where no
        node could train a task; the other members are trained then."""
        labelled = [(place.group, c) for place, c in zip(sweep.places, configs, strict=True)]
        whole = Plan(tuple(labelled), sweep)
        with connected(self._cluster.address, _STORE_BYTES) as ray:
            nodes = _nodes(ray)
            divided = pieces(configs, len(nodes))
            print(f"On Ray: {count(len(divided), 'task')}, {count(len(nodes), 'node')}.")
            there = frozenset(path.name for path in run_folders(configs[0].runs_dir))
            parts = [_part(whole, piece, interrupted, watch) for piece in divided]
            works = [functools.partial(_train, part, there) for part in parts]
            found = self._run(ray, works)
        folders = {
            index: folder
            for piece, some in zip(divided, found, strict=True)
            for index, folder in zip(piece, some, strict=True)
        }
        return [read_run(folders[index]) for index in range(len(configs))]

    def _run(self, ray: Any, works: Sequence[Work]) -> list[list[Path]]:
        nodes = _nodes(ray)
        cpus = self._cluster.cpus or min(node.cpus for node in nodes)
        gpus = self._cluster.gpus
        if gpus is None:
            gpus = float(any(node.gpus for node in nodes))
        asked = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": _RESTARTS}
        return _Tasks(ray, works, asked).until_done()


# --- dividing ---------------------------------------------------------------------------------


def pieces(configs: Sequence[Config], nodes: int) -> list[list[int]]:
    """The members of each task, by index. Those that share every batch stay together, so that
    their frozen part is computed and cached on one node; they are divided, between depths where
    that goes, only where computing it several times ends sooner."""
    groups: dict[object, list[int]] = {}
    for index, config in enumerate(configs):
        groups.setdefault(batches_of(config), []).append(index)
    sizes = [len(group) for group in groups.values()]

    def duration(parts: int) -> int:
        """Of one task after the other on each node, in training steps of one member."""
        rounds = math.ceil(sum(min(parts, size) for size in sizes) / nodes)
        return rounds * (_FROZEN_STEPS + math.ceil(max(sizes) / parts))

    parts = min(range(1, max(sizes) + 1), key=duration)
    found = []
    for group in groups.values():
        by_depth = sorted(group, key=lambda i: (configs[i].phase, configs[i].unfreeze, i))
        divided = np.array_split(np.array(by_depth), min(parts, len(group)))
        found += [part.tolist() for part in divided]
    return found


@dataclass(frozen=True)
class _Part:
    """Members to train together; `beside` are all of the sweep, because what is frozen is computed
    in the stretches that all need, and rounded alike wherever it is trained."""

    plan: Plan
    beside: tuple[Config, ...]
    interrupted: Mapping[int, Run]
    watch: Watch | None = None


def _part(
    whole: Plan, piece: Sequence[int], interrupted: Mapping[int, Run], watch: Watch | None
) -> _Part:
    known = {i: interrupted[index] for i, index in enumerate(piece) if index in interrupted}
    rest = [c for index, c in enumerate(whole.configs) if index not in piece]
    watched = None if watch is None else only(watch, piece)
    return _Part(whole.only(piece), tuple(rest), known, watched)


# --- on a node --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """The folders of the runs, or why this node could not train them."""

    node: str
    folders: tuple[Path, ...] = ()
    problem: str | None = None


def _on_node(work: Work, folder: str, cpus: int) -> _Answer:
    """Do the work in a process of Ray's, in the folder that its paths are relative to."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    try:
        os.chdir(folder)
        _prepare(cpus)
        return _Answer(node, tuple(path.absolute() for path in work()))
    except (ThawError, OSError, MemoryError) as error:
        return _Answer(node, problem=f"{type(error).__name__}: {error}")


def _prepare(cpus: int) -> None:
    from trainer.process import prepare_process

    prepare_process()
    import torch

    torch.set_num_threads(cpus)


def _fit(config: Config) -> list[Path]:
    from trainer.fit import fit

    return [fit(config, go_on=True).path]


def _train(part: _Part, there: frozenset[str]) -> list[Path]:
    """Train what is not done yet: Ray may begin it again after its first process has died. Of the
    runs that were `there` before, by id, only those interrupted go on. Not told apart by time:
    another node's clock may differ.
    """
    from trainer.fit import fit_together
    from trainer.sweep import earlier

    known = {**part.interrupted, **earlier(part.plan, but=there)}
    done = {i: run for i, run in known.items() if run.status == "done"}
    rest = [i for i in range(len(part.plan.members)) if i not in done]
    beside = (*part.beside, *(part.plan.configs[i] for i in done))
    if rest:
        left = part.plan.only(rest)
        going_on = {n: known[i] for n, i in enumerate(rest) if i in known}
        watch = None if part.watch is None else only(part.watch, rest)
        runs = fit_together(left.configs, left.info, going_on, beside, watch)
        done |= dict(zip(rest, runs, strict=True))
    return [done[i].path for i in range(len(part.plan.members))]


# --- the cluster ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    id: str
    name: str
    cpus: int
    gpus: float


def _nodes(ray: Any) -> list[Node]:
    alive = [node for node in ray.nodes() if node["Alive"]]
    found = [
        Node(
            node["NodeID"],
            node["NodeManagerHostname"],
            int(node["Resources"].get("CPU", 0)),
            node["Resources"].get("GPU", 0.0),
        )
        for node in alive
    ]
    usable = [node for node in found if node.cpus]
    if not usable:
        raise RayError("The Ray cluster has no node with CPUs: start one with `ray start`.")
    return usable


class _Tasks:
    """Work under way; what one node refuses is tried on the others, one after the other. `asked`
    are Ray's options for each task, "num_cpus" among them."""

    def __init__(self, ray: Any, works: Sequence[Work], asked: Mapping[str, Any]) -> None:
        self._ray, self._works, self._asked = ray, works, asked
        self._remote = ray.remote(_on_node)
        self._pending: dict[Any, tuple[int, frozenset[str]]] = {}
        self._found: dict[int, list[Path]] = {}
        self._failed: list[str] = []

    def until_done(self) -> list[list[Path]]:
        """The folders of the runs, in the order of the works. Raises ThawError."""
        try:
            for number in range(len(self._works)):
                self._start(number, frozenset(), "SPREAD")
            while self._pending:
                (ready, *_), _ = self._ray.wait(list(self._pending))
                self._take(*self._pending.pop(ready), self._answer(ready))
        except BaseException:
            self._stop()
            raise
        if self._failed:
            raise ThawError("\n".join(self._failed))
        return [self._found[number] for number in range(len(self._works))]

    def _start(self, number: int, tried: frozenset[str], where: Any) -> None:
        remote = self._remote.options(**self._asked, scheduling_strategy=where)
        reference = remote.remote(self._works[number], str(Path.cwd()), self._asked["num_cpus"])
        self._pending[reference] = number, tried

    def _answer(self, reference: Any) -> _Answer:
        errors = self._ray.exceptions
        try:
            answer: _Answer = self._ray.get(reference)
        except errors.RayTaskError:
            raise  # a fault of ours: the traceback is wanted
        except errors.RayError as error:
            first = str(error).strip().splitlines()[0]
            return _Answer("", problem=f"{type(error).__name__}, {_RESTARTS} times again: {first}")
        return answer

    def _take(self, number: int, tried: frozenset[str], answer: _Answer) -> None:
        if answer.problem is None:
            self._found[number] = list(answer.folders)
            return
        tried |= {answer.node}
        nodes = _nodes(self._ray)
        place = next((f" on {node.name}" for node in nodes if node.id == answer.node), "")
        said = f"Task {number + 1} of {len(self._works)}{place}: {inert(answer.problem)}"
        others = [node for node in nodes if node.id not in tried]
        if not answer.node or not others:
            self._failed.append(said)
            return
        print(f"{said}\nThe task is tried on {others[0].name}.")
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._start(number, tried, NodeAffinitySchedulingStrategy(others[0].id, soft=False))

    def _stop(self) -> None:
        """Let the tasks keep what they have before the cluster takes their processes away."""
        waiting = list(self._pending)
        for reference in waiting:
            with contextlib.suppress(Exception):
                self._ray.cancel(reference)
        if waiting:
            self._ray.wait(waiting, num_returns=len(waiting), timeout=_STOP_SECONDS)

"""Where a sweep on a cluster stops scaling: 1 to 1,000 nodes, simulated.

    python -m tests.benchmarks.cluster [--link 10] [--out docs/scale.svg]

A discrete-event model (SimPy) of `trainer.on_ray`: its own division of the members into tasks, one
task at a time on a node, and one link to the storage that all nodes share, which gives everybody in
turn 16 MB. The constants are measurements of this repository (docs/benchmarks.md: two cores, no
GPU), except the link, which no machine here has. Nothing else is in it: no stragglers, no failures,
nodes all alike. Prints a Markdown table, and draws the speed-up.

Two places of the frozen activations are compared: a cache on each node (as it is by default), and
one in the shared folder (`--cache-dir` there), which the first task fills and the others wait for.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import altair as alt
import pandas as pd
import simpy

from trainer.config import Config
from trainer.grid import Request, batches_of, grid, plan
from trainer.on_ray import pieces

NODES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
_TURN_BYTES: Final = 16e6

CacheKind = Literal["each node", "shared folder"]


@dataclass(frozen=True)
class Costs:
    """Of EfficientNet-B0 at 224 pixels with 20 layers unfrozen. Seconds a photo on a node of two
    cores, bytes a photo or a run."""

    decode: float = 1.2e-3  # docs/benchmarks.md, "Growth"
    prefix: float = 5.8e-3  # the same: the frozen part of one view
    tail: float = 2.6e-3  # the same: a training step
    evaluate: float = 0.7e-3  # the same
    start: float = 8.0  # a task's process, with torch; docs/scale.md
    schedule: float = 0.01  # the driver hands out tasks one after the other
    photo_bytes: float = 60e3  # a JPEG of the shared flowers
    view_bytes: float = 37_648  # a cached row: 192x7x7 float32 and its checksum
    run_bytes: float = 33e6  # two checkpoints, log and predictions of a run
    link: float = 10e9 / 8  # bytes a second to the shared storage


@dataclass(frozen=True)
class Case:
    """A sweep: `members` for each of `seeds`, on `photos` for training and validation."""

    name: str
    seeds: int
    members: int
    train: int = 8950  # Oregon Wildlife, 70% of 12,786
    val: int = 3836
    epochs: int = 20


CASES: Final = (
    Case("six pairs, 1 seed", 1, 6),
    Case("six pairs, 3 seeds", 3, 6),
    Case("100 members, 1 seed", 1, 100),
    Case("100 members, 10 seeds", 10, 100),
)


def simulate(case: Case, nodes: int, costs: Costs, cache: CacheKind) -> float:
    """Seconds until the last run is written."""
    world = _World(case, costs, cache, nodes)
    world.env.run()
    return float(world.env.now)


class _World:
    def __init__(self, case: Case, costs: Costs, cache: CacheKind, nodes: int) -> None:
        self.case, self.costs, self.cache = case, costs, cache
        self.env = simpy.Environment()
        self.link = simpy.Resource(self.env)
        self.free = simpy.Store(self.env)
        self.free.items = list(range(nodes))
        self.has_photos: set[int] = set()
        self.filled: dict[Any, simpy.Event] = {}
        self.env.process(self._driver(nodes))

    def _driver(self, nodes: int) -> Iterator[Any]:
        configs = _configs(self.case)
        for piece in pieces(configs, nodes):
            node = yield self.free.get()
            yield self.env.timeout(self.costs.schedule)
            self.env.process(self._task(node, batches_of(configs[piece[0]]), len(piece)))

    def _task(self, node: int, batches: object, members: int) -> Iterator[Any]:
        case, costs = self.case, self.costs
        yield self.env.timeout(costs.start)
        photos = case.train + case.val
        if node not in self.has_photos:
            yield from self._transfer(photos * costs.photo_bytes)
            yield self.env.timeout(photos * costs.decode)
            self.has_photos.add(node)
        yield from self._prefix(node, batches)
        steps = case.epochs * case.train * costs.tail
        evaluations = (case.epochs + 1) * case.val * costs.evaluate
        yield self.env.timeout(members * (steps + evaluations))
        yield from self._transfer(members * costs.run_bytes)
        self.free.put(node)

    def _prefix(self, node: int, batches: object) -> Iterator[Any]:
        """Every view of every training photo once, and the validation photos."""
        views = self.case.epochs * self.case.train + self.case.val
        key = batches if self.cache == "shared folder" else (node, batches)
        known = self.filled.get(key)
        if known is None:
            self.filled[key] = self.env.event()
            yield self.env.timeout(views * self.costs.prefix)
            if self.cache == "shared folder":
                yield from self._transfer(views * self.costs.view_bytes)
            self.filled[key].succeed()
            return
        yield known
        if self.cache == "shared folder":
            yield from self._transfer(views * self.costs.view_bytes)

    def _transfer(self, size: float) -> Iterator[Any]:
        for _ in range(math.ceil(size / _TURN_BYTES)):
            with self.link.request() as turn:
                yield turn
                yield self.env.timeout(min(size, _TURN_BYTES) / self.costs.link)


def _configs(case: Case) -> Sequence[Config]:
    """As many members as the case has, and a control for each seed."""
    rates = tuple(1e-6 * 1.01**i for i in range(case.members))
    asked = grid({"data": Path("oregon"), "lr": rates, "seed": tuple(range(case.seeds))})
    return plan(Request(asked), None).configs


def table(costs: Costs) -> pd.DataFrame:
    rows = []
    for case, cache in itertools.product(CASES, ("each node", "shared folder")):
        alone = simulate(case, 1, costs, cache)
        for nodes in NODES:
            seconds = simulate(case, nodes, costs, cache)
            rows.append((case.name, cache, nodes, seconds, alone / seconds))
    return pd.DataFrame(rows, columns=["sweep", "cache", "nodes", "seconds", "speedup"])


def chart(found: pd.DataFrame) -> alt.Chart:
    axis = {"scale": alt.Scale(type="log"), "axis": alt.Axis(values=[1, 10, 100, 1000])}
    lines = (
        alt.Chart(found)
        .mark_line(point=True)
        .encode(
            x=alt.X("nodes:Q", title="nodes", **axis),
            y=alt.Y("speedup:Q", title="times as fast as one node", **axis),
            color=alt.Color("sweep:N", sort=None, title=None),
            strokeDash=alt.StrokeDash(
                "cache:N",
                sort=None,
                title="frozen activations cached on",
                legend=alt.Legend(symbolType="stroke"),
            ),
        )
    )
    ideal = pd.DataFrame({"nodes": [1, 1000], "speedup": [1, 1000]})
    return (
        alt.Chart(ideal).mark_line(color="grey", strokeWidth=1).encode(x="nodes:Q", y="speedup:Q")
        + lines
    ).properties(width=520, height=380, background="white")


def markdown(found: pd.DataFrame) -> str:
    wide = found.pivot_table(
        index=["sweep", "cache"], columns="nodes", values="speedup", sort=False
    )
    lines = [f"| sweep | cache | {' | '.join(map(str, wide.columns))} |"]
    lines.append(f"|{' --- |' * (len(wide.columns) + 2)}")
    for (sweep, cache), row in wide.iterrows():
        lines.append(f"| {sweep} | {cache} | {' | '.join(f'{value:.1f}' for value in row)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--link", type=float, default=10, help="Gbit/s to the shared storage (10)")
    parser.add_argument("--out", type=Path, help="where to write the plot (.svg)")
    given = parser.parse_args()
    found = table(replace(Costs(), link=given.link * 1e9 / 8))
    print(markdown(found))
    for case in CASES:
        one = found.query("sweep == @case.name and nodes == 1 and cache == 'each node'")
        print(f"\n{case.name}, one node: {one.seconds.item() / 3600:.1f} h")
    if given.out is not None:
        chart(found).save(given.out)


if __name__ == "__main__":
    main()

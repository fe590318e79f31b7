"""The processes that train one run together, started by torchrun: who they are, what they agree on.

Rank 0 decides and writes; the others follow. In a process of its own everything here does nothing:
`from_first(make)` is `make()`, the share of a batch is all of it.

Gradients travel by NCCL where there are GPUs (never run so far), everything else by Gloo.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from trainer.process import launched, ranks
from trainer.rows import Rows
from trainer.schema import ThawError

T = TypeVar("T")

# A process that gives no sign for this long, while the others wait for its gradients, is lost.
_LOST_SECONDS: Final = 300.0
_LOST_NAME: Final = "THAW_LOST_SECONDS"
# Decoding and filling a cache take as long as they take, on one machine longer than on another.
_PATIENCE: Final = timedelta(hours=6)
_LOOK_SECONDS: Final = 0.01
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class LostError(ThawError):
    """Another process of this training is gone, or cannot be reached."""


class RanksError(ThawError):
    """What cannot be done by several processes, or not by these."""


@dataclass(frozen=True)
class Team:
    """This process among those that train together; `here` are those on this machine."""

    rank: int
    size: int
    rank_here: int
    size_here: int
    patient: dist.ProcessGroup

    @property
    def turns(self) -> tuple[tuple[int, int], ...]:
        """(rank, of how many) to divide what is to be cached by: first over all, then, where their
        caches are not the same folder, over those on this machine, then alone."""
        return (self.rank, self.size), (self.rank_here, self.size_here), (0, 1)


_team: Team | None = None
_job: str | None = None
_wanted: int | None = None  # the signal that arrived


def size() -> int:
    """How many processes train together; 1 in a process of its own."""
    return 1 if _team is None else _team.size


def rank() -> int:
    return 0 if _team is None else _team.rank


def about(info: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json says of who trains it; nothing in a process of its own, unless others did."""
    if not (launched() or "distributed" in info):
        return {}
    nodes = int(os.environ["GROUP_WORLD_SIZE"]) if launched() else 1
    return {"distributed": {"world_size": size(), "nodes": nodes, "job": _job}}


def set_job(key: str) -> None:
    """By which runs are known again as those of one torchrun, whatever happens to its processes."""
    global _job
    _job = key


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes that torchrun has started; without it, or where it started one
    only, nothing happens.

    Only rank 0 prints. Raises LostError where the others do not come.
    """
    global _team
    if ranks() == 1:
        yield
        return
    lost, gpus = _lost_after(), torch.cuda.device_count()
    with reached():
        store, number, among = next(rendezvous("env://", timeout=lost))
        store = PrefixStore(_name_of_meeting(store, number, among, lost), store)
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=among, timeout=lost)
        patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(patient, dist.ProcessGroup)
    here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    _team = Team(number, among, *here, patient)
    if here[0] < gpus:
        torch.cuda.set_device(here[0])
    try:
        with _only_first_speaks(_team.rank):
            yield
    finally:
        _team = None
        dist.destroy_process_group()


def _lost_after() -> timedelta:
    given = os.environ.get(_LOST_NAME)
    try:
        return timedelta(seconds=_LOST_SECONDS if given is None else float(given))
    except (ValueError, OverflowError) as error:
        raise RanksError(f"{_LOST_NAME}={given}: must be a number of seconds.") from error


def _name_of_meeting(store: Store, number: int, among: int, lost: timedelta) -> str:
    """A name that all who train together now agree on, and nobody had before.

    torchrun keeps its store when it starts them anew, with the addresses of those that are gone.
    So rank 0 invents a name, and shows with it the words that the others have said; one that sees
    its own word knows that the name is of now, and answers under that name.
    """
    mine, until = secrets.token_hex(8), time.monotonic() + lost.total_seconds()
    others = range(1, among)
    if number > 0:
        store.set(f"thaw/word/{number}", mine)
    while time.monotonic() < until:
        if number == 0:
            keys = {other: f"thaw/word/{other}" for other in others}
            words = {o: store.get(k).decode() for o, k in keys.items() if store.check([k])}
            store.set("thaw/name", json.dumps([mine, words]))
            if store.check([f"thaw/{mine}/{other}" for other in others]):
                return f"thaw/{mine}"
        elif store.check(["thaw/name"]):
            name, words = json.loads(store.get("thaw/name"))
            if words.get(str(number)) == mine:
                store.set(f"thaw/{name}/{number}", "")
                return f"thaw/{name}"
        time.sleep(_LOOK_SECONDS)
    raise LostError(f"Not all of the {among} processes that torchrun started have come.")


@contextlib.contextmanager
def _only_first_speaks(number: int) -> Iterator[None]:
    """What all of them say is said once, by rank 0."""
    if number == 0:
        yield
        return
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(_NoTerminal(os.dup(2))),  # no bars
    ):
        try:
            yield
        except LostError:
            raise  # maybe it is rank 0 that is lost
        except ThawError as error:
            raise SystemExit(2) from error


class _NoTerminal(io.TextIOWrapper):
    def __init__(self, descriptor: int) -> None:
        super().__init__(os.fdopen(descriptor, "wb"), write_through=True)

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def reached() -> Iterator[None]:
    """Says LostError for what the network reports, around whatever others have to take part in.
    Gloo has no type of error of its own."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).partition("] ")[2] or str(error)
        raise LostError(
            "Another process of this training has ended or cannot be reached "
            f"({reason.partition('. ')[0].strip()}). What it said itself stands above, or on its "
            "machine. A run that had begun goes on with --resume auto, by any number of processes; "
            "with --max-restarts torchrun sees to that."
        ) from error


# --- agreeing -----------------------------------------------------------------------------------


def meet() -> None:
    """Wait for all, however long that takes."""
    if _team is None:
        return
    with reached():
        work = dist.barrier(group=_team.patient, async_op=True)
        assert work is not None
        while not work.is_completed():
            check_stop()
            time.sleep(_LOOK_SECONDS)
        work.wait()


def from_first(make: Callable[[], T]) -> T:
    """What rank 0 makes, for all, and its ThawErrors: others may not see the same runs folder."""
    if _team is None:
        return make()
    made: list[Any] = [None, None]
    if _team.rank == 0:
        try:
            made[0] = make()
        except ThawError as error:
            made[1] = error
    meet()
    with reached():
        dist.broadcast_object_list(made, 0, device=torch.device("cpu"))
    if made[1] is not None:
        raise made[1]
    result: T = made[0]
    return result


def each_alike(make: Callable[[], T], mark: Callable[[T], str], what: str) -> T:
    """What each makes for itself, on each machine one process first: the others find its cache.

    Raises RanksError where their marks differ, and on all what was raised on one.
    """
    if _team is None:
        return make()
    made: list[T] = []
    problem = ""
    for turn in (True, False):
        if turn == (_team.rank_here == 0):
            try:
                made.append(make())
            except ThawError as error:
                problem = str(error)
        meet()
    mine = (socket.gethostname(), problem, mark(made[0]) if made else "")
    found: list[Any] = [None] * _team.size
    with reached():
        dist.all_gather_object(found, mine)
    for number, (host, said, _) in enumerate(found):
        if said:
            raise RanksError(said if number == 0 else f"Rank {number} on {host}: {said}")
    for number, (host, _, marked) in enumerate(found):
        if marked != found[0][2]:
            raise RanksError(
                f"Rank {number} on {host} reads other {what} than rank 0 on {found[0][0]}. Give "
                "every machine the same, under the same names."
            )
    return made[0]


def agree(error: ThawError | None) -> None:
    """Ends all where rank 0, which alone writes, could not: raises its error there."""
    if _team is None:
        return
    failed = [error is not None]
    with reached():
        dist.broadcast_object_list(failed, 0, device=torch.device("cpu"))
    if failed[0]:
        raise error if error is not None else SystemExit(2)


def total(*values: float) -> tuple[float, ...]:
    """The sums over all, of float64. Ends all of them where one was told to stop."""
    sums = torch.tensor([*values, float(_wanted is not None)], dtype=torch.float64)
    with reached():
        dist.all_reduce(sums)
    *found, stopping = sums.tolist()
    if stopping:
        raise SystemExit(128 + (_wanted or signal.SIGTERM))
    return tuple(found)


# --- dividing -----------------------------------------------------------------------------------


def pieces(count: int, most: int, among: int) -> list[Rows]:
    """All rows in order, `most` at a time, or fewer so that everyone has some."""
    at_once = max(1, min(most, math.ceil(count / among)))
    return [np.arange(start, min(start + at_once, count)) for start in range(0, count, at_once)]


def my_pieces(count: int, most: int) -> Iterator[Rows]:
    """Those of `pieces` that this process sees to. Between them all end if one was told to stop."""
    found = pieces(count, most, size())
    for first in range(0, len(found), size()):
        if _team is not None:
            total()
        if first + rank() < len(found):
            yield found[first + rank()]


def turns() -> tuple[tuple[int, int], ...]:
    """See `Team.turns`; alone there is one."""
    return ((0, 1),) if _team is None else _team.turns


def gathered(values: Sequence[Tensor], rows: Sequence[Rows], count: int) -> Tensor:
    """float32 [count, width] of all, from what each has of it: [n, width] for n rows each."""
    if _team is None:
        return torch.cat(list(values))
    width = torch.tensor(values[0].shape[1] if values else 0)
    with reached():
        dist.all_reduce(width, dist.ReduceOp.MAX)
        whole = torch.zeros(count, int(width))
        for part, where in zip(values, rows, strict=True):
            whole[torch.from_numpy(where)] = part
        dist.all_reduce(whole)  # every row is one rank's: the others add zero to it
    return whole


def check_team(batch_size: int, device: torch.device) -> None:
    """Raises RanksError where there is no photo of each batch, or no GPU, for each process."""
    if batch_size < size():
        raise RanksError(
            f"--batch-size {batch_size}: has fewer photos than there are processes ({size()}) to "
            "divide it among. Give a larger batch, or start fewer."
        )
    gpus = torch.cuda.device_count()
    if _team is not None and device.type == "cuda" and _team.size_here > gpus:
        raise RanksError(
            f"torchrun started {_team.size_here} processes here, where there are {gpus} GPUs. Give "
            f"--nproc-per-node {gpus}, or --device cpu."
        )


# --- stopping -----------------------------------------------------------------------------------


@contextlib.contextmanager
def stopping_together() -> Iterator[None]:
    """A signal meanwhile ends all at the same step, so that none waits for another that is gone;
    the second one ends this process at once."""
    global _wanted
    if _team is None:
        yield
        return
    before = {number: signal.signal(number, _note) for number in _SIGNALS}
    try:
        yield
        check_stop()
    finally:
        if _wanted is None:
            for number, handler in before.items():
                signal.signal(number, handler)
        _wanted = None


def _note(number: int, frame: FrameType | None) -> None:
    global _wanted
    _wanted = number
    for one in _SIGNALS:
        signal.signal(one, signal.SIG_DFL)


def check_stop() -> None:
    """Call it where nobody waits for this process."""
    if _wanted is not None:
        raise SystemExit(128 + _wanted)

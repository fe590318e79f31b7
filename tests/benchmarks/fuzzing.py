"""What the fuzzers share: bytes that are damaged, and a process that reads them under watch."""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import random
import resource
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

SECONDS: Final = 5.0
BYTES: Final = 1 << 30
HUNG: Final = 60.0  # seconds after which a case is given up
_ADDRESS_SPACE: Final = 8 << 30  # what is above is a MemoryError, not the end of this machine
_SIDES: Final = (0, 1, 2, 255, 256, 8000, 9999, 16383, 32767, 65535, 65536, 2**24, 2**31 - 1)
_BYTES: Final = (0, 1, 2, 3, 4, 8, 16, 32, 64, 127, 128, 254, 255)

Mutation = Callable[[random.Random, bytearray, Sequence[bytes]], bytearray]


@dataclass(frozen=True)
class Fuzzer:
    """`make` gives the file of a case, `read` says in a few words what came of it, and raises what
    it must not. Both run in a process of their own."""

    make: Callable[[random.Random], bytes]
    read: Callable[[bytes], str]


@dataclass(frozen=True)
class Outcome:
    number: int
    came: str
    seconds: float = 0.0
    memory: int = 0

    @property
    def failed(self) -> bool:
        too_much = self.seconds > SECONDS or self.memory > BYTES
        return self.came.startswith("FAILED") or too_much


# --- damage -------------------------------------------------------------------------------------


def damaged(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """With bits flipped, bytes replaced, a part cut out, doubled or taken from another, or a number
    of 2 or 4 bytes changed; at most a few MB."""
    changed = bytearray(content or b"\0")
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        changed = rng.choice(_MUTATIONS)(rng, changed, others) or bytearray(b"\0")
    return bytes(changed)


def _flip(rng: random.Random, content: bytearray, others: Sequence[bytes]) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        content[_place(rng, content)] ^= 1 << rng.randrange(8)
    return content


def _replace(rng: random.Random, content: bytearray, others: Sequence[bytes]) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 8))):
        content[_place(rng, content)] = rng.choice(_BYTES)
    return content


def _cut(rng: random.Random, content: bytearray, others: Sequence[bytes]) -> bytearray:
    start = _place(rng, content)
    del content[start : rng.choice((len(content), start + rng.randrange(1, 64)))]
    return content


def _double(rng: random.Random, content: bytearray, others: Sequence[bytes]) -> bytearray:
    start, size = _place(rng, content), rng.choice((1, 4, 12, 100, 1000))
    content[start:start] = content[start : start + size] * rng.choice((1, 2, 100, 5000))
    return content


def _splice(rng: random.Random, content: bytearray, others: Sequence[bytes]) -> bytearray:
    other = rng.choice(others)
    start = rng.randrange(len(other) + 1)
    taken = other[start : start + rng.choice((4, 20, 200, len(other)))]
    place = _place(rng, content)
    return content[:place] + taken + content[rng.choice((place, place + len(taken))) :]


def _resize(rng: random.Random, content: bytearray, others: Sequence[bytes]) -> bytearray:
    """Somewhere in the header, as the sides of a photo are."""
    form = rng.choice(("<H", ">H", "<I", ">I"))
    size = struct.calcsize(form)
    place = rng.randrange(max(1, min(len(content), 300) - size))
    value = rng.choice(_SIDES) % (1 << 8 * size)
    content[place : place + size] = struct.pack(form, value)
    return content


_MUTATIONS: Final[tuple[Mutation, ...]] = (_flip, _replace, _cut, _double, _splice, _resize)


def _place(rng: random.Random, content: bytearray) -> int:
    """Half of the time among the first bytes."""
    end = len(content) if rng.random() < 0.5 else min(len(content), 400)
    return rng.randrange(max(1, end))


# --- the run ------------------------------------------------------------------------------------


def fuzz(fuzzer: Fuzzer, seed: int, minutes: float, keep: Path | None) -> int:
    """Cases one after another; prints those that fail, and what came of all; how many failed."""
    came: Counter[str] = Counter()
    failed: list[Outcome] = []
    slowest, largest = 0.0, 0
    for outcome in _outcomes(fuzzer, seed, 60 * minutes):
        came[outcome.came] += 1
        slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.memory)
        if outcome.failed:
            failed.append(outcome)
            print(outcome, flush=True)
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                content = fuzzer.make(_random(seed, outcome.number))
                (keep / f"{seed}-{outcome.number}").write_bytes(content)
    print(f"{came.total():,} cases, {len(failed)} failed")
    print(f"slowest {slowest:.2f} s, most memory {largest / 2**20:.0f} MiB")
    for words, count in came.most_common(40):
        print(f"{count:9,}  {words}")
    return len(failed)


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--minutes", type=float, default=1.0)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--keep", type=Path, metavar="DIR", help="where to write what fails")
    return made


def _random(seed: int, number: int) -> random.Random:
    return random.Random(f"{seed}/{number}")


def _outcomes(fuzzer: Fuzzer, seed: int, seconds: float) -> Iterator[Outcome]:
    """Of one case after another; a process that ends or hangs is one more."""
    until, number = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        ours, theirs = mp.Pipe()
        worker = mp.Process(target=_work, args=(fuzzer, theirs, seed, number), daemon=True)
        worker.start()
        theirs.close()
        try:
            while time.monotonic() < until:
                number = ours.recv()
                if not ours.poll(HUNG):
                    yield Outcome(number, "FAILED hung", HUNG)
                    break
                yield Outcome(number, *ours.recv())
        except EOFError:
            worker.join()
            yield Outcome(number, f"FAILED the process ended ({worker.exitcode})")
        worker.kill()
        worker.join()
        number += 1


def _work(fuzzer: Fuzzer, pipe: Connection, seed: int, number: int) -> None:
    """Cases from `number` on: their numbers before, and what came of them after."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # libtiff writes there itself
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    while True:
        content = fuzzer.make(_random(seed, number))
        pipe.send(number)
        Path("/proc/self/clear_refs").write_text("5")  # begin the peak of memory anew
        before, started = _memory("VmRSS"), time.perf_counter()
        try:
            came = fuzzer.read(content)
        except BaseException as error:
            came = f"FAILED {type(error).__name__}: {error}"[:300]
        pipe.send((came, time.perf_counter() - started, _memory("VmHWM") - before))
        number += 1


def _memory(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"{name}:")[2].split()[0])

"""The service under load: 1, 8 and 64 clients, with batches and without, and past its capacity.

    python -m tests.benchmarks.serve_load MODEL PHOTOS [--requests 400] [--rounds 3] [--past 128]

MODEL is a model.onnx and PHOTOS a folder. Two services, which do nothing while nobody asks, are
asked in turn: one that takes up to 64 photos together, and one that takes each by itself. Each
client sends its next photo when the one before is answered, over one connection. A third, with a
capacity of 16, is asked by `--past` clients at once, which wait 0.1 s when they were turned away.

Prints Markdown: the medians of the rounds, every status that came back, and the memory of all the
service's processes. Clients run on the same cores as the service.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from export.infer import find_photos
from tests.browser.conftest import ROOT, _free_port

_CLIENTS: Final = (1, 8, 64)
_CAPACITY: Final = 16
_PAUSE: Final = 0.1  # seconds that a client waits that was turned away
_SLOWEST: Final = 60.0  # seconds; an answer that takes longer is an error
_START: Final = 120.0


@dataclass(frozen=True)
class Service:
    name: str
    port: int
    pid: int

    def memory(self) -> float:
        """What its processes have, in MB."""
        return sum(map(_resident, _family(self.pid)))


@dataclass(frozen=True)
class Load:
    """What came back; `seconds` of each answer, in order of length."""

    statuses: Counter[str]
    seconds: list[float]
    took: float

    @property
    def rate(self) -> float:
        return self.statuses["200"] / self.took

    def within(self, share: float) -> float:
        """Milliseconds that this share of the answers took at most."""
        return 1000 * self.seconds[int(share * (len(self.seconds) - 1))]


def main() -> int:
    parser = argparse.ArgumentParser(description="Load the service.")
    parser.add_argument("model", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--past", type=int, default=128)
    args = parser.parse_args()
    contents = [path.read_bytes() for path in find_photos([args.photos])[: args.requests]]
    with ExitStack() as stack:
        flags = {"batches of up to 64": (), "one by one": ("--batch", "1")}
        services = [
            stack.enter_context(served(name, args.model, *more)) for name, more in flags.items()
        ]
        _compare(services, contents, args.requests, args.rounds)
    with served("past capacity", args.model, "--capacity", str(_CAPACITY)) as service:
        _past(service, contents, args.past, args.requests)
    return 0


def _compare(
    services: Sequence[Service], contents: Sequence[bytes], requests: int, rounds: int
) -> None:
    for service in services:
        load(service.port, 8, contents, 50)  # what is made at the first batch
    print("| clients | service | photos/s | p50 | p99 | answers | memory |")
    print("|---:|---|---:|---:|---:|---|---:|")
    for clients in _CLIENTS:
        found: dict[str, list[Load]] = {service.name: [] for service in services}
        for _, service in itertools.product(range(rounds), services):
            found[service.name].append(load(service.port, clients, contents, requests))
        for service in services:
            loads = found[service.name]
            rate, p50, p99 = (
                statistics.median(values)
                for values in zip(
                    *((one.rate, one.within(0.5), one.within(0.99)) for one in loads), strict=True
                )
            )
            said = _said(sum((one.statuses for one in loads), Counter()))
            print(
                f"| {clients} | {service.name} | {rate:.0f} | {p50:.0f} ms | {p99:.0f} ms "
                f"| {said} | {service.memory():.0f} MB |",
                flush=True,
            )


def _past(service: Service, contents: Sequence[bytes], clients: int, requests: int) -> None:
    before = service.memory()
    most, done = before, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.2):
            most = max(most, service.memory())

    watching = threading.Thread(target=watch)
    watching.start()
    found = load(service.port, clients, contents, 10 * requests)
    done.set()
    watching.join()
    print(
        f"\n{clients} clients at a capacity of {_CAPACITY}: {_said(found.statuses)}; "
        f"{found.rate:.0f} photos/s, p99 {found.within(0.99):.0f} ms; memory {before:.0f} MB "
        f"before, {most:.0f} MB at most, {service.memory():.0f} MB after."
    )


def _said(statuses: Counter[str]) -> str:
    return ", ".join(f"{count:,} x {status}" for status, count in sorted(statuses.items()))


def load(port: int, clients: int, contents: Sequence[bytes], requests: int) -> Load:
    """Answers to so many photos, from so many clients at once."""
    left = iter(range(requests))
    lock = threading.Lock()
    statuses: Counter[str] = Counter()
    seconds: list[float] = []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_SLOWEST)
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return connection.close()
            started = time.perf_counter()
            status = _ask(connection, contents[number % len(contents)])
            with lock:
                statuses[status] += 1
                seconds.append(time.perf_counter() - started)
            if status == "503":
                time.sleep(_PAUSE)

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(client) for _ in range(clients)]:
            future.result()
    return Load(statuses, sorted(seconds), time.perf_counter() - started)


def _ask(connection: http.client.HTTPConnection, content: bytes) -> str:
    try:
        connection.request("POST", "/predict", content)
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        return type(error).__name__
    return str(answer.status)


@contextmanager
def served(name: str, model: Path, *flags: str) -> Iterator[Service]:
    port = _free_port()
    command = [sys.executable, "-m", "export.serve", str(model), "--port", str(port), *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            _wait(port, process)
            yield Service(name, port, process.pid)
        finally:
            process.terminate()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START
    while time.monotonic() < end and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.2)
    raise SystemExit("the service did not start")


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in _family(int(child)))]


def _resident(pid: int) -> float:
    """In MB; pages that processes share count for one of them each, by their part."""
    try:
        said = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return int(said.partition("\nPss:")[2].split()[0]) / 1024


if __name__ == "__main__":
    sys.exit(main())

"""The app under load: many visitors at once on many runs, while one run is being trained.

    python -m tests.benchmarks.load_app [--visitors 20] [--runs 200] [--minutes 5] [--epochs 45]
        [--pause 2] [--idle] [--out FILE.json]

Each visitor is a session of its own over a websocket, as a browser's is: it opens one page after
the other in an order of its own, waits `--pause` seconds in between, and meanwhile has drawn again
what the page wants to be drawn again (every two seconds while a run is in progress). Beside them
`python -m trainer` trains small networks, one after the other, into the same runs folder (not with
`--idle`).

Prints JSON: how many pages were opened and parts refreshed, the errors, the seconds that pages took
(median, 95%, longest) and the server's memory in MB: after the first quarter, when every page has
been opened, at the end, at most, the line through the last three quarters (MB a minute), and every
ten seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests.benchmarks.explorer import write_runs
from tests.browser.conftest import ROOT, _free_port, _wait_for
from tests.streamlit_client import Seen, Visitor
from trainer.runlog import list_runs

_PAGES: Final = ("", "runs", "sweep", "results", "changed", "classify", "exporting", "importing")
_SLOWEST: Final = 120.0  # seconds; an answer that takes longer is an error
_MB: Final = 2**20


@dataclass
class Notes:
    """What the visitors saw."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: Counter[str] = field(default_factory=Counter)
    refreshed: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def page(self, name: str, seen: Seen) -> None:
        with self.lock:
            self.seconds[name or "compare"].append(seen.seconds)
            self.errors.update(seen.errors)
            if not seen.elements:
                self.errors[f"nothing shown on {name or 'compare'}"] += 1

    def part(self, seen: Seen) -> None:
        with self.lock:
            self.refreshed.append(seen.seconds)
            self.errors.update(seen.errors)

    def error(self, error: Exception) -> None:
        with self.lock:
            self.errors[f"{type(error).__name__}: {error}"[:200]] += 1


def visit(
    address: str, number: int, runs: list[str], until: float, pause: float, notes: Notes
) -> None:
    """One visitor, until the time is up; one that is thrown out comes again."""
    chance = random.Random(number)
    while time.monotonic() < until:
        try:
            with Visitor(address) as visitor:
                while time.monotonic() < until:
                    _look(visitor, chance, runs, until, pause, notes)
        except Exception as error:  # whatever it is, it is what this counts
            notes.error(error)
            time.sleep(1)


def _look(
    visitor: Visitor,
    chance: random.Random,
    runs: list[str],
    until: float,
    pause: float,
    notes: Notes,
) -> None:
    page = chance.choice(_PAGES)
    link: dict[str, str | list[str]] = {"run": chance.choice(runs)}
    if page == "":
        link = {"runs": chance.sample(runs, min(12, len(runs)))}
    elif page == "changed":
        link["part"] = chance.choice(["Classes", "Confusions", "Photos", "Confidence"])
    seen = visitor.open(page, _SLOWEST, **link)
    notes.page(page, seen)
    # With several parts the front end asks for each; one is as good as another here.
    parts = [one for one, every in seen.refreshing if every <= 2]
    end = min(until, time.monotonic() + pause * chance.uniform(0.5, 1.5))
    while time.monotonic() < end:
        time.sleep(min(2.0, max(0.0, end - time.monotonic())))
        for part in parts[:1]:
            notes.part(visitor.refresh(part, page, _SLOWEST))


def memory(pid: int) -> float:
    """The memory of a process in MB, that it shares with others included."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / _MB


@contextmanager
def serving(runs_dir: Path) -> Iterator[tuple[str, int]]:
    """The address of the app and its process."""
    port = _free_port()
    command = [sys.executable, "-m", "streamlit", "run", "streamlit_app.py"]
    command += ["--server.port", str(port), "--server.headless", "true"]
    with subprocess.Popen(
        [*command, "--", "--runs-dir", str(runs_dir)], cwd=ROOT, stdout=subprocess.DEVNULL
    ) as process:
        try:
            _wait_for(f"http://127.0.0.1:{port}/_stcore/health")
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()


@contextmanager
def training(runs_dir: Path, cache: Path) -> Iterator[None]:
    """One run after the other is being trained, until the block ends."""
    command = [sys.executable, "-m", "trainer", "--phase", "transfer", "--data", "sample"]
    command += ["--arch", "mobilenet_v3_small", "--weights", "none", "--limit", "40"]
    command += ["--epochs", "60", "--runs-dir", str(runs_dir)]
    environment = os.environ | {"THAW_CACHE": str(cache)}
    over = threading.Event()

    def train() -> None:
        while not over.is_set():
            with subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            ) as process:
                while process.poll() is None and not over.wait(0.5):
                    pass
                process.terminate()

    thread = threading.Thread(target=train)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def measure(address: str, pid: int, runs: list[str], chosen: argparse.Namespace) -> dict[str, Any]:
    """Let them in, and note the server's memory every second until the time is up."""
    notes = Notes()
    until = time.monotonic() + 60 * chosen.minutes
    threads = [
        threading.Thread(target=visit, args=(address, n, runs, until, chosen.pause, notes))
        for n in range(chosen.visitors)
    ]
    for thread in threads:
        thread.start()
    used = []
    while time.monotonic() < until:
        used.append(memory(pid))
        time.sleep(1)
    for thread in threads:
        thread.join()
    opened = [second for seconds in notes.seconds.values() for second in seconds]
    return {
        "pages": len(opened),
        "refreshed": len(notes.refreshed),
        "errors": dict(notes.errors),
        "seconds": _spread(opened),
        "seconds_of_a_refresh": _spread(notes.refreshed),
        "seconds_by_page": {name: _spread(taken) for name, taken in notes.seconds.items()},
        "memory_mb": _level(used),
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    median, most = np.percentile(seconds, [50, 95])
    return {"median": round(median, 3), "95%": round(most, 3), "longest": round(max(seconds), 3)}


def _level(used: list[float]) -> dict[str, Any]:
    later = used[len(used) // 4 :]
    slope = statistics.linear_regression(range(len(later)), later).slope if len(later) > 2 else 0.0
    return {
        "after_a_quarter": round(later[0], 1),
        "at_the_end": round(used[-1], 1),
        "at_most": round(max(used), 1),
        "a_minute": round(60 * slope, 2),
        "every_10_s": [round(one) for one in used[::10]],
    }


def _epochs(runs_dir: Path, known: list[str]) -> int:
    return sum(len(run.epochs) for run in list_runs(runs_dir) if run.run_id not in known)


def _wait_for_epochs(runs_dir: Path, known: list[str]) -> None:
    end = time.monotonic() + 180
    while not _epochs(runs_dir, known):
        if time.monotonic() > end:
            raise SystemExit("the training beside it has logged no epoch in three minutes")
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--pause", type=float, default=2)
    parser.add_argument("--idle", action="store_true", help="train nothing beside")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs_dir = Path(folder, "runs")
        write_runs(runs_dir, chosen.runs, chosen.epochs).close()
        names = [run.run_id for run in list_runs(runs_dir)]
        with serving(runs_dir) as (address, pid):
            if chosen.idle:
                found = measure(address, pid, names, chosen)
            else:
                with training(runs_dir, Path(folder, "cache")):
                    _wait_for_epochs(runs_dir, names)
                    found = measure(address, pid, names, chosen)
        found = {"epochs_trained": _epochs(runs_dir, names)} | found
    text = json.dumps({k: v for k, v in vars(chosen).items() if k != "out"} | found, indent=1)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""How time and memory grow with photos, epochs and members, and how far that is from the limit.

    python -m tests.benchmarks.growth --data DIR --weights FILE [--limit 40] [--epochs 4]

Real commands in fresh processes, all augmentations, each with an empty cache: photos x1, x2, x4;
epochs x1, x2, x4; members x1, x2, x4. Then the parts measured alone, in one process: decoding a
photo, the frozen part over one view at inference speed, and one training step of the tail; what
they add up to is the least that the same work can take.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch.nn import functional

from tests.benchmarks.against_peers import _photos, run, say
from tests.benchmarks.peers.job import CROP_FROM, Job
from trainer.__main__ import parse
from trainer.fit import prepare
from trainer.forms import choose_form
from trainer.model import InputNormalize, unfreeze
from trainer.phase import Part, make_optimizer
from trainer.prefix import Trace
from trainer.preprocess import load_photo
from trainer.process import keep_freed_memory
from trainer.runlog import list_runs
from trainer.schema import Preprocess

_RATES: Final = ("1e-4", "3e-5", "1e-5", "3e-6")


@dataclass(frozen=True)
class Size:
    """What one measurement runs: photos of each class, epochs and members of a sweep."""

    limit: int
    epochs: int
    members: int


def measure(arguments: argparse.Namespace, size: Size) -> dict[str, float]:
    """Seconds of a finetune sweep, cold, and the peak memory of its process in MB."""
    job = Job(arguments.data, Path(), arguments.weights, augment=True)
    with tempfile.TemporaryDirectory(prefix="thaw-") as name:
        common = ["--data", str(job.data), "--weights", str(job.weights), "--device", "cpu"]
        common += ["--limit", str(size.limit), "--runs-dir", f"{name}/runs"]
        start = [sys.executable, "-m", "trainer"]
        trunk = [*start, "--phase", "transfer", "--epochs", "1", *common]
        run([*trunk, "--cache-dir", f"{name}/trunk"])
        parent = list_runs(Path(name) / "runs")[0]
        sweep = [*start, "sweep", "--from", parent.run_id, "--epochs", str(size.epochs)]
        sweep += ["--lr", *_RATES[: size.members], *common, *_photos(job)]
        figures, _ = run([*sweep, "--cache-dir", f"{name}/cache"])
        last = list_runs(Path(name) / "runs")[-1]
    memory = last.epochs[-1].peak_memory_bytes / 1e6
    return {"wall": figures["wall"], "cpu": figures["cpu"], "memory": memory}


# --- the limit ----------------------------------------------------------------------------------


def parts(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds a photo of each part alone: decode, prefix, tail step, tail evaluation."""
    flags = ["--phase", "transfer", "--data", str(arguments.data), "--limit", "16", "--no-cache"]
    job = prepare(parse([*flags, "--weights", str(arguments.weights)]))
    network, photos = job.start.network.to(memory_format=torch.channels_last), job.photos  # type: ignore[call-overload]
    traced = Trace(network, torch.rand(3, 3, 224, 224))
    unfreeze(network, "20")
    part = Part.of(network, traced)
    batch = torch.from_numpy(photos.train.photos[np.arange(32)])
    pixels = InputNormalize(job.start.preprocess)(batch)
    form = choose_form(traced.part(None, part.cut), pixels, 10**9, None)  # the fastest
    with torch.inference_mode():
        activations = form.run(pixels)
    inputs = tuple(value.clone() for value in activations)
    tail, labels = part.copy(), torch.zeros(32, dtype=torch.int64)
    optimizer = make_optimizer(tail, "adam", 1e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(tail(*inputs), labels).backward()
        optimizer.step()

    @torch.inference_mode()
    def forward() -> None:
        form.run(pixels)

    @torch.inference_mode()
    def look() -> None:
        tail(*inputs)

    alone = {"prefix": forward, "tail step": step, "tail evaluation": look}
    seconds = {name: _median(one) / 32 for name, one in alone.items()}
    return seconds | {"decode": _decode(photos.listing.root, photos.train.files)}


def _median(one: Callable[[], None], times: int = 9) -> float:
    one()
    found = []
    for _ in range(times):
        started = time.perf_counter()
        one()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _decode(root: Path, files: tuple[str, ...]) -> float:
    """With all cores, as the trainer does it."""
    larger = Preprocess(CROP_FROM, CROP_FROM)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = time.perf_counter()
        list(pool.map(lambda file: load_photo(root / file, larger), files))
    return (time.perf_counter() - started) / len(files)


def least(size: Size, classes: int, alone: dict[str, float]) -> float:
    """Seconds that the parts of a sweep of this size add up to; members and the control."""
    val = round(size.limit * 0.3) * classes
    train = size.limit * classes - val
    prefix = (train * size.epochs + val) * alone["prefix"]
    steps = train * size.epochs * size.members * alone["tail step"]
    # The control's steps cost what the frozen stretch of its tail costs at inference speed.
    control = train * size.epochs * alone["tail evaluation"]
    looks = val * (size.epochs + 1) * (size.members + 1) * alone["tail evaluation"]
    return (train + val) * alone["decode"] + prefix + steps + control + looks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    keep_freed_memory()
    base = Size(arguments.limit, arguments.epochs, 1)
    sizes = [base]
    for factor in (2, 4):
        sizes += [
            Size(base.limit * factor, base.epochs, 1),
            Size(base.limit, base.epochs * factor, 1),
            Size(base.limit, base.epochs, factor),
        ]
    classes = sum(path.is_dir() for path in arguments.data.iterdir())
    before = parts(arguments)
    rows = []
    for size in sizes:
        rows.append((size, measure(arguments, size)))
        say(f"{size}: {rows[-1][1]}")
    after = parts(arguments)
    alone = {name: (before[name] + after[name]) / 2 for name in before}
    print("| photos a class | epochs | members | s | least s | ratio | peak memory MB |")
    print("|" + " --- |" * 7)
    for size, found in sorted(rows, key=lambda row: (row[0].members, row[0].epochs, row[0].limit)):
        floor = least(size, classes, alone)
        cells = [str(size.limit), str(size.epochs), str(size.members), f"{found['wall']:.1f}"]
        cells += [f"{floor:.1f}", f"{found['wall'] / floor:.2f}", f"{found['memory']:.0f}"]
        print(f"| {' | '.join(cells)} |")
    print(json.dumps({"parts": alone, "load": os.getloadavg(), "rows": [str(r) for r in rows]}))


if __name__ == "__main__":
    main()

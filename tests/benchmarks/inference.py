"""Classifying photos with an exported model, against PyTorch as people write it.

    python -m tests.benchmarks.inference --run RUN --runs-dir DIR --photos DIR
        [--rounds 5] [--out FILE.json]

RUN must have been exported (`python -m export RUN`, also with --precision int8 and fp16: what lies
beside model.onnx is measured too). Everything is measured in turn, A B C A B C; medians.

- end to end: a folder of photos, each contestant in a fresh process: `python -m export.infer`, and
  a plain script (PIL, torchvision's transforms, the eager network) that takes the photos one by one
  or in batches of 32 from a DataLoader with a worker for each core. Images a second from the first
  photo on, and with the start of the process counted. How often both name the same class is told.
- model: the network alone, photos in memory: images a second in batches of 1 and 32, and for 1 also
  p50 and p99. PyTorch gets its photos normalised; ONNX Runtime normalises them itself.

Where torch sees a GPU, both are measured on it as well, with TensorRT and torch.compile, in batches
of 1 and 64. That part has never run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from export.infer import find_photos
from export.metadata import file_name
from export.precision import PRECISIONS
from export.session import DEVICES, DeviceError, Session, open_session
from tests.benchmarks.against_peers import run, say
from trainer.checkpoint import Checkpoint, load_model
from trainer.environment import describe
from trainer.model import InputNormalize
from trainer.process import usable_cores
from trainer.runlog import checkpoint_path, find_run
from trainer.schema import MODEL_ONNX

Work = Callable[[int], object]  # classify the first n photos
Figures = dict[str, Any]

BATCHES: Final = {"cpu": (1, 32), "cuda": (1, 64)}
# Runs of one contestant in one round.
_TIMES: Final = {1: 30, 32: 3, 64: 20}
_WORKERS_BATCH: Final = 32


# --- the plain script -------------------------------------------------------------------------


class Photos(Dataset[Tensor]):
    """A folder of photos, each as the network takes it."""

    def __init__(self, files: Sequence[Path], checkpoint: Checkpoint) -> None:
        about = checkpoint.preprocess
        self._files = files
        self._transform = transforms.Compose(
            [
                transforms.Resize(about.resize, transforms.InterpolationMode(about.interpolation)),
                transforms.CenterCrop(about.crop),
                transforms.ToTensor(),
                transforms.Normalize(about.mean, about.std),
            ]
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self._files[index]) as image:
            found: Tensor = self._transform(image.convert("RGB"))
        return found


def plain(checkpoint_file: Path, folder: Path, batch: int, device: str) -> Figures:
    """Classify a folder the way a tutorial does; images a second without the start."""
    network, checkpoint = load_model(checkpoint_file)
    network.eval().to(device)
    photos = Photos(find_photos([folder]), checkpoint)
    batches: Iterator[Tensor] | DataLoader[Tensor] = (photos[i][None] for i in range(len(photos)))
    if batch > 1:
        batches = DataLoader(photos, batch, num_workers=usable_cores())
    labels: list[int] = []
    started = time.perf_counter()
    with torch.inference_mode():
        for images in batches:
            labels += network(images.to(device)).softmax(1).argmax(1).tolist()
    rate = len(photos) / (time.perf_counter() - started)
    return {"images_per_second": rate, "labels": [checkpoint.classes[i] for i in labels]}


# --- end to end -------------------------------------------------------------------------------


def end_to_end(job: Job, device: str, rounds: int) -> Figures:
    """Each contestant in turn in a fresh process; `labels` are compared and not kept."""
    commands = _contestants(job, device)
    found: dict[str, list[Figures]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            measured, output = run(command)
            figures = json.loads(output)
            labels = figures.get("labels") or [one.get("label") for one in figures["results"]]
            rate = figures["images_per_second"]
            found[name].append({"rate": rate, "wall": measured["wall"], "labels": labels})
            say(f"round {number + 1}, {device}, {name}: {rate:.1f} images/s")
    expected = next(iter(found.values()))[0]["labels"]
    return {name: _medians(all_, expected) for name, all_ in found.items()}


def _contestants(job: Job, device: str) -> dict[str, list[str]]:
    own = [sys.executable, "-m", "tests.benchmarks.inference", *job.flags(), "--device", device]
    infer = [sys.executable, "-m", "export.infer"]
    named = {
        "plain, one by one": [*own, "--plain", "1"],
        "plain, DataLoader": [*own, "--plain", str(_WORKERS_BATCH)],
    }
    for name, path in job.models.items():
        command = [*infer, str(path), str(job.photos), "--json", "--device", device]
        named[f"export.infer, {name}"] = command
    return named


def _medians(rounds: Sequence[Figures], expected: Sequence[str]) -> Figures:
    pairs = list(zip(rounds[0]["labels"], expected, strict=True))
    return {
        "images_per_second": statistics.median(one["rate"] for one in rounds),
        "images_per_second_with_start": statistics.median(
            len(pairs) / one["wall"] for one in rounds
        ),
        "same_class_as_the_first": sum(a == b for a, b in pairs) / len(pairs),
        "rounds": [one["rate"] for one in rounds],
    }


# --- the model alone --------------------------------------------------------------------------


def model_alone(job: Job, device: str, rounds: int) -> Figures:
    """Each contestant in turn on the same photos, after one run that does not count."""
    files = find_photos([job.photos])[: max(BATCHES[device])]
    network, checkpoint = load_model(job.checkpoint)
    side = checkpoint.preprocess.crop
    photos = np.stack(
        [np.asarray(Image.open(f).convert("RGB").resize((side, side))) for f in files]
    )
    normalised = InputNormalize(checkpoint.preprocess)(torch.from_numpy(photos)).to(device)
    contestants = _torch(network.eval().to(device), normalised) | _onnx(job, device, photos)
    found: dict[str, dict[int, list[float]]] = {}
    for number in range(rounds):
        for name, work in contestants.items():
            for batch in BATCHES[device]:
                taken = found.setdefault(name, {}).setdefault(batch, [])
                taken += _timed(work, batch)
        say(f"round {number + 1}, {device}, the model alone")
    return {name: _rates(taken) for name, taken in found.items()}


def _timed(work: Work, batch: int) -> list[float]:
    time.sleep(0.3)  # until the last contestant's threads no longer wait for work
    work(batch)
    taken = []
    for _ in range(_TIMES[batch]):
        started = time.perf_counter()
        work(batch)
        taken.append(time.perf_counter() - started)
    return taken


def _rates(taken: Mapping[int, Sequence[float]]) -> Figures:
    figures: Figures = {}
    for batch, seconds in taken.items():
        figures[f"images_per_second_{batch}"] = batch / statistics.median(seconds)
        if batch == 1:
            for percent in (50, 99):
                figures[f"p{percent}_ms"] = 1000 * float(np.percentile(seconds, percent))
    return figures


def _torch(network: nn.Module, photos: Tensor) -> dict[str, Work]:
    last = photos.contiguous(memory_format=torch.channels_last)

    def eager(images: Tensor, count: int, half: torch.dtype | None = None) -> Tensor:
        with torch.inference_mode(), _autocast(half):
            found: Tensor = network(images[:count]).softmax(1).float().cpu()
        return found

    found: dict[str, Work] = {
        "eager": partial(eager, photos),
        "eager, channels last": partial(eager, last),
    }
    if not photos.is_cuda:
        return found
    compiled = torch.compile(network, mode="max-autotune")

    def fast(half: torch.dtype | None, count: int) -> Tensor:
        with torch.inference_mode(), _autocast(half):
            found: Tensor = compiled(last[:count]).softmax(1).float().cpu()
        return found

    found |= {f"eager, {n}": partial(eager, last, half=h) for n, h in _HALVES.items() if h}
    return found | {f"torch.compile, {n}": partial(fast, h) for n, h in _HALVES.items()}


_HALVES: Final = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def _autocast(half: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cuda", half) if half else contextlib.nullcontext()


def _onnx(job: Job, device: str, photos: NDArray[np.uint8]) -> dict[str, Work]:
    found: dict[str, Work] = {}
    for name, path in job.models.items():
        content = path.read_bytes()
        if device == "cpu":
            all_cores, one_core = (
                open_session(content, "cpu"),
                open_session(content, "cpu", one_core=True),
            )
            found[f"{name}, all cores"] = partial(_whole, all_cores, photos)
            found[f"{name}, one photo on each core"] = partial(_one_by_one, one_core, photos)
            continue
        for kind in DEVICES[2:]:
            with contextlib.suppress(DeviceError):  # no TensorRT here
                session = open_session(content, kind, len(photos), tell=say)
                found[f"{name}, {session.provider}"] = partial(_whole, session, photos)
    return found


def _whole(session: Session, photos: NDArray[np.uint8], count: int) -> object:
    return session.probabilities(photos[:count])


_POOL: Final = ThreadPoolExecutor(usable_cores())


def _one_by_one(session: Session, photos: NDArray[np.uint8], count: int) -> object:
    return list(_POOL.map(session.probabilities, np.split(photos[:count], count)))


# --- the command line -------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A run that was exported, and the photos to classify."""

    run: str
    runs_dir: Path
    photos: Path

    def flags(self) -> list[str]:
        place = ["--run", self.run, "--runs-dir", str(self.runs_dir)]
        return [*place, "--photos", str(self.photos)]

    @property
    def checkpoint(self) -> Path:
        return checkpoint_path(find_run(self.runs_dir, self.run), "after")

    @property
    def models(self) -> dict[str, Path]:
        """Each precision that was exported."""
        folder = find_run(self.runs_dir, self.run).path
        paths = {name: folder / file_name(MODEL_ONNX, "after", name) for name in PRECISIONS}
        return {name: path for name, path in paths.items() if path.is_file()}


def measure(job: Job, rounds: int) -> Figures:
    for file in find_photos([job.photos]):
        file.read_bytes()  # from the disk now, not in the first contestant's time
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    figures: Figures = {"load_before": os.getloadavg(), "rounds": rounds}
    figures["photos"] = len(find_photos([job.photos]))
    for device in devices:
        whole, alone = end_to_end(job, device, rounds), model_alone(job, device, rounds)
        figures[device] = {"end_to_end": whole, "model": alone}
    environment = describe(torch.device(devices[-1]))
    return figures | {"load_after": os.getloadavg(), "environment": environment}


def table(figures: Figures) -> str:
    rows = []
    for device in ("cpu", "cuda"):
        for what, found in figures.get(device, {}).items():
            keys = [key for key in next(iter(found.values())) if key != "rounds"]
            rows.append(f"\n| {device}, {what} | {' | '.join(keys)} |")
            rows.append("| --- |" + " --- |" * len(keys))
            for name, one in found.items():
                rows.append(f"| {name} | {' | '.join(f'{one[key]:.3g}' for key in keys)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", required=True)
    parser.add_argument("--runs-dir", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plain", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    job = Job(arguments.run, arguments.runs_dir.absolute(), arguments.photos.absolute())
    if arguments.plain:
        print(json.dumps(plain(job.checkpoint, job.photos, arguments.plain, arguments.device)))
        return
    figures = measure(job, arguments.rounds)
    print(table(figures))
    text = json.dumps(figures, indent=1)
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()

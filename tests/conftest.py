"""Small real data and real trainings shared by the tests."""

from __future__ import annotations

import os
import time

# A thread for each of the processes that the tests are divided among: more would only wait.
# Before torch is imported, which reads it then.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from export.to_onnx import export_run
from tests.tiny_run import make_run
from trainer.__main__ import main as trainer_main
from trainer.config import Config
from trainer.data import load_photos
from trainer.model import InputNormalize, ModelSpec, build_model
from trainer.runlog import Run, list_runs, read_run
from trainer.schema import Preprocess

SHARED = Path(__file__).resolve().parents[2] / "shared"
# A small torchvision network that needs no download.
TINY = ("--arch", "mobilenet_v3_small", "--weights", "none", "--batch-size", "8")

COLORS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 200), "grey": (128,) * 3}

PhotoFolder = Callable[..., Path]
Train = Callable[..., Run]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test does reaches the user's cache."""
    if "THAW_CACHE" not in os.environ:
        monkeypatch.setenv("THAW_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def takes_less(seconds: float, act: Callable[[], object]) -> bool:
    """Whether `act` takes less of this thread, at least once of three times: what runs beside it
    costs it too."""

    def taken() -> float:
        started = time.thread_time()
        act()
        return time.thread_time() - started

    return any(taken() < seconds for _ in range(3))


def draw_photo(path: Path, color: tuple[int, ...], number: int) -> None:
    """A disc of one colour on a noisy background: learnable, and no two alike."""
    rng = np.random.default_rng(number)
    noise = rng.integers(0, 255, (240, 320, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((320, 240))
    x, y = rng.integers(20, 120, 2)
    ImageDraw.Draw(image).ellipse((x, y, x + 120, y + 100), fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=85)


@pytest.fixture(scope="session")
def make_photos() -> PhotoFolder:
    """make_photos(root, classes=3, photos=8) -> root with class folders."""

    def make(root: Path, classes: int = 3, photos: int = 8) -> Path:
        for label, (name, color) in enumerate(list(COLORS.items())[:classes]):
            for number in range(photos):
                draw_photo(root / name / f"{number:03d}.jpg", color, label * 1000 + number)
        return root

    return make


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory, make_photos: PhotoFolder) -> Path:
    """Three classes of eight photos; read only."""
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of random weights with its model.onnx; its photos lie in its runs folder's ../data.
    Read only."""
    run = make_run(tmp_path_factory.mktemp("exported"))
    export_run(run)
    return read_run(run.path)


@pytest.fixture
def train(tmp_path: Path, photos: Path) -> Train:
    """train("--phase", "transfer", ...) -> the newest run; the real command line, in process."""

    def run(*flags: str, runs_dir: Path = tmp_path / "runs", data: Path = photos) -> Run:
        chosen = [] if "--from" in flags else list(TINY)
        argv = [*chosen, "--data", str(data), "--runs-dir", str(runs_dir), *flags]
        assert trainer_main(argv) == 0
        return list_runs(runs_dir)[-1]

    return run


@pytest.fixture(scope="session")
def awake(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> str:
    """A file with random weights and BatchNorm statistics of real photos, for TINY's network.

    Without these hardly anything of a photo reaches the end of a random network, and all trainings
    look the same.
    """
    torch.manual_seed(0)
    network = build_model(ModelSpec("mobilenet_v3_small", 3)).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    config = Config("transfer", data=str(photos), cache=False)
    pixels = torch.from_numpy(load_photos(config, Preprocess()).train.photos[:])
    with torch.no_grad():
        network(InputNormalize(Preprocess())(pixels))
    path = tmp_path_factory.mktemp("weights") / "awake.pth"
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.fixture
def train_awake(train: Train, awake: str) -> Train:
    """As `train`, from these weights."""

    def run(*flags: str, **options: Any) -> Run:
        given = () if "--from" in flags else ("--weights", awake)
        return train(*given, *flags, **options)

    return run


def shared(path: str) -> Path:
    """A folder of the shared material, or skip."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"needs {found}, which is not part of the repository")
    return found

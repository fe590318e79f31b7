"""A small run of random weights and what it was trained on, without the training."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trainer.checkpoint import Checkpoint, save_checkpoint
from trainer.model import ModelSpec, build_model
from trainer.run_writer import RunWriter
from trainer.runlog import Run, read_run
from trainer.schema import PhaseRecord, Preprocess

CLASSES = ("daisy", "rose", "tulip")
PREPROCESS = Preprocess(resize=72, crop=64)
SPEC = ModelSpec("squeezenet1_1", len(CLASSES))


def make_photos(root: Path, per_class: int = 4) -> list[str]:
    """JPEGs in class folders; returns their paths relative to `root`."""
    numbers = np.random.default_rng(0)
    files = []
    for position, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = numbers.integers(0, 256, (6, 8, 3), np.uint8)
            pixels[..., position] = 255
            photo = Image.fromarray(pixels).resize((120, 90), Image.Resampling.BICUBIC)
            photo.save(root / name / f"{number}.jpg", quality=90)
            files.append(f"{name}/{number}.jpg")
    return files


def make_run(folder: Path) -> Run:
    """A transfer run as the trainer leaves it, with random weights; its data lie in folder/data."""
    files = make_photos(folder / "data")
    dataset = {"name": "data", "root": str(folder / "data"), "fingerprint": "0", "counts": {}}
    writer = RunWriter.create(folder / "runs", "tiny", {"classes": CLASSES, "dataset": dataset})
    writer.start_phase(PhaseRecord("transfer", 0, None, (), 1))
    save_weights(writer.path / "checkpoints" / "transfer-best.pt", epoch=3)
    arrays = io.BytesIO()
    logits = np.zeros((len(files), len(CLASSES)), np.float32)
    np.savez(arrays, files=np.array(files), labels=np.zeros(len(files), np.int64), logits=logits)
    (writer.path / "predictions" / "after.npz").write_bytes(arrays.getvalue())
    writer.end_phase(3)
    writer.close("done")
    return read_run(writer.path)


def save_weights(path: Path, epoch: int) -> None:
    """Random weights, the same in every run."""
    torch.manual_seed(0)
    weights = build_model(SPEC).state_dict()
    # SqueezeNet ends in a ReLU: without this most logits are 0, whatever the photo.
    weights["classifier.1.weight"] *= 20
    weights["classifier.1.weight"] -= weights["classifier.1.weight"].mean(1, keepdim=True)
    weights["classifier.1.bias"] += 3
    save_checkpoint(path, Checkpoint(SPEC, CLASSES, PREPROCESS, "transfer", epoch, weights))

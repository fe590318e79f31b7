"""The test split, evaluated once, at the end, with the best checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from trainer.checkpoint import Checkpoint, load_checkpoint, restore_model
from trainer.cli import guarded, inert
from trainer.config import SAMPLE, Config
from trainer.data import Split, load_test
from trainer.listing import DataError, Listing
from trainer.loop import Evaluation, score
from trainer.model import InputNormalize
from trainer.phase import outputs_of
from trainer.process import prepare_process
from trainer.reproduce import recorded
from trainer.runlog import Run, checkpoint_path, find_run
from trainer.tested import Tested, read_tested, write_tested

_BATCH = 32


def test_run(run: Run, data: Path | None = None) -> Tested:
    """The run's best checkpoint on the test photos of its data; written to its test.json.

    A checkpoint that was tested before is not tested again: what is looked at twice becomes
    validation. `data` is the place of the data folder if it has moved. Raises ThawError.
    """
    checkpoint = load_checkpoint(checkpoint_path(run, "after"))
    before = read_tested(run)
    if before is not None and before.checkpoint_sha256 == checkpoint.sha256:
        return before
    config = _config(run, data)
    listing, split = load_test(config, checkpoint.preprocess)
    found = _evaluate(checkpoint, split, _labels(run, checkpoint, listing, split))
    tested = Tested(
        len(split),
        found.accuracy,
        found.loss,
        found.top5,
        found.macro_f1,
        checkpoint.epoch,
        checkpoint.sha256,
    )
    write_tested(run, tested)
    return tested


def _config(run: Run, data: Path | None) -> Config:
    config = recorded(run)
    root = data or run.info.get("dataset", {}).get("root")
    return config if config.data in (None, SAMPLE) else dataclasses.replace(config, data=str(root))


def _labels(run: Run, checkpoint: Checkpoint, listing: Listing, split: Split) -> NDArray[np.int64]:
    if run.phase == "direct":
        return np.array(outputs_of(listing.classes, checkpoint.classes))[split.labels]
    if checkpoint.classes[: len(listing.classes)] != listing.classes:
        raise DataError(
            f"The classes in {listing.root} are not those that run {run.run_id} was trained on."
        )
    return split.labels


def _evaluate(checkpoint: Checkpoint, split: Split, labels: NDArray[np.int64]) -> Evaluation:
    network = restore_model(checkpoint).to(memory_format=torch.channels_last)
    normalize, logits = InputNormalize(checkpoint.preprocess), []
    bar = tqdm(total=len(split), desc="Testing", unit="img", leave=False, disable=None)
    with bar, torch.inference_mode():
        for start in range(0, len(split), _BATCH):
            photos = torch.from_numpy(split.photos[start : start + _BATCH])
            logits.append(network(normalize(photos)))
            bar.update(len(photos))
    return score(torch.cat(logits), torch.from_numpy(labels))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer test",
        description="Measure a run's best checkpoint on the test photos of its data (a folder "
        "test/ beside train/, or 'test' in --split-file). Once: a checkpoint that was tested "
        "keeps its figures.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="run id, a unique part of it, or its folder")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the data folder, if it has moved")
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: runs"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 a mistake of the user's."""
    return guarded(lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    prepare_process()
    run = find_run(args.runs_dir, args.run)
    tested = test_run(run, args.data)
    print(
        f"{inert(run.run_id)}: {tested.accuracy:.2%} of {tested.photos:,} test photos, loss "
        f"{tested.loss:.4f} (best checkpoint, epoch {tested.epoch})"
    )
    return 0

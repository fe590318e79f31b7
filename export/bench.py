"""`python -m export.bench MODEL`: how fast a model.onnx is on this machine, beside PyTorch.

The model alone is timed: photos of random pixels lie in memory, probabilities come back to it.
Nothing is read or decoded; the rate that `python -m export.infer` prints includes that.

All engines are loaded at first and then timed in turn, A B C A B C, so that a noisy moment hits all
alike; every figure is the median over the rounds. torch is imported only for its own rows. What
runs on a GPU has been tested without one only: that it is refused, and left out by name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from export.bench_files import read_model, siblings, torch_rows
from export.bench_text import description, head, refuse_place, text, write_json
from export.engines import cold_compiler, onnx_candidates, tell
from export.session import DEVICES, Device, open_session
from export.timing import BATCHES, ROUNDS, SECONDS, Measured, measure
from trainer.cli import guarded
from trainer.preprocess import Photo
from trainer.process import prepare_process

LARGEST_BATCH: Final = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (0 measured, 2 refused)."""
    args = _parser().parse_args(argv)
    return guarded(lambda: _bench(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.bench",
        description="Latency and images a second of a model.onnx with everything here that can run "
        "it, and of PyTorch beside it: the model alone, without reading and decoding photos. "
        "Other precisions of the same checkpoint in the same folder are measured too.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a model.onnx")
    add("--device", choices=DEVICES, default="auto", help="default: auto, all that work here")
    add(
        "--batches",
        type=_batch,
        nargs="+",
        default=list(BATCHES),
        metavar="N",
        help=f"photos at a time (default: {' '.join(map(str, BATCHES))}); 1 is always measured",
    )
    add(
        "--seconds",
        type=_seconds,
        default=SECONDS,
        metavar="S",
        help=f"for each figure in each round (default: {SECONDS:g})",
    )
    add("--rounds", type=_count, default=ROUNDS, metavar="N", help=f"default: {ROUNDS}")
    add(
        "--threads",
        type=_count,
        metavar="N",
        help="threads of each engine on the CPU (default: its own choice)",
    )
    add(
        "--torch",
        default="auto",
        metavar="RUN|auto|none",
        help="the run that the model comes from, to measure PyTorch with its checkpoint (default: "
        "auto, the run in the model's folder or in --runs-dir)",
    )
    add("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    add(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="leave torch.compile out, which can take minutes to compile on a CPU",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    return parser


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return int(text)


def _batch(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) <= LARGEST_BATCH):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {LARGEST_BATCH}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to 3600")
    return value


def _bench(args: argparse.Namespace) -> int:
    prepare_process()
    refuse_place(args.json)
    model = read_model(args.model)
    if args.device not in ("auto", "cpu"):
        open_session(model.content, args.device, 1, tell=tell)  # or refuse: it was asked for
    others, left_out = siblings(model)
    # The first is what the others are compared with.
    files = sorted([model, *others], key=lambda file: file.precision != "fp32")
    devices: list[Device] = ["cpu", "cuda", "tensorrt"] if args.device == "auto" else [args.device]
    candidates = [
        candidate
        for device in devices
        for file in files
        for candidate in onnx_candidates(file.content, file.precision, device, args.threads)
    ]
    with_torch, without_torch = torch_rows(model, args)
    photos = random_photos(max(args.batches), model.metadata.preprocess.crop)
    about = description(files, args)
    print("\n".join(head(about)), flush=True)
    with cold_compiler():
        measured = measure(
            [*candidates, *with_torch], photos, args.batches, args.seconds, args.rounds
        )
    measured = Measured(measured.rows, (*measured.left_out, *left_out, *without_torch))
    if args.json:
        write_json(args.json, about, measured)
    print("\n".join(text(measured)))
    return 0


def random_photos(count: int, side: int) -> Photo:
    """uint8 [count, side, side, 3], the same in every run."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


if __name__ == "__main__":
    sys.exit(main())

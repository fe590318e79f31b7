"""Images a second of each form of the frozen part, and how far its activations are off.

    python -m tests.benchmarks.forms --data DIR --weights FILE [--rounds 9] [--compiled]

EfficientNet-B0 up to what `--unfreeze 20` trains, on 32 photos of DIR; the forms in turn in every
round, medians. "onnxruntime, whole batches" is what the trainer does not do: all cores on one layer
of 32 photos. `--compiled` adds torch.compile, which takes half a minute to compile on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, fx

from trainer import forms
from trainer.__main__ import parse
from trainer.fit import prepare
from trainer.model import InputNormalize, unfreeze
from trainer.prefix import Activations, Trace
from trainer.process import keep_freed_memory, restart_with_huge_pages


def make(arguments: argparse.Namespace) -> tuple[fx.GraphModule, Tensor]:
    """The frozen part with real weights, and normalised photos [32, 3, 224, 224]."""
    flags = ["--phase", "transfer", "--data", str(arguments.data), "--limit", "16", "--no-cache"]
    job = prepare(parse([*flags, "--weights", str(arguments.weights)]))
    network = job.start.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    traced = Trace(network, torch.rand(3, 3, 224, 224))
    unfreeze(network, "20")
    cut = traced.cut()
    assert cut is not None
    photos = torch.from_numpy(job.photos.train.photos[np.arange(32)])
    return traced.part(None, cut).eval(), InputNormalize(job.start.preprocess)(photos)


def whole_batches(prefix: fx.GraphModule, photos: Tensor) -> forms.Run:
    folded = forms._folded(prefix, photos)
    program = torch.onnx.export(
        folded,
        (photos[:3],),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("n")},),
    )
    assert program is not None
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def run(batch: Tensor) -> Activations:
        return tuple(map(torch.from_numpy, session.run(None, {name: batch.contiguous().numpy()})))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    keep_freed_memory()
    prefix, photos = make(arguments)
    build = {"plain": lambda module, _: module, **forms._BUILD}
    build["onnxruntime, whole batches"] = whole_batches
    if not arguments.compiled:
        del build["compiled"]
    built = {name: one(prefix, photos) for name, one in build.items()}
    seconds: dict[str, list[float]] = {name: [] for name in built}
    found: dict[str, Activations] = {}
    for _ in range(arguments.rounds + 1):
        for name, run in built.items():
            started = time.perf_counter()
            with torch.inference_mode():
                found[name] = run(photos)
            seconds[name].append(time.perf_counter() - started)
    print(
        "| form | images/s | difference from plain, of the largest activation |\n|" + " --- |" * 3
    )
    rates = {name: len(photos) / statistics.median(all_[1:]) for name, all_ in seconds.items()}
    for name, rate in rates.items():
        difference = forms._difference(found["plain"], found[name])
        print(f"| {name} | {rate:.0f} | {difference:.1e} |")
    print(json.dumps({"images_per_second": rates, "load": os.getloadavg()}))


if __name__ == "__main__":
    restart_with_huge_pages()
    main()

"""How much of a training step glibc's malloc costs: default against `keep_freed_memory`.

    python -m tests.benchmarks.allocator [--pairs 3]

Alternates fresh processes A B A B, each of which times steps of EfficientNet-B0 with its top 20
layers unfrozen (batch 32, 224 pixels), and prints the median rate of each and their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time


def measure(tuned: bool) -> float:
    """Images a second: the median of five steps after one to warm up."""
    if tuned:
        from trainer.process import keep_freed_memory

        keep_freed_memory()
    import torch

    from trainer.model import ModelSpec, build_model, set_train_mode, unfreeze
    from trainer.phase import make_optimizer

    network = build_model(ModelSpec("efficientnet_b0", 12)).to(memory_format=torch.channels_last)
    unfreeze(network, "20")
    set_train_mode(network)
    optimizer = make_optimizer(network, "adam", 1e-5)
    photos = torch.rand(32, 3, 224, 224).to(memory_format=torch.channels_last)
    labels = torch.zeros(32, dtype=torch.long)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(photos), labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return 32 / statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--one", choices=("default", "tuned"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(measure(arguments.one == "tuned"))
        return
    rates: dict[str, list[float]] = {"default": [], "tuned": []}
    for _ in range(arguments.pairs):
        for name, values in rates.items():
            command = [sys.executable, "-m", "tests.benchmarks.allocator", "--one", name]
            values.append(float(subprocess.check_output(command, text=True)))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = medians["tuned"] / medians["default"]
    print(json.dumps({"images_per_second": medians, "ratio": ratio, "all": rates}, indent=2))


if __name__ == "__main__":
    main()

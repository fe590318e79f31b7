"""What each augmentation costs: milliseconds a photo, alone and all together.

    python -m tests.benchmarks.augment [--rounds 15] [--batch 32]

Photos of 224 pixels (cut from 235 where crops are asked for), on the CPU, with the trainer's own
memory settings. The cases take turns, so that a busy machine slows all of them; medians are shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from trainer.augment import augment
from trainer.config import Augmentation
from trainer.process import keep_freed_memory

CROP, CROP_FROM = 224, 235
CASES = {
    "brightness": Augmentation(brightness=0.3),
    "contrast": Augmentation(contrast=2.0),
    "rotation": Augmentation(rotation=0.02),
    "crop": Augmentation(crop_from=CROP_FROM),
    "noise": Augmentation(noise=0.6),
    "all": Augmentation(
        brightness=0.3, contrast=2.0, rotation=0.02, crop_from=CROP_FROM, noise=0.6
    ),
}


def measure(augmentation: Augmentation, batch: int, view: int) -> float:
    """Milliseconds a photo for one batch."""
    side = augmentation.crop_from or CROP
    photos = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8)
    names = [f"class/{number}.jpg" for number in range(batch)]
    started = time.perf_counter()
    augment(photos, names, augmentation, CROP, seed=0, view=view)
    return (time.perf_counter() - started) * 1000 / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    keep_freed_memory()
    taken: dict[str, list[float]] = {name: [] for name in CASES}
    for number in range(arguments.rounds + 1):
        for name, augmentation in CASES.items():
            milliseconds = measure(augmentation, arguments.batch, view=number)
            if number > 0:  # the first round warms up
                taken[name].append(milliseconds)
    medians = {name: round(statistics.median(values), 3) for name, values in taken.items()}
    print("augmentation  ms a photo")
    for name, milliseconds in medians.items():
        print(f"{name:12}  {milliseconds:10.2f}")
    threads, batch = torch.get_num_threads(), arguments.batch
    print(json.dumps({"milliseconds_per_photo": medians, "threads": threads, "batch": batch}))


if __name__ == "__main__":
    main()

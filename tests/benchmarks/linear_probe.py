"""Does the transfer phase reach what a plain linear probe reaches?

    python -m tests.benchmarks.linear_probe RUN [--runs-dir DIR]

Takes the photos, the split and the weights file of a finished transfer run of EfficientNet-B0 and
does the same job again without any code of Thaw's training: torchvision's network and transforms,
pooled features, a linear head by AdamW (best of three weight decays). Prints both accuracies.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.models import EfficientNet_B0_Weights, efficientnet_b0

from trainer.config import Config
from trainer.listing import Item, list_photos
from trainer.runlog import Run, find_run


def features(run: Run, items: list[Item]) -> tuple[Tensor, Tensor]:
    """Pooled features [N, 1280] and labels [N], photo by photo as a tutorial would."""
    network = efficientnet_b0()
    source = run.info["weights"]["source"]
    network.load_state_dict(torch.load(source, weights_only=True), strict=False)
    network.classifier = torch.nn.Identity()
    transform = EfficientNet_B0_Weights.DEFAULT.transforms()
    root = Path(run.info["dataset"]["root"])
    with torch.inference_mode():
        rows = [
            network.eval()(transform(Image.open(root / item.file).convert("RGB"))[None])
            for item in items
        ]
    return torch.cat(rows), torch.tensor([item.label for item in items])


def probe(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: int) -> float:
    """Best validation accuracy of a linear head over epochs and three weight decays."""
    best = 0.0
    for weight_decay in (1e-4, 1e-2, 1.0):
        torch.manual_seed(0)
        head = torch.nn.Linear(train[0].shape[1], classes)
        optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=weight_decay)
        for _ in range(30):
            for rows in torch.randperm(len(train[1])).split(32):
                loss = torch.nn.functional.cross_entropy(head(train[0][rows]), train[1][rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            hits = head(val[0]).argmax(dim=1) == val[1]
            best = max(best, float(hits.float().mean()))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    run = find_run(arguments.runs_dir, arguments.run)
    config = Config("transfer", data=run.info["dataset"]["root"])
    listing = list_photos(config)
    splits = {s: [i for i in listing.items if i.split == s] for s in ("train", "val")}
    started = time.perf_counter()
    train, val = features(run, splits["train"]), features(run, splits["val"])
    accuracy = probe(train, val, len(listing.classes))
    result = {
        "run": run.run_id,
        "photos": {name: len(items) for name, items in splits.items()},
        "thaw_val_acc": max(e.val_acc for e in run.epochs),
        "probe_val_acc": accuracy,
        "probe_seconds": time.perf_counter() - started,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""A split file for road signs whose names are track_frame: no track in both splits.

    python -m tests.benchmarks.split_by_track DIR > split.csv

Of each class 30% of the tracks are held out. Frames of one track are near-duplicates; a split by
frame would validate on what was trained on.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from pathlib import Path


def main() -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["path", "split"])
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        tracks = {photo.name.partition("_")[0] for photo in folder.iterdir()}
        names = {hashlib.sha256(f"{folder.name}/{t}".encode()).hexdigest(): t for t in tracks}
        ranked = [names[digest] for digest in sorted(names)]
        held_out = set(ranked[: max(1, round(len(ranked) * 0.3))])
        for photo in sorted(folder.iterdir()):
            split = "val" if photo.name.partition("_")[0] in held_out else "train"
            writer.writerow([f"{folder.name}/{photo.name}", split])


if __name__ == "__main__":
    main()

"""What a data folder holds: classes, photos and their split, before any photo is opened."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Final

from tqdm import tqdm

from trainer.cli import inert
from trainer.config import NAMED_DATA, SAMPLE, Config
from trainer.preprocess import PHOTO_SUFFIXES, is_photo
from trainer.schema import ThawError

_SPLIT_NAMES: Final = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


class DataError(ThawError):
    """A data folder that cannot be trained on; says what is wrong with it."""


@dataclass(frozen=True)
class Item:
    """One listed photo: `file` is relative to the data folder, with forward slashes."""

    file: str
    label: int
    split: str


@dataclass(frozen=True)
class Listing:
    """What a data folder holds, before any photo is opened."""

    name: str
    root: Path
    classes: tuple[str, ...]
    items: tuple[Item, ...]
    notices: tuple[str, ...] = ()

    @property
    def used(self) -> list[Item]:
        """What training opens: all but the photos of the test split."""
        return [item for item in self.items if item.split != "test"]


def list_photos(config: Config) -> Listing:
    """Find classes and photos and split them. Raises DataError."""
    listing = find_photos(config)
    check_listing(listing)
    return listing


def find_photos(config: Config) -> Listing:
    """As `list_photos`, but what was found may be too little to train on."""
    name, root = _root(config)
    if not root.is_dir():
        raise DataError(
            f"There is no folder {root}. Give --data a folder that holds class folders."
        )
    if config.split_file is not None:
        listing = _from_split_file(name, root, config.split_file)
    elif own := _own_splits(root):
        listing = _from_split_folders(name, root, own, config)
    else:
        classes, files, notices = _class_folders(root)
        items = [
            Item(file, label, split)
            for label, of_class in enumerate(files)
            for file, split in _split_class(_limited(of_class, config), config)
        ]
        listing = Listing(name, root, classes, tuple(items), notices)
    if config.grouping is not None:
        listing = _told_of_lone_tracks(listing)
    return listing if config.exclude_file is None else _without(listing, config.exclude_file)


def _root(config: Config) -> tuple[str, Path]:
    if config.data in (None, SAMPLE):
        return SAMPLE, _sample(config.cache_dir)
    if config.data in NAMED_DATA:
        from trainer.datasets import find_data

        return config.data, find_data(config.data, config.cache_dir)
    root = Path(str(config.data)).expanduser().absolute()
    return root.name, root


def _sample(cache_dir: Path) -> Path:
    from trainer.sample import prepare_sample

    with tqdm(desc="Drawing the sample, once", unit="img", disable=None, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return prepare_sample(cache_dir, progress=show)


def _own_splits(root: Path) -> dict[str, Path]:
    found = {_SPLIT_NAMES.get(p.name.lower(), ""): p for p in folders_in(root)}
    found.pop("", None)
    return found if "train" in found else {}


def holds_classes(root: Path) -> bool:
    """Whether a folder looks like a data folder: train/ in it, or two folders with photos."""
    if _own_splits(root):
        return True
    return sum(1 for folder in folders_in(root) if _photos_below(folder)[0]) > 1


def folders_in(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _class_folders(root: Path) -> tuple[tuple[str, ...], list[list[str]], tuple[str, ...]]:
    """Class names, their photos (relative to `root`), and what the user should know."""
    classes, files, notices = [], [], []
    for folder in folders_in(root):
        if folder.is_symlink() and root.resolve().is_relative_to(folder.resolve()):
            notices.append(f"{folder.name}: a link back to {folder.resolve()}, left out.")
            continue
        photos, others = _photos_below(folder)
        if others:
            notices.append(f"{folder.name}: {others} files without a photo suffix were left out.")
        if photos:
            classes.append(folder.name)
            files.append([path.relative_to(root).as_posix() for path in photos])
        else:
            notices.append(f"{folder.name}: holds no photos and is no class.")
    return tuple(classes), files, tuple(notices)


def _photos_below(folder: Path) -> tuple[list[Path], int]:
    def refuse(error: OSError) -> None:
        raise DataError(
            f"Cannot read the folder {error.filename}: {error.strerror}. Make it readable, or move "
            "it away: photos that are left out unnoticed would change the split."
        )

    photos, others = [], 0
    for base, folders, names in os.walk(folder, onerror=refuse):  # follows no links, so no loops
        folders[:] = sorted(n for n in folders if not n.startswith("."))
        for name in sorted(names):
            path = Path(base) / name
            if is_photo(path):
                photos.append(path)
            elif not name.startswith("."):
                others += 1
    return photos, others


def _rank(file: str, seed: int) -> bytes:
    """A place in the shuffle that depends on this photo alone, not on its neighbours."""
    text = file.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16, salt=seed.to_bytes(8, "little")).digest()


def _limited(files: list[str], config: Config) -> list[str]:
    return sorted(files, key=lambda file: _rank(file, 0))[: config.limit]


def _split_class(files: list[str], config: Config) -> list[tuple[str, str]]:
    """Stratified: each class is shuffled by its photos' own ranks, so photos added to other
    classes change nothing here."""
    if config.grouping == "track":
        return _split_tracks(files, config)
    ranked = sorted(files, key=lambda file: _rank(file, config.split_seed))
    held_out = min(max(1, round(len(ranked) * config.val_fraction)), max(1, len(ranked) - 1))
    return sorted((f, "val" if i < held_out else "train") for i, f in enumerate(ranked))


def _split_tracks(files: list[str], config: Config) -> list[tuple[str, str]]:
    """As `_split_class`, by whole tracks: as many of them as come nearest to the fraction, but all
    of a lone track train."""
    tracks: dict[str, list[str]] = defaultdict(list)
    for file in files:
        tracks[_track(file)].append(file)
    ranked = sorted(tracks, key=lambda track: _rank(track, config.split_seed))
    wanted = len(files) * config.val_fraction
    sizes = [0, *accumulate(len(tracks[track]) for track in ranked)]
    count = min(range(1, len(ranked)), key=lambda n: abs(sizes[n] - wanted), default=0)
    held_out = set(ranked[:count])
    return sorted((file, "val" if _track(file) in held_out else "train") for file in files)


def _track(file: str) -> str:
    """`00/00001` of `00/00001_00012.png`."""
    path = PurePosixPath(file)
    track, _, frame = path.stem.rpartition("_")
    if not track or not frame.isdecimal():
        raise DataError(
            f"--group-by track: {file} is not named track_frame, such as 00001_00012.png. Rename "
            "it, leave the flag away, or give the split with --split-file."
        )
    return (path.parent / track).as_posix()


def _told_of_lone_tracks(listing: Listing) -> Listing:
    validated = {item.label for item in listing.items if item.split == "val"}
    lone = [name for label, name in enumerate(listing.classes) if label not in validated]
    if not lone:
        return listing
    notice = f"All photos of one track, so none to validate: {', '.join(lone)}."
    return replace(listing, notices=(*listing.notices, notice))


def _without(listing: Listing, path: Path) -> Listing:
    """Taken away after the split, so that every other photo stays in its part."""
    excluded = read_excluded(path)
    unknown = sorted(file for file in excluded if not _is_file(listing.root / file))
    if excluded and len(unknown) == len(excluded):
        raise DataError(
            f"None of the {len(excluded)} photos that --exclude-file {path} lists is in "
            f"{listing.root}. Paths in it are relative to the data folder: is it another's list?"
        )
    items = tuple(item for item in listing.items if item.file not in excluded)
    left_out = len(listing.items) - len(items)
    notices = [*listing.notices, f"{left_out} photos are left out (--exclude-file {path})."]
    if unknown:
        notices.append(f"{len(unknown)} that it lists are not there, such as {unknown[0]}.")
    return replace(listing, items=items, notices=tuple(notices))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # above all: a name too long for the system
        return False


def read_excluded(path: Path) -> frozenset[str]:
    """The photos of an `--exclude-file`, relative to the data folder: one a line as it is, or in
    JSON's quotes; empty lines and those that begin with # say nothing. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"--exclude-file {path} cannot be read: {error}.") from error
    found = set()
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line and not line.startswith("#"):
            try:
                file = json.loads(line) if line.startswith('"') else line
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}.") from error
            found.add(PurePosixPath(file).as_posix())
    return frozenset(found)


def excluded_line(file: str) -> str:
    """`file` as a line that `read_excluded` reads."""
    plain = file == inert(file) == file.strip() and not file.startswith(("#", '"'))
    return file if plain else json.dumps(file)


def _from_split_folders(
    name: str, root: Path, folders: Mapping[str, Path], config: Config
) -> Listing:
    classes = sorted({c for folder in folders.values() for c in _class_folders(folder)[0]})
    items, notices = [], []
    for split, folder in folders.items():
        names, files, said = _class_folders(folder)
        notices += [f"{split}: {notice}" for notice in said]
        for class_name, of_class in zip(names, files, strict=True):
            label = classes.index(class_name)
            paths = [f"{folder.name}/{file}" for file in _limited(of_class, config)]
            if split == "train" and "val" not in folders:
                items += [Item(file, label, part) for file, part in _split_class(paths, config)]
            else:
                items += [Item(file, label, split) for file in paths]
    if "val" not in folders:
        notices.append(
            f"No val folder: {config.val_fraction:.0%} of train is held out for validation."
        )
    return Listing(name, root, tuple(classes), tuple(items), tuple(notices))


def _from_split_file(name: str, root: Path, path: Path) -> Listing:
    """A CSV with the columns path (relative to the data folder, class folder first) and split."""
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"--split-file {path} cannot be read: {error}.") from error
    if not rows or not {"path", "split"} <= set(rows[0]):
        raise DataError(f"--split-file {path} must be a CSV with the columns path and split.")
    found: list[tuple[str, str, str]] = []
    for line, row in enumerate(rows, start=2):
        file, split = (row["path"] or "").replace("\\", "/"), _SPLIT_NAMES.get(row["split"] or "")
        parts = Path(file).parts
        if split is None or len(parts) < 2 or ".." in parts or Path(file).is_absolute():
            raise DataError(
                f"{path}, line {line}: expected class/photo.jpg and train, val or test, "
                f"found {row['path']!r} and {row['split']!r}."
            )
        if not _is_file(root / file):
            raise DataError(f"{path}, line {line}: there is no photo {root / file}.")
        found.append((file, parts[-2], split))
    twice = [file for file, count in Counter(f for f, _, _ in found).items() if count > 1]
    if twice:
        raise DataError(f"{path} lists {twice[0]} more than once; a photo belongs to one split.")
    classes = sorted({class_name for _, class_name, _ in found})
    items = [Item(file, classes.index(c), split) for file, c, split in found]
    return Listing(name, root, tuple(classes), tuple(items))


def check_listing(listing: Listing) -> None:
    """Raise DataError where it cannot be trained on."""
    if not listing.classes:
        kinds = " ".join(sorted(PHOTO_SUFFIXES))
        raise DataError(
            f"{listing.root} holds no class folders with photos. Expected one folder for each "
            f"class with photos inside ({kinds})."
        )
    if len(listing.classes) == 1:
        raise DataError(
            f"{listing.root} holds one class only ({listing.classes[0]}); a classifier needs two."
        )
    check_counts(listing, listing.items)


def check_counts(listing: Listing, items: Iterable[Item]) -> None:
    """Raise DataError where `items` are too few to train on and to validate."""
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for item in items:
        counts[item.label][item.split] += 1
    for label, name in enumerate(listing.classes):
        train, val = counts[label]["train"], counts[label]["val"]
        if train + val < 2 or train == 0:
            what = (
                "one photo only" if train + val == 1 else f"{train} to train on, {val} to validate"
            )
            raise DataError(
                f"Class {name!r} in {listing.root} has {what}. It needs two readable photos or "
                "more, one of them to train on. Add photos or move the folder away."
            )
    if not any(counts[label]["val"] for label in counts):
        raise DataError(f"{listing.root} has no validation photos at all.")

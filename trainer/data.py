"""From a folder of class folders to arrays: list, split, decode once, fingerprint."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import features
from tqdm import tqdm

from trainer.cache import Cache, Key, say
from trainer.cli import inert
from trainer.config import SAMPLE, Augmentation, Config
from trainer.preprocess import PHOTO_SUFFIXES, Photo, PhotoError, is_photo, load_photo
from trainer.rows import Header, Layout, RowFile, Rows
from trainer.schema import Preprocess, ThawError

_SPLIT_NAMES: Final = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
# Photos that cannot be cached are kept in memory up to here, else in a file that has no name.
_IN_MEMORY_BYTES: Final = 4 << 30


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


class PhotoRows:
    """Decoded photos: `rows[i]` are uint8 [n, S, S, 3] for an array i of n numbers.

    They lie in the cache, or in a file without a name; a photo that is damaged there is decoded
    again.
    """

    def __init__(self, file: RowFile, rows: Rows, decode: Callable[[int], Photo]) -> None:
        self._file, self._rows, self._decode = file, rows, decode

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def side(self) -> int:
        """Pixels."""
        return self._file.header.layout.parts[0][1][0]

    def __getitem__(self, index: Rows | slice) -> Photo:
        rows = self._rows[index]
        (photos,), good = self._file.read(rows)
        for i in np.flatnonzero(~good):
            say(f"A decoded photo in the cache is damaged; it is decoded again (row {rows[i]}).")
            photos[i] = self._decode(int(rows[i]))
            with contextlib.suppress(OSError):  # it may be there for reading only
                self._file.write(rows[i : i + 1], (photos[i : i + 1],))
        return photos


@dataclass(frozen=True)
class Split:
    """Decoded photos of one split with their labels, int64 [N].

    `name` is the data set's; `digest` changes with any photo, its place and how it was decoded.
    """

    name: str
    files: tuple[str, ...]
    labels: NDArray[np.int64]
    photos: PhotoRows = field(repr=False)
    digest: str

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class Photos:
    """A data set ready for training. `fingerprint` changes with any photo, class or split; `cache`
    is the one it came through, None with `--no-cache`."""

    listing: Listing
    train: Split
    val: Split
    rejected: tuple[tuple[str, str], ...]
    fingerprint: str
    cache: Cache | None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.listing.classes

    def to_dict(self) -> dict[str, Any]:
        """The "dataset" of run.json."""
        counts = Counter(item.split for item in self.listing.items)
        counts |= {"train": len(self.train), "val": len(self.val)}
        return {
            "name": self.listing.name,
            "root": str(self.listing.root),
            "fingerprint": self.fingerprint,
            "counts": dict(counts),
            "rejected": [{"file": file, "reason": reason} for file, reason in self.rejected],
        }


# --- listing ----------------------------------------------------------------------------------


def list_photos(config: Config) -> Listing:
    """Find classes and photos and split them. Raises DataError."""
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
    _check(listing)
    return listing


def _root(config: Config) -> tuple[str, Path]:
    if config.data in (None, SAMPLE):
        return SAMPLE, _sample(config.cache_dir)
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
    found = {_SPLIT_NAMES.get(p.name.lower(), ""): p for p in _folders(root)}
    found.pop("", None)
    return found if "train" in found else {}


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _class_folders(root: Path) -> tuple[tuple[str, ...], list[list[str]], tuple[str, ...]]:
    """Class names, their photos (relative to `root`), and what the user should know."""
    classes, files, notices = [], [], []
    for folder in _folders(root):
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
    photos, others = [], 0
    for base, folders, names in os.walk(folder):  # does not follow links, so no loops
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
    ranked = sorted(files, key=lambda file: _rank(file, config.split_seed))
    held_out = min(max(1, round(len(ranked) * config.val_fraction)), max(1, len(ranked) - 1))
    return sorted((f, "val" if i < held_out else "train") for i, f in enumerate(ranked))


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
        if not (root / file).is_file():
            raise DataError(f"{path}, line {line}: there is no photo {root / file}.")
        found.append((file, parts[-2], split))
    twice = [file for file, count in Counter(f for f, _, _ in found).items() if count > 1]
    if twice:
        raise DataError(f"{path} lists {twice[0]} more than once; a photo belongs to one split.")
    classes = sorted({class_name for _, class_name, _ in found})
    items = [Item(file, classes.index(c), split) for file, c, split in found]
    return Listing(name, root, tuple(classes), tuple(items))


def _check(listing: Listing) -> None:
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
    _check_counts(listing, listing.items)


def _check_counts(listing: Listing, items: Iterable[Item]) -> None:
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


# --- decoding ---------------------------------------------------------------------------------


def load_photos(config: Config, preprocess: Preprocess) -> Photos:
    """List, decode and fingerprint the photos. Raises DataError.

    Training photos are decoded at `--crop-from` pixels where that is given, all others as
    `preprocess` says; what the cache holds is not decoded again. Unreadable photos are listed, left
    out, and fatal with `--strict`.
    """
    listing = list_photos(config)
    augmented = to_augment(config.augmentation, preprocess)
    used = [item for item in listing.items if item.split != "test"]
    cache = Cache(config.cache_dir, config.cache_limit) if config.cache else None
    rejected: dict[str, str] = {}
    hashes = _hash_all(listing.root, used, rejected)
    splits = {}
    for name, wanted in (("train", augmented), ("val", preprocess)):
        items = [item for item in used if item.split == name and item.file in hashes]
        splits[name] = _Decoder(listing, items, hashes, wanted).split(config, cache, rejected)
    if rejected:
        _report(rejected, config)
        _check_counts(listing, [item for item in listing.items if item.file not in rejected])
    return Photos(
        listing=listing,
        train=splits["train"],
        val=splits["val"],
        rejected=tuple(sorted(rejected.items())),
        fingerprint=_fingerprint(listing, used, hashes),
        cache=cache,
    )


def to_augment(augmentation: Augmentation, preprocess: Preprocess) -> Preprocess:
    """How photos are decoded that are augmented then: the larger square to crop from included.

    Raises DataError where that is smaller than the network's input.
    """
    side = augmentation.crop_from
    if side is None:
        return preprocess
    if side < preprocess.crop:
        raise DataError(f"--crop-from {side}: must be at least {preprocess.crop}, the input size.")
    return replace(preprocess, resize=side, crop=side)


def _hash_all(root: Path, items: list[Item], rejected: dict[str, str]) -> dict[str, str]:
    """SHA-256 of every file that can be read."""

    def digest(item: Item) -> str | None:
        try:
            return hashlib.sha256((root / item.file).read_bytes()).hexdigest()
        except OSError as error:
            rejected[item.file] = str(error.strerror)
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(digest, items))
    return {item.file: d for item, d in zip(items, found, strict=True) if d is not None}


class _Decoder:
    """Decodes the photos of one split into a file of rows."""

    def __init__(
        self,
        listing: Listing,
        items: list[Item],
        hashes: Mapping[str, str],
        preprocess: Preprocess,
    ) -> None:
        self._name, self._root, self._items = listing.name, listing.root, items
        self._hashes, self._preprocess = hashes, preprocess
        crop = preprocess.crop
        self._layout = Layout((("uint8", (crop, crop, 3)),))

    def split(self, config: Config, cache: Cache | None, rejected: dict[str, str]) -> Split:
        key, size = self._key(self._items), len(self._items)
        file = cache and cache.open(key, self._layout, size)
        file = file or self._temporary(config)
        try:
            reasons = self._fill(file)
        except OSError as error:  # a disk that is full after all
            if cache is not None:
                cache.give_up(error)
            file = self._temporary(config)
            reasons = self._fill(file)
        items = self._items
        rejected |= {i.file: r for i, r in zip(items, reasons, strict=True) if r is not None}
        good = np.array([row for row, reason in enumerate(reasons) if reason is None], np.int64)
        kept = [items[row] for row in good]
        return Split(
            self._name,
            tuple(item.file for item in kept),
            np.array([item.label for item in kept], np.int64),
            PhotoRows(file, good, self._decode),
            self._key(kept).digest,
        )

    def _key(self, items: list[Item]) -> Key:
        pixels = {"preprocess": _pixels(self._preprocess), "decoder": decoder_versions()}
        content = [self._hashes[item.file] for item in items]
        about = {"data": self._name, "pixels": self._preprocess.crop}
        return Key("photos", {**pixels, "photos": content}, about)

    def _temporary(self, config: Config) -> RowFile:
        header = Header("", self._layout, len(self._items), {})
        size = self._layout.file_bytes(len(self._items))
        try:
            if size <= _IN_MEMORY_BYTES:
                return RowFile.temporary(header, None)
            config.cache_dir.mkdir(parents=True, exist_ok=True)
            return RowFile.temporary(header, config.cache_dir)
        except OSError as error:
            raise DataError(
                f"The decoded photos need {size / 1e9:.1f} GB in {config.cache_dir}: "
                f"{error.strerror}. Free some space, or name another folder with --cache-dir."
            ) from error

    def _fill(self, file: RowFile) -> list[str | None]:
        """Decode what is missing; returns for each photo the reason where it cannot be read."""
        missing = np.flatnonzero(~file.has(np.arange(len(self._items))))
        reasons: list[str | None] = [None] * len(self._items)

        def decode(row: int) -> None:
            try:
                photo = self._decode(row)
            except PhotoError as error:
                reasons[row] = str(error)
            else:
                file.write(np.array([row]), (photo[None],))
            progress.update()

        with (
            tqdm(total=len(missing), desc="Reading photos", unit="img", disable=None) as progress,
            ThreadPoolExecutor(os.cpu_count()) as pool,  # Pillow decodes outside the GIL
        ):
            list(pool.map(decode, missing.tolist()))
        return reasons

    def _decode(self, row: int) -> Photo:
        """uint8 [S, S, 3]. Raises PhotoError."""
        path = self._root / self._items[row].file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise PhotoError(str(error.strerror)) from error
        return load_photo(io.BytesIO(content), self._preprocess)


def _pixels(preprocess: Preprocess) -> list[Any]:
    """What of a preprocessing decides the bytes of a decoded photo: not mean and std."""
    return [preprocess.resize, preprocess.crop, preprocess.interpolation]


def decoder_versions() -> dict[str, str | None]:
    """What turns a file into pixels; another version may give other ones."""
    known = {
        name: features.version(name) for name in ("pil", "jpg", "libjpeg_turbo", "webp", "zlib")
    }
    return {**known, "numpy": np.__version__}


def _report(rejected: Mapping[str, str], config: Config) -> None:
    lines = [f"  {inert(file)}: {reason}" for file, reason in sorted(rejected.items())]
    text = f"{len(rejected)} photos cannot be read:\n" + "\n".join(lines)
    if config.strict:
        raise DataError(f"{text}\nRepair or remove them, or train without --strict.")
    tqdm.write(f"{text}\nThey are left out (--strict would stop here).")


def _fingerprint(listing: Listing, items: list[Item], hashes: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(listing.classes).encode("utf-8", "backslashreplace"))
    for item in sorted(items, key=lambda item: item.file):
        line = f"{item.split}\0{item.label}\0{item.file}\0{hashes.get(item.file)}\n"
        digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()

"""From listed photos to arrays: decode once, fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Mapping
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
from trainer.config import Augmentation, Config
from trainer.intake import PhotoError, read_photo
from trainer.listing import DataError, Item, Listing, check_counts, list_photos
from trainer.preprocess import Photo, load_photo
from trainer.process import usable_cores
from trainer.rows import Header, Layout, RowFile, Rows
from trainer.schema import Preprocess

# Photos that cannot be cached are kept in memory up to here, else in a file that has no name.
_IN_MEMORY_BYTES: Final = 4 << 30


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


# --- decoding ---------------------------------------------------------------------------------


def load_photos(config: Config, preprocess: Preprocess) -> Photos:
    """List, decode and fingerprint the photos. Raises DataError.

    Training photos are decoded at `--crop-from` pixels where that is given, all others as
    `preprocess` says; what the cache holds is not decoded again. Unreadable photos are listed, left
    out, and fatal with `--strict`.
    """
    listing = list_photos(config)
    augmented = to_augment(config.augmentation, preprocess)
    used = listing.used
    cache = Cache(config.cache_dir, config.cache_limit) if config.cache else None
    rejected: dict[str, str] = {}
    hashes = _hash_all(listing.root, used, rejected)
    splits = {}
    for name, wanted in (("train", augmented), ("val", preprocess)):
        items = [item for item in used if item.split == name and item.file in hashes]
        splits[name] = _Decoder(listing, items, hashes, wanted).split(config, cache, rejected)
    if rejected:
        _report(rejected, config)
        check_counts(listing, [item for item in listing.items if item.file not in rejected])
    return Photos(
        listing=listing,
        train=splits["train"],
        val=splits["val"],
        rejected=tuple(sorted(rejected.items())),
        fingerprint=_fingerprint(listing, used, hashes),
        cache=cache,
    )


def load_test(config: Config, preprocess: Preprocess) -> tuple[Listing, Split]:
    """The photos of the test split, which no training opens. Raises DataError without any."""
    listing = list_photos(config)
    items = [item for item in listing.items if item.split == "test"]
    if not items:
        raise DataError(
            f"{listing.root} has no test photos. Put them into a folder test/ beside train/, or "
            "name them in --split-file."
        )
    rejected: dict[str, str] = {}
    hashes = _hash_all(listing.root, items, rejected)
    items = [item for item in items if item.file in hashes]
    cache = Cache(config.cache_dir, config.cache_limit) if config.cache else None
    split = _Decoder(listing, items, hashes, preprocess).split(config, cache, rejected)
    if rejected:
        _report(rejected, config)
    return listing, split


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
            return hashlib.sha256(read_photo(root / item.file)).hexdigest()
        except PhotoError as error:
            rejected[item.file] = str(error)
            return None

    with ThreadPoolExecutor(usable_cores()) as pool:
        found = list(pool.map(digest, items))
    return {item.file: d for item, d in zip(items, found, strict=True) if d is not None}


def find_fingerprint(config: Config) -> str:
    """The fingerprint of the photos, without decoding any. Raises DataError."""
    listing = list_photos(config)
    return _fingerprint(listing, listing.used, _hash_all(listing.root, listing.used, {}))


def _fingerprint(listing: Listing, items: list[Item], hashes: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(listing.classes).encode("utf-8", "backslashreplace"))
    for item in sorted(items, key=lambda item: item.file):
        line = f"{item.split}\0{item.label}\0{item.file}\0{hashes.get(item.file)}\n"
        digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


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
            PhotoRows(file, good, self._decode_again),
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
            ThreadPoolExecutor(usable_cores()) as pool,  # Pillow decodes outside the GIL
        ):
            list(pool.map(decode, missing.tolist()))
        return reasons

    def _decode(self, row: int) -> Photo:
        """uint8 [S, S, 3]. Raises PhotoError, also where the file is not the one that was listed:
        under its hash the cache would keep another photo."""
        content = read_photo(self._path(row))
        if hashlib.sha256(content).hexdigest() != self._hashes[self._items[row].file]:
            raise PhotoError("it was changed while the photos were read")
        return load_photo(io.BytesIO(content), self._preprocess)

    def _decode_again(self, row: int) -> Photo:
        try:
            return self._decode(row)
        except PhotoError as error:
            raise DataError(
                f"A decoded photo is damaged in the cache, and {self._path(row)} cannot be decoded "
                f"again: {error}. Put the photo back as it was, or start again without it."
            ) from error

    def _path(self, row: int) -> Path:
        return self._root / self._items[row].file


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

"""What is in a data folder, photo by photo: sizes, broken ones, duplicates, leakage (no torch)."""

from __future__ import annotations

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from trainer.intake import PhotoError, read_photo
from trainer.listing import DataError, Item, Listing, check_listing
from trainer.preprocess import open_photo, photo_size
from trainer.process import usable_cores
from trainer.survey_alike import Print, fingerprint, near_pairs

SPLITS: Final = ("train", "val", "test")
# Of copies the one further right is kept: what measures stays as it is.
_KEPT_FIRST: Final = ("test", "val", "train")
_DECODED: Final = 64  # pixels of the shorter side, of which the fingerprint uses 32


@dataclass(frozen=True)
class Photo:
    """A photo that can be read: its sides in pixels, upright, and the SHA-256 of its file."""

    item: Item
    size: tuple[int, int]
    sha256: str
    look: Print | None


@dataclass(frozen=True)
class Alike:
    """Two photos or more that are the same file; or two that are nearly the same, whose
    fingerprints differ in `bits`."""

    items: tuple[Item, ...]
    bits: int | None = None

    @property
    def across_classes(self) -> bool:
        return len({item.label for item in self.items}) > 1

    @property
    def across_splits(self) -> bool:
        return len({item.split for item in self.items}) > 1

    def to_dict(self) -> dict[str, Any]:
        return {
            "files": [item.file for item in self.items],
            "splits": [item.split for item in self.items],
            "bits": self.bits,
            "across_classes": self.across_classes,
            "across_splits": self.across_splits,
        }


@dataclass(frozen=True)
class Survey:
    """What was found. `near` are pairs, without those of `exact`; None where photos without number
    look the same. `refused` says why the trainer would not train on this."""

    listing: Listing
    photos: tuple[Photo, ...]
    broken: tuple[tuple[str, str], ...]
    exact: tuple[Alike, ...]
    near: tuple[Alike, ...] | None
    refused: str | None

    @cached_property
    def counts(self) -> dict[str, Counter[str]]:
        """Photos of each class by split, without broken ones."""
        found: dict[str, Counter[str]] = {name: Counter() for name in self.listing.classes}
        for photo in self.photos:
            found[self.listing.classes[photo.item.label]][photo.item.split] += 1
        return found

    @property
    def totals(self) -> Counter[str]:
        """Photos by split."""
        return sum(self.counts.values(), Counter())

    @property
    def imbalance(self) -> tuple[str, str, float] | None:
        """Largest class, smallest class, and how many times its photos; None without photos."""
        sizes = {name: by_split.total() for name, by_split in self.counts.items()}
        if not sizes or min(sizes.values()) == 0:
            return None
        largest, smallest = max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)
        return largest, smallest, sizes[largest] / sizes[smallest]

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Width and height of the smallest, the median and the largest photo, by their area."""
        ranked = sorted((photo.size for photo in self.photos), key=lambda size: size[0] * size[1])
        if not ranked:
            return {}
        return {"smallest": ranked[0], "median": ranked[len(ranked) // 2], "largest": ranked[-1]}

    @property
    def leaks(self) -> list[Alike]:
        """Photos that are in two splits, or nearly."""
        return [alike for alike in (*self.exact, *(self.near or ())) if alike.across_splits]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        balance = self.imbalance
        return {
            "data": self.listing.name,
            "root": str(self.listing.root),
            "classes": {name: dict(by_split) for name, by_split in self.counts.items()},
            "sizes": {name: list(size) for name, size in self.sizes.items()},
            "imbalance": None if balance is None else balance[2],
            "broken": [{"file": file, "reason": reason} for file, reason in self.broken],
            "exact_duplicates": [alike.to_dict() for alike in self.exact],
            "near_duplicates": None if self.near is None else [a.to_dict() for a in self.near],
            "notices": list(self.listing.notices),
            "refused": self.refused,
        }


def survey(listing: Listing) -> Survey:
    """Open every photo of a listing, as the trainer would."""
    photos: list[Photo] = []
    broken: list[tuple[str, str]] = []
    look = partial(_look, listing.root)
    with ThreadPoolExecutor(usable_cores()) as pool:  # Pillow decodes outside the GIL
        looked = pool.map(look, listing.items)
        progress = tqdm(looked, "Looking", len(listing.items), unit="img", disable=None)
        for item, found in zip(listing.items, progress, strict=True):
            if isinstance(found, Photo):
                photos.append(found)
            else:
                broken.append((item.file, found))
    exact = _exact(photos)
    return Survey(listing, tuple(photos), tuple(broken), exact, _near(photos), _refused(listing))


def _look(root: Path, item: Item) -> Photo | str:
    """The photo, or why it cannot be read."""
    try:
        content = read_photo(root / item.file)
        image = open_photo(io.BytesIO(content), at_least=_DECODED)
        width, height = photo_size(io.BytesIO(content))
    except PhotoError as error:
        return str(error)
    if (image.width > image.height) != (width > height):  # the camera was held on its side
        width, height = height, width
    sha256 = hashlib.sha256(content).hexdigest()
    return Photo(item, (width, height), sha256, fingerprint(image))


def _exact(photos: Iterable[Photo]) -> tuple[Alike, ...]:
    groups: dict[str, list[Item]] = defaultdict(list)
    for photo in photos:
        groups[photo.sha256].append(photo.item)
    return tuple(Alike(tuple(items)) for items in groups.values() if len(items) > 1)


def _near(photos: Iterable[Photo]) -> tuple[Alike, ...] | None:
    seen = [(photo, photo.look) for photo in photos if photo.look is not None]
    pairs = near_pairs([look for _, look in seen])
    if pairs is None:
        return None
    return tuple(
        Alike((a.item, b.item), bits)
        for a, b, bits in ((seen[i][0], seen[j][0], bits) for i, j, bits in pairs)
        if a.sha256 != b.sha256
    )


def _refused(listing: Listing) -> str | None:
    try:
        check_listing(listing)
    except DataError as error:
        return str(error)
    return None


# --- what to leave out --------------------------------------------------------------------------


@dataclass(frozen=True)
class Exclusion:
    """A photo to leave out, and why."""

    file: str
    reason: str


def exclusions(found: Survey) -> list[Exclusion]:
    """Broken photos; all but one of the same bytes, and all of them where their classes differ;
    of nearly the same photos in two splits the one that measures less.

    Kept is the copy in test, else the one in val: so runs with and without these photos are
    measured on the same ones. Nearly the same photos within a split stay, and so do those in two
    classes: `doubtful` has these.
    """
    out = {file: f"cannot be read: {reason}" for file, reason in found.broken}
    classes = found.listing.classes
    for alike in found.exact:
        if alike.across_classes:
            where = ", ".join(sorted({classes[item.label] for item in alike.items}))
            out |= {item.file: f"the same file is in {where}" for item in alike.items}
        else:
            kept, *copies = sorted(alike.items, key=_measuring)
            out |= {item.file: f"the same file as {kept.file} ({kept.split})" for item in copies}
    for alike in found.near or ():
        if alike.across_splits and not alike.across_classes:
            kept, copy = sorted(alike.items, key=_measuring)
            if kept.file not in out:
                out.setdefault(copy.file, f"nearly the same as {kept.file} ({kept.split})")
    return [Exclusion(file, reason) for file, reason in sorted(out.items())]


def _measuring(item: Item) -> tuple[int, str]:
    return _KEPT_FIRST.index(item.split), item.file


def doubtful(found: Survey) -> list[Alike]:
    """Nearly the same photos in two classes: often two things that look alike, such as road signs,
    so somebody has to look."""
    return [alike for alike in found.near or () if alike.across_classes]

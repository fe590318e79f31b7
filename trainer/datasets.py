"""Named data sets: where each is looked for, and how it is made from what its makers publish.

`--data food101` is the folder `$THAW_DATA/food101`, without that variable `data/food101` in the
cache folder. In it are archives, as they were downloaded, and the photos: a folder of the user's
own, or one of the same name that was made here. That one appears complete or not at all.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from tqdm import tqdm

from trainer.cache import format_size
from trainer.listing import DataError, folders_in, holds_classes
from trainer.preprocess import is_photo

HOME: Final = "THAW_DATA"

_WORKSHOP: Final = ".unfinished"
# Left to everybody else on the disk.
_SPARE_BYTES: Final = 200_000_000


@dataclass(frozen=True)
class DataSet:
    """`make(folder, work)` fills the folder `work`/<name> from the archives in `folder`.

    `archives` are the published files with their sizes, `unpacked` is what they become; both in
    bytes. `by_hand` is what to do where that does not work.
    """

    name: str
    title: str
    archives: Mapping[str, int]
    unpacked: int
    by_hand: str
    make: Callable[[DataSet, Path, Path], None]


def find_data(name: str, cache_dir: Path) -> Path:
    """The folder of a named data set; made first where it is not there yet.

    Raises DataError with what to do by hand.
    """
    known = DATA_SETS[name]
    home = Path(os.environ.get(HOME) or cache_dir / "data").expanduser().absolute()
    folder = home / name
    return _found(folder) or _make(known, folder)


def _found(folder: Path) -> Path | None:
    for place in (folder / folder.name, folder):
        if place.is_dir() and holds_classes(inner := _unwrapped(place)):
            return inner
    return None


def _unwrapped(folder: Path) -> Path:
    """Archives often hold one folder, and that the next, before the classes come."""
    while not holds_classes(folder) and len(inside := folders_in(folder)) == 1:
        folder = inside[0]
    return folder


def _make(known: DataSet, folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if found := _found(folder):  # by another process, while this one waited
                return found
            work = folder / _WORKSHOP
            shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
            work.mkdir()
            try:
                known.make(known, folder, work)
                (work / known.name).rename(folder / known.name)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{known.title} cannot be prepared in {folder}: {error.strerror or error}.\n"
            f"{_steps(known, folder)}"
        ) from error
    print(f"{known.title} is ready in {folder / known.name}.")
    _tell_of_archives(known, folder)
    return folder / known.name


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While one process prepares a data set, others wait; a killed one lets go."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another process that prepares {folder}.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _tell_of_archives(known: DataSet, folder: Path) -> None:
    left = [folder / name for name in known.archives if (folder / name).is_file()]
    if left:
        print(f"Not needed any more: {', '.join(map(str, left))}.")


def _steps(known: DataSet, folder: Path) -> str:
    own = Path(known.name)
    hint = f" The folder {own.absolute()} is --data ./{own}." if own.is_dir() else ""
    return (
        f"{known.by_hand.format(folder=folder)}\n"
        f"Then run the same command again. Data sets lie elsewhere with {HOME}=DIR, this one in "
        f"DIR/{known.name}.{hint}"
    )


def _check_space(folder: Path, needed: int, title: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise DataError(
            f"{title} needs {format_size(needed)} in {folder}, and {format_size(free)} are free. "
            f"Free some space, or choose another place with {HOME}=DIR."
        )


# --- by torchvision: download, checksum, extraction ---------------------------------------------


@contextlib.contextmanager
def _downloading(known: DataSet, folder: Path, inside: Path) -> Iterator[None]:
    """For torchvision's classes with download=True, which look for archives in `inside`.

    They check the archives that are there already, too. Raises DataError.
    """
    from trainer.weights import short_timeout

    there = [name for name in known.archives if (folder / name).is_file()]
    missing = sum(size for name, size in known.archives.items() if name not in there)
    _check_space(folder, missing + known.unpacked, known.title)
    inside.mkdir(exist_ok=True)
    for name in known.archives:
        # Downloads land behind the link: a whole archive outlives an unpacking that is cut short.
        (inside / name).symlink_to(folder / name)
    what = f"Downloading {format_size(missing)} and unpacking" if missing else "Unpacking"
    print(f"{what} {known.title} in {folder}. Unpacking takes minutes and shows no progress.")
    try:
        with short_timeout():
            yield
    except Exception as error:  # urllib, ssl, socket, checksum, archive and disk errors alike
        used = f" Of {', '.join(there)} only the undamaged are used." if there else ""
        raise DataError(
            f"{known.title} cannot be downloaded or unpacked ({error}).{used}\n"
            f"{_steps(known, folder)}"
        ) from error


def _make_food(known: DataSet, folder: Path, work: Path) -> None:
    """The published split: train/ and test/, each with 101 class folders."""
    from torchvision.datasets import Food101

    root = folder
    place: Callable[[Path, Path], None] = _link
    if not (folder / "food-101" / "meta").is_dir():
        root, place = work, os.replace
        with _downloading(known, folder, work):
            Food101(work, download=True)
    for split in ("train", "test"):
        with _complaining(known, folder):
            photos = Food101(root, split, loader=Path)  # which gives paths instead of images
            for path, label in tqdm(photos, f"Sorting {split}", unit="img", disable=None):
                target = work / known.name / split / photos.classes[label]
                target.mkdir(parents=True, exist_ok=True)
                place(path, target / path.name)


@contextlib.contextmanager
def _complaining(known: DataSet, folder: Path) -> Iterator[None]:
    """A folder that the user unpacked may lack anything."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"{known.title} in {folder} is not complete: there is no {error.filename}. Unpack it "
            "again, or remove what was unpacked and keep the archive."
        ) from error


def _link(source: Path, target: Path) -> None:
    """The user's own files stay where they are."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a disk that knows no links
        shutil.copyfile(source, target)


def _make_signs(known: DataSet, folder: Path, work: Path) -> None:
    """train/ with names track_frame.ppm and test/, each with the classes 00 to 42."""
    from torchvision.datasets import GTSRB

    inside = work / "gtsrb"
    with _downloading(known, folder, inside):
        for split in ("train", "test"):
            GTSRB(work, split, download=True)
    photos = [
        ("train", path.parent.name, path) for path in (inside / "GTSRB/Training").glob("*/*.ppm")
    ]
    with (inside / "GT-final_test.csv").open(newline="") as file:
        for row in csv.DictReader(file, delimiter=";"):
            path = inside / "GTSRB/Final_Test/Images" / row["Filename"]
            photos.append(("test", row["ClassId"], path))
    for split, name, path in tqdm(photos, "Sorting", unit="img", disable=None):
        target = work / known.name / split / f"{int(name):02d}"
        target.mkdir(parents=True, exist_ok=True)
        path.rename(target / path.name)


# --- from an archive that the user has ----------------------------------------------------------


def _make_oregon(known: DataSet, folder: Path, work: Path) -> None:
    archives = sorted(folder.glob("*.zip"))
    if len(archives) != 1:
        found = f"{len(archives)} archives are" if archives else "neither photos nor an archive is"
        raise DataError(f"{known.title}: {found} in {folder}.\n{_steps(known, folder)}")
    unpacked = work / "unpacked"
    _unzip(archives[0], unpacked, known.title)
    photos = _unwrapped(unpacked)
    if not holds_classes(photos):
        raise DataError(f"{archives[0]} holds no class folders with photos.")
    photos.rename(work / known.name)


def _unzip(archive: Path, target: Path, title: str) -> None:
    """The photos of an archive. Raises DataError for one that is damaged, or that would write
    anywhere else."""
    target.mkdir()
    try:
        with zipfile.ZipFile(archive) as content:
            photos = _photos_in(archive, content.infolist())
            _check_space(target, sum(member.file_size for member in photos), title)
            for member in tqdm(photos, "Unpacking", unit="img", disable=None):
                path = target / member.filename
                path.parent.mkdir(parents=True, exist_ok=True)
                with content.open(member) as source, path.open("xb") as copy:
                    shutil.copyfileobj(source, copy)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{archive} cannot be unpacked ({error}). Download it again; an encrypted one unpack "
            "by hand."
        ) from error


def _photos_in(archive: Path, members: Sequence[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    for member in members:
        path = PurePosixPath(member.filename)
        kind = stat.S_IFMT(member.external_attr >> 16)
        outside = path.is_absolute() or ".." in path.parts or "\\" in member.filename
        if outside or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DataError(
                f"{archive} was not unpacked: {member.filename} in it is a link or lies outside of "
                "it. Is it the right archive?"
            )
    return [
        member
        for member in members
        if not member.is_dir()
        and is_photo(Path(member.filename))
        and not any(part.startswith((".", "__")) for part in PurePosixPath(member.filename).parts)
    ]


_GTSRB: Final = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"

DATA_SETS: Final = {
    known.name: known
    for known in (
        DataSet(
            "oregon",
            "Oregon Wildlife",
            {},
            0,
            "Only those who are logged in to Kaggle can download it: open "
            "https://www.kaggle.com/datasets/virtualkerala/oregon-wildlife, choose Download, and "
            "put the archive (one .zip) as it is into {folder}, or unpack it there.",
            _make_oregon,
        ),
        DataSet(
            "food101",
            "Food-101",
            {"food-101.tar.gz": 4_996_278_331},
            5_200_000_000,
            "Download http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz (5 GB) where there is a "
            "network, and put it as it is into {folder}.",
            _make_food,
        ),
        DataSet(
            "signs",
            "The German road signs (GTSRB)",
            {
                "GTSRB-Training_fixed.zip": 187_490_228,
                "GTSRB_Final_Test_Images.zip": 88_978_620,
                "GTSRB_Final_Test_GT.zip": 99_620,
            },
            600_000_000,
            "Download these three where there is a network, and put them as they are into "
            "{folder}:\n"
            f"  {_GTSRB}/GTSRB-Training_fixed.zip\n"
            f"  {_GTSRB}/GTSRB_Final_Test_Images.zip\n"
            f"  {_GTSRB}/GTSRB_Final_Test_GT.zip",
            _make_signs,
        ),
    )
}

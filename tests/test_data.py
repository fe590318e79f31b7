"""Folders of photos: classes, splits, what is refused and what is only reported."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

import trainer.data
from tests.conftest import PhotoFolder
from trainer.config import Augmentation, Config
from trainer.data import load_photos
from trainer.listing import DataError, Listing, list_photos
from trainer.schema import Preprocess

SMALL = Preprocess(resize=36, crop=32)


def config(root: Path, **changes: object) -> Config:
    return dataclasses.replace(Config("transfer", data=str(root)), **changes)


def members(listing: Listing, split: str) -> set[str]:
    return {item.file for item in listing.items if item.split == split}


def test_a_class_is_a_folder_and_the_split_is_stratified(photos: Path) -> None:
    listing = list_photos(config(photos))
    assert listing.classes == ("blue", "green", "red")
    for name in listing.classes:
        held_out = [file for file in members(listing, "val") if file.startswith(name)]
        assert len(held_out) == 2  # 30% of 8
    assert not members(listing, "train") & members(listing, "val")


def test_the_split_is_fixed_by_its_seed(photos: Path) -> None:
    assert list_photos(config(photos)) == list_photos(config(photos))
    assert list_photos(config(photos)) == list_photos(config(photos, seed=5))
    other = members(list_photos(config(photos, split_seed=1)), "val")
    assert other != members(list_photos(config(photos)), "val")


def test_photos_added_to_one_class_leave_the_split_of_the_others(
    tmp_path: Path, make_photos: PhotoFolder
) -> None:
    before = list_photos(config(make_photos(tmp_path, photos=10)))
    make_photos(tmp_path, classes=1, photos=17)  # seven more red ones
    make_photos(tmp_path, classes=4, photos=10)  # and a new class
    after = list_photos(config(tmp_path))
    for split in ("train", "val"):
        kept = {f for f in members(before, split) if not f.startswith("red")}
        assert kept <= members(after, split)


def test_own_split_folders_are_kept(tmp_path: Path, make_photos: PhotoFolder) -> None:
    for folder, count in (("train", 5), ("Validation", 3), ("test", 2)):
        make_photos(tmp_path / folder, photos=count)
    listing = list_photos(config(tmp_path))
    counts = {split: len(members(listing, split)) for split in ("train", "val", "test")}
    assert counts == {"train": 15, "val": 9, "test": 6}
    assert "Validation/red/000.jpg" in members(listing, "val")


def test_without_a_val_folder_part_of_train_is_held_out(
    tmp_path: Path, make_photos: PhotoFolder
) -> None:
    make_photos(tmp_path / "train", photos=10)
    make_photos(tmp_path / "test", photos=2)
    listing = list_photos(config(tmp_path))
    assert len(members(listing, "val")) == 9
    assert any("No val folder" in notice for notice in listing.notices)


def test_split_file(tmp_path: Path, photos: Path) -> None:
    path = tmp_path / "split.csv"
    rows = ["path,split"] + [
        f"{name}/00{number}.jpg,{split}"
        for name in ("red", "blue")
        for number, split in enumerate(["train", "train", "val", "test"])
    ]
    path.write_text("\n".join(rows))
    listing = list_photos(config(photos, split_file=path))
    assert listing.classes == ("blue", "red")
    assert members(listing, "val") == {"red/002.jpg", "blue/002.jpg"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "columns path and split"),
        ("file,set\na,b", "columns path and split"),
        ("path,split\nred/000.jpg,training data", "line 2"),
        ("path,split\n../red/000.jpg,train", "line 2: expected class/photo.jpg"),
        ("path,split\nred/999.jpg,train", "there is no photo"),
        ("path,split\nred/000.jpg,train\nred/000.jpg,val", "more than once"),
    ],
)
def test_wrong_split_files_name_the_line(
    tmp_path: Path, photos: Path, content: str, message: str
) -> None:
    path = tmp_path / "split.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        list_photos(config(photos, split_file=path))


def test_limit_is_per_class(photos: Path) -> None:
    listing = list_photos(config(photos, limit=4))
    assert len(listing.items) == 12


def test_hidden_and_other_files_are_no_photos(tmp_path: Path, make_photos: PhotoFolder) -> None:
    make_photos(tmp_path)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "red" / "notes.txt").write_text("x")
    listing = list_photos(config(tmp_path))
    assert listing.classes == ("blue", "green", "red")
    assert [n for n in listing.notices if "empty" in n]
    assert [n for n in listing.notices if "red: 1 files" in n]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no folder .*nowhere"):
        list_photos(config(tmp_path / "nowhere"))


def test_folder_without_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no class folders"):
        list_photos(config(tmp_path))


def test_one_class(tmp_path: Path, make_photos: PhotoFolder) -> None:
    make_photos(tmp_path, classes=1)
    with pytest.raises(DataError, match=r"one class only \(red\)"):
        list_photos(config(tmp_path))


def test_a_class_with_one_photo(tmp_path: Path, make_photos: PhotoFolder) -> None:
    make_photos(tmp_path)
    for extra in sorted((tmp_path / "red").iterdir())[1:]:
        extra.unlink()
    with pytest.raises(DataError, match=r"Class 'red'.* has one photo only.* needs two"):
        list_photos(config(tmp_path))


@pytest.fixture
def with_a_bad_photo(tmp_path: Path, make_photos: PhotoFolder) -> Path:
    make_photos(tmp_path)
    (tmp_path / "red" / "000.jpg").write_bytes(b"not a photo")
    return tmp_path


def test_unreadable_photos_are_listed_and_left_out(
    with_a_bad_photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = load_photos(config(with_a_bad_photo), SMALL)
    assert [file for file, _ in photos.rejected] == ["red/000.jpg"]
    assert len(photos.train) + len(photos.val) == 23
    assert "red/000.jpg" not in photos.train.files + photos.val.files
    assert "red/000.jpg: not an image" in capsys.readouterr().out


def test_strict_makes_unreadable_photos_fatal(with_a_bad_photo: Path) -> None:
    with pytest.raises(DataError, match=r"red/000.jpg: not an image"):
        load_photos(config(with_a_bad_photo, strict=True), SMALL)


def test_a_class_that_loses_all_its_photos_is_fatal(
    tmp_path: Path, make_photos: PhotoFolder
) -> None:
    make_photos(tmp_path)
    for path in (tmp_path / "red").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="Class 'red'"):
        load_photos(config(tmp_path), SMALL)


def test_arrays_match_their_labels(photos: Path) -> None:
    loaded = load_photos(config(photos), SMALL)
    assert loaded.val.photos[:].shape == (len(loaded.val), 32, 32, 3)
    for file, label in zip(loaded.train.files, loaded.train.labels, strict=True):
        assert file.startswith(f"{loaded.classes[label]}/")
    pixels = loaded.train.photos[:].reshape(len(loaded.train), -1)
    assert len(np.unique(pixels, axis=0)) == len(loaded.train)


def test_crop_from_enlarges_training_photos_only(photos: Path) -> None:
    larger = config(photos, augmentation=Augmentation(crop_from=40))
    loaded = load_photos(larger, SMALL)
    assert (loaded.train.photos.side, loaded.val.photos.side) == (40, 32)
    with pytest.raises(DataError, match="--crop-from 20"):
        load_photos(config(photos, augmentation=Augmentation(crop_from=20)), SMALL)


def test_fingerprint_changes_with_content_name_and_split(tmp_path: Path, photos: Path) -> None:
    def fingerprint(**changes: object) -> str:
        return load_photos(config(tmp_path / "p", **changes), SMALL).fingerprint

    shutil.copytree(photos, tmp_path / "p")
    original = load_photos(config(photos), SMALL).fingerprint
    assert fingerprint() == original  # another place, the same data
    assert fingerprint(split_seed=1) != original
    photo = tmp_path / "p" / "red" / "001.jpg"
    content = photo.read_bytes()
    photo.write_bytes(content + b"\0")
    assert fingerprint() != original
    photo.write_bytes(content)
    photo.rename(photo.with_name("renamed.jpg"))
    assert fingerprint() != original


def test_photos_are_decoded_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = {"cache_dir": tmp_path / "cache"}
    first = load_photos(config(photos, **cache), SMALL)
    decode = trainer.data.load_photo
    monkeypatch.setattr(trainer.data, "load_photo", _never)
    again = load_photos(config(photos, **cache), SMALL)
    assert np.array_equal(again.train.photos[:], first.train.photos[:])
    assert again.train.digest == first.train.digest
    monkeypatch.setattr(trainer.data, "load_photo", decode)
    other = load_photos(config(photos, **cache), dataclasses.replace(SMALL, resize=40))
    assert not np.array_equal(other.train.photos[:], first.train.photos[:])
    assert other.train.digest != first.train.digest


def _never(*_: object) -> None:
    raise AssertionError("decoded again")


def test_a_decoded_photo_that_is_damaged_in_the_cache_is_decoded_again(
    photos: Path, tmp_path: Path
) -> None:
    cached = config(photos, cache_dir=tmp_path / "cache")
    first = load_photos(cached, SMALL).train.photos[:]
    for path in (tmp_path / "cache").rglob("*.rows"):
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    assert np.array_equal(load_photos(cached, SMALL).train.photos[:], first)


def test_without_cache_photos_are_in_memory_or_in_a_file_without_a_name(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = config(photos, cache_dir=tmp_path / "cache", cache=False)
    in_memory = load_photos(without, SMALL)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("trainer.data._IN_MEMORY_BYTES", 0)
    in_file = load_photos(without, SMALL)
    assert np.array_equal(in_file.train.photos[:], in_memory.train.photos[:])
    assert not list((tmp_path / "cache").iterdir())  # nothing is left behind

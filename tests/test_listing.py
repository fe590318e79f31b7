"""Which photos train and which validate: splits by track, and photos that are left out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Train, shared
from trainer.config import Config, ConfigError
from trainer.listing import DataError, Listing, excluded_line, list_photos, read_excluded


def frames(root: Path, tracks: int = 8, of: int = 5, classes: str = "abc") -> Path:
    """Empty files track_frame.jpg: a listing opens none."""
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(tracks * of):
            (root / name / f"{number // of:05d}_{number % of:05d}.jpg").touch()
    return root


def listed(root: Path, **changes: Any) -> Listing:
    return list_photos(dataclasses.replace(Config("transfer", data=str(root)), **changes))


def parts(listing: Listing) -> dict[str, str]:
    return {item.file: item.split for item in listing.items}


def tracks_by_split(listing: Listing) -> dict[str, set[str]]:
    found = defaultdict(set)
    for file, split in parts(listing).items():
        found[split].add(file.rpartition("_")[0])
    return found


@pytest.mark.parametrize(
    ("changes", "digest"),
    [
        ({}, "960eea0b59e0eda4"),
        ({"split_seed": 3, "val_fraction": 0.2}, "4f9c1e9d0a545c20"),
        ({"limit": 7}, "8f9aa60057c38316"),
    ],
)
def test_splits_of_earlier_versions_stay(
    tmp_path: Path, changes: dict[str, Any], digest: str
) -> None:
    items = listed(frames(tmp_path), **changes).items
    text = "\n".join(f"{item.split} {item.file}" for item in items)
    assert hashlib.sha256(text.encode()).hexdigest().startswith(digest)


def test_no_track_is_in_two_parts(tmp_path: Path) -> None:
    listing = listed(frames(tmp_path), group_by="track")
    tracks = tracks_by_split(listing)
    assert not tracks["train"] & tracks["val"]
    for name in listing.classes:  # 30% of 40 photos, as near as tracks of 5 come
        assert sum(parts(listing)[f] == "val" for f in parts(listing) if f.startswith(name)) == 10
    by_frame = tracks_by_split(listed(tmp_path))
    assert by_frame["train"] & by_frame["val"]


def test_tracks_of_one_number_in_two_classes_are_two_tracks(tmp_path: Path) -> None:
    held_out = tracks_by_split(listed(frames(tmp_path), group_by="track"))["val"]
    assert len({track.rpartition("/")[2] for track in held_out}) > 2


def test_the_split_by_track_is_fixed_by_its_seed_and_by_nothing_else(tmp_path: Path) -> None:
    before = listed(frames(tmp_path), group_by="track")
    assert listed(tmp_path, group_by="track", seed=7) == before
    assert parts(listed(tmp_path, group_by="track", split_seed=1)) != parts(before)
    frames(tmp_path, tracks=12, classes="a")
    after = parts(listed(tmp_path, group_by="track"))
    others = {file: split for file, split in parts(before).items() if not file.startswith("a")}
    assert others.items() <= after.items()


def test_a_lone_track_trains_and_that_is_said(tmp_path: Path) -> None:
    frames(tmp_path)
    frames(tmp_path, tracks=1, of=9, classes="d")
    listing = listed(tmp_path, group_by="track")
    assert {split for file, split in parts(listing).items() if file.startswith("d")} == {"train"}
    assert any("one track" in notice and notice.endswith(" d.") for notice in listing.notices)


def test_own_parts_stay_and_only_train_is_split(tmp_path: Path) -> None:
    frames(tmp_path / "train")
    (tmp_path / "test" / "a").mkdir(parents=True)
    (tmp_path / "test" / "a" / "00001.jpg").touch()  # no track in the name, and none needed
    listing = listed(tmp_path, group_by="track")
    tracks = tracks_by_split(listing)
    assert tracks["train"] and tracks["val"] and not tracks["train"] & tracks["val"]
    assert parts(listing)["test/a/00001.jpg"] == "test"


@pytest.mark.parametrize("name", ["photo.jpg", "00001_last.jpg", "_00001.jpg", "00001.jpg"])
def test_names_without_a_track_are_refused(tmp_path: Path, name: str) -> None:
    (frames(tmp_path) / "b" / name).touch()
    with pytest.raises(DataError, match=rf"b/{name} is not named track_frame"):
        listed(tmp_path, group_by="track")


def test_signs_are_split_by_track_unless_a_file_decides(tmp_path: Path) -> None:
    assert Config("transfer", data="signs").grouping == "track"
    assert Config("transfer", data="signs").to_dict()["group_by"] == "track"
    assert Config("transfer", data="./signs").grouping is None
    assert Config("transfer", data="signs", split_file=tmp_path / "split.csv").grouping is None
    with pytest.raises(ConfigError, match="--group-by class: choose one of track"):
        Config("transfer", group_by="class")  # type: ignore[arg-type]


def test_the_road_signs() -> None:
    listing = listed(shared("photos/signs"), group_by="track")
    tracks = tracks_by_split(listing)
    assert not tracks["train"] & tracks["val"]
    held_out = sum(split == "val" for split in parts(listing).values())
    assert 0.2 < held_out / len(listing.items) < 0.5


# --- photos that are left out -------------------------------------------------------------------


def test_what_is_left_out_moves_no_other_photo(tmp_path: Path) -> None:
    before = parts(listed(frames(tmp_path / "p")))
    gone = sorted(before)[::7]
    path = tmp_path / "out.txt"
    path.write_text("# because\n\n" + "\r\n".join(gone))
    listing = listed(tmp_path / "p", exclude_file=path)
    assert parts(listing) == {file: s for file, s in before.items() if file not in gone}
    assert f"{len(gone)} photos are left out (--exclude-file {path})." in listing.notices


@pytest.mark.parametrize(
    "name",
    [
        *("plain.jpg", "with space.jpg", "# no comment.jpg", '"quoted".jpg', " edges .jpg "),
        *("two\nlines.jpg", "\x1b[31mred.jpg", "back\\slash.jpg", "größe ✓.jpg", "raw\udcff.jpg"),
    ],
)
def test_any_name_can_be_listed(tmp_path: Path, name: str) -> None:
    for file in (f"class/{name}", name):
        path = tmp_path / "out.txt"
        line = excluded_line(file)
        path.write_text(f"{line}\n", encoding="utf-8")
        assert line.isprintable()
        assert read_excluded(path) == {file}


def test_lines_for_photos_that_are_gone_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("./a/00000_00000.jpg\na/typo.jpg\n")
    notices = listed(frames(tmp_path / "p"), exclude_file=path).notices
    assert any(notice.startswith("1 photos are left out") for notice in notices)
    assert "1 that it lists are not there, such as a/typo.jpg." in notices


def test_the_list_of_another_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("roses/1.jpg\n")
    with pytest.raises(DataError, match="None of the 1 photos that --exclude-file"):
        listed(frames(tmp_path / "p"), exclude_file=path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"\xff\xfe", "cannot be read"), (b'a\n"b', "line 2: ")],
)
def test_a_list_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "out.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        listed(frames(tmp_path / "p"), exclude_file=path)


def test_training_leaves_them_out(train: Train, tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("red/000.jpg\nblue/001.jpg\n")
    run = train("--phase", "transfer", "--epochs", "1", "--exclude-file", str(path))
    counts = run.info["dataset"]["counts"]
    assert counts["train"] + counts["val"] == 22
    assert run.info["config"]["exclude_file"] == str(path)

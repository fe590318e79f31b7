"""What `python -m trainer data` finds in a folder, and the list that training takes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tests.conftest import shared
from trainer.__main__ import main
from trainer.config import Config
from trainer.listing import list_photos, read_excluded
from trainer.survey import Survey, exclusions, survey
from trainer.survey_alike import MOST_BITS, Print, fingerprint, near_pairs


def scene(number: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Soft patches of colour: as different as photographs are, and no two alike."""
    patches = np.random.default_rng(number).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)


def save(image: Image.Image, path: Path, quality: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=quality)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """roses and tulips, eight different photos each."""
    for number in range(16):
        name = "roses" if number < 8 else "tulips"
        save(scene(number), tmp_path / "photos" / name / f"{number:02d}.jpg")
    return tmp_path / "photos"


def split_of(folder: Path) -> dict[str, str]:
    return {
        item.file: item.split for item in list_photos(Config("transfer", data=str(folder))).items
    }


def one_of(folder: Path, split: str, class_name: str = "roses") -> str:
    """A photo that is in this part of the split."""
    return next(f for f, s in split_of(folder).items() if s == split and f.startswith(class_name))


def surveyed(folder: Path) -> Survey:
    return survey(list_photos(Config("transfer", data=str(folder))))


def report(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["data", str(folder), *flags]) == 0
    return capsys.readouterr().out


def as_json(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(report(folder, capsys, "--json", *flags))
    return found


# --- fingerprints -------------------------------------------------------------------------------


def bits_apart(a: Image.Image, b: Image.Image) -> int:
    one, other = fingerprint(a), fingerprint(b)
    assert one is not None and other is not None
    return (one.bits ^ other.bits).bit_count()


@pytest.mark.parametrize("number", range(10))
def test_copies_differ_in_few_bits(number: int, tmp_path: Path) -> None:
    photo = scene(number, (640, 480))
    recompressed = Image.open(save(photo.resize((200, 150)), tmp_path / "a.jpg", quality=30))
    for copy in (recompressed, photo.convert("L").convert("RGB"), _lighter(photo)):
        assert bits_apart(photo, copy) <= MOST_BITS
    assert bits_apart(photo, scene(number + 1)) > 2 * MOST_BITS


def _lighter(photo: Image.Image) -> Image.Image:
    return ImageEnhance.Contrast(ImageEnhance.Brightness(photo).enhance(1.1)).enhance(0.7)


def test_a_flat_photo_is_not_compared() -> None:
    assert fingerprint(Image.new("RGB", (50, 50), "navy")) is None


def test_near_pairs_are_those_that_comparing_all_finds() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 600, dtype=np.uint64)
    for copy in range(300, 600):  # with up to twice as many bits as count as near
        hashes[copy] = hashes[copy - 300]
        for bit in rng.choice(64, rng.integers(0, 2 * MOST_BITS), replace=False):
            hashes[copy] ^= np.uint64(1) << np.uint64(bit)
    greys = rng.integers(0, 255, (16, 16), np.uint8)
    wanted = [
        (i, j, bits)
        for i, j in itertools.combinations(range(600), 2)
        if (bits := int(np.bitwise_count(hashes[i] ^ hashes[j]))) <= MOST_BITS
    ]
    assert len(wanted) > 100
    assert near_pairs([Print(int(one), greys) for one in hashes]) == wanted


def test_one_hash_of_many_photos_and_of_none() -> None:
    greys = np.random.default_rng(0).integers(0, 255, (16, 16), np.uint8)
    assert near_pairs([Print(5, greys)] * 4) == [
        (i, j, 0) for i, j in itertools.combinations(range(4), 2)
    ]
    assert near_pairs([]) == []
    assert near_pairs([Print(5, greys)] * 5000) is None


def test_the_same_bits_with_other_greys_are_no_pair() -> None:
    greys = np.random.default_rng(0).integers(0, 255, (16, 16), np.uint8)
    assert near_pairs([Print(5, greys), Print(5, greys.T.copy())]) == []


# --- the report ---------------------------------------------------------------------------------


def test_a_clean_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(scene(99, (30, 400)), folder / "roses" / "strip.jpg")
    text = report(folder, capsys)
    assert "photos: 2 classes, 17 photos, 12 train, 5 val" in text
    assert [line.split() for line in text.splitlines() if line.startswith(("roses", "tulips"))] == [
        ["roses", "9", "6", "3"],
        ["tulips", "8", "6", "2"],
    ]
    assert "smallest 30 x 400, median 160 x 120, largest 160 x 120 pixels" in text
    assert "Imbalance: roses has 1.12 times the photos of tulips." in text
    for kind in ("Broken photos", "Exact duplicates", "Near duplicates"):
        assert f"{kind}: none." in text
    assert "Leakage" not in text


def test_sizes_are_of_upright_photos(folder: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    scene(50, (300, 200)).save(folder / "roses" / "turned.jpg", exif=turned)
    assert surveyed(folder).sizes["largest"] == (200, 300)


def test_broken_photos_by_name_and_reason(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "roses" / "00.jpg").write_bytes(b"no photo")
    content = (folder / "tulips" / "08.jpg").read_bytes()
    (folder / "tulips" / "08.jpg").write_bytes(content[: len(content) // 2])
    text = report(folder, capsys)
    assert "Broken photos: 2." in text
    assert "roses/00.jpg: not an image in a format that Thaw reads" in text
    assert "tulips/08.jpg: OSError: image file is truncated" in text


def test_leakage_and_the_list_that_ends_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = one_of(folder, "train"), one_of(folder, "val")
    same, near = one_of(folder, "train", "tulips"), one_of(folder, "val", "tulips")
    content = (folder / val).read_bytes()
    (folder / train).write_bytes(content)  # the same file in both parts
    small = Image.open(folder / near).resize((100, 75))
    save(small, folder / same, quality=60)  # nearly the same in both
    before = {path: path.read_bytes() for path in folder.rglob("*.jpg")}
    target = tmp_path / "out.txt"
    text = report(folder, capsys, "--exclude-file", str(target))
    assert "Exact duplicates: 1 group." in text
    assert "Near duplicates: 1 pair." in text
    assert "Leakage: 2 of these" in text
    assert text.count("LEAK") == 2
    assert read_excluded(target) == {train, same}  # what is validated on stays
    assert f"# the same file as {val} (val)" in target.read_text()
    assert {path: path.read_bytes() for path in folder.rglob("*.jpg")} == before
    listing = list_photos(Config("transfer", data=str(folder), exclude_file=target))
    assert not survey(listing).leaks
    assert {i.file for i in listing.items if i.split == "val"} == {
        file for file, split in split_of(folder).items() if split == "val"
    }


def test_leakage_is_that_of_the_split_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "roses" / "01.jpg").write_bytes((folder / "roses" / "00.jpg").read_bytes())
    rows = ["path,split", *(f"{f},train" for f in split_of(folder) if f != "roses/00.jpg")]
    for last, leaks in (("val", 1), ("train", 0)):
        path = tmp_path / f"{last}.csv"
        path.write_text("\n".join([*rows[:-1], f"roses/00.jpg,{last}", rows[-1][:-5] + "val"]))
        found = as_json(folder, capsys, "--split-file", str(path))
        [duplicate] = found["exact_duplicates"]  # type: ignore[misc]
        assert duplicate["across_splits"] == bool(leaks)
    splits = set()
    for seed in range(12):
        found = as_json(folder, capsys, "--split-seed", str(seed), "--val-fraction", "0.5")
        [duplicate] = found["exact_duplicates"]  # type: ignore[misc]
        splits.add(tuple(duplicate["splits"]))
    assert len(splits) > 2


def test_classes_that_disagree(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same file in two classes goes; what only looks the same, somebody has to look at."""
    (folder / "tulips" / "08.jpg").write_bytes((folder / "roses" / "00.jpg").read_bytes())
    save(Image.open(folder / "roses" / "01.jpg").resize((80, 60)), folder / "tulips" / "09.jpg")
    target = tmp_path / "out.txt"
    text = report(folder, capsys, "--exclude-file", str(target))
    assert text.count("TWO CLASSES") == 2
    assert "1 group, 1 across classes" in text
    assert read_excluded(target) == {"roses/00.jpg", "tulips/08.jpg"}
    lines = target.read_text().splitlines()
    assert {"# roses/01.jpg", "# tulips/09.jpg"} <= set(lines)
    assert lines.count("# the same file is in roses, tulips") == 2


def test_of_many_copies_one_stays(folder: Path) -> None:
    content = (folder / "roses" / "00.jpg").read_bytes()
    for number in range(1, 8):
        (folder / "roses" / f"{number:02d}.jpg").write_bytes(content)
    found = surveyed(folder)
    out = {one.file for one in exclusions(found)}
    assert len(out) == 7
    [kept] = [file for file in split_of(folder) if file.startswith("roses") and file not in out]
    assert split_of(folder)[kept] == "val"


def test_what_the_trainer_would_refuse_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(scene(70), folder / "lilies" / "only.jpg")
    text = report(folder, capsys)
    assert "The trainer would not train on this: Class 'lilies'" in text
    text = report(folder / "roses", capsys)
    assert "holds no class folders with photos" in text


def test_frames_of_tracks_are_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for track in range(8):
        for frame in range(4):
            photo = scene(track, (60 + 10 * frame, 45 + 8 * frame))
            save(photo, tmp_path / f"{track % 2:02d}" / f"{track:05d}_{frame:05d}.png")
    text = report(tmp_path, capsys)
    assert "LEAK" in text
    assert "With --group-by track" in text
    text = report(tmp_path, capsys, "--group-by", "track")
    assert "Near duplicates: 48 pairs." in text
    assert "and 28 more (--json names all)" in text
    assert "LEAK" not in text
    assert "--group-by" not in text


def test_hostile_names_are_inert(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = folder / "roses" / "\x1b[31mred\n# x.jpg"
    bad.write_bytes(b"")
    target = tmp_path / "out.txt"
    text = report(folder, capsys, "--exclude-file", str(target))
    assert "\x1b" not in text + target.read_text()
    assert "\\x1b[31mred\\n# x.jpg: not an image" in text
    assert read_excluded(target) == {"roses/\x1b[31mred\n# x.jpg"}
    assert "\x1b" not in report(folder, capsys, "--json")


def test_json_holds_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "roses" / "01.jpg").write_bytes(b"")
    found = as_json(folder, capsys)
    classes: dict[str, dict[str, int]] = found["classes"]  # type: ignore[assignment]
    assert [sum(classes[name].values()) for name in ("roses", "tulips")] == [7, 8]
    [broken] = found["broken"]  # type: ignore[misc]
    assert broken["file"] == "roses/01.jpg"
    [out] = found["exclude"]  # type: ignore[misc]
    assert out["file"] == "roses/01.jpg"
    assert found["refused"] is None


def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.txt"
    target.write_text("mine")
    for flags, message in (
        ((str(folder), "--exclude-file", str(target)), "is there already"),
        ((str(folder), "--exclude-file", str(tmp_path / "no" / "x")), "cannot be written"),
        ((str(tmp_path / "nowhere"),), "There is no folder"),
        ((str(folder), "--val-fraction", "2"), "--val-fraction 2.0"),
    ):
        assert main(["data", *flags]) == 2
        assert message in capsys.readouterr().err
    assert target.read_text() == "mine"


def test_it_needs_no_torch() -> None:
    code = "import sys, trainer.survey_command, trainer.datasets; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- real photographs ---------------------------------------------------------------------------


def test_the_flowers_hold_eight_copies(capsys: pytest.CaptureFixture[str]) -> None:
    found = surveyed(shared("photos/flowers"))
    assert found.near is not None
    assert [sorted(i.file.partition("/")[0] for i in one.items) for one in found.exact] == [
        ["sunflowers", "sunflowers"]
    ]
    names = sorted(one.items[0].file.partition("/")[0] for one in found.near)
    assert names == [*["daisy"], *["dandelion"] * 2, *["roses"] * 2, "sunflowers", "tulips"]
    assert not found.broken


def test_signs_by_track_leak_little() -> None:
    root = str(shared("photos/signs"))
    by_frame = survey(list_photos(Config("transfer", data=root)))
    by_track = survey(list_photos(Config("transfer", data=root, group_by="track")))
    assert len(by_frame.leaks) > 300
    assert len(by_track.leaks) < 20

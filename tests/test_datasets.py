"""Named data sets: archives in the published form become a data folder, whole or not at all.

The archives are small ones of the same form; torchvision's own classes unpack them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import shutil
import stat
import tarfile
import threading
import urllib.error
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image

from trainer.__main__ import main
from trainer.config import Config
from trainer.datasets import DATA_SETS, find_data
from trainer.listing import DataError, Listing, list_photos

CLASSES = ("apple_pie", "baklava")
BOTH = pytest.mark.parametrize("name", ["food101", "signs"])


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The archives ask for 10 GB, which no test needs."""
    usage = shutil.disk_usage("/")._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def photo(number: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (30, 40, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def zipped(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def food_files() -> dict[str, bytes]:
    """Of each class six photos to train on and two to test, as in the published archive."""
    files: dict[str, bytes] = {}
    for split, numbers in (("train", range(6)), ("test", range(6, 8))):
        meta = {name: [f"{name}/{1000 + n}" for n in numbers] for name in CLASSES}
        files[f"meta/{split}.json"] = json.dumps(meta).encode()
        for name in (name for names in meta.values() for name in names):
            files[f"images/{name}.jpg"] = photo(len(files))
    return files


def write_food(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "food-101.tar.gz", "w:gz") as archive:
        for name, content in food_files().items():
            member = tarfile.TarInfo(f"food-101/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_signs(folder: Path) -> None:
    """Two classes of four tracks of three frames, and three photos to test."""
    folder.mkdir(parents=True, exist_ok=True)
    train: dict[str, bytes] = {"GTSRB/Readme.txt": b""}
    for name in ("00000", "00014"):
        train[f"GTSRB/Training/{name}/GT-{name}.csv"] = b"Filename;Width\n"
        for n in range(12):
            file = f"GTSRB/Training/{name}/{n // 3:05d}_{n % 3:05d}.ppm"
            train[file] = photo(len(train), "PPM")
    test = {f"GTSRB/Final_Test/Images/{n:05d}.ppm": photo(n, "PPM") for n in range(3)}
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    rows += [f"{n:05d}.ppm;40;30;5;5;35;25;{label}" for n, label in enumerate((14, 0, 14))]
    zipped(folder / "GTSRB-Training_fixed.zip", train)
    zipped(folder / "GTSRB_Final_Test_Images.zip", test)
    zipped(folder / "GTSRB_Final_Test_GT.zip", {"GT-final_test.csv": "\n".join(rows).encode()})


WRITE = {"food101": write_food, "signs": write_signs}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THAW_DATA", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, **_: object) -> str:
        raise urllib.error.URLError(f"no route to {url}")

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", refuse)


@pytest.fixture
def any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our small archives pass for the published ones."""
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_, **__: True)


def listing(name: str) -> Listing:
    return list_photos(Config("transfer", data=name))


def counts(found: Listing) -> Counter[tuple[str, str]]:
    return Counter((item.split, found.classes[item.label]) for item in found.items)


# --- from the published archives ----------------------------------------------------------------


@pytest.mark.usefixtures("any_checksum")
def test_food_keeps_its_own_split(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_food(home / "food101")
    found = listing("food101")
    assert found.name == "food101"
    assert found.root == home / "food101" / "food101"
    own = {("train", 4), ("val", 2), ("test", 2)}
    assert counts(found) == {(split, name): n for split, n in own for name in CLASSES}
    test = {item.file for item in found.items if item.split == "test"}
    assert test == {f"test/{name}/{n}.jpg" for name in CLASSES for n in (1006, 1007)}
    assert (found.root / "train/baklava/1000.jpg").read_bytes() == food_files()[
        "images/baklava/1000.jpg"
    ]
    assert "food-101.tar.gz" in capsys.readouterr().out.rpartition("Not needed any more")[2]
    (home / "food101" / "food-101.tar.gz").unlink()
    assert listing("food101") == found


@pytest.mark.usefixtures("any_checksum")
def test_signs_are_split_by_track_and_have_a_test_part(home: Path) -> None:
    write_signs(home / "signs")
    found = listing("signs")
    assert found.classes == ("00", "14")
    both = {("train", "00"): 9, ("val", "00"): 3, ("train", "14"): 9, ("val", "14"): 3}
    assert counts(found) == both | {("test", "00"): 1, ("test", "14"): 2}
    for name in found.classes:
        held_out = [i.file for i in found.items if i.split == "val" and f"/{name}/" in i.file]
        assert len({file.rpartition("_")[0] for file in held_out}) == 1
    # As the run's settings have it: the folder and the flag give the same split.
    again = Config("transfer", data=str(found.root), group_by="track")
    assert list_photos(again) == found


def test_an_unpacked_food_is_used_and_stays(home: Path) -> None:
    unpacked = home / "food101" / "food-101"
    for name, content in food_files().items():
        (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
        (unpacked / name).write_bytes(content)
    assert sum(counts(listing("food101")).values()) == 16
    assert len([path for path in unpacked.rglob("*") if path.is_file()]) == 18
    shutil.rmtree(home / "food101" / "food101")
    (unpacked / "images/baklava/1003.jpg").unlink()
    with pytest.raises(DataError, match=r"not complete: there is no .*baklava/1003\.jpg"):
        listing("food101")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Publishes tmp_path/published, on this machine only."""
    monkeypatch.undo()  # the network is there
    (tmp_path / "published").mkdir()
    handler = functools.partial(_Quiet, directory=str(tmp_path / "published"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_download_with_its_checksum(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_food(tmp_path / "published")
    archive = tmp_path / "published" / "food-101.tar.gz"
    monkeypatch.delenv("THAW_DATA", raising=False)
    monkeypatch.setattr("torchvision.datasets.Food101._URL", f"{server}/food-101.tar.gz")
    folder = tmp_path / "cache" / "data" / "food101"
    with pytest.raises(DataError, match=r"cannot be downloaded or unpacked.*corrupted"):
        find_data("food101", tmp_path / "cache")
    assert not (folder / "food101").exists()
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr("torchvision.datasets.Food101._MD5", md5)
    assert find_data("food101", tmp_path / "cache") == folder / "food101"
    assert (folder / "food-101.tar.gz").read_bytes() == archive.read_bytes()


# --- what goes wrong ----------------------------------------------------------------------------


@BOTH
def test_offline_the_manual_steps_are_told(
    home: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", name]) == 2
    message = capsys.readouterr().err
    assert "no route to" in message
    assert f"as {'they are' if name == 'signs' else 'it is'} into {home / name}" in " ".join(
        message.split()
    )
    assert "Then run the same command again" in message
    assert "THAW_DATA=DIR" in message


@BOTH
def test_the_steps_name_what_torchvision_downloads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    kind = {"food101": "food101.Food101", "signs": "gtsrb.GTSRB"}[name]
    module, _, cls = kind.partition(".")
    monkeypatch.setattr(
        f"torchvision.datasets.{module}.download_and_extract_archive",
        lambda url, **_: asked.append(url),
    )
    for split in ("train", "test"):
        with pytest.raises(RuntimeError):
            getattr(torchvision.datasets, cls)(tmp_path, split, download=True)
    assert {url.rpartition("/")[2] for url in asked} == set(DATA_SETS[name].archives)
    assert all(url in DATA_SETS[name].by_hand for url in asked)


def test_a_damaged_archive_is_not_used(home: Path) -> None:
    write_food(home / "food101")  # its checksum is not the published one
    with pytest.raises(DataError, match=r"Of food-101\.tar\.gz only the undamaged are used"):
        listing("food101")
    assert sorted(p.name for p in (home / "food101").iterdir()) == [".lock", "food-101.tar.gz"]


@BOTH
@pytest.mark.usefixtures("any_checksum")
def test_an_interrupted_preparation_leaves_nothing(
    home: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITE[name](home / name)
    before = sorted(path.name for path in (home / name).iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("trainer.datasets.tqdm", _interrupting)
        with pytest.raises(KeyboardInterrupt):
            listing(name)
    assert sorted(path.name for path in (home / name).iterdir()) == [".lock", *before]
    assert listing(name).items


def _interrupting(things: Any, *_: object, **__: object) -> Iterator[Any]:
    for number, thing in enumerate(things):
        if number == 3:
            raise KeyboardInterrupt
        yield thing


def test_what_a_killed_process_left_is_not_taken_for_whole(home: Path) -> None:
    left = home / "oregon" / ".unfinished" / "oregon"
    for name in ("bear", "elk"):
        (left / name).mkdir(parents=True)
        (left / name / "1.jpg").write_bytes(photo(1))
    with pytest.raises(DataError, match="neither photos nor an archive is in"):
        listing("oregon")
    assert not left.exists()


@BOTH
def test_room_is_looked_for_first(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    needed = {"food101": "10.2 GB", "signs": "877 MB"}[name]
    with pytest.raises(DataError, match=rf"needs {needed} in {home / name}, and 1 MB are free"):
        listing(name)


def test_a_folder_that_cannot_be_written(home: Path) -> None:
    home.write_text("a file")
    with pytest.raises(DataError, match=r"Food-101 cannot be prepared in .*Not a directory"):
        listing("food101")


# --- Oregon Wildlife, which the user has --------------------------------------------------------


def oregon_files(inside: str = "oregon_wildlife/oregon_wildlife/") -> dict[str, bytes]:
    files = {f"{inside}{name}/{n}.jpg": photo(n) for name in ("bear", "elk") for n in range(4)}
    return files | {f"{inside}readme.txt": b"", "__MACOSX/bear/._0.jpg": b""}


@pytest.fixture
def oregon(home: Path) -> Path:
    (home / "oregon").mkdir(parents=True)
    return home / "oregon"


@pytest.mark.parametrize("inside", ["", "oregon_wildlife/", "oregon_wildlife/oregon_wildlife/"])
def test_oregon_from_its_archive(oregon: Path, inside: str) -> None:
    zipped(oregon / "archive.zip", oregon_files(inside))
    found = listing("oregon")
    assert (found.name, found.classes) == ("oregon", ("bear", "elk"))
    assert len(found.items) == 8
    assert found.root == oregon / "oregon"
    assert sorted(path.name for path in oregon.iterdir()) == [".lock", "archive.zip", "oregon"]


def test_oregon_from_a_folder_of_the_users_own(oregon: Path) -> None:
    for name, content in oregon_files().items():
        (oregon / name).parent.mkdir(parents=True, exist_ok=True)
        (oregon / name).write_bytes(content)
    found = listing("oregon")
    assert found.root == oregon / "oregon_wildlife" / "oregon_wildlife"
    assert (found.name, len(found.items)) == ("oregon", 8)
    assert not (oregon / "oregon").exists()


def test_without_oregon_the_steps_are_told(
    oregon: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        listing("oregon")
    assert "https://www.kaggle.com/datasets/virtualkerala/oregon-wildlife" in str(caught.value)
    assert f"into {oregon}" in str(caught.value)
    assert "./oregon" not in str(caught.value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "oregon").mkdir()
    with pytest.raises(DataError, match=r"The folder .*/oregon is --data \./oregon"):
        listing("oregon")


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system = 3
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    "member",
    ["../evil.jpg", "bear/../../evil.jpg", "/tmp/evil.jpg", "bear\\..\\evil.jpg", link("bear/x")],
)
def test_an_archive_that_reaches_outside_is_refused(
    oregon: Path, member: str | zipfile.ZipInfo
) -> None:
    with zipfile.ZipFile(zipped(oregon / "a.zip", oregon_files()), "a") as archive:
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(DataError, match="is a link or lies outside"):
        listing("oregon")
    assert sorted(path.name for path in oregon.iterdir()) == [".lock", "a.zip"]
    assert not list(oregon.parent.rglob("evil*"))


def test_archives_that_cannot_be_used(oregon: Path) -> None:
    whole = zipped(oregon / "a.zip", oregon_files()).read_bytes()
    for damaged in (whole[:-200], b"", whole.replace(photo(2), photo(2)[::-1])):
        (oregon / "a.zip").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.zip cannot be unpacked .*Download it again"):
            listing("oregon")
    zipped(oregon / "a.zip", {"notes/readme.txt": b""})
    with pytest.raises(DataError, match=r"a\.zip holds no class folders with photos"):
        listing("oregon")
    (oregon / "b.zip").write_bytes(whole)
    with pytest.raises(DataError, match="2 archives are in"):
        listing("oregon")
    assert not (oregon / "oregon").exists()


def test_two_at_once_prepare_it_once(oregon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped(oregon / "a.zip", oregon_files())
    made: list[str] = []
    known = DATA_SETS["oregon"]

    def make(*arguments: Any) -> None:
        made.append("once")
        known.make(*arguments)

    counting = dataclasses.replace(known, make=make)
    monkeypatch.setitem(DATA_SETS, "oregon", counting)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(find_data("oregon", oregon))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [oregon / "oregon"] * 4
    assert made == ["once"]


def test_class_folders_of_the_users_own_are_named_too(home: Path) -> None:
    for n in range(12):
        for name in ("00", "01"):
            path = home / "signs" / name / f"{n // 3:05d}_{n % 3:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo(n, "PNG"))
    found = listing("signs")
    assert found.root == home / "signs"
    assert counts(found)[("val", "00")] == 3

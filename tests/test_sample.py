"""The sample data set: what the trainer and the README's demo rely on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer import sample
from trainer.sample import CLASSES, PHOTOS_PER_CLASS, SAMPLE_VERSION, prepare_sample, render
from trainer.sample.board import choose_pose
from trainer.sample.textures import generator
from trainer.schema import ThawError


def _photos(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_there_are_twelve_classes_in_the_order_of_their_folders() -> None:
    assert len(CLASSES) == 12
    assert list(CLASSES) == sorted(set(CLASSES))


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_renders_as_a_small_rgb_photo(name: str) -> None:
    photo = render(name, 0)
    assert photo.mode == "RGB"
    assert 216 <= min(photo.size) <= 264
    assert 288 <= max(photo.size) <= 352
    assert np.asarray(photo).std() > 5, "the photo is nearly of one colour"


def test_sizes_and_orientations_vary() -> None:
    sizes = {render("stop", index).size for index in range(12)}
    assert len(sizes) > 6
    assert {width > height for width, height in sizes} == {True, False}


def test_the_same_photo_comes_out_whatever_was_rendered_before() -> None:
    first = render("yield", 3).tobytes()
    render("stop", 9)
    np.random.seed(1)
    assert render("yield", 3).tobytes() == first


def test_other_processes_render_the_same_photo() -> None:
    code = (
        "import hashlib; from trainer.sample import render;"
        "print(hashlib.sha256(render('speed_30', 2).tobytes()).hexdigest())"
    )
    digests = set()
    for seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        root = Path(sample.__file__).parents[2]
        done = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1


def test_photos_of_a_class_and_of_two_classes_differ() -> None:
    photos = [render(name, index) for name in ("speed_30", "speed_50") for index in range(4)]
    assert len({photo.tobytes() for photo in photos}) == len(photos)


def test_the_version_is_part_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = render("stop", 0).tobytes()
    monkeypatch.setattr(sample, "SAMPLE_VERSION", SAMPLE_VERSION + 1)
    assert render("stop", 0).tobytes() != before


def test_the_sign_lies_inside_the_centre_crop() -> None:
    for index in range(40):
        pose = choose_pose(generator(f"thaw-sample/{SAMPLE_VERSION}/stop/{index}"), 320, 240)
        # Evaluation resizes to 256 and crops 224: of 240 pixels, the middle 210.
        assert abs(pose.x - 160) + pose.radius <= 107
        assert abs(pose.y - 120) + pose.radius <= 107


@pytest.mark.parametrize(("name", "index"), [("bus_stop", 0), ("stop", -1)])
def test_a_photo_that_does_not_exist_is_a_user_error(name: str, index: int) -> None:
    with pytest.raises(ThawError):
        render(name, index)


def test_prepare_writes_a_folder_per_class(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    folder = prepare_sample(
        tmp_path / "new" / "cache", per_class=2, progress=lambda *step: steps.append(step)
    )
    assert sorted(p.name for p in folder.iterdir()) == list(CLASSES)
    for name in CLASSES:
        assert sorted(p.name for p in (folder / name).iterdir()) == ["000.jpg", "001.jpg"]
    with Image.open(folder / "stop" / "001.jpg") as photo:
        assert photo.format == "JPEG"
        assert photo.size == render("stop", 1).size
    assert steps == [(done, 24) for done in range(1, 25)]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name], "a workshop was left behind"


def test_prepare_again_renders_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare_sample(tmp_path, per_class=1)

    def forbidden(class_name: str, index: int) -> Image.Image:
        raise AssertionError("rendered again")

    monkeypatch.setattr(sample, "render", forbidden)
    assert prepare_sample(tmp_path, per_class=1) == folder


def test_the_count_is_part_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "render", lambda *_: Image.new("RGB", (8, 8)))
    assert prepare_sample(tmp_path).name == f"sample-v{SAMPLE_VERSION}"
    assert len(list(tmp_path.rglob("*.jpg"))) == 12 * PHOTOS_PER_CLASS
    assert prepare_sample(tmp_path, per_class=1).name == f"sample-v{SAMPLE_VERSION}-1"


def test_lost_and_empty_photos_are_rendered_again(tmp_path: Path) -> None:
    folder = prepare_sample(tmp_path, per_class=1)
    before = _photos(folder)
    (folder / "stop" / "000.jpg").unlink()
    (folder / "yield" / "000.jpg").write_bytes(b"")
    prepare_sample(tmp_path, per_class=1)
    assert _photos(folder) == before


def test_what_a_killed_process_left_is_not_used_and_goes_in_time(tmp_path: Path) -> None:
    name = f".sample-v{SAMPLE_VERSION}-1-4242-"
    for tail in ("old", "young"):
        (tmp_path / (name + tail) / "stop").mkdir(parents=True)
        (tmp_path / (name + tail) / "stop" / "000.jpg").write_bytes(b"half a ph")
    long_ago = time.time() - 2 * 3600
    os.utime(tmp_path / f"{name}old", (long_ago, long_ago))
    folder = prepare_sample(tmp_path, per_class=1)
    assert len(_photos(folder)) == 12
    assert (folder / "stop" / "000.jpg").stat().st_size > 1000
    assert not (tmp_path / f"{name}old").exists()
    assert (tmp_path / f"{name}young").exists(), "its process may be at work"


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(class_name: str, index: int) -> Image.Image:
        if class_name == "stop":
            raise KeyboardInterrupt
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(sample, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_sample(tmp_path, per_class=1)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_at_once_both_succeed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from trainer.sample import prepare_sample;"
        "print(prepare_sample(Path(sys.argv[1]), per_class=1))"
    )
    root = Path(sample.__file__).parents[2]
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) for _ in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert Path(output.decode().strip()) == tmp_path / f"sample-v{SAMPLE_VERSION}-1"
    assert len(list(tmp_path.glob("*/*/*.jpg"))) == 12
    assert len(list(tmp_path.iterdir())) == 1


def test_losing_the_race_keeps_the_winner_s_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sample.render
    winner = tmp_path / f"sample-v{SAMPLE_VERSION}-1"

    def late(class_name: str, index: int) -> Image.Image:
        if class_name == CLASSES[-1]:  # the other process finishes while we render our last photo
            monkeypatch.setattr(sample, "render", real)
            prepare_sample(tmp_path, per_class=1)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(sample, "render", late)
    assert prepare_sample(tmp_path, per_class=1) == winner
    assert [p.name for p in tmp_path.iterdir()] == [winner.name]
    assert len(_photos(winner)) == 12


@pytest.mark.parametrize("blocked", ["cache", "sample"])
def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path: Path, blocked: str) -> None:
    cache = tmp_path / "cache"
    if blocked == "sample":
        cache.mkdir()
        (cache / f"sample-v{SAMPLE_VERSION}-1").write_text("a file in the folder's place")
    else:
        cache.write_text("a file in the folder's place")
    with pytest.raises(ThawError, match="choose another with --cache-dir") as caught:
        prepare_sample(cache, per_class=1)
    assert str(cache) in str(caught.value)


def test_no_photos_per_class_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(ThawError):
        prepare_sample(tmp_path, per_class=0)


def test_it_needs_no_torch() -> None:
    code = "import sys, trainer.sample; sys.exit('torch' in sys.modules)"
    root = Path(sample.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0

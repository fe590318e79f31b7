"""The sample data set: photographs of road signs, rendered by our own code (Pillow + numpy).

It needs no download and no licence, and is what the trainer uses when it gets no --data. A photo
depends on (SAMPLE_VERSION, class, index) and on the installed Pillow alone: never on the process,
the order of calls or a global random state. What surrounds a sign is drawn without knowing the
class, so a network cannot cheat by learning the street instead of the sign.

A photo is made as a camera would: `backdrop` (street, country, wall or hedge), then `put_up`
(the sign, worn, turned in space, on its pole), `foreground` (leaves, wires and posts in front of
it), `light` (time of day, shadows, fog) and `take_photo` (blur, noise, JPEG).
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from PIL import Image

from trainer.sample.backdrops import backdrop
from trainer.sample.board import choose_pose, put_up
from trainer.sample.camera import foreground, light, take_photo
from trainer.sample.textures import generator, to_floats
from trainer.schema import ThawError

CLASSES: Final = (
    "ahead_only",
    "no_entry",
    "no_parking",
    "pedestrians",
    "priority_road",
    "road_works",
    "roundabout",
    "speed_30",
    "speed_50",
    "stop",
    "turn_right",
    "yield",
)
# Raise it with every change that moves pixels: it is part of the seed and of the folder's name.
SAMPLE_VERSION: Final = 1
PHOTOS_PER_CLASS: Final = 56

_JPEG_QUALITY: Final = 90
_STALE_SECONDS: Final = 3600.0


def render(class_name: str, index: int) -> Image.Image:
    """Photo number `index` (0, 1, ...) of a class.

    Returns an RGB image of about 320 x 240 pixels (sides 216 to 352, landscape or portrait); the
    sign lies inside the centre crop. Raises ThawError for an unknown class or a negative index.
    """
    if class_name not in CLASSES:
        raise ThawError(f"The sample has no class {class_name!r}; it has: {', '.join(CLASSES)}.")
    if index < 0:
        raise ThawError(f"The sample's photos count from 0, so there is no photo {index}.")
    rng = generator(f"thaw-sample/{SAMPLE_VERSION}/{class_name}/{index}")
    scale = rng.uniform(0.9, 1.1)
    width, height = round(320 * scale), round(240 * scale)
    if rng.random() < 0.3:
        width, height = height, width
    photo = backdrop(rng, width, height)
    pose = choose_pose(rng, width, height)
    photo = put_up(rng, photo, class_name, pose)
    photo = foreground(rng, photo, pose)
    return take_photo(rng, light(rng, to_floats(photo), pose))


def prepare_sample(
    cache_dir: Path,
    *,
    per_class: int = PHOTOS_PER_CLASS,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The folder with the sample, `<class>/<index>.jpg`, rendered on the first call only.

    The folder appears complete or not at all, and processes may call this at the same time.
    Photos that have since been lost (cleaners of temporary folders) are rendered again.
    `progress` is called with (photos written, photos to write). Raises ThawError where the folder
    cannot be written.
    """
    if per_class < 1:
        raise ThawError(f"The sample needs at least one photo per class, not {per_class}.")
    count = "" if per_class == PHOTOS_PER_CLASS else f"-{per_class}"
    folder = cache_dir / f"sample-v{SAMPLE_VERSION}{count}"
    try:
        missing = _missing(folder, per_class)
        if missing:
            _write(folder, missing, progress)
    except OSError as error:
        raise ThawError(
            f"The sample photos cannot be written to {folder} ({error.strerror or error}). "
            "Make room or make the folder writable, or choose another with --cache-dir."
        ) from error
    return folder


_Item = tuple[str, int]


def _file(folder: Path, item: _Item) -> Path:
    return folder / item[0] / f"{item[1]:03d}.jpg"


def _missing(folder: Path, per_class: int) -> list[_Item]:
    items = [(name, index) for name in CLASSES for index in range(per_class)]
    return [item for item in items if not _has_content(_file(folder, item))]


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _write(
    folder: Path, items: Sequence[_Item], progress: Callable[[int, int], None] | None
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    # Not tempfile.mkdtemp: its folders are closed to other users, and a cache may be shared.
    workshop = folder.with_name(f".{folder.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        for done, item in enumerate(items, start=1):
            path = _file(workshop, item)
            path.parent.mkdir(parents=True, exist_ok=True)
            render(*item).save(path, quality=_JPEG_QUALITY)
            if progress is not None:
                progress(done, len(items))
        _install(workshop, folder, items)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _install(workshop: Path, folder: Path, items: Sequence[_Item]) -> None:
    try:
        workshop.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        # Another process was faster, or some photos were lost: ours are the same, file by file.
        for item in items:
            target = _file(folder, item)
            target.parent.mkdir(exist_ok=True)
            _file(workshop, item).replace(target)


def _remove_stale(folder: Path) -> None:
    """Delete what killed processes left; younger workshops may still be in use."""
    for path in folder.parent.glob(f".{folder.name}-*-*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # its owner has just removed it

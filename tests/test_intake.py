"""One photo of each kind: the rule for it, and the same input tensor in trainer, infer and app."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import explorer.classify as app
import export.classifier
from export.classifier import Classifier
from trainer.checkpoint import load_checkpoint
from trainer.config import Config
from trainer.data import load_photos
from trainer.model import InputNormalize
from trainer.preprocess import open_photo
from trainer.runlog import Run, checkpoint_path

RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 160, 60), (40, 60, 200), (255, 255, 255)
ORIENTATION = 0x0112
# What Pillow has to do to an upright image to store it as this orientation says.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def corners() -> Image.Image:
    """300 x 200, each quarter in a colour of its own."""
    image = Image.new("RGB", (300, 200), RED)
    for color, box in ((GREEN, (150, 0)), (BLUE, (0, 100)), (WHITE, (150, 100))):
        image.paste(color, (*box, box[0] + 150, box[1] + 100))
    return image


def content(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    stored, exif = corners(), Image.Exif()
    exif[ORIENTATION] = orientation
    if (how := STORED[orientation]) is not None:
        stored = stored.transpose(how)
    return content(stored, "PNG", exif=exif)


def see_through() -> Image.Image:
    image = corners().convert("RGBA")
    image.paste((0, 0, 0, 0), (150, 100, 300, 200))
    return image


def palette() -> bytes:
    image = corners().quantize(4)
    clear = image.getpixel((299, 199))
    return content(image, "PNG", transparency=clear)


def grey(image: Image.Image) -> Image.Image:
    return image.convert("L")


def deep_grey() -> bytes:
    return content(Image.fromarray(np.asarray(grey(corners())).astype(np.uint16) << 8), "PNG")


def several(kind: str) -> bytes:
    others = [Image.new("RGB", (300, 200), "black")]
    return content(corners(), kind, save_all=True, append_images=others)


KINDS: dict[str, tuple[bytes, Image.Image]] = {
    **{f"exif-{number}.png": (turned(number), corners()) for number in STORED},
    "grey.jpg": (content(grey(corners()), "JPEG"), grey(corners()).convert("RGB")),
    "cmyk.jpg": (content(corners().convert("CMYK"), "JPEG", quality=95), corners()),
    "16-bit.png": (deep_grey(), grey(corners()).convert("RGB")),
    "palette.png": (palette(), corners()),
    "alpha.png": (content(see_through(), "PNG"), corners()),
    "animated.gif": (several("GIF"), corners()),
    "animated.webp": (content(corners(), "WEBP", lossless=True, save_all=True), corners()),
    "mpo.mpo": (several("MPO"), corners()),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_becomes_the_upright_photo(name: str) -> None:
    """Turned as EXIF says, transparency over white, 16 bits scaled to 8, the first of several."""
    stored, wanted = KINDS[name]
    found = open_photo(io.BytesIO(stored))
    assert (found.mode, found.size) == ("RGB", wanted.size)
    for place in ((40, 40), (260, 40), (40, 160), (260, 160)):
        off = np.subtract(found.getpixel(place), wanted.getpixel(place))
        assert np.abs(off).max() <= 6, (place, found.getpixel(place))


def test_trainer_infer_and_app_see_the_same_bytes(
    exported: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = (content(corners().resize((2400, 1600)), "JPEG"), corners())
    kinds = {**KINDS, "large.jpg": large}
    for split in ("train", "val"):
        for label in ("one", "two"):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for name, (stored, _) in kinds.items():
                if label == "one" or name == "exif-1.png":  # a second class, for the trainer
                    (folder / name).write_bytes(stored)
    preprocess = load_checkpoint(checkpoint_path(exported, "after")).preprocess
    config = Config("transfer", data=str(tmp_path / "photos"), cache=False)
    photos = load_photos(config, preprocess)
    assert not photos.rejected
    seen = []
    monkeypatch.setattr(
        export.classifier,
        "_probabilities",
        lambda session, rows: seen.append(rows) or session.probabilities(rows),
    )
    shown: list[torch.Tensor] = []
    forward = InputNormalize.forward
    monkeypatch.setattr(
        InputNormalize, "forward", lambda self, rows: shown.append(rows) or forward(self, rows)
    )
    infer = Classifier.load(exported.path / "model.onnx", "cpu")
    networks = (
        app.Classifier(checkpoint_path(exported, "after")),
        app.Exported(exported.path / "model.onnx"),
    )
    for index, file in enumerate(photos.val.files):
        path = tmp_path / "photos" / file
        expected = photos.val.photos[index : index + 1].tobytes()
        assert photos.train.photos[index : index + 1].tobytes() == expected
        list(infer.classify([path]))
        assert seen[-1].tobytes() == expected, file
        upload = app.decode(io.BytesIO(path.read_bytes()), preprocess)
        for network in networks:
            network.predict([upload])
        assert shown[-1].numpy().tobytes() == expected, file
        assert seen[-1].tobytes() == expected, file

"""The classify page: photos through a run's network from before and after unfreezing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

import streamlit as st
from PIL import Image

from explorer.classify import (
    Classifier,
    Prediction,
    Slot,
    agreement,
    decode,
    slots,
    thumbnail,
)
from explorer.pages import parts
from trainer.preprocess import PHOTO_SUFFIXES, PhotoError
from trainer.schema import ThawError

_MAX_PHOTOS: Final = 50  # on one page; more belong on the command line


@dataclass(frozen=True)
class Upload:
    name: str
    content: bytes


@dataclass(frozen=True)
class Ready:
    """A network that is loaded; `stamp` changes with the checkpoint's file."""

    slot: Slot
    classifier: Classifier
    stamp: str


def page() -> None:
    snapshot = parts.opened("What does the network see, before and after?")
    if snapshot is None:
        return
    left, right = st.columns([3, 1])
    with left:
        run = parts.choose_run(snapshot, lambda run: run.boundary is not None)
    with right:
        source = parts.one_of("Photos from", ["Files", "Camera"], key="source")
    uploads = _photos(source)
    networks = slots(run)
    if uploads:
        _results(networks, uploads)
    else:
        _explain(networks)
    parts.problems(snapshot)


def _photos(source: str) -> list[Upload]:
    if source == "Camera":
        shot = st.camera_input("Take a photo (the browser allows it on localhost or https only)")
        return [Upload("camera", shot.getvalue())] if shot else []
    suffixes = sorted(suffix.removeprefix(".") for suffix in PHOTO_SUFFIXES)
    files = st.file_uploader("Photos", type=suffixes, accept_multiple_files=True, key="files")
    if len(files) > _MAX_PHOTOS:
        st.warning(
            f"Only the first {_MAX_PHOTOS} of {len(files)} photos are shown here. For many photos "
            "use the exported model: python -m export.infer model.onnx FOLDER"
        )
    return [Upload(file.name, file.getvalue()) for file in files[:_MAX_PHOTOS]]


def _explain(networks: Sequence[Slot]) -> None:
    for slot in networks:
        if slot.reason:
            st.text(f"{slot.title}: {slot.reason}")
    if len(networks) == 2:
        st.caption("Both networks answer side by side. Photos stay on this machine.")
    else:
        st.caption(
            "This run was not unfrozen, so there is one network. Photos stay on this machine."
        )


def _results(networks: Sequence[Slot], uploads: Sequence[Upload]) -> None:
    ready = [_load(slot) for slot in networks]
    for slot, outcome in zip(networks, ready, strict=True):
        if isinstance(outcome, str):
            st.text(f"{slot.title}: {outcome}")
    loaded = [each for each in ready if isinstance(each, Ready)]
    tally = st.container()
    marks = [_photo(upload, loaded) for upload in uploads] if loaded else []
    compared = [text for text in marks if text]
    if len(compared) > 1:
        same = sum(text.startswith("same") for text in compared)
        tally.text(f"The networks agree on {same} of {len(compared)} photos.")


def _load(slot: Slot) -> Ready | str:
    """The network of a slot, or the reason why there is none."""
    if slot.path is None:
        return slot.reason
    try:
        status = slot.path.stat()
        stamp = f"{slot.path} {status.st_mtime_ns} {status.st_size}"
        with st.spinner("Loading the network"):
            return Ready(slot, _classifier(str(slot.path), stamp), stamp)
    except ThawError as error:
        return str(error)
    except OSError as error:
        return f"{slot.path} cannot be read: {error.strerror}."


@st.cache_resource(max_entries=6, show_spinner=False)
def _classifier(path: str, stamp: str) -> Classifier:
    """`stamp` makes a checkpoint that was written anew load anew."""
    return Classifier(Path(path))


@st.cache_data(max_entries=500, show_spinner=False)
def _predict(_classifier: Classifier, stamp: str, digest: str, _image: Image.Image) -> Prediction:
    """Cached by checkpoint and photo, so that another click on the page costs nothing."""
    return _classifier.predict(_image)


def _photo(upload: Upload, networks: Sequence[Ready]) -> str:
    """Show one photo with its answers; returns the agreement."""
    with st.container(border=True):
        try:
            image = decode(io.BytesIO(upload.content), networks[0].classifier.preprocess)
        except PhotoError as error:
            st.text(f"{upload.name} could not be read: {error}")
            return ""
        digest = sha256(upload.content).hexdigest()
        answers = [_predict(each.classifier, each.stamp, digest, image) for each in networks]
        verdict = agreement(answers)
        picture, *columns = st.columns([1.1, *[2] * len(networks)], gap="medium")
        with picture:
            st.image(thumbnail(image), width=220)
            st.text(upload.name)
            parts.mark(verdict)
        for column, each, answer in zip(columns, networks, answers, strict=True):
            with column:
                parts.prediction(each.slot.title, answer)
        return verdict

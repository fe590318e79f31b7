"""Checkpoints: written atomically, loaded only if the bytes are those that were written.

A checkpoint `<phase>-<best|last>.pt` holds everything needed to build the network anew, and beside
it `<name>.pt.sha256` its SHA-256: torch loads a file with a flipped byte without complaint.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from trainer.files import read_bounded, write_atomically
from trainer.model import ModelError, ModelSpec, build_model
from trainer.schema import SCHEMA_VERSION, Phase, Preprocess, ThawError

_MOST_BYTES: Final = 16 << 30


class CheckpointError(ThawError):
    """A checkpoint that is missing, damaged, or of another network."""


@dataclass(frozen=True)
class Checkpoint:
    """A network's weights with what they mean. `epoch` counts over the whole lineage.

    `optimizer` is the state to train on with, where there was a step before and one may follow.
    """

    spec: ModelSpec
    classes: tuple[str, ...]
    preprocess: Preprocess
    phase: Phase
    epoch: int
    state_dict: Mapping[str, Tensor] = field(repr=False)
    sha256: str = ""
    optimizer: dict[str, Any] | None = field(default=None, repr=False)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> str:
    """Write the checkpoint and its hash; returns the SHA-256."""
    buffer = io.BytesIO()
    torch.save(
        {
            "schema_version": SCHEMA_VERSION,
            "spec": checkpoint.spec.to_dict(),
            "classes": list(checkpoint.classes),
            "preprocess": checkpoint.preprocess.to_dict(),
            "phase": checkpoint.phase,
            "epoch": checkpoint.epoch,
            "state_dict": dict(checkpoint.state_dict),
            "optimizer": checkpoint.optimizer,
        },
        buffer,
    )
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    try:
        # The new hash joins the old one first: whichever of the two files a crash leaves behind, a
        # listed hash fits it.
        old = _listed_hashes(path)[:1] if path.exists() else []
        _write_hashes(path, [digest, *old])
        write_atomically(path, content)
        _write_hashes(path, [digest])
    except OSError as error:
        raise CheckpointError(f"Cannot write the checkpoint {path}: {error.strerror}.") from error
    return digest


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint, onto the CPU. Raises CheckpointError; never runs a pickle."""
    try:
        content = read_bounded(path, _MOST_BYTES)
    except OSError as error:
        raise CheckpointError(f"Cannot read the checkpoint {path}: {error.strerror}.") from error
    digest = hashlib.sha256(content).hexdigest()
    listed = _listed_hashes(path)
    if digest not in listed:
        what = "its .sha256 file is missing" if not listed else "its SHA-256 does not match"
        raise CheckpointError(f"The checkpoint {path} is damaged or was replaced: {what}.")
    try:
        _check_archive(content)
        data = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return _from_data(data, digest)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many kinds on foreign content
        raise CheckpointError(f"{path} is not a checkpoint of Thaw: {said_of(error)}") from error


def said_of(error: Exception) -> object:
    """Why torch did not load a file; of a pickle that may run code it says how to run it."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors, numbers and texts, and could run code"
    return error


def _check_archive(content: bytes) -> None:
    """torch unpacks what is compressed, though it never writes it so."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > len(content):
            raise CheckpointError("The checkpoint unpacks to more than it is.")


def _from_data(data: Mapping[str, Any], digest: str) -> Checkpoint:
    if data["schema_version"] > SCHEMA_VERSION:
        raise CheckpointError("The checkpoint was written by a newer Thaw; update to read it.")
    _check_sizes(data)
    spec = data["spec"]
    return Checkpoint(
        spec=ModelSpec(spec["arch"], spec["num_classes"], tuple(spec["head"]), spec["pool"]),
        classes=tuple(data["classes"]),
        preprocess=Preprocess.from_dict(data["preprocess"]),
        phase=data["phase"],
        epoch=data["epoch"],
        state_dict=data["state_dict"],
        sha256=digest,
        optimizer=data.get("optimizer"),
    )


def _check_sizes(data: Mapping[str, Any]) -> None:
    """The network is built before its weights can be compared with it, so the sizes that it is
    built of must be those of weights that are there."""
    spec, classes, weights = data["spec"], data["classes"], data["state_dict"].values()
    there = {
        side
        for tensor in weights
        if tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
        for side in tensor.shape
    }
    sizes = (spec["num_classes"], *spec["head"])
    sound = set(sizes) <= there and all(type(size) is int for size in sizes)
    if not sound or len(classes) != sizes[0] or not all(isinstance(c, str) for c in classes):
        raise CheckpointError("Classes and weights of the checkpoint do not fit its network.")


def load_model(path: Path) -> tuple[nn.Module, Checkpoint]:
    """The network of a checkpoint, in evaluation mode on the CPU, and the checkpoint itself."""
    checkpoint = load_checkpoint(path)
    return restore_model(checkpoint), checkpoint


def restore_model(checkpoint: Checkpoint) -> nn.Module:
    """Build the checkpoint's network with its weights, in evaluation mode on the CPU."""
    try:
        network = build_model(checkpoint.spec)
        network.load_state_dict(checkpoint.state_dict)
    except ThawError:
        raise
    except Exception as error:  # a spec of any content meets torchvision's and timm's builders
        raise ModelError(
            f"The checkpoint does not fit the network {checkpoint.spec.arch}: {error}"
        ) from error
    return network.eval()


def _hash_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _listed_hashes(path: Path) -> list[str]:
    try:
        lines = read_bounded(_hash_path(path)).decode("ascii").splitlines()
    except (OSError, ValueError):
        return []
    return [line.split()[0] for line in lines if line.strip()]


def _write_hashes(path: Path, digests: list[str]) -> None:
    # The format of sha256sum, so that `sha256sum -c` checks it too.
    text = "".join(f"{digest}  {path.name}\n" for digest in digests)
    write_atomically(_hash_path(path), text.encode("ascii"))

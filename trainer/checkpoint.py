"""Checkpoints: written atomically, loaded only if the bytes are those that were written.

A checkpoint `<phase>-<best|last>.pt` holds everything needed to build the network anew, and beside
it `<name>.pt.sha256` its SHA-256: torch loads a file with a flipped byte without complaint.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model import ModelError, ModelSpec, build_model
from trainer.runlog import write_atomically
from trainer.schema import SCHEMA_VERSION, Phase, Preprocess, ThawError


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
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"Cannot read the checkpoint {path}: {error.strerror}.") from error
    digest = hashlib.sha256(content).hexdigest()
    listed = _listed_hashes(path)
    if digest not in listed:
        what = "its .sha256 file is missing" if not listed else "its SHA-256 does not match"
        raise CheckpointError(f"The checkpoint {path} is damaged or was replaced: {what}.")
    try:
        data = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return _from_data(data, digest)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many kinds on foreign content
        raise CheckpointError(f"{path} is not a checkpoint of Thaw: {error}") from error


def _from_data(data: Mapping[str, Any], digest: str) -> Checkpoint:
    if data["schema_version"] > SCHEMA_VERSION:
        raise CheckpointError("The checkpoint was written by a newer Thaw; update to read it.")
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


def load_model(path: Path) -> tuple[nn.Module, Checkpoint]:
    """The network of a checkpoint, in evaluation mode on the CPU, and the checkpoint itself."""
    checkpoint = load_checkpoint(path)
    return restore_model(checkpoint), checkpoint


def restore_model(checkpoint: Checkpoint) -> nn.Module:
    """Build the checkpoint's network with its weights, in evaluation mode on the CPU."""
    network = build_model(checkpoint.spec)
    try:
        network.load_state_dict(checkpoint.state_dict)
    except RuntimeError as error:
        raise ModelError(
            f"The checkpoint does not fit the network {checkpoint.spec.arch}: {error}"
        ) from error
    return network.eval()


def _hash_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _listed_hashes(path: Path) -> list[str]:
    try:
        lines = _hash_path(path).read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return []
    return [line.split()[0] for line in lines if line.strip()]


def _write_hashes(path: Path, digests: list[str]) -> None:
    # The format of sha256sum, so that `sha256sum -c` checks it too.
    text = "".join(f"{digest}  {path.name}\n" for digest in digests)
    write_atomically(_hash_path(path), text.encode("ascii"))

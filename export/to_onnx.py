"""A checkpoint becomes one self-contained ONNX file, or nothing at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from torch import Tensor, nn

import trainer
from export.metadata import INPUT, OUTPUTS, ModelMetadata, Which, file_name, parity_props
from export.parity import Parity, measure, validation_photos
from trainer.checkpoint import Checkpoint, load_model
from trainer.model import TIMM_PREFIX, InputNormalize
from trainer.runlog import Run, checkpoint_path, write_atomically
from trainer.schema import MODEL_ONNX, PARITY_JSON, Preprocess, ThawError

# What torch's exporter writes natively (others go through a converter), and ONNX Runtime >= 1.15
# reads.
OPSET: Final = 18


class ExportError(ThawError):
    """A network that cannot be exported, or a file that cannot be written."""


@dataclass(frozen=True)
class Exported:
    """A model.onnx that has been written."""

    path: Path
    size: int
    sha256: str
    metadata: ModelMetadata
    parity: Parity


class PhotoClassifier(nn.Module):
    """uint8 [N, H, W, 3] -> logits and probabilities, float32 [N, classes]: what is exported."""

    def __init__(self, network: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.normalize = InputNormalize(preprocess)
        self.network = network

    def forward(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(self.normalize(photos))
        return logits, torch.softmax(logits, dim=1)


def export_run(
    run: Run, which: Which = "after", output: Path | None = None, data: Path | None = None
) -> Exported:
    """Export a run's checkpoint; nothing is written before the file gave what PyTorch gives.

    `output` is the file to write (default: in the run's folder), `data` the place of the run's
    data folder if it has moved. Raises ThawError: ExportError, ParityError, or what is wrong with
    the run or its checkpoint.
    """
    path = output or run.path / file_name(MODEL_ONNX, which)
    _refuse_place(path)
    network, checkpoint = load_model(checkpoint_path(run, which))
    photos = validation_photos(run, data)
    classifier = PhotoClassifier(network, checkpoint.preprocess).eval()
    about = _describe(run, which, checkpoint)
    content = serialize(convert(classifier, checkpoint), about.to_props())
    parity = measure(classifier, content, photos.batches(checkpoint.preprocess), photos.missing)
    # Protocol buffers concatenate: what follows adds metadata to the very bytes that were measured.
    content += serialize(onnx.ModelProto(), parity_props(parity.to_dict()))
    onnx.checker.check_model(content, full_check=True)
    exported = Exported(
        path=path,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        metadata=about,
        parity=parity,
    )
    _write(exported.path, content)
    _write(run.path / file_name(PARITY_JSON, which), _parity_json(exported))
    return exported


def convert(classifier: PhotoClassifier, checkpoint: Checkpoint) -> onnx.ModelProto:
    """The network as an ONNX graph with a dynamic batch, without any trace of this machine."""
    side = checkpoint.preprocess.crop
    example = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    try:
        with _quietly():
            program = torch.onnx.export(
                classifier,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes={INPUT: {0: torch.export.Dim("N")}},
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever its many steps raise
        raise ExportError(
            f"torch {torch.__version__} cannot export {checkpoint.spec.arch} to ONNX: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    if program is None:
        raise ExportError(f"torch {torch.__version__} gave no ONNX graph.")
    model: onnx.ModelProto = program.model_proto
    _strip(model)
    return model


def _strip(message: Any) -> None:
    """Remove the exporter's notes, which hold source lines with the absolute paths of this machine,
    from the model and everything in it."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif hasattr(value, "ListFields"):
            _strip(value)
        elif field.message_type is not None:
            for part in value:
                _strip(part)


def serialize(model: onnx.ModelProto, props: Mapping[str, str]) -> bytes:
    """The file's bytes, with `props` as metadata; the same for the same model."""
    onnx.helper.set_model_props(model, dict(props))
    try:
        content: bytes = model.SerializeToString(deterministic=True)
    except Exception as error:  # the exception differs between protobuf's implementations
        raise ExportError(
            "The model exceeds 2 GB, the most that one ONNX file can hold; train a smaller --arch."
        ) from error
    return content


def _describe(run: Run, which: Which, checkpoint: Checkpoint) -> ModelMetadata:
    return ModelMetadata(
        classes=checkpoint.classes,
        preprocess=checkpoint.preprocess,
        run_id=run.run_id,
        checkpoint=which,
        phase=checkpoint.phase,
        epoch=checkpoint.epoch,
        checkpoint_sha256=checkpoint.sha256,
        arch=checkpoint.spec.arch,
        versions=_versions(checkpoint.spec.arch),
    )


def _versions(arch: str) -> dict[str, str]:
    packages = ["torch", "torchvision", "onnx", "onnxscript"]
    packages += ["timm"] if arch.startswith(TIMM_PREFIX) else []
    return {name: metadata.version(name) for name in packages} | {"thaw": trainer.__version__}


def _parity_json(exported: Exported) -> bytes:
    about = exported.metadata
    figures: dict[str, Any] = exported.parity.to_dict() | {
        "run_id": about.run_id,
        "checkpoint": about.checkpoint,
        "checkpoint_sha256": about.checkpoint_sha256,
        "onnx_sha256": exported.sha256,
        "versions": {**about.versions, "onnxruntime": _onnxruntime_version()},
    }
    return json.dumps(figures, indent=2, allow_nan=False).encode()


def _onnxruntime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _refuse_place(path: Path) -> None:
    """Asked before the minutes of work, not after."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ExportError(f"Cannot write {path}. Name a file in a writable folder with --output.")


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ExportError(f"Cannot write {path}: {error.strerror}.") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporter's running commentary off the screen; what fails is raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

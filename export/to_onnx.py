"""A checkpoint becomes one self-contained ONNX file, or nothing at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from torch import Tensor, nn

import trainer
from export.calibration import training_photos
from export.card import write_card
from export.half import in_half_precision
from export.metadata import (
    INPUT,
    OUTPUTS,
    ModelFileError,
    ModelMetadata,
    Which,
    file_name,
    parity_props,
)
from export.parity import measure, validation_photos
from export.precision import Parity, Precision
from export.quantize import quantize
from export.seal import seal
from export.session import open_session
from trainer.cache import say
from trainer.checkpoint import Checkpoint, load_model
from trainer.files import write_atomically
from trainer.model import TIMM_PREFIX, InputNormalize
from trainer.preprocess import Photo
from trainer.process import hushed
from trainer.runlog import Run, checkpoint_path
from trainer.schema import MODEL_ONNX, PARITY_JSON, Preprocess, ThawError

# The oldest that torch's exporter writes (asked for an older one, it writes this one); ONNX Runtime
# reads it since 1.15.
OPSET: Final = 18
_IR_VERSION: Final = 10  # torch's exporter writes it with every opset


class ExportError(ThawError):
    """A network that cannot be exported, or a file that cannot be written."""


@dataclass(frozen=True)
class Exported:
    """A model.onnx that has been written; `size` in bytes. Of an int8 model `kept_layers` are the
    modules that compute in float32."""

    path: Path
    size: int
    sha256: str
    metadata: ModelMetadata
    parity: Parity
    kept_layers: tuple[str, ...] = ()


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
    run: Run,
    which: Which = "after",
    output: Path | None = None,
    data: Path | None = None,
    *,
    precision: Precision = "fp32",
    opset: int = OPSET,
) -> Exported:
    """Export a run's checkpoint; nothing is written before the file gave what PyTorch gives.

    `output` is the file to write (default: in the run's folder), `data` the place of the run's
    data folder if it has moved. Raises ThawError: ExportError, ParityError, QuantizeError, or what
    is wrong with the run, its checkpoint or its photos.
    """
    path = output or run.path / file_name(MODEL_ONNX, which, precision)
    _refuse_place(path)
    _refuse_opset(opset)
    network, checkpoint = load_model(checkpoint_path(run, which))
    photos = validation_photos(run, data)
    classifier = PhotoClassifier(network, checkpoint.preprocess).eval()
    about = _describe(run, which, checkpoint, precision)
    training = None
    if precision == "int8":
        training = training_photos(run, photos.names, checkpoint.preprocess, data)
    model, kept, kept_layers = _in_precision(
        convert(classifier, checkpoint, opset), precision, training
    )
    content = serialize(model, about.to_props())
    batches = photos.batches(checkpoint.preprocess)
    parity = measure(classifier, content, batches, photos.missing, precision, kept)
    # Protocol buffers concatenate: what follows adds metadata to the very bytes that were measured.
    content += serialize(onnx.ModelProto(), parity_props(parity.to_dict()))
    content += seal(content)
    onnx.checker.check_model(content, full_check=True)
    exported = Exported(
        path=path,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        metadata=about,
        parity=parity,
        kept_layers=kept_layers,
    )
    _write(exported.path, content)
    _write_figures(run.path / file_name(PARITY_JSON, which, precision), exported)
    write_card(run, exported)
    return exported


def _write_figures(path: Path, exported: Exported) -> None:
    try:
        _write(path, _parity_json(exported))
    except ExportError as error:
        if exported.path.parent == path.parent:
            raise
        # --output is the way out where the runs folder is there for reading only.
        say(f"{error} Its figures are in the model itself, too.")


def _in_precision(
    model: onnx.ModelProto, precision: Precision, training: Photo | None
) -> tuple[onnx.ModelProto, tuple[str, ...], tuple[str, ...]]:
    """The graph, and what of it an int8 model keeps in float32: in words, and as modules."""
    if training is not None:
        quantized = quantize(model, training)
        return quantized.model, quantized.kept, quantized.kept_layers
    return (in_half_precision(model) if precision == "fp16" else model), (), ()


def convert(
    classifier: PhotoClassifier, checkpoint: Checkpoint, opset: int = OPSET
) -> onnx.ModelProto:
    """The network as an ONNX graph with a dynamic batch, without any trace of this machine."""
    side = checkpoint.preprocess.crop
    # Laid out so that the network sees contiguous channels: with channels last torch writes the
    # strides of each pooling into the graph, as computations on shapes that keep it off a GPU.
    example = torch.zeros(2, 3, side, side, dtype=torch.uint8).permute(0, 2, 3, 1)
    try:
        with hushed():
            program = torch.onnx.export(
                classifier,
                (example,),
                dynamo=True,
                opset_version=opset,
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
    written = {entry.domain: entry.version for entry in model.opset_import}
    if written != {"": opset}:
        raise ExportError(
            f"torch {torch.__version__} cannot write {checkpoint.spec.arch} with --opset {opset}. "
            f"Use --opset {OPSET}."
        )
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


def _describe(
    run: Run, which: Which, checkpoint: Checkpoint, precision: Precision
) -> ModelMetadata:
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
        precision=precision,
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
        "kept_layers": list(exported.kept_layers),
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


def _refuse_opset(opset: int) -> None:
    newest = onnx.defs.onnx_opset_version()
    if not OPSET <= opset <= newest:
        raise ExportError(
            f"--opset {opset}: torch {torch.__version__} writes {OPSET} and newer, and onnx "
            f"{onnx.__version__} knows them up to {newest}. Use --opset {OPSET}, the default."
        )
    helper = onnx.helper
    photos, same = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"
    )
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "try", [photos], [same])
    imports = [helper.make_opsetid("", opset)]
    tiny = helper.make_model(graph, opset_imports=imports, ir_version=_IR_VERSION)
    try:
        open_session(tiny.SerializeToString(), "cpu")
    except ModelFileError as error:
        raise ExportError(f"--opset {opset}: {error} Use --opset {OPSET}, the default.") from error


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ExportError(f"Cannot write {path}: {error.strerror}.") from error

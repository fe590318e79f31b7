"""What is measured: a model, its other precisions, the checkpoint it was made from."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

from export.classifier import Classifier
from export.engines import torch_candidates
from export.metadata import ModelFileError, ModelMetadata
from export.timing import BenchError, Candidate, LeftOut
from trainer.runlog import Run, checkpoint_path, find_run, read_run, run_folders
from trainer.schema import RUN_JSON, ThawError


@dataclass(frozen=True)
class ModelFile:
    """A model.onnx that was opened and found to be one of Thaw's."""

    path: Path
    content: bytes
    metadata: ModelMetadata

    @property
    def precision(self) -> str:
        return self.metadata.precision

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def read_model(path: Path) -> ModelFile:
    """Raises ModelFileError, also if the CPU cannot run it."""
    about = Classifier.load(path, "cpu").metadata
    return ModelFile(path, path.read_bytes(), about)


def siblings(model: ModelFile) -> tuple[list[ModelFile], list[LeftOut]]:
    """The same checkpoint in other precisions, in the same folder: model-fp16.onnx and the like.

    Of several files in one precision the one with the shortest name is taken.
    """
    found: list[ModelFile] = []
    left_out: list[LeftOut] = []
    begin = model.path.stem.split("-")[0]
    for path in sorted(model.path.parent.glob("*.onnx"), key=lambda p: (len(p.name), p.name)):
        if path.stem.split("-")[0] != begin or path.resolve() == model.path.resolve():
            continue
        try:
            other = read_model(path)
        except ModelFileError as error:
            left_out.append(LeftOut(path.name, None, None, str(error)))
            continue
        same = other.metadata.checkpoint_sha256 == model.metadata.checkpoint_sha256
        if same and other.precision not in (model.precision, *(file.precision for file in found)):
            found.append(other)
    return found, left_out


def find_checkpoint(model: ModelFile, runs_dir: Path, reference: str | None = None) -> Path:
    """The checkpoint that the model was made of; `reference` names its run, if it is not the one in
    the model's folder or in `runs_dir`. Raises ThawError when it is not there or another."""
    about = model.metadata
    run = find_run(runs_dir, reference) if reference else _run_of(model, runs_dir)
    path = checkpoint_path(run, "before" if about.checkpoint == "before" else "after")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BenchError(f"Cannot read the checkpoint {path}: {error.strerror}.") from error
    if hashlib.sha256(content).hexdigest() != about.checkpoint_sha256:
        raise BenchError(
            f"{path} is not the checkpoint that {model.path.name} was made of: its SHA-256 is not "
            f"{about.checkpoint_sha256[:12]}... Export the run anew, or name another with --torch."
        )
    return path


def _run_of(model: ModelFile, runs_dir: Path) -> Run:
    beside = model.path.absolute().parent
    if (beside / RUN_JSON).is_file():
        return read_run(beside)
    # Compared, not joined to a path: the id comes from the file.
    for folder in run_folders(runs_dir):
        if folder.name == model.metadata.run_id:
            return read_run(folder)
    raise BenchError(
        f"the run {model.metadata.run_id} is neither the model's folder nor in {runs_dir}; name it "
        "with --torch RUN."
    )


def torch_rows(model: ModelFile, args: argparse.Namespace) -> tuple[list[Candidate], list[LeftOut]]:
    if args.torch == "none":
        return [], []
    try:
        named = None if args.torch == "auto" else args.torch
        checkpoint = find_checkpoint(model, args.runs_dir, named)
    except ThawError as error:
        if args.torch != "auto":
            raise
        return [], [LeftOut("PyTorch", None, None, str(error))]
    try:
        import torch
    except ImportError as error:
        return [], [LeftOut("PyTorch", None, None, f"not installed here ({error})")]
    if args.threads:
        torch.set_num_threads(args.threads)
    on_cpu, on_gpu = args.device in ("auto", "cpu"), args.device != "cpu"
    found = torch_candidates(checkpoint, "cpu", args.compile) if on_cpu else []
    if on_gpu and torch.cuda.is_available():
        found += torch_candidates(checkpoint, "cuda", args.compile)
    elif on_gpu:
        return found, [LeftOut("PyTorch", None, "CUDA", "torch sees no GPU here")]
    return found, []

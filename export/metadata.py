"""What a model.onnx says about itself: the strings in its metadata (stdlib and trainer.schema)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from export.precision import PRECISIONS, Precision
from trainer.schema import Preprocess, ThawError

FORMAT: Final = 2
# From this format on a file ends with its SHA-256, see `export.seal`.
_SEALED: Final = 2
MOST_BYTES: Final = 2 << 30  # the most that a protocol buffer can have
INPUT: Final = "photos"
OUTPUTS: Final = ("logits", "probabilities")

Which = Literal["before", "after"]

_FORMAT_KEY: Final = "thaw_format"
_PARITY_KEY: Final = "parity"


def file_name(name: str, which: Which, precision: Precision = "fp32") -> str:
    """The trunk's model and other precisions get names of their own, or they would replace the
    model that the run is for: model-before-int8.onnx."""
    stem, _, suffix = name.rpartition(".")
    parts = [stem, *(word for word in (which, precision) if word not in ("after", "fp32"))]
    return f"{'-'.join(parts)}.{suffix}"


class ModelFileError(ThawError):
    """A file that is not a model of Thaw, or a damaged one."""


@dataclass(frozen=True)
class ModelMetadata:
    """What is needed to use a model.onnx, and where it comes from.

    `phase`, `epoch` (over the whole lineage), and `checkpoint_sha256` name the checkpoint;
    `checkpoint` is "before" or "after" the unfreezing. `parity` holds the figures of the comparison
    with PyTorch; it is empty until that has been made. A file that names no `precision` is fp32.
    """

    classes: tuple[str, ...]
    preprocess: Preprocess
    run_id: str
    checkpoint: str
    phase: str
    epoch: int
    checkpoint_sha256: str
    arch: str
    versions: Mapping[str, str]
    precision: Precision = "fp32"
    parity: Mapping[str, Any] = field(default_factory=dict)

    def to_props(self) -> dict[str, str]:
        """All but `parity`, as ONNX's metadata_props."""
        return {
            _FORMAT_KEY: str(FORMAT),
            "classes": json.dumps(self.classes),
            "preprocess": json.dumps(self.preprocess.to_dict()),
            "run_id": self.run_id,
            "checkpoint": self.checkpoint,
            "phase": self.phase,
            "epoch": str(self.epoch),
            "checkpoint_sha256": self.checkpoint_sha256,
            "arch": self.arch,
            "versions": json.dumps(self.versions, sort_keys=True),
            "precision": self.precision,
        }

    @classmethod
    def from_props(cls, props: Mapping[str, str], sealed: bool = True) -> ModelMetadata:
        """Inverse of `to_props` and `parity_props`; `sealed` is what `check_seal` said of the file.
        Raises ModelFileError."""
        if _FORMAT_KEY not in props:
            raise ModelFileError(
                "it was not written by Thaw: its metadata name no classes and no preprocessing. "
                "Make one with `python -m export RUN`."
            )
        try:
            if int(props[_FORMAT_KEY]) > FORMAT:
                raise ModelFileError("it was written by a newer Thaw; update to use it.")
            if int(props[_FORMAT_KEY]) >= _SEALED and not sealed:
                raise ModelFileError("the SHA-256 at its end is missing: it was changed or cut.")
            return cls(
                classes=_classes(json.loads(props["classes"])),
                preprocess=Preprocess.from_dict(json.loads(props["preprocess"])),
                run_id=props["run_id"],
                checkpoint=props["checkpoint"],
                phase=props["phase"],
                epoch=int(props["epoch"]),
                checkpoint_sha256=props["checkpoint_sha256"],
                arch=props["arch"],
                versions=_versions(json.loads(props["versions"])),
                precision=_precision(props.get("precision", "fp32")),
                parity=dict(json.loads(props.get(_PARITY_KEY, "{}"))),
            )
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ModelFileError(f"its metadata are damaged ({error!r}).") from error


def parity_props(figures: Mapping[str, Any]) -> dict[str, str]:
    """The figures of the comparison with PyTorch, as ONNX's metadata_props."""
    return {_PARITY_KEY: json.dumps(figures, allow_nan=False)}


def _classes(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError("classes")
    return tuple(names)


def _versions(said: Any) -> dict[str, str]:
    versions = dict(said)
    if not all(isinstance(text, str) for pair in versions.items() for text in pair):
        raise ValueError("versions")
    return versions


def _precision(name: str) -> Precision:
    for precision in PRECISIONS:
        if name == precision:
            return precision
    raise ValueError(f"precision {name!r}")

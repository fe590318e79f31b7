"""`python -m export RUN`: write the run's model.onnx. Parses and prints; to_onnx.py does it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.card import card_path
from export.precision import PRECISIONS, Parity
from trainer.cli import guarded, inert
from trainer.process import prepare_process
from trainer.runlog import find_run

if TYPE_CHECKING:
    from export.to_onnx import Exported


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (0 written, 2 refused)."""
    args = _parser().parse_args(argv)
    return guarded(lambda: _export(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Write a run's network as one self-contained ONNX file: photos in (uint8), "
        "logits and probabilities out, classes and preprocessing inside. Nothing is written unless "
        "the file gives what PyTorch gives on the run's validation photos.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="run id, a unique part of it, or its folder")
    parser.add_argument(
        "--checkpoint",
        choices=("before", "after"),
        default="after",
        help="before unfreezing, or the best after it (default: after)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write (default: model.onnx in the run's folder; model-before.onnx, "
        "model-int8.onnx and so on for other checkpoints and precisions)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="fp32; fp16 for GPUs; int8, smaller and faster on CPUs, calibrated on training photos "
        "and refused where it costs more than a point of accuracy (default: fp32)",
    )
    parser.add_argument(
        "--opset",
        type=int,
        metavar="N",
        help="ONNX operator set, for programs that need a newer one (default: 18)",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="the run's data folder, if it has moved"
    )
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: runs"
    )
    return parser


def _export(args: argparse.Namespace) -> int:
    prepare_process()
    # Inside, so that --help and a mistyped flag do not wait seconds for torch.
    from export.to_onnx import OPSET, export_run

    run = find_run(args.runs_dir, args.run)
    exported = export_run(
        run,
        args.checkpoint,
        args.output,
        args.data,
        precision=args.precision,
        opset=OPSET if args.opset is None else args.opset,
    )
    _print(exported)
    return 0


def _print(exported: Exported) -> None:
    path, classes, parity = exported.path, exported.metadata.classes, exported.parity
    names = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
    lines = {
        "written": f"{path} ({exported.size / 1e6:.1f} MB, {parity.precision})",
        "classes": f"{len(classes)}: {names}",
        "as PyTorch": _as_pytorch(parity),
        "accuracy": f"{parity.accuracy:.2%}, PyTorch {parity.accuracy_pytorch:.2%}",
        "in float32": _kept(exported),
        "card": str(card_path(path)),
        "next": f"python -m export.infer {shlex.quote(str(path))} PHOTOS...",
    }
    for title, text in lines.items():
        if text:
            print(f"{title + ':':<12}{inert(text)}")


def _kept(exported: Exported) -> str:
    if exported.parity.precision != "int8":
        return ""
    words = ", ".join(exported.parity.kept)
    return f"{len(exported.kept_layers)} layers: {words}" if words else "no layer"


def _as_pytorch(parity: Parity) -> str:
    gone = f" ({parity.photos_missing} more are gone)" if parity.photos_missing else ""
    tied = f" ({parity.ties} tied in PyTorch itself)" if parity.ties else ""
    allowed = f" (allowed {parity.tolerance:.1e})" if parity.precision != "int8" else ""
    share = f"{parity.top1_agreement:.2%}".replace(".00%", "%")
    return (
        f"{share} same class{tied} on {parity.photos} validation photos{gone}, logits within "
        f"{parity.max_abs_logit_difference:.1e}{allowed}, {parity.provider}"
    )


if __name__ == "__main__":
    sys.exit(main())

"""`python -m export RUN`: write the run's model.onnx. Parses and prints; to_onnx.py does it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
        help="file to write (default: model.onnx in the run's folder, model-before.onnx for "
        "--checkpoint before)",
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
    from export.to_onnx import export_run

    run = find_run(args.runs_dir, args.run)
    _print(export_run(run, args.checkpoint, args.output, args.data))
    return 0


def _print(exported: Exported) -> None:
    path, classes, parity = exported.path, exported.metadata.classes, exported.parity
    names = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
    gone = f" ({parity.photos_missing} more are gone)" if parity.photos_missing else ""
    for title, text in {
        "written": f"{path} ({exported.size / 1e6:.1f} MB)",
        "classes": f"{len(classes)}: {names}",
        "as PyTorch": f"{parity.top1_agreement:.0%} same class on {parity.photos} validation photos"
        f"{gone}, logits within {parity.max_abs_logit_difference:.1e} (allowed "
        f"{parity.tolerance:.1e}), {parity.provider}",
        "next": f"python -m export.infer {shlex.quote(str(path))} PHOTOS...",
    }.items():
        print(f"{title + ':':<12}{inert(text)}")


if __name__ == "__main__":
    sys.exit(main())

"""What `python -m export.bench` prints."""

from __future__ import annotations

import argparse
import json
import os
import platform
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort

import trainer
from export.bench_files import ModelFile
from export.gpu import gpu_name
from export.timing import BenchError, LeftOut, Measured, Row
from trainer.cli import inert
from trainer.files import write_atomically
from trainer.process import cpu_name, usable_cores, version_of

_ENOUGH_CALLS: Final = 100  # for a 99th percentile
_NOISY: Final = 0.2
_WIDTH: Final = 100
_SIZES_IN_A_ROW: Final = 6
_TORCH: Final = "PyTorch"
_PACKAGES: Final = ("openvino", "torch", "tensorrt")


def description(files: Sequence[ModelFile], args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, where and how; for the head and the JSON."""
    about = files[0].metadata
    return {
        "files": [
            {"path": str(f.path), "precision": f.precision, "sha256": f.sha256} for f in files
        ],
        "run_id": about.run_id,
        "phase": about.phase,
        "epoch": about.epoch,
        "checkpoint_sha256": about.checkpoint_sha256,
        "arch": about.arch,
        "classes": len(about.classes),
        "side": about.preprocess.crop,
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": args.threads,
        "gpu": None if args.device == "cpu" else gpu_name(),
        "versions": {"thaw": trainer.__version__, "python": platform.python_version()}
        | {"onnxruntime": str(ort.__version__)}
        | {name: found for name in _PACKAGES if (found := version_of(name))},
        "batches": sorted({1, *args.batches}),
        "seconds": args.seconds,
        "rounds": args.rounds,
    }


def head(about: dict[str, Any]) -> Iterator[str]:
    for number, file in enumerate(about["files"]):
        name = f"{file['path']}, {file['precision']}, sha256 {file['sha256'][:12]}"
        yield from _titled("" if number else "model:", name)
    network = f"{about['arch']}, {about['side']} x {about['side']}, {about['classes']} classes"
    yield from _titled("network:", f"{network}, {about['phase']} epoch {about['epoch']}")
    yield from _titled("run:", f"{about['run_id']}, checkpoint {about['checkpoint_sha256'][:12]}")
    machine = f"{about['cpu']}, {about['cores']} cores, {about['gpu'] or 'no GPU'}"
    threads = f"--threads {about['threads']}" if about["threads"] else "each engine's own threads"
    yield from _titled("machine:", f"{machine}; {threads}")
    yield from _titled("versions:", ", ".join(f"{k} {v}" for k, v in about["versions"].items()))
    yield from _titled(
        "measured:",
        "the model alone, from random pixels in memory to probabilities in memory: nothing is read "
        f"or decoded. {about['rounds']} rounds in turn, {about['seconds']:g} s for each figure and "
        "round; medians over the rounds",
    )


def _titled(title: str, text: str) -> list[str]:
    return _wrapped(text, f"{title:<10}", " " * 10)


def _wrapped(text: str, first: str = "", others: str = "  ") -> list[str]:
    return textwrap.wrap(
        inert(text),
        _WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_on_hyphens=False,  # a file's name stays whole
    )


def text(measured: Measured) -> Iterator[str]:
    """Two tables, what is not in them, what to keep in mind, and what is fastest."""
    rows = measured.rows
    if rows:
        yield from _one_photo(rows)
        sizes = sorted({cell.batch for row in rows for cell in row.cells})
        for start in range(0, len(sizes), _SIZES_IN_A_ROW):
            yield from _many_photos(rows, sizes[start : start + _SIZES_IN_A_ROW])
    if measured.left_out:
        yield "\nnot measured"
        yield from _reasons(measured.left_out)
    if rows:
        yield ""
        yield from _doubts(rows)
        yield from _fastest(rows)


def _one_photo(rows: Sequence[Row]) -> Iterator[str]:
    heads = ("load s", "first s", "p50 ms", "p99 ms", "off by")
    yield _line("\none photo", "precision", "device", heads, 8)
    for row in rows:
        figures = (
            f"{row.load_seconds:.2f}",
            f"{row.cells[0].first_seconds:.2f}",
            f"{row.p50_ms:.2f}",
            f"{row.p99_ms:.2f}",
            f"{row.difference:.0e}" if row.difference else "0",
        )
        yield _line(row.engine, row.precision, row.device, figures, 8)


def _many_photos(rows: Sequence[Row], sizes: Sequence[int]) -> Iterator[str]:
    heads = [f"x {size}" for size in sizes]
    yield _line("\nimages/s, in batches", "precision", "device", heads, 7)
    for row in rows:
        cells = [row.cell(size) for size in sizes]
        figures = [_rate(cell.rate) if cell else "-" for cell in cells]
        yield _line(row.engine, row.precision, row.device, figures, 7)


def _line(name: str, precision: str, device: str, figures: Sequence[str], width: int) -> str:
    lead, text = ("\n", name[1:]) if name.startswith("\n") else ("", name)
    columns = "".join(f"{figure:>{width}}" for figure in figures)
    return f"{lead}{text:<35}{precision:<10}{device:<13}{columns}"


def _rate(rate: float) -> str:
    return f"{rate:.1f}" if rate < 1000 else f"{rate:.0f}"


def _reasons(left_out: Sequence[LeftOut]) -> Iterator[str]:
    """Each reason once, behind all that it holds for."""
    reasons = {one.reason: [o for o in left_out if o.reason == one.reason] for one in left_out}
    for reason, ones in reasons.items():
        names = " and ".join(dict.fromkeys(one.engine for one in ones))
        kinds = dict.fromkeys(kind for o in ones for kind in (o.device, o.precision) if kind)
        what = f"{names} ({', '.join(kinds)})" if kinds else names
        yield from _wrapped(f"{what}: {reason}", "  ", "    ")


def _doubts(rows: Sequence[Row]) -> Iterator[str]:
    cells = [cell for row in rows for cell in row.cells]
    noisy = sum(cell.spread > _NOISY for cell in cells)
    if noisy:
        yield from _wrapped(
            f"Take care: in {noisy} of {len(cells)} figures the rounds differ by more than "
            f"{_NOISY:.0%}. Something else used this machine; measure again when it is idle."
        )
    if min(min(row.cells[0].calls) for row in rows) < _ENOUGH_CALLS:
        yield from _wrapped(
            f"Some p99 come from fewer than {_ENOUGH_CALLS} calls a round and are close to the "
            "slowest call; give more --seconds."
        )


def _fastest(rows: Sequence[Row]) -> Iterator[str]:
    one, many = max(rows, key=_rate_of_one), max(rows, key=_best_rate)
    yield from _wrapped(
        f"Fastest for one photo: {_name(one)}, {one.p50_ms:.2f} ms"
        f"{_ahead(one, rows, _rate_of_one)}."
    )
    yield from _wrapped(
        f"Fastest for many: {_name(many)}, {_rate(many.best.rate)} images/s in batches of "
        f"{many.best.batch}{_ahead(many, rows, _best_rate)}."
    )


def _rate_of_one(row: Row) -> float:
    return 1000 / row.p50_ms


def _best_rate(row: Row) -> float:
    return row.best.rate


def _ahead(best: Row, rows: Sequence[Row], speed: Callable[[Row], float]) -> str:
    theirs = max((speed(row) for row in rows if row.engine.startswith(_TORCH)), default=None)
    if theirs is None or best.engine.startswith(_TORCH):
        return ""
    return f", {speed(best) / theirs:.1f} times the fastest {_TORCH}"


def _name(row: Row) -> str:
    return f"{row.engine} ({row.precision}, {row.device})"


def refuse_place(path: Path | None) -> None:
    """Asked before the minutes of work, not after."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise BenchError(f"Cannot write {path}. Name a file in a writable folder with --json.")


def write_json(path: Path, about: dict[str, Any], measured: Measured) -> None:
    rows = [
        asdict(row)
        | {"p50_ms": row.p50_ms, "p99_ms": row.p99_ms}
        | {"cells": [asdict(cell) | {"rate": cell.rate} for cell in row.cells]}
        for row in measured.rows
    ]
    left_out = [asdict(one) for one in measured.left_out]
    document = about | {"rows": rows, "left_out": left_out}
    try:
        write_atomically(path, json.dumps(document, indent=1, allow_nan=False).encode())
    except OSError as error:
        raise BenchError(f"Cannot write {path}: {error.strerror}.") from error

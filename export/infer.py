"""`python -m export.infer MODEL PATH...`: classify photos with a model.onnx, without torch.

The library behind it is `export.classifier`; its names are here too.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Final, cast

from tqdm import tqdm

from export.classifier import BATCH, Classifier, Prediction, Result
from export.session import DEVICES
from trainer.cli import guarded, inert, inert_cell
from trainer.preprocess import is_photo
from trainer.schema import ThawError

__all__ = ["Classifier", "Prediction", "Result", "find_photos", "main"]

TOP: Final = 3
STDIN: Final = "-"
_WIDEST_NAME: Final = 60
# Of a column of names that are not known yet.
_USUAL_NAME: Final = 40
# The most that is taken from standard input at once, in bytes.
_BLOCK: Final = 1 << 16


class PathError(ThawError):
    """A path that leads to no photos."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 all classified, 1 some photos could not be
    read, 2 nothing done."""
    args = _parser().parse_args(argv)
    _refuse_mixed(args)
    return guarded(lambda: _engine(args))


def _engine(args: argparse.Namespace) -> int:
    if args.engine == "local":
        return _classify(args)
    from export.infer_ray import classify_on_ray

    return classify_on_ray(args)


def find_photos(paths: Iterable[Path]) -> list[Path]:
    """The files as given, and of folders all photos below them, sorted. Raises PathError."""
    paths = list(paths)
    photos = [photo for path in paths for photo in photos_of(path)]
    if not photos:
        raise PathError(f"No photos in {', '.join(map(str, paths))}.")
    return photos


def photos_of(path: Path) -> list[Path]:
    """The file itself, or all photos below a folder, sorted. Raises PathError."""
    try:
        if path.is_dir():
            return list(_photos_below(path))
        if path.exists():
            return [path]
    except OSError as error:  # above all: a name too long for the system
        raise PathError(f"Cannot read {path}: {error.strerror}.") from error
    raise PathError(f"There is no photo or folder {path}.")


def _photos_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise PathError(f"Cannot read the folder {error.filename}: {error.strerror}.")

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders.sort()
        yield from (path for name in sorted(files) if is_photo(path := Path(place, name)))


def _classify(args: argparse.Namespace) -> int:
    classifier = Classifier.load(args.model, args.device, args.batch, note)
    if classifier.note:
        note(classifier.note)
    named = _named(args.paths)
    known = [photo for group in named for photo in group or ()]
    started = time.perf_counter()
    results = _results(classifier, named, args.top)
    if (first := next(results, None)) is None:
        raise PathError(f"No photos in {', '.join(args.paths)}.")
    emit = _FORMATS[args.format](classifier, known, args.top)
    kept: list[Result] = []
    count = failed = 0
    for result in _watched(chain([first], results), None if None in named else len(known)):
        emit(result)
        count, failed = count + 1, failed + (result.error is not None)
        if args.format == "json":
            kept.append(result)
    rate = count / (time.perf_counter() - started)
    if args.format == "json":
        _print_json(kept, classifier, args.model, rate)
    summary = f"{count} photos, {failed} failed, {rate:.1f} images/s, {classifier.provider}"
    print(summary, file=sys.stderr)
    return 1 if failed else 0


def note(text: str) -> None:
    print("note:", inert(text), file=sys.stderr)


def _named(paths: Sequence[str]) -> list[list[Path] | None]:
    """The photos that the command line names, and None where they come from standard input.
    Raises PathError."""
    if urls := [name for name in paths if "://" in name]:
        raise PathError(f"{urls[0]} is a URL: that needs --engine ray --out FOLDER.")
    return [
        None if from_stdin else [photo for name in names for photo in photos_of(Path(name))]
        for from_stdin, names in groupby(paths, lambda name: name == STDIN)
    ]


def _results(
    classifier: Classifier, named: Iterable[list[Path] | None], top: int
) -> Iterator[Result]:
    for group in named:
        for part in _from_stdin() if group is None else [group]:
            if isinstance(part, Result):
                yield part
            else:
                yield from classifier.stream(part, top)
            sys.stdout.flush()  # whoever wrote these paths may wait for the answer


def _from_stdin() -> Iterator[list[Path] | Result]:
    """Paths, one a line, as they arrive: all photos that are there at once, or a path that leads to
    none, which is one photo that failed."""
    if sys.stdin is None:
        raise PathError("There is no standard input to read paths from.")
    source, rest = cast(io.BufferedReader, sys.stdin.buffer), b""
    while block := source.read1(_BLOCK):
        *lines, rest = (rest + block).split(b"\n")
        yield from _grouped(lines)
    yield from _grouped([rest])


def _grouped(lines: Iterable[bytes]) -> Iterator[list[Path] | Result]:
    photos: list[Path] = []
    for name in (os.fsdecode(line.removesuffix(b"\r")) for line in lines):
        try:
            photos += photos_of(Path(name)) if name else []
        except PathError as error:
            yield photos
            yield Result(name, error=str(error))
            photos = []
    yield photos


def _watched(results: Iterable[Result], total: int | None) -> Iterator[Result]:
    """The same results, with a bar on a terminal and a line for each photo that failed."""
    with tqdm(total=total, unit="img", disable=None, leave=False, dynamic_ncols=True) as bar:
        for result in results:
            if result.error is not None:
                tqdm.write(f"failed: {inert(result.photo)}: {inert(result.error)}", sys.stderr)
            yield result
            bar.update()


# --- output: each format starts with its head and then takes one result at a time -------------

Emit = Callable[[Result], None]


def _table(classifier: Classifier, photos: Sequence[Path], top: int) -> Emit:
    print(f"{inert(classifier.metadata.run_id)} on {classifier.provider}")
    names = [len(inert(str(photo))) for photo in photos]
    width = min(_WIDEST_NAME, max(names, default=_USUAL_NAME))
    label = max(len("label"), *(len(inert(name)) for name in classifier.classes))
    head = [f"{'file':<{width}}", f"{'label':<{label}}", "probability"]
    places = range(2, min(top, len(classifier.classes)) + 1)
    head += [f"{f'{place}.':<{label + 7}}" for place in places]
    print("  ".join(head).rstrip())

    def emit(result: Result) -> None:
        if result.error is not None:
            return  # told on standard error
        best, *others = result.top
        row = [f"{inert(result.photo):<{width}}", f"{inert(best.label):<{label}}"]
        row.append(f"{best.probability:11.1%}")
        row += [f"{inert(other.label):<{label}} {other.probability:6.1%}" for other in others]
        tqdm.write("  ".join(row).rstrip())

    return emit


def _csv(classifier: Classifier, photos: Sequence[Path], top: int) -> Emit:
    shown = min(top, len(classifier.classes))
    suffixes = ["", *(f"_{place}" for place in range(2, shown + 1))]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    names = [f"{name}{suffix}" for suffix in suffixes for name in ("label", "probability")]
    writer.writerow(["file", *names, "error", "provider"])

    def emit(result: Result) -> None:
        cells = [c for p in result.top for c in (inert_cell(p.label), f"{p.probability:.6f}")]
        cells += [""] * (2 * shown - len(cells))
        why = inert_cell(result.error or "")
        writer.writerow([inert_cell(result.photo), *cells, why, classifier.provider])

    return emit


def _json(classifier: Classifier, photos: Sequence[Path], top: int) -> Emit:
    return lambda result: None  # one document, printed when all is known


_FORMATS: Final = {"table": _table, "csv": _csv, "json": _json}


def _print_json(
    results: Sequence[Result], classifier: Classifier, model: Path, rate: float
) -> None:
    document = {
        "model": str(model),
        "run_id": classifier.metadata.run_id,
        "provider": classifier.provider,
        "images_per_second": round(rate, 1),
        "photos": len(results),
        "failed": sum(result.error is not None for result in results),
        "results": [_json_result(result) for result in results],
    }
    # ASCII only: control characters and undecodable names leave as escapes.
    print(json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False))


def _json_result(result: Result) -> dict[str, Any]:
    if result.error is not None:
        return {"file": result.photo, "error": result.error}
    return {"file": result.photo, **json_top(result)}


def json_top(result: Result) -> dict[str, Any]:
    """What is said of a photo that could be read, as JSON."""
    best = result.top[0]
    return {
        "label": best.label,
        "probability": best.probability,
        "top": [asdict(prediction) for prediction in result.top],
    }


# --- flags ------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.infer",
        description="Classify photos with a model.onnx that `python -m export` wrote.",
        epilog="Exit status: 0 all classified, 1 some photos could not be read, 2 nothing done.",
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model.onnx")
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="photos, folders of photos, and - for paths on standard input, one a line",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="auto: the GPU where CUDA works, else the CPU; every output says which (default: "
        "auto). tensorrt builds an engine for the model and GPU first, which takes minutes, once",
    )
    parser.add_argument(
        "--top", type=positive, default=TOP, metavar="K", help=f"classes to show (default: {TOP})"
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: many photos on Ray Data, also at URLs such as s3://bucket/folder, into Parquet "
        "files (default: local)",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="with --engine ray: where the Parquet files go, a folder or URL; the same command "
        "again goes on where it was stopped",
    )
    parser.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="with --engine ray: a cluster, or auto (default: $RAY_ADDRESS, or this machine alone)",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="with --engine ray: processes, each with a core or a GPU (default: all there are)",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help=f"photos at a time (default: {BATCH} on a GPU; on the CPU one on each core, which is "
        "faster than batches)",
    )
    output = parser.add_mutually_exclusive_group()
    for name in ("json", "csv"):
        output.add_argument(
            f"--{name}",
            dest="format",
            action="store_const",
            const=name,
            default="table",
            help=f"{name.upper()} on standard output instead of a table",
        )
    return parser


def _refuse_mixed(args: argparse.Namespace) -> None:
    """Ends the process, as argparse does, where flags do not go together."""
    if args.engine == "local":
        if args.out or args.ray_address or args.workers:
            _parser().error("--out, --ray-address and --workers need --engine ray")
    elif args.out is None:
        _parser().error("--engine ray needs --out FOLDER")
    elif args.format != "table" or STDIN in args.paths:
        _parser().error("--engine ray takes neither --json, --csv nor paths on standard input")


def positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

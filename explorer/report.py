"""`python -m explorer.report RUN...`: one HTML file to hand in or to attach to a pull request.

Parses, writes and prints; report_build.py says what is in it, report_html.py how it looks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trainer.cli import guarded, inert
from trainer.files import write_atomically
from trainer.runlog import find_run
from trainer.schema import ThawError

if TYPE_CHECKING:
    from explorer.data import Snapshot
    from explorer.report_html import Report

_ALL: Final = "all"


class OutputError(ThawError):
    """Files that cannot be written: says which, and why."""


def report_html(snapshot: Snapshot, run_ids: Sequence[str]) -> bytes:
    """The report on these runs as one self-contained HTML file.

    Takes seconds, because every chart is drawn. Raises ReportError where no run can be read.
    """
    from explorer.report_build import build
    from explorer.report_html import to_html

    return to_html(build(snapshot, run_ids)).encode()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (0 written, 2 refused)."""
    args = _parser().parse_args(argv)
    return guarded(lambda: _report(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m explorer.report",
        description="Write a report on some runs: settings, curves, verdicts, the sweep, what "
        "changed for each class. One HTML file that needs no app, no network and no script; every "
        "chart in it can be saved as SVG and PNG, every table as CSV.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run id, a unique part of it, or its folder; `all` for all that are not archived",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="file to write (default: report.html)",
    )
    parser.add_argument(
        "--charts",
        type=Path,
        metavar="DIR",
        help="also write every chart as .svg and .png and every table as .csv into this folder",
    )
    parser.add_argument(
        "--runs-dir", default="runs", metavar="DIR", help="folder or URL (default: runs)"
    )
    return parser


def _report(args: argparse.Namespace) -> int:
    # Inside, so that --help and a mistyped flag need not wait for pandas and Altair.
    from explorer.report_build import build
    from explorer.report_html import to_html

    report = build(*_chosen(args.runs_dir, args.runs))
    print(f"report: {_written({args.output: to_html(report).encode()})}")
    if args.charts is not None:
        print(f"charts: {_written(_single_files(report, args.charts))}")
    return 0


def _chosen(place: str, references: Sequence[str]) -> tuple[Snapshot, list[str]]:
    from explorer.data import Library
    from explorer.report_build import ReportError

    library = Library.at(place)
    if library.mirror is not None:
        library.mirror.update()
    if _ALL in references:
        snapshot = library.snapshot()
        readable = snapshot.current or snapshot.newest_first
        if not readable and not snapshot.broken:
            raise ReportError(f"There are no runs in {place}. Name another with --runs-dir.")
        return snapshot, [*readable[::-1], *snapshot.broken]
    runs = [find_run(library.runs_dir, reference) for reference in references]
    folders = {run.path.resolve().parent: run.path.parent for run in runs}
    if len(folders) > 1:
        raise ReportError(
            f"These runs are in several folders: {', '.join(map(str, folders.values()))}. A report "
            "compares the runs of one folder, so copy them into one."
        )
    [folder] = folders.values()
    library = library if folder == library.runs_dir else Library(folder)
    return library.snapshot(), [run.path.resolve().name for run in runs]


def _single_files(report: Report, folder: Path) -> dict[Path, bytes]:
    from explorer.report_html import to_csv

    files = {folder / f"{table.name}.csv": to_csv(table.frame).encode() for table in report.tables}
    for figure in report.figures:
        files[folder / f"{figure.name}.svg"] = figure.svg.encode()
        files[folder / f"{figure.name}.png"] = figure.png
    return files


def _written(files: dict[Path, bytes]) -> str:
    """Write each file whole; returns what was written and how large it is, for the user."""
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}.") from error
    size = f"{sum(map(len, files.values())) / 1e6:.1f} MB"
    if len(files) == 1:
        return f"{inert(str(path))} ({size})"
    return f"{inert(str(path.parent))} ({len(files)} files, {size})"


if __name__ == "__main__":
    sys.exit(main())

"""`python -m trainer cache`: what is kept, whether it is sound, and away with it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from trainer.cache import Check, Entry, check, format_size, list_entries
from trainer.cli import guarded, inert
from trainer.config import default_cache_dir
from trainer.schema import ThawError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer cache",
        description="Decoded photos and frozen activations, kept so that no run computes them "
        "again. Everything in it can be deleted at any time.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "action",
        choices=("list", "verify", "clear"),
        nargs="?",
        default="list",
        help="list what is there (default); verify: check every row, remove what is damaged; "
        "clear: remove everything",
    )
    parser.add_argument(
        "--cache-dir", type=Path, default=default_cache_dir(), metavar="DIR", help="(%(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 damage was found, 2 a mistake of the user's."""
    return guarded(lambda: _run(build_parser().parse_args(argv)))


def _run(arguments: argparse.Namespace) -> int:
    folder: Path = arguments.cache_dir / "rows"
    entries = sorted(list_entries(folder), key=lambda entry: entry.used, reverse=True)
    total = format_size(sum(entry.bytes for entry in entries))
    if arguments.action == "clear":
        for entry in entries:
            _remove(entry)
        print(f"Removed {len(entries)} files, {total}, from {folder}.")
        return 0
    checks = [check(entry, arguments.action == "verify") for entry in entries]
    for found in checks:
        print(_line(found))
    print(f"{len(entries)} files, {total}, in {folder}.")
    return _repair(checks) if arguments.action == "verify" else 0


def _repair(checks: list[Check]) -> int:
    bad = [found for found in checks if found.problem or found.damaged]
    for found in bad:
        _remove(found.entry)
    if bad:
        print(f"{len(bad)} damaged files were removed; the next run that needs them makes them.")
    else:
        print("All sound.")
    return 1 if bad else 0


def _remove(entry: Entry) -> None:
    try:
        entry.path.unlink(missing_ok=True)
    except OSError as error:
        raise ThawError(f"Cannot remove {entry.path}: {error.strerror}.") from error


def _line(found: Check) -> str:
    """`52.7 MB  3 h ago  1400/1400 rows  activations  flowers, features.7.0.block.0.0, view 3`."""
    size, age = format_size(found.entry.bytes), _age(time.time() - found.entry.used)
    if found.header is None:
        return f"{size:>9}  {age:>10}  unusable: {found.problem}  {found.entry.path.name}"
    about = {k: str(v) for k, v in found.header.about.items() if v is not None}
    kind = about.pop("kind", "")
    text = ", ".join(value if key == "data" else f"{key} {value}" for key, value in about.items())
    damage = f", {found.damaged} DAMAGED" if found.damaged else ""
    rows = f"{found.written}/{found.header.rows} rows{damage}"
    return inert(f"{size:>9}  {age:>10}  {rows:>16}  {kind:<11}  {text}")


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"

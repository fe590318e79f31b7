"""`python -m trainer data`: what is in a data folder, and a list of what to leave out."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from trainer.__main__ import add_split
from trainer.cli import guarded, inert
from trainer.config import Config, default_cache_dir
from trainer.listing import DataError, excluded_line, find_photos, list_photos
from trainer.schema import ThawError
from trainer.survey import SPLITS, Alike, Survey, doubtful, exclusions, survey

_SHOWN: Final = 20  # lines of each kind; --json has all

_HEAD: Final = """\
# Photos to leave out of {root}
# with: python -m trainer --exclude-file THIS-FILE. A path relative to the data folder on each line;
# lines that begin with # count for nothing. Nothing was deleted.
"""
_DOUBTFUL: Final = """
# Nearly the same photos in two classes. Look at them: where a label is wrong, or the photo is the
# same, remove the "# " before the path to leave it out.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer data",
        description="Reports classes, sizes, broken photos, and exact and near duplicates, also "
        "across classes and across the parts of the split that training would use. Nothing is "
        "deleted.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "data", metavar="PATH", help="a data folder, or sample, oregon, food101, signs"
    )
    add_split(parser.add_argument_group("split (as in training)"))
    parser.add_argument(
        "--exclude-file", type=Path, metavar="F", help="write a list of what to leave out"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help=f"({default_cache_dir()})")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, whatever was found; 2 a mistake of the user's."""
    return guarded(lambda: _run(build_parser().parse_args(argv)))


def _run(arguments: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    as_json, target = given.pop("json"), given.pop("exclude_file", None)
    if target is not None and target.exists():
        raise DataError(f"{target} is there already. Remove it, or name another --exclude-file.")
    config = Config("transfer", **given)
    found = survey(find_photos(config))
    if as_json:
        left_out = [{"file": out.file, "reason": out.reason} for out in exclusions(found)]
        print(json.dumps(found.to_dict() | {"exclude": left_out}, indent=2))
    else:
        for line in report(found):
            print(inert(line))
        if found.leaks and _has_tracks(config):
            print(
                "The names have the form track_frame. With --group-by track all photos of one "
                "track train, or all validate."
            )
    if target is not None:
        write_exclusions(target, found)
        if not as_json:
            print(f"\n{target} lists {len(exclusions(found))} photos to leave out.")
    return 0


def _has_tracks(config: Config) -> bool:
    """Whether photos could be split by track, and are not."""
    if config.grouping is not None or config.split_file is not None:
        return False
    try:
        list_photos(replace(config, group_by="track"))
    except DataError:
        return False
    return True


# --- the report ---------------------------------------------------------------------------------


def report(found: Survey) -> Iterator[str]:
    """Lines, not yet inert."""
    listing, totals = found.listing, found.totals
    parts = "".join(f", {totals[split]} {split}" for split in SPLITS if totals[split])
    yield f"{listing.name}: {len(listing.classes)} classes, {totals.total()} photos{parts}"
    yield f"in {listing.root}"
    yield from _classes(found)
    yield ""
    if found.sizes:
        sizes = (f"{name} {width} x {height}" for name, (width, height) in found.sizes.items())
        yield f"Sizes: {', '.join(sizes)} pixels."
    if found.imbalance is not None:
        largest, smallest, times = found.imbalance
        many = f"{largest} has {times:.3g} times the photos of {smallest}" if times > 1 else "none"
        yield f"Imbalance: {many}."
    yield f"Broken photos: {len(found.broken) or 'none'}."
    yield from _some(f"  {file}: {reason}" for file, reason in found.broken)
    yield from _duplicates(found)
    yield from (f"Note: {notice}" for notice in listing.notices)
    if found.refused is not None:
        yield f"The trainer would not train on this: {found.refused}"


def _classes(found: Survey) -> Iterator[str]:
    splits = [split for split in SPLITS if found.totals[split]]
    width = max((len(inert(name)) for name in found.counts), default=0)
    yield ""
    yield "  ".join(["class".ljust(width), "photos", *(split.rjust(6) for split in splits)])
    for name, by_split in found.counts.items():
        numbers = (by_split.total(), *(by_split[split] for split in splits))
        yield "  ".join([inert(name).ljust(width), *(f"{number:6}" for number in numbers)])


def _duplicates(found: Survey) -> Iterator[str]:
    yield f"Exact duplicates: {_count(found.exact, 'group')}."
    yield from _some(map(_pair, found.exact))
    if found.near is None:
        yield (
            "Near duplicates: too many to tell. The photos are frames of films, or drawings, which "
            "look alike without being the same; only exact duplicates were looked for."
        )
        return
    yield f"Near duplicates: {_count(found.near, 'pair')}."
    yield from _some(map(_pair, sorted(found.near, key=_weight)))
    leaks = found.leaks
    if leaks:
        yield (
            f"Leakage: {len(leaks)} of these lie in two parts of the split, so that photos are "
            "validated on that were trained on. --exclude-file F writes a list for the trainer."
        )


def _count(alike: Sequence[Alike], word: str) -> str:
    if not alike:
        return "none"
    text = f"{len(alike)} {word if len(alike) == 1 else word + 's'}"
    across = sum(one.across_classes for one in alike)
    return f"{text}, {across} across classes" if across else text


def _weight(alike: Alike) -> tuple[bool, bool, int]:
    """The gravest first."""
    return not alike.across_classes, not alike.across_splits, alike.bits or 0


def _pair(alike: Alike) -> str:
    """`  roses/a.jpg (train) = roses/b.jpg (val)  LEAK`."""
    sign = " = " if alike.bits is None else " ~ "
    names = sign.join(f"{item.file} ({item.split})" for item in alike.items)
    marks = ["TWO CLASSES"] if alike.across_classes else []
    marks += ["LEAK"] if alike.across_splits else []
    return f"  {names}{'  ' if marks else ''}{', '.join(marks)}"


def _some(lines: Iterable[str]) -> Iterator[str]:
    every = list(lines)
    yield from every[:_SHOWN]
    if len(every) > _SHOWN:
        yield f"  and {len(every) - _SHOWN} more (--json names all)"


# --- the list -----------------------------------------------------------------------------------


def write_exclusions(path: Path, found: Survey) -> None:
    """What `--exclude-file` of the trainer reads. Raises ThawError; overwrites nothing."""
    lines = [_HEAD.format(root=inert(str(found.listing.root)))]
    for out in exclusions(found):
        lines += [f"\n# {inert(out.reason)}\n", f"{excluded_line(out.file)}\n"]
    in_doubt = doubtful(found)
    lines += [_DOUBTFUL] if in_doubt else []
    for alike in in_doubt:
        lines += ["\n", *(f"# {excluded_line(item.file)}\n" for item in alike.items)]
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        unfinished.write_text("".join(lines), encoding="utf-8")
        unfinished.rename(path)
    except OSError as error:
        raise ThawError(f"{path} cannot be written: {error.strerror}.") from error

"""The settings of a sweep, from flags and a recipe (no torch)."""

from __future__ import annotations

import argparse
import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from trainer.__main__ import build_parser
from trainer.grid import SWEPT, Cluster, Request, Search, SweepError, grid
from trainer.search import corners, space_of

# Flags about this call and this machine, which no recipe holds.
_NOT_IN_RECIPES: Final = (
    *("-h", "--help", "--dry-run", "--again"),
    *("--engine", "--address", "--worker-cpus", "--worker-gpus"),
    *("--search", "--trials", "--at-once", "--prune"),
)
_SEARCH: Final = ("search", "trials", "at_once", "prune")
_EPILOG: Final = """\
A recipe holds the same names under [sweep], lists for several values; flags win over it.

examples:
  python -m trainer sweep --from RUN --lr 1e-6 1e-5 1e-4 --unfreeze 10 20 all --seed 0 1 2
  python -m trainer sweep --from RUN --pairs 1e-6:20 1e-8:10 --epochs 20 --dry-run
  python -m trainer sweep --phase transfer --data photos/ --lr 1e-4 1e-3 1e-2
  python -m trainer sweep FILE.toml --from RUN
"""


def build_sweep_parser() -> argparse.ArgumentParser:
    """The flags of `python -m trainer`, several values where a sweep varies them."""
    parser = build_parser()
    parser.prog = "python -m trainer sweep"
    parser.description = (
        "Train every combination of the values given, together, from one parent, beside a\n"
        "control in which all but the head stays frozen. The same command goes on where it was\n"
        "interrupted."
    )
    parser.epilog = _EPILOG
    for action in parser._actions:
        if action.dest in SWEPT:
            action.nargs = "+"
        if action.dest == "crop_from":
            action.type, action.help = _crop, f"{action.help}; or off"
        if action.dest == "phase":
            action.required, action.metavar = False, "finetune|transfer"
            action.help = "what the members train (finetune)"
    parser.add_argument(
        "recipe",
        nargs="?",
        type=_recipe,
        metavar="FILE.toml",
        help="a recipe; write it before the flags",
    )
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "--pairs",
        nargs="+",
        type=_pair,
        metavar="LR:LAYERS",
        help="these pairs instead of all combinations of --lr and --unfreeze",
    )
    group.add_argument("--dry-run", action="store_true", help="print the grid and train nothing")
    group.add_argument("--again", action="store_true", help="train also what is done already")
    _add_search(parser)
    _add_engine(parser)
    return parser


def _add_search(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search, instead of every combination")
    group.add_argument(
        "--search",
        choices=("optuna",),
        help="let it choose: between two numbers, or among the values given",
    )
    group.add_argument("--trials", type=int, metavar="N", help="members in all (20)")
    group.add_argument("--at-once", type=int, metavar="N", help="members trained together (4)")
    group.add_argument(
        "--prune", action="store_true", default=None, help="stop members that look hopeless"
    )


def _search(asked: dict[str, Any], given: Mapping[str, Any]) -> Search | None:
    """What its own flags say, and the settings of the members. Raises SweepError."""
    engine = asked.pop("search", None)
    for name, value in asked.items():
        flag = f"--{name.replace('_', '-')}"
        if engine is None:
            raise SweepError(f"{flag} belongs to --search optuna.")
        if value < 1:
            raise SweepError(f"{flag} {value}: must be 1 or more.")
    return None if engine is None else Search(given, space_of(given), **asked)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where the members are trained")
    group.add_argument(
        "--engine", choices=("local", "ray"), help="in this process, or on a Ray cluster (local)"
    )
    group.add_argument("--address", help="of the Ray cluster (RAY_ADDRESS, or this machine)")
    group.add_argument(
        "--worker-cpus", type=int, metavar="N", help="CPUs for one task (all of a node)"
    )
    group.add_argument(
        "--worker-gpus", type=float, metavar="X", help="GPUs for one task (1, where there are any)"
    )


def _cluster(given: dict[str, Any]) -> Cluster | None:
    """Takes its settings out of those given. Raises SweepError."""
    engine = given.pop("engine", "local")
    asked = {name: given.pop(name, None) for name in ("address", "worker_cpus", "worker_gpus")}
    if engine == "ray":
        cpus, gpus = asked["worker_cpus"], asked["worker_gpus"]
        if cpus is not None and cpus < 1:
            raise SweepError(f"--worker-cpus {cpus}: must be 1 or more.")
        if gpus is not None and gpus < 0:
            raise SweepError(f"--worker-gpus {gpus:g}: must be 0 or more.")
        return Cluster(asked["address"], cpus, gpus)
    for name, value in asked.items():
        if value is not None:
            flag = name.replace("_", "-")
            raise SweepError(f"--{flag} belongs to --engine ray.")
    return None


def _recipe(text: str) -> Path:
    if not text.endswith(".toml"):
        raise argparse.ArgumentTypeError(
            f"{text}: is no recipe (FILE.toml), and the flag before it takes one value"
        )
    return Path(text)


def _crop(text: str) -> int | None:
    if text != "off" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: must be a number of pixels, or off")
    return None if text == "off" else int(text)


def _pair(text: str) -> tuple[float, str]:
    rate, _, layers = text.partition(":")
    try:
        pair = float(rate), layers.strip()
    except ValueError:
        pair = math.nan, ""
    if not pair[1]:
        raise argparse.ArgumentTypeError(f"{text}: must be LR:LAYERS, such as 1e-6:20 or 1e-6:all")
    return pair


def parse(argv: Sequence[str] | None = None) -> Request:
    """Flags, and the recipe they name -> the members. Raises ThawError."""
    parser = build_sweep_parser()
    given = _given(vars(parser.parse_intermixed_args(argv)))
    dry_run, again = given.pop("dry_run"), given.pop("again")
    cluster = _cluster(given)
    flags: dict[str, Any] = {name: given.pop(name) for name in _SEARCH if name in given}
    recipe: Path | None = given.pop("recipe", None)
    name = given.get("run_name")
    if recipe is not None:
        asked = read_recipe(recipe, parser)
        name = asked.pop("sweep", None) or name or recipe.stem
        given = _beside(asked, given) | given
    searched = _search(flags, given)
    if searched is not None and dry_run:
        raise SweepError("--dry-run: which members a search trains is not known before.")
    members = grid(given) if searched is None else corners(given, searched.space)
    return Request(members, name, dry_run, again, cluster, searched)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if value is not None
    }


def _beside(asked: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe asks for beside these flags: pairs are another way to give two of them."""
    beaten = {"lr", "unfreeze"} if "pairs" in given else set()
    if "lr" in given or "unfreeze" in given:
        beaten = {"pairs"}
    return {name: value for name, value in asked.items() if name not in beaten}


def read_recipe(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The settings under [sweep] by their names in Config; `name` comes back as "sweep".

    Raises SweepError with the key, its value and what is wanted.
    """
    try:
        content = read_toml(path)
    except OSError as error:
        raise SweepError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise SweepError(f"The recipe {path} is not valid TOML: {error}.") from error
    table = content.get("sweep")
    if not isinstance(table, dict) or len(content) > 1:
        others = sorted(set(content) - {"sweep"})
        found = f"; it holds {', '.join(others)}" if others else ""
        raise SweepError(f"The recipe {path} must hold one table, [sweep]{found}.")
    flags = flags_by_name(parser)
    settings: dict[str, Any] = {}
    for key, value in table.items():
        where = f"{path}: {key} = {value!r}"
        name = key.replace("_", "-")
        if name == "name":
            dest, read = "sweep", _name(value, where)
        elif name in flags:
            dest, read = flags[name].dest, read_setting(flags[name], value, where)
        else:
            raise SweepError(unknown_setting(path, key, [*flags, "name"]))
        if dest in settings:
            raise SweepError(f"{path}: {key} is there twice, with - and with _. Remove one.")
        settings[dest] = read
    return _given(settings)


def read_toml(path: Path) -> dict[str, Any]:
    """Raises OSError, ValueError or RecursionError, also for numbers that no message could name."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    repr(content)  # Python writes no number of more than 4,300 digits, but reads it as 0xfff...
    return content


def flags_by_name(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Those that a recipe may hold, by name without dashes in front: `epochs-drop`."""
    return {
        option[2:]: action
        for action in parser._actions
        for option in action.option_strings
        if option not in _NOT_IN_RECIPES
    }


def unknown_setting(path: Path, key: str, names: Sequence[str]) -> str:
    """What to say of a key that is no flag."""
    near = difflib.get_close_matches(key.replace("_", "-"), names, 1)
    remedy = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(sorted(names))}."
    return f"{path}: {key} is no setting of a sweep. {remedy}"


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise SweepError(f"{where}: must be a text.")
    return value.strip()


def read_setting(action: argparse.Action, value: object, where: str) -> Any:
    """A value of a recipe as the flag would have read it. Raises SweepError, with `where`."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise SweepError(f"{where}: must be true or false.")
        return action.const if value else None
    if action.nargs != "+":
        if isinstance(value, list):
            raise SweepError(f"{where}: takes one value, and a sweep does not vary it.")
        return _convert(action, value, where)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise SweepError(f"{where}: an empty list gives no member. Remove the line.")
    return tuple(_convert(action, one, where) for one in values)


def _convert(action: argparse.Action, value: object, where: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise SweepError(f"{where}: must be a text or a number.")
    if not callable(action.type):
        return str(value)
    try:
        return action.type(str(value))
    except argparse.ArgumentTypeError as error:
        raise SweepError(f"{where}: {error}.") from error
    except ValueError as error:
        wanted = "a number" if action.type is float else "a whole number"
        raise SweepError(f"{where}: must be {wanted}.") from error

"""Experiments of several stages, such as those of the labs, from TOML (no torch).

    title = "..."          one line: what is asked
    needs = "..."          the data
    takes = "..."          how long, on what
    photos = 12786         of that data, by which a folder of it is recognised; likewise classes
    data = "oregon"        and any other flag of the trainer, for all stages

    [[stage]]
    name = "transfer"
    phase = "transfer"
    epochs = 25

    [[stage]]
    name = "pairs"
    from = "transfer"      an earlier stage, whose run these start from
    pairs = ["1e-8:10", "1e-6:all"]
    published = [{ lr = 1e-8, unfreeze = "10", val_acc = 0.8933 }]

Where a flag that a sweep varies has several values, the stage is a sweep with its control.
Published figures name the settings of the run they belong to; without settings, any of the stage.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final

from trainer.grid import SWEPT, SweepError
from trainer.recipe import (
    build_sweep_parser,
    flags_by_name,
    read_setting,
    read_toml,
    unknown_setting,
)
from trainer.runlog import Run

FIGURES: Final = (
    *("test_acc", "test_loss", "train_acc", "train_loss", "val_acc", "val_loss", "seconds"),
)
_ABOUT: Final = ("title", "needs", "takes")
_SIZES: Final = ("photos", "classes")
_OWN: Final = ("name", "from", "published")


class ExperimentError(SweepError):
    """A recipe that makes no sense: names the file, the key, the remedy."""


@dataclass(frozen=True)
class Published:
    """Figures that somebody reported for a run with these `settings`: accuracies as fractions,
    `seconds` for the whole training."""

    settings: Mapping[str, Any]
    figures: Mapping[str, float]

    def fits(self, settings: Mapping[str, Any]) -> bool:
        """Whether a run was trained so; `settings` by the names of the flags."""
        return all(settings.get(name) == value for name, value in self.settings.items())


@dataclass(frozen=True)
class Stage:
    """One training, or one sweep. `settings` by their names in Config, tuples where a sweep may
    vary them; `fixed` names those that a user's choice for all stages leaves alone; `parent` is the
    stage to start from. `data` is what the recipe trains on."""

    name: str
    settings: Mapping[str, Any]
    parent: str | None = None
    published: tuple[Published, ...] = ()
    fixed: frozenset[str] = frozenset()
    data: str | None = None

    @property
    def is_sweep(self) -> bool:
        return "pairs" in self.settings or any(
            isinstance(self.settings.get(name), tuple) and len(self.settings[name]) > 1
            for name in SWEPT
        )


@dataclass(frozen=True)
class Experiment:
    """The stages in order, and what to say of them. `photos` and `classes` of the recipe's data,
    where they are known."""

    name: str
    title: str
    needs: str
    takes: str
    stages: tuple[Stage, ...] = field(repr=False)
    photos: int | None = None
    classes: int | None = None

    def with_settings(self, given: Mapping[str, Any]) -> Experiment:
        """All stages with these settings instead of their own; the runs say what other data stands
        in for."""

        def changed(stage: Stage) -> Stage:
            chosen = {name: value for name, value in given.items() if name not in stage.fixed}
            if stage.data is not None and chosen.get("data", stage.data) != stage.data:
                chosen["stand_in_for"] = stage.data
            return replace(stage, settings={**stage.settings, **chosen})

        return replace(self, stages=tuple(map(changed, self.stages)))

    def published(self, stage: Stage, run: Run) -> tuple[Published, ...]:
        """What was published of a stage, for one of its runs: nothing for a part of the data or for
        other data than that of the recipe."""
        config, dataset = run.info.get("config", {}), run.info.get("dataset", {})
        photos = sum(dataset.get("counts", {}).values()) + len(dataset.get("rejected", []))
        alike = photos == self.photos and len(run.info.get("classes", [])) == self.classes
        same = config.get("data") == stage.data or alike
        return stage.published if same and config.get("limit") is None else ()


def packaged() -> dict[str, Experiment]:
    """The experiments that come with Thaw, by name."""
    folder = resources.files("trainer") / "recipes"
    with resources.as_file(folder) as path:
        return {file.stem: read_experiment(file) for file in sorted(path.glob("*.toml"))}


def find_experiment(name: str) -> Experiment:
    """One that comes with Thaw, or a file's. Raises ExperimentError."""
    if name.endswith(".toml"):
        return read_experiment(Path(name))
    known = packaged()
    if name not in known:
        raise ExperimentError(
            f"There is no recipe {name!r}. Known are {', '.join(known)}; or name a FILE.toml."
        )
    return known[name]


def read_experiment(path: Path) -> Experiment:
    """Read and check a recipe. Raises ExperimentError."""
    try:
        content = read_toml(path)
    except OSError as error:
        raise ExperimentError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ExperimentError(f"The recipe {path} is not valid TOML: {error}.") from error
    title, needs, takes = (_text(path, name, content.pop(name, "")) for name in _ABOUT)
    tables = content.pop("stage", None)
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise ExperimentError(f"The recipe {path} has no [[stage]], so there is nothing to train.")
    photos, classes = (_number(path, name, content.pop(name, None)) for name in _SIZES)
    parser = build_sweep_parser()
    stages: list[Stage] = []
    for table in tables:
        stages.append(_stage(path, content, table, parser, stages))
    return Experiment(path.stem, title, needs, takes, tuple(stages), photos, classes)


def _stage(
    path: Path,
    common: Mapping[str, Any],
    table: Mapping[str, Any],
    parser: argparse.ArgumentParser,
    before: Sequence[Stage],
) -> Stage:
    name = _text(path, "name", table.get("name", ""))
    if not name or name in (stage.name for stage in before):
        raise ExperimentError(f"{path}: each [[stage]] needs a name of its own.")
    parent = table.get("from")
    single = [stage.name for stage in before if not stage.is_sweep]
    if parent is not None and parent not in single:
        raise ExperimentError(
            f"{path}: stage {name} starts from {parent!r}, which is no single training before it."
        )
    own = {key: value for key, value in table.items() if key not in _OWN}
    settings = dict(_settings(path, {**common, **own}, parser))
    # A stage with random weights, or with a network of its own, is about these.
    fixed = frozenset(own) & {"arch", "weights"}
    published = tuple(_published(path, name, table, parser))
    return Stage(name, settings, parent, published, fixed, settings.get("data"))


def _settings(
    path: Path, table: Mapping[str, Any], parser: argparse.ArgumentParser
) -> Iterator[tuple[str, Any]]:
    flags = flags_by_name(parser)
    for key, value in table.items():
        action = flags.get(key.replace("_", "-"))
        if action is None or action.dest == "parent":
            raise ExperimentError(unknown_setting(path, key, [*flags, *_OWN]))
        yield action.dest, read_setting(action, value, f"{path}: {key} = {value!r}")


def _published(
    path: Path, stage: str, table: Mapping[str, Any], parser: argparse.ArgumentParser
) -> Iterator[Published]:
    found = table.get("published", [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ExperimentError(f"{path}: published of stage {stage} must be a list of tables.")
    for one in found:
        figures = {key: value for key, value in one.items() if key in FIGURES}
        numbers = [value for value in figures.values() if type(value) in (int, float)]
        if not figures or len(numbers) < len(figures) or not all(map(math.isfinite, numbers)):
            raise ExperimentError(
                f"{path}: what is published of stage {stage} needs numbers under some of "
                f"{', '.join(FIGURES)}."
            )
        own = {key: value for key, value in one.items() if key not in FIGURES}
        settings = _settings(path, own, parser)
        yield Published({name: _single(value) for name, value in settings}, figures)


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def _text(path: Path, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise ExperimentError(f"{path}: {key} must be a text.")
    return " ".join(value.split())


def _number(path: Path, key: str, value: object) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ExperimentError(f"{path}: {key} must be a whole number above 0.")
    return value

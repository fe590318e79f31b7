"""The members of a sweep: settings -> one Config for each, the controls beside them (no torch)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

from trainer.config import (
    NAMED_DATA,
    Augmentation,
    ClassWeights,
    Config,
    Schedule,
    ScheduleName,
)
from trainer.runlog import Run
from trainer.schema import ThawError

MOST_MEMBERS: Final = 1000
# What may take several values, in the order in which a label names it.
SWEPT: Final = (
    *("lr", "unfreeze", "name", "decay", "drop", "epochs_drop"),
    *("label_smoothing", "class_weights", "layer_decay"),
    *("brightness", "contrast", "rotation", "crop_from", "noise", "seed"),
)
# Settings that came later: where they are off, a plan keeps the id that it had without them.
_LATER: Final = (
    *("label_smoothing", "class_weights", "layer_decay", "gradual", "size", "outputs"),
    *("group_by", "exclude_file"),
)
# Where and how fast a member is computed, not what: these leave the id of the plan as it is.
NOT_TRAINING: Final = (
    *("device", "cache", "cache_dir", "cache_limit", "runs_dir", "run_name", "recipe"),
    *("stand_in_for", "track"),
)

_USED: Final[Mapping[ScheduleName, tuple[str, ...]]] = {
    "constant": (),
    "exponential": ("decay",),
    "step": ("drop", "epochs_drop"),
    "cosine": (),
}
_SCHEDULE: Final = tuple(field.name for field in dataclasses.fields(Schedule))
_PHOTOS: Final = tuple(field.name for field in dataclasses.fields(Augmentation))
# What of SWEPT changes the batches. Only in these do two controls of a sweep differ.
_BATCHES: Final = tuple(name for name in SWEPT if name in (*_PHOTOS, "seed"))


class SweepError(ThawError):
    """A sweep that makes no sense: names the flag or the recipe's key, the value, the remedy."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A Ray cluster to train on. `address` None: the one of RAY_ADDRESS, or this machine alone.
    `cpus` and `gpus` are what one task gets; None: all CPUs of a node, and a GPU where there are
    any."""

    address: str | None = None
    cpus: int | None = None
    gpus: float | None = None


@dataclasses.dataclass(frozen=True)
class Search:
    """Members that are proposed one round after the other, instead of a grid.

    `settings` are those of all, `space` the values to choose from, by name in SWEPT. `trials` are
    trained in all, `at_once` together; with `prune` those that look hopeless end early.
    """

    settings: Mapping[str, Any]
    space: Mapping[str, tuple[Any, ...]]
    trials: int = 20
    at_once: int = 4
    prune: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for, checked: the members without the controls, with no parent looked up; of
    a search, two members that differ in all that it chooses. `cluster` None: trained by this
    process."""

    members: tuple[Config, ...]
    name: str | None = None
    dry_run: bool = False
    again: bool = False
    cluster: Cluster | None = None
    search: Search | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """A member's place in its sweep: `number` counts from 1, `group` is its label without seed.

    `key` is a hash of everything that changes what this member trains, and of nothing else.
    """

    number: int
    group: str
    control: bool
    key: str


@dataclasses.dataclass(frozen=True)
class SweepInfo:
    """What the runs of a sweep say about it; `places` are in the order of the configs trained."""

    id: str
    name: str
    of: int
    places: tuple[Place, ...]

    def entry(self, index: int) -> dict[str, Any]:
        """The "sweep" of run.json for config number `index`, counted from 0."""
        place = self.places[index]
        return {
            "id": self.id,
            "name": self.name,
            "member": place.number,
            "of": self.of,
            "group": place.group,
            "control": place.control,
            "key": place.key,
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """All members of a sweep, each with its label, the controls last."""

    members: tuple[tuple[str, Config], ...]
    info: SweepInfo

    @property
    def id(self) -> str:
        return self.info.id

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(label for label, _ in self.members)

    @property
    def configs(self) -> tuple[Config, ...]:
        return tuple(config for _, config in self.members)

    @property
    def batch_groups(self) -> int:
        """How many groups of members there are that share every batch: same seed, same views."""
        return len({batches_of(config) for config in self.configs})

    def only(self, indices: Iterable[int]) -> Plan:
        """The plan of these members; they keep their numbers, and the plan its id."""
        kept = list(indices)
        places = tuple(self.info.places[index] for index in kept)
        return Plan(
            tuple(self.members[index] for index in kept),
            dataclasses.replace(self.info, places=places),
        )


def batches_of(config: Config) -> tuple[int, Augmentation]:
    """What the batches of a member depend on, within one sweep."""
    return config.seed, config.augmentation


# --- the grid ---------------------------------------------------------------------------------


def grid(given: Mapping[str, Any]) -> tuple[Config, ...]:
    """One Config for each combination of values, sorted, so that their order does not matter.

    Tuples under the names in SWEPT and under "pairs" are the values to combine. Settings that a
    member's schedule does not use are left at their defaults, and members that are the same
    training then count once. Raises ThawError.
    """
    settings = {"phase": "finetune"} | dict(given)
    _check_phase(settings)
    axes = {name: settings.pop(name) for name in ("pairs", *SWEPT) if name in settings}
    for name, values in axes.items():
        _check_values(_flag(name), values)
    if "pairs" in axes and ("lr" in axes or "unfreeze" in axes):
        raise SweepError("--pairs gives learning rates and layers; leave --lr and --unfreeze away.")
    sizes = [len(values) for values in axes.values()]
    if math.prod(sizes) > MOST_MEMBERS:
        product = " x ".join(str(size) for size in sizes if size > 1)
        raise SweepError(
            f"The grid has {math.prod(sizes)} combinations ({product}), at most {MOST_MEMBERS} are "
            "trained together. Give fewer values, or make several sweeps of it."
        )
    combinations = itertools.product(*axes.values())
    chosen = [settings | dict(zip(axes, values, strict=True)) for values in combinations]
    members = sorted({_member(one) for one in chosen}, key=_order)
    _check_use(axes, members)
    return tuple(members)


def _check_phase(settings: Mapping[str, Any]) -> None:
    phase = settings["phase"]
    if phase not in ("finetune", "transfer"):
        raise SweepError(f"--phase {phase}: a sweep is of finetune or of transfer.")
    if phase == "transfer":
        for name in ("parent", "unfreeze", "pairs"):
            if name in settings:
                raise SweepError(f"{_flag(name)} belongs to a sweep of --phase finetune.")


def _check_values(flag: str, values: tuple[Any, ...]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        shown = ":".join(map(_text, twice[0])) if flag == "--pairs" else _text(twice[0])
        raise SweepError(f"{flag} {shown}: is there twice. Give each value once.")


def _check_use(axes: Mapping[str, tuple[Any, ...]], members: Sequence[Config]) -> None:
    """Refuse several values that make no two members differ."""
    for name, user in (("decay", "exponential"), ("drop", "step"), ("epochs_drop", "step")):
        used = any(swept(member)[name] is not None for member in members)
        if len(axes.get(name, ())) > 1 and not used:
            raise SweepError(
                f"{_flag(name)} takes several values that no member uses. Give --schedule {user}, "
                f"or leave {_flag(name)} away."
            )


def _member(settings: dict[str, Any]) -> Config:
    if "pairs" in settings:
        rate, layers = settings.pop("pairs")
        settings |= {"lr": rate, "unfreeze": layers}
    schedule = Schedule(**{name: settings.pop(name) for name in _SCHEDULE if name in settings})
    photos = Augmentation(**{name: settings.pop(name) for name in _PHOTOS if name in settings})
    config = Config(schedule=_as_used(schedule), augmentation=photos, **settings)
    return dataclasses.replace(config, lr=config.learning_rate)


def _as_used(schedule: Schedule) -> Schedule:
    """The settings that this policy does not use at their defaults."""
    unused = {"decay", "drop", "epochs_drop"} - set(_USED[schedule.name])
    return dataclasses.replace(schedule, **{name: getattr(Schedule, name) for name in unused})


def _flag(name: str) -> str:
    """The flag that gives a setting: `epochs_drop` -> `--epochs-drop`."""
    return {"name": "--schedule", "parent": "--from"}.get(name, f"--{name.replace('_', '-')}")


def swept(config: Config) -> dict[str, Any]:
    """The settings in SWEPT; None where the member does not use one."""
    used = _USED[config.schedule.name]
    head_only = config.phase != "finetune"
    return {
        "lr": config.lr,
        "unfreeze": None if head_only else config.unfreeze,
        "name": config.schedule.name,
        "decay": config.schedule.decay if "decay" in used else None,
        "drop": config.schedule.drop if "drop" in used else None,
        "epochs_drop": config.schedule.epochs_drop if "epochs_drop" in used else None,
        "label_smoothing": config.label_smoothing,
        "class_weights": config.class_weights,
        "layer_decay": None if head_only else config.layer_decay,
        "brightness": config.augmentation.brightness,
        "contrast": config.augmentation.contrast,
        "rotation": config.augmentation.rotation,
        "crop_from": config.augmentation.crop_from,
        "noise": config.augmentation.noise,
        "seed": config.seed,
    }


def _order(config: Config, names: Sequence[str] = SWEPT) -> tuple[tuple[int, Any], ...]:
    settings = swept(config)
    return tuple(_rank(name, settings[name]) for name in names)


def _rank(name: str, value: Any) -> tuple[int, Any]:
    """Sorts numbers by size, nothing before them, names after them, and `all` last."""
    if value is None:
        return 0, 0
    if name == "name":
        return 1, get_args(ScheduleName).index(value)
    if name == "class_weights":
        return 1, get_args(ClassWeights).index(value)
    if name == "unfreeze":
        if str(value).isdecimal():
            return 1, int(value)
        return (3, 0) if value == "all" else (2, value)
    return 1, value


# --- the plan ---------------------------------------------------------------------------------


def plan(request: Request, parent: Run | None) -> Plan:
    """The members from `parent` on, the controls beside them, all with labels and run names.

    A finetune sweep gets one control for each seed and augmentation. `parent` None: a transfer
    sweep, or a finetune sweep whose parent has to be trained first.
    """
    members = [_started(config, parent) for config in request.members]
    controls = _controls(members, parent)
    configs = [*members, *controls]
    kinds = [*itertools.repeat(False, len(members)), *itertools.repeat(True, len(controls))]
    varied = _varied(members)
    keys = [_hash(_training(config, parent)) for config in configs]
    identity = _hash(sorted(keys))
    places, labelled = [], []
    for number, (config, is_control) in enumerate(zip(configs, kinds, strict=True), start=1):
        group = _label(config, varied - {"seed"}, is_control)
        places.append(Place(number, group, is_control, keys[number - 1]))
        named = dataclasses.replace(config, run_name=_run_name(config, varied, is_control))
        labelled.append((_label(config, varied, is_control), named))
    name = request.name or f"sweep-{identity[:6]}"
    return Plan(tuple(labelled), SweepInfo(identity, name, len(configs), tuple(places)))


def _controls(members: Sequence[Config], parent: Run | None) -> list[Config]:
    if members[0].phase != "finetune":
        return []
    one_each = {batches_of(config): config for config in members}
    found = sorted(one_each.values(), key=lambda config: _order(config, _BATCHES))
    return [control(config, parent) for config in found]


def _started(config: Config, parent: Run | None) -> Config:
    """Once there is a parent, how to train one is no longer a setting."""
    if parent is None:
        return config
    return dataclasses.replace(
        config, parent=_reference(config, parent), transfer_epochs=None, transfer_lr=None
    )


def _reference(config: Config, parent: Run) -> str:
    inside = parent.path.parent.absolute() == config.runs_dir.absolute()
    return parent.run_id if inside else str(parent.path.absolute())


def control(config: Config, parent: Run | None) -> Config:
    """The same further epochs as `config` on the same batches, with all but the head frozen.

    It goes on with the parent's own optimizer, loss and schedule (`lr` None), so it is what
    training would have been without fine-tuning; after a parent that was not a transfer phase, with
    the rate that its head ended with.
    """
    theirs = {} if parent is None else parent.info.get("config", {})
    # A parent that has to be trained first is trained with these; an old one without any.
    without = config if parent is None else Config
    return dataclasses.replace(
        config,
        phase="transfer",
        lr=None if parent is None or parent.phase == "transfer" else _last_rate(parent),
        unfreeze=Config.unfreeze,
        schedule=Schedule(),
        optimizer=theirs.get("optimizer", config.optimizer),
        label_smoothing=theirs.get("label_smoothing", without.label_smoothing),
        class_weights=theirs.get("class_weights", without.class_weights),
        layer_decay=Config.layer_decay,
        gradual=None,
        transfer_epochs=None,
        transfer_lr=None,
    )


def _last_rate(parent: Run) -> float | None:
    return parent.epochs[-1].lr_head or None if parent.epochs else None


def trunk(config: Config) -> Config:
    """The transfer phase that is run first where there is no run to start `config` from."""
    return dataclasses.replace(
        config,
        phase="transfer",
        epochs=config.transfer_epochs or config.epochs,
        lr=config.transfer_lr,
        transfer_epochs=None,
        transfer_lr=None,
        schedule=Schedule(),
        layer_decay=Config.layer_decay,
        gradual=None,
        run_name=None,
    )


def _varied(members: Sequence[Config]) -> set[str]:
    found = [swept(member) for member in members]
    values = {name: {one[name] for one in found} - {None} for name in SWEPT}
    values["crop_from"] = {one["crop_from"] for one in found}  # None is a value here: off
    return {name for name, different in values.items() if len(different) > 1}


def _label(config: Config, varied: set[str], is_control: bool) -> str:
    words = _words(config, varied, is_control)
    if is_control:
        return ", ".join(["control", *words])
    return ", ".join(words or _words(config, {"lr", "unfreeze"}, False))


def _words(config: Config, names: set[str], is_control: bool) -> list[str]:
    return [
        word(name, value)
        for name, value in swept(config).items()
        if name in names
        and (value is not None or name == "crop_from")
        and (name in _BATCHES or not is_control)
    ]


def word(name: str, value: Any) -> str:
    """A setting as a label says it: `lr 1e-06`, `20 layers`, `step`, `seed 1`."""
    if name == "name":
        return str(value)
    if name == "unfreeze":
        counts = value == "all" or str(value).isdecimal()
        return f"{value} layer{'' if value == '1' else 's'}" if counts else str(value)
    if name == "crop_from":
        return "no crop" if value is None else f"crop from {value}"
    if name == "epochs_drop":
        return f"drop every {value}"
    return f"{name.replace('_', ' ')} {_text(value)}"


def _text(value: Any) -> str:
    """Short, and never the same text for two different numbers."""
    if not isinstance(value, float):
        return "off" if value is None else str(value)
    return short if float(short := f"{value:g}") == value else repr(value)


def _run_name(config: Config, varied: set[str], is_control: bool) -> str:
    words = _words(config, varied - {"lr", "unfreeze"}, is_control)
    if is_control:
        base = ["control"]
    elif config.phase == "finetune":
        base = [f"finetune-{config.unfreeze}-lr{_text(config.lr)}"]
    else:
        base = [f"transfer-lr{_text(config.lr)}"]
    prefix = [config.run_name] if config.run_name else []
    return "-".join([*prefix, *base, *(one.replace(" ", "") for one in words)])


def _hash(content: object) -> str:
    text = json.dumps(content, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _training(config: Config, parent: Run | None) -> dict[str, Any]:
    settings = dataclasses.asdict(config)
    for name in NOT_TRAINING:
        settings.pop(name, None)
    for name in _LATER:
        if settings[name] == getattr(Config, name):
            del settings[name]
    places: Mapping[str, tuple[str | None, ...]] = {
        "data": NAMED_DATA,
        "split_file": (),
        "exclude_file": (),
        "weights": ("imagenet", "none"),
    }
    for name, words in places.items():
        value = settings.get(name)
        if value is not None and value not in words:
            settings[name] = str(Path(value).expanduser().absolute())  # however it was written
    if settings.get("views") == "auto":
        settings["views"] = "exact"  # the same training, with advice
    return settings | {"parent": None if parent is None else parent.run_id}

"""Where a phase starts: at pretrained or random weights, or at the last epoch of another run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from trainer.checkpoint import CheckpointError, load_checkpoint, restore_model
from trainer.config import SAMPLE, Config, Schedule
from trainer.data import Photos
from trainer.model import DEFAULT_ARCH, ModelSpec, build_model, head_name
from trainer.runlog import Run, list_runs
from trainer.schema import Preprocess, ThawError
from trainer.weights import (
    IMAGENET,
    LITE0,
    NONE,
    Pretrained,
    WeightsError,
    choose_preprocess,
    find_weights,
    imagenet_categories,
    load_weights,
)


@dataclasses.dataclass(frozen=True)
class Start:
    """A network before its first epoch, with what the run has to say about it."""

    network: nn.Module
    spec: ModelSpec
    preprocess: Preprocess
    classes: tuple[str, ...]
    first_epoch: int
    origin: dict[str, Any]
    # Epochs that the learning rate's schedule counts as over.
    epochs_done: int = 0


def choose_weights(config: Config) -> tuple[Config, Pretrained]:
    if config.phase == "scratch":
        return config, find_weights(config.arch or DEFAULT_ARCH, NONE)
    config = sample_arch(config)
    return config, find_weights(config.arch or DEFAULT_ARCH, config.weights)


def sample_arch(config: Config) -> Config:
    """The embedded sample must train without a network: there, and only there, EfficientNet-Lite0
    stands in for a B0 whose ImageNet weights cannot be downloaded."""
    free = config.data in (None, SAMPLE) and config.arch is None and config.weights == IMAGENET
    if not free or config.phase == "scratch":
        return config
    trunk = _sample_trunk(config) if config.phase == "finetune" else None
    if trunk is not None:
        return dataclasses.replace(config, arch=trunk.info.get("model", {}).get("arch"))
    try:
        find_weights(DEFAULT_ARCH, IMAGENET)
        return config
    except WeightsError:
        print(
            f"The ImageNet weights of {DEFAULT_ARCH} cannot be downloaded here. The sample is "
            "trained with EfficientNet-Lite0 instead, whose ImageNet weights are installed."
        )
        return dataclasses.replace(config, arch=LITE0)


def _sample_trunk(config: Config) -> Run | None:
    """The newest transfer run that settled what could be downloaded for the sample."""
    for run in _finished_transfers(config):
        settled = run.info.get("model", {}).get("arch") in (DEFAULT_ARCH, LITE0)
        if settled and run.info.get("dataset", {}).get("name") == SAMPLE:
            return run
    return None


def _finished_transfers(config: Config) -> list[Run]:
    """Newest first; without the members of sweeps and those that trained the head of another run
    further, which are there to compare with."""
    return [
        run
        for run in list_runs(config.runs_dir)[::-1]
        if run.phase == "transfer"
        and run.status == "done"
        and run.parent_run_id is None
        and "sweep" not in run.info
    ]


def start_from_weights(
    config: Config, arch: str, weights: Pretrained, preprocess: Preprocess, photos: Photos
) -> Start:
    direct = config.phase == "direct"
    classes = (
        _pretrained_classes(arch, weights, photos)
        if direct
        else with_unused(photos.classes, config.outputs)
    )
    spec = ModelSpec(arch, len(classes), config.head or (), config.pool or "avg")
    if direct and (config.head or config.pool or config.outputs):
        raise ThawError(
            "--phase direct measures the pretrained network as it is: no --head, --pool, --outputs."
        )
    network = build_model(spec)
    load_weights(network, weights, with_head=direct)
    print(f"{arch}, weights: {weights.source}")
    origin = {
        "parent_run_id": None,
        "weights": {"source": weights.source, "sha256": weights.sha256},
    }
    return Start(network, spec, preprocess, classes, 0, origin)


def with_unused(classes: tuple[str, ...], outputs: int | None) -> tuple[str, ...]:
    """A name for each output: those of the classes, then "unused 43" and so on for outputs that no
    photo asks for. Raises ThawError where there are too few outputs, or a class has such a name."""
    if outputs is None:
        return classes
    if outputs < len(classes):
        raise ThawError(f"--outputs {outputs}: the data has {len(classes)} classes.")
    unused = tuple(f"unused {number}" for number in range(len(classes), outputs))
    if both := set(unused) & set(classes):
        raise ThawError(
            f"--outputs {outputs}: an output without a class would have the name of the class "
            f"{min(both)}. Rename its folder."
        )
    return classes + unused


def _pretrained_classes(arch: str, weights: Pretrained, photos: Photos) -> tuple[str, ...]:
    """The class names of the pretrained head, which a direct run keeps."""
    if weights.tensors is None:
        raise ThawError("--phase direct measures pretrained weights; --weights none has none.")
    head = head_name(build_model(ModelSpec(arch, 1000)))
    bias = weights.tensors.get(f"{head}.bias", weights.tensors.get(f"{head}.weight"))
    if bias is None:
        raise WeightsError(
            f"The weights from {weights.source} have no classifier ({head}); --phase direct needs "
            "a whole network. Use --phase transfer, which trains a new one."
        )
    names = imagenet_categories() if len(bias) == 1000 else tuple(map(str, range(len(bias))))
    if len(photos.classes) > len(names):
        raise ThawError(
            f"The data has {len(photos.classes)} classes, the pretrained network {len(names)}."
        )
    return names


def adopt(config: Config, parent: Run) -> Config:
    """Take from the parent what was not given; refuse what contradicts it."""
    if parent.status == "running":
        raise ThawError(
            f"Run {parent.run_id} is still being trained; wait, or give another --from."
        )
    if "imported" in parent.info:
        raise ThawError(
            f"Run {parent.run_id} was imported: its log is here, its network is not. Train a "
            "transfer run, or give another --from."
        )
    theirs = parent.info.get("model", {})
    preprocess = parent.info.get("preprocess", {})
    for flag, ours, key, value in (
        ("--arch", config.arch, "arch", theirs.get("arch")),
        ("--pool", config.pool, "pool", theirs.get("pool")),
        (
            "--head",
            None if config.head is None else list(config.head),
            "head",
            theirs.get("head"),
        ),
        ("--size", config.size, "size", preprocess.get("crop")),
        ("--outputs", config.outputs, "outputs", theirs.get("num_classes")),
    ):
        if ours is not None and ours != value:
            raise CheckpointError(
                f"{flag} {ours}: run {parent.run_id} has {key} {value}. Leave the flag "
                "away, or train a transfer run of your own with it."
            )
    config = dataclasses.replace(config, arch=theirs.get("arch"))
    return config if config.data is not None else _adopt_data(config, parent)


def _adopt_data(config: Config, parent: Run) -> Config:
    """The parent's photos in the parent's split, or photos it trained on would validate here."""
    dataset = parent.info.get("dataset", {})
    given = parent.info.get("config", {})
    split_file = config.split_file or given.get("split_file")
    exclude_file = config.exclude_file or given.get("exclude_file")
    return dataclasses.replace(
        config,
        data=SAMPLE if dataset.get("name") == SAMPLE else dataset.get("root"),
        split_file=None if split_file is None else Path(split_file),
        exclude_file=None if exclude_file is None else Path(exclude_file),
        **{
            name: given.get(name, value)
            for name in ("split_seed", "val_fraction", "limit", "group_by")
            if (value := getattr(config, name)) == _field_default(name)
        },
    )


def _field_default(name: str) -> Any:
    return Config.__dataclass_fields__[name].default


def newest_parent(config: Config, fingerprint: str) -> Run | None:
    """The newest finished transfer run of the photos with this fingerprint and the architecture.

    Head, pooling, outputs and weights count only where they were asked for.
    """
    candidates = [
        run
        for run in _finished_transfers(config)
        if run.info.get("dataset", {}).get("fingerprint") == fingerprint
    ]
    for run in candidates:
        if _is_as_asked(config, run):
            print(f"Starting from transfer run {run.run_id} (choose another with --from).")
            return run
    if candidates:
        print(
            f"Note: transfer run {candidates[0].run_id} of this data has another network; "
            "choose it with --from."
        )
    return None


def _is_as_asked(config: Config, run: Run) -> bool:
    model = run.info.get("model", {})
    arch = config.arch or DEFAULT_ARCH
    wanted = {
        "arch": arch,
        "pool": config.pool,
        "head": None if config.head is None else list(config.head),
        "num_classes": config.outputs,
    }
    # The photos are there already, in this size.
    size = choose_preprocess(arch, config.size).crop
    if run.info.get("preprocess", {}).get("crop") != size:
        return False
    same_weights = config.weights in (IMAGENET, run.info.get("config", {}).get("weights"))
    return same_weights and all(v is None or model.get(k) == v for k, v in wanted.items())


def start_from_run(config: Config, parent: Run, photos: Photos) -> Start:
    if parent.phase == "direct":
        raise CheckpointError(
            f"Run {parent.run_id} is a direct run with the head of its pretraining; "
            "finetune from a transfer run."
        )
    path = parent.checkpoint(f"{parent.phase}-last")
    checkpoint = load_checkpoint(path)
    outputs = max(len(checkpoint.classes), len(photos.classes))
    if checkpoint.classes != with_unused(photos.classes, outputs):
        raise CheckpointError(
            f"Run {parent.run_id} was trained on the classes {_shown(checkpoint.classes)}; "
            f"{photos.listing.root} holds {_shown(photos.classes)}. Use the data it was trained on,"
            " or train a transfer run on this data first."
        )
    if parent.info.get("dataset", {}).get("fingerprint") != photos.fingerprint:
        print(
            f"Warning: photos or split differ from those of run {parent.run_id}. Photos validated "
            "on here may have been trained on there."
        )
    origin = {
        "parent_run_id": parent.run_id,
        "parent_checkpoint": {"file": path.name, "sha256": checkpoint.sha256},
        "weights": parent.info.get("weights"),
    }
    network = restore_model(checkpoint)
    return Start(
        network,
        checkpoint.spec,
        checkpoint.preprocess,
        checkpoint.classes,
        checkpoint.epoch,
        origin,
    )


def continued(config: Config, start: Start, parent: Run) -> tuple[Config, Start]:
    """A transfer phase that goes on where its parent ended: with the parent's learning rate and
    schedule, at the epoch they had reached, unless a rate is given."""
    if config.lr is not None:
        return config, start
    theirs = parent.info.get("config", {})
    schedule = theirs.get("schedule")
    if parent.phase != "transfer" or not isinstance(schedule, dict):
        raise ThawError(
            f"Run {parent.run_id} has no transfer phase whose learning rate could go on; give --lr."
        )
    config = dataclasses.replace(config, lr=theirs.get("lr"), schedule=Schedule(**schedule))
    return config, dataclasses.replace(start, epochs_done=start.first_epoch)


def _shown(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more

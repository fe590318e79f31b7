"""The phases, from top to bottom: choose a network, freeze, fit; unfreeze, fit again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from trainer.config import Config
from trainer.data import Photos, load_photos
from trainer.environment import choose_device, describe
from trainer.model import (
    DEFAULT_ARCH,
    ModelSpec,
    build_model,
    freeze,
    trainable_parameters,
    unfreeze,
    unfreeze_everything,
    unfreeze_head,
)
from trainer.phase import PhaseRun
from trainer.runlog import Run, RunWriter, check_writable, find_run, read_run
from trainer.schema import Preprocess
from trainer.start import (
    Start,
    adopt,
    choose_weights,
    newest_parent,
    sample_arch,
    start_from_run,
    start_from_weights,
)
from trainer.weights import default_preprocess


def fit(config: Config) -> Run:
    """Train one phase as configured and return the finished run. Raises ThawError."""
    # Before any work: nobody should wait for ten thousand photos to learn of these.
    choose_device(config.device)
    check_writable(config.runs_dir)
    if config.parent is None:
        arch = config.arch or DEFAULT_ARCH
        build_model(ModelSpec(arch, 2, config.head or (), config.pool or "avg"))
    if config.phase == "finetune":
        return finetune(config)
    return from_weights(config)


def from_weights(config: Config, photos: Photos | None = None) -> Run:
    """direct, scratch and transfer: everything that starts from weights, not from a run."""
    config, weights = choose_weights(config)
    arch = config.arch or DEFAULT_ARCH
    preprocess = default_preprocess(arch)
    photos = photos or load_photos(config, preprocess)
    torch.manual_seed(config.seed)
    start = start_from_weights(config, arch, weights, preprocess, photos)
    return _run_phase(config, photos, start)


def finetune(config: Config) -> Run:
    """Unfreeze the top layers of a finished run and train on, from its last frozen epoch."""
    if config.parent is not None:
        parent = find_run(config.runs_dir, config.parent)
        config = adopt(config, parent)
        preprocess = Preprocess.from_dict(parent.info["preprocess"])
        photos = load_photos(config, preprocess)
    else:
        config = sample_arch(config)
        photos = load_photos(config, default_preprocess(config.arch or DEFAULT_ARCH))
        parent = newest_parent(config, photos) or _transfer_first(config, photos)
    start = start_from_run(config, parent, photos)
    return _run_phase(config, photos, start)


def _transfer_first(config: Config, photos: Photos) -> Run:
    print(
        "No finished transfer run of this data and architecture: running the transfer phase first."
    )
    transfer = dataclasses.replace(
        config,
        phase="transfer",
        epochs=config.transfer_epochs or config.epochs,
        lr=config.transfer_lr,
        transfer_epochs=None,
        transfer_lr=None,
        schedule=dataclasses.replace(config.schedule, name="constant", warmup=0),
        run_name=None,
    )
    return from_weights(transfer, photos)


def _unfreeze(config: Config, network: nn.Module) -> tuple[str, ...]:
    match config.phase:
        case "transfer":
            return unfreeze_head(network)
        case "finetune":
            return unfreeze(network, config.unfreeze)
        case "scratch":
            return unfreeze_everything(network)
        case "direct":
            freeze(network)
            return ()


def _run_phase(config: Config, photos: Photos, start: Start) -> Run:
    for notice in photos.listing.notices:
        print(f"Note: {notice}")
    device = choose_device(config.device)
    unfrozen = _unfreeze(config, start.network)
    writer = RunWriter.create(config.runs_dir, config.run_name or _name(config), {})
    with _closing(writer):
        writer.update(
            recipe=None,
            config=config.to_dict(),
            model=start.spec.to_dict(),
            classes=list(start.classes),
            dataset=photos.to_dict(),
            preprocess=start.preprocess.to_dict(),
            environment=describe(device),
            **start.origin,
        )
        print(
            f"{config.phase}: {len(photos.train)} training and {len(photos.val)} validation photos "
            f"in {len(photos.classes)} classes, {trainable_parameters(start.network):,} parameters "
            f"train, on {device} -> {writer.path}"
        )
        phase = PhaseRun(config, photos, start, writer, device, unfrozen)
        phase.run()
    return read_run(writer.path)


def _name(config: Config) -> str:
    if config.phase == "finetune":
        return f"finetune-{config.unfreeze}-lr{config.learning_rate:g}"
    return config.phase


@contextmanager
def _closing(writer: RunWriter) -> Iterator[None]:
    """Whatever ends the run, its log says how."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        writer.close("interrupted")
        raise
    except BaseException as error:
        writer.close("failed", f"{type(error).__name__}: {error}")
        raise
    writer.close("done")

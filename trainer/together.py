"""One phase of one or many runs that share every batch: read once, frozen part computed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trainer.cache import say
from trainer.config import Config, ConfigError
from trainer.data import Photos
from trainer.environment import choose_device, describe
from trainer.frozen import Engine, Source, Work, prepare
from trainer.loop import DivergedError, TrainingResult, evaluate, objective_of, train_epoch
from trainer.model import freeze, unfreeze, unfreeze_everything, unfreeze_head
from trainer.phase import Part, PhaseRun, Stage
from trainer.prefix import Trace, trace
from trainer.progress import Progress
from trainer.ranks import LostError, about, agree, from_first, stopping_together
from trainer.resume import Resume
from trainer.run_writer import RunWriter
from trainer.runlog import Run
from trainer.schema import EpochRecord, Status, ThawError
from trainer.start import Start
from trainer.track import tracking

_FEWER_VIEWS: Final = 5
_LONG_MINUTES: Final = 10


@dataclass(frozen=True)
class Member:
    """One run to train. `label` is its name in what is printed, `extra` goes into its run.json.

    `resume` is the interrupted run to go on with; all members that train together have one that
    ended after the same epoch, or none. `again` is a run that was stopped before anything was kept
    of it: this one takes its folder. `watch` is asked after each epoch whether to train on.
    """

    config: Config
    start: Start
    label: str
    extra: dict[str, Any] = field(default_factory=dict)
    resume: Resume | None = None
    again: Run | None = None
    watch: Callable[[EpochRecord], str | None] | None = None


def train_together(
    members: Sequence[Member], photos: Photos, progress: Progress, beside: Sequence[Config] = ()
) -> list[PhaseRun]:
    """Train members that start from the same network and see the same batches.

    They share photos, seed, batch size, augmentation, epochs and device. A member whose loss
    diverges, or whose folder cannot be written, ends as failed; the others go on. Whatever else
    stops them is raised, after each has kept its checkpoints and said in its log how it ended.
    `beside` are all that these members began beside: what is frozen is cached and computed in the
    same stretches as then, and rounded alike. Of several processes that train one member together
    all return; rank 0 alone writes.
    """
    with tracking(members[0].config.track), stopping_together():
        return _train_together(members, photos, progress, beside)


def _train_together(
    members: Sequence[Member], photos: Photos, progress: Progress, beside: Sequence[Config]
) -> list[PhaseRun]:
    config, start = members[0].config, members[0].start
    device = choose_device(config.device)
    start.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    traced = trace_of(config, start, device)
    parts = _parts([*(m.config for m in members), *beside], start.network, traced)
    runs: list[PhaseRun] = []
    try:
        for member, part in zip(members, parts, strict=False):
            runs.append(_open_run(member, part, photos, device))
            runs[-1].watch = member.watch
        engine = engine_of(config, start, photos, device, traced, parts)
        for run in runs:
            run.writer.update(engine=engine.to_dict())
        _announce(runs, photos, device)
        if config.views == "auto" and (advice := fewer_views(engine, config, len(photos.train))):
            say(advice)
        _Drive(runs, [m.label for m in members], engine, photos, progress).all_epochs()
    except (KeyboardInterrupt, SystemExit):
        _end_all(runs, "interrupted", None)
        raise
    except LostError as error:  # a run that can go on
        _end_all(runs, "interrupted", str(error))
        raise
    except BaseException as error:
        _end_all(runs, "failed", f"{type(error).__name__}: {error}")
        raise
    return runs


def trace_of(config: Config, start: Start, device: torch.device) -> Trace | None:
    """The network's graph, where a part of it is frozen and it can be traced."""
    if config.phase in ("direct", "scratch"):
        return None  # one evaluation has nothing to save, and from scratch nothing is frozen
    side = start.preprocess.crop
    return trace(start.network, torch.rand(3, 3, side, side, device=device))


def _parts(configs: Sequence[Config], network: nn.Module, traced: Trace | None) -> list[Part]:
    """For each config its part; cut once for those that unfreeze the same."""
    known: dict[tuple[str, str, str | None], Part] = {}
    for config in configs:
        which = config.phase, config.unfreeze, config.gradual
        known[which] = known.get(which) or part_of(config, network, traced)
    return [known[config.phase, config.unfreeze, config.gradual] for config in configs]


def part_of(config: Config, network: nn.Module, traced: Trace | None) -> Part:
    """Freeze the network as `config` says; what trains then. Raises ThawError."""
    match config.phase:
        case "transfer":
            unfreeze_head(network)
        case "finetune":
            return Part.of(network, traced, _stages(config, network))
        case "scratch":
            unfreeze_everything(network)
        case "direct":
            freeze(network)
    return Part.of(network, traced, [Stage.of(network)])


def _stages(config: Config, network: nn.Module) -> list[Stage]:
    """What a finetune phase frees, one after the other; the network is left in the last of them."""
    found: list[Stage] = []
    for after, which in config.stages:
        unfreeze(network, which)
        stage = Stage.of(network, after)
        if found and not set(stage.unfrozen) > set(found[-1].unfrozen):
            raise ConfigError(
                f"--gradual {config.gradual}: {which} frees nothing that is not free before it. "
                "Give more layers from one to the next, and fewer to --unfreeze."
            )
        found.append(stage)
    return found


def _open_run(member: Member, part: Part, photos: Photos, device: torch.device) -> PhaseRun:
    config, start = member.config, member.start
    objective = objective_of(config, photos.train.labels, len(start.classes), device)
    opened: list[RunWriter] = []
    from_first(lambda: opened.append(_open_writer(member, photos, device)))
    kind, writer = (PhaseRun, opened[0]) if opened else (_Follower, _nobody())
    return kind(config, start, writer, part, objective, photos.val, device, member.resume)


def _open_writer(member: Member, photos: Photos, device: torch.device) -> RunWriter:
    config, start, resume = member.config, member.start, member.resume
    if resume is not None:
        writer = RunWriter.reopen(resume.run, resume.checkpoint.epoch)
        writer.update(environment=describe(device), **about(writer.info))
        return writer
    info = {
        "recipe": config.recipe,
        "config": config.to_dict(),
        "model": start.spec.to_dict(),
        "classes": list(start.classes),
        "dataset": photos.to_dict(),
        "preprocess": start.preprocess.to_dict(),
        "environment": describe(device),
        **start.origin,
        **member.extra,
    }
    info |= about(info)
    if member.again is not None:
        return RunWriter.begin_again(member.again, info)
    return RunWriter.create(config.runs_dir, config.run_name or _name(config), info)


class _Follower(PhaseRun):
    """A run as the ranks see it that do not write it: they train it, and keep nothing."""

    def _open_logs(self, resume: Resume | None) -> None:
        self._journal, self._board = _nobody(), _nobody()

    def save(self) -> None:
        self._unsaved.clear()

    def _save_predictions(self, name: str, logits: NDArray[np.float32]) -> None:
        pass


class _Nobody:
    """Takes whatever there is to write, and writes nothing."""

    path = Path()

    def __getattr__(self, name: str) -> Any:
        return _written_nowhere


def _nobody() -> Any:
    return _Nobody()


def _written_nowhere(*values: Any, **named: Any) -> None:
    pass


def _name(config: Config) -> str:
    if config.phase == "finetune":
        return f"finetune-{config.unfreeze}-lr{config.learning_rate:g}"
    return config.phase if config.parent is None else f"{config.phase}-further"


def engine_of(
    config: Config,
    start: Start,
    photos: Photos,
    device: torch.device,
    traced: Trace | None,
    parts: Sequence[Part],
) -> Engine:
    """What turns these photos into what the parts start from."""
    views = config.distinct_views or config.epochs
    repeated = min(views, config.epochs) if config.augmentation.active else 1
    few = np.arange(min(config.batch_size, len(photos.train)))
    work = Work(
        preprocess=start.preprocess,
        device=device,
        augmentation=config.augmentation,
        seed=config.seed,
        views=config.distinct_views,
        passes=len(photos.train) * repeated + len(photos.val),
        precision=config.precision,
        sample=torch.from_numpy(photos.train.photos[few]),
    )
    return prepare(
        work,
        traced,
        [part.cut for part in parts],
        {"arch": start.spec.arch, "pool": start.spec.pool},
        photos.cache,
        config.cache_dir / "calibration.json",
    )


def fewer_views(engine: Engine, config: Config, photos: int) -> str | None:
    """What `--views auto` has to say where exact views take long: a suggestion, never a choice."""
    rates = [trial.images_per_second for trial in engine.trials if trial.images_per_second]
    if not rates or not config.augmentation.active or config.epochs <= _FEWER_VIEWS:
        return None
    exact, fewer = (photos * views / max(rates) / 60 for views in (config.epochs, _FEWER_VIEWS))
    if exact < _LONG_MINUTES:
        return None
    return (
        f"Computing every epoch's own views takes about {exact:.0f} minutes here, "
        f"{_FEWER_VIEWS} views of each photo in turn about {fewer:.0f} (--views {_FEWER_VIEWS}). "
        "That is another training, and may end at another accuracy."
    )


def _announce(runs: Sequence[PhaseRun], photos: Photos, device: torch.device) -> None:
    seen = (
        f"{len(photos.train)} training and {len(photos.val)} validation photos in "
        f"{len(photos.classes)} classes"
    )
    first = runs[0]
    if len(runs) == 1:
        what = f"{first.config.phase}: {seen}, {first.stage.params:,} parameters train"
        where = first.writer.path
    else:
        what, where = f"{len(runs)} runs on {seen}", first.config.runs_dir
    print(f"{what}, on {device} -> {where}")


def _end_all(runs: Sequence[PhaseRun], status: Status, reason: str | None) -> None:
    for run in runs:
        try:
            run.end(status, reason)
        except ThawError as error:  # what stopped them all is on its way to the user already
            say(str(error))


def _end_done(run: PhaseRun) -> None:
    """End one of several runs: what keeps it from being written stays its own."""
    try:
        run.end("done")
    except ThawError as error:
        run.error = error


class _Drive:
    """All epochs of runs that share their batches."""

    def __init__(
        self,
        runs: Sequence[PhaseRun],
        labels: Sequence[str],
        engine: Engine,
        photos: Photos,
        progress: Progress,
    ) -> None:
        self._runs, self._progress = runs, progress
        self._labels = dict(zip(map(id, runs), labels, strict=True))
        self._train = Source(engine, photos.train, augmented=True)
        self._val = Source(engine, photos.val, augmented=False)
        self._config, self._first = runs[0].config, runs[0].start.first_epoch

    def all_epochs(self) -> None:
        started = time.perf_counter()
        self._fill()
        done = self._runs[0].phase_epoch
        if done is None:
            self._before(started)
        if self._config.phase != "direct":
            for phase_epoch in range((done or 0) + 1, self._config.epochs + 1):
                if self._active:
                    self._epoch(phase_epoch)
        for run in self._active:
            _end_done(run)
        self._agree()

    @property
    def _active(self) -> list[PhaseRun]:
        return [run for run in self._runs if run.status == "running"]

    def _fill(self) -> None:
        """Compute at once what every epoch needs."""
        for source in (self._val, self._train):
            if not source.augmented and self._config.phase != "direct":
                source.open()
                source.fill(self._config.batch_size, only_mine=source is self._val)

    def _before(self, started: float) -> None:
        evaluations = evaluate(self._runs, self._val, self._config.batch_size)
        # Each run bears its share of what was done for all.
        seconds = (time.perf_counter() - started) / len(self._runs)
        for run, evaluation in zip(self._runs, evaluations, strict=True):
            try:
                run.begin(evaluation, seconds)
            except ThawError as error:
                run.fail(error)
        self._agree()
        self._show(0)

    def _epoch(self, phase_epoch: int) -> None:
        active, size = self._active, self._config.batch_size
        self._progress.start_epoch(self._config.phase, phase_epoch, self._config.epochs)
        for run in active:
            try:
                run.start_epoch(phase_epoch)
            except ThawError as error:
                run.fail(error)
        self._agree()
        if not (active := self._active):
            return
        results, seconds = train_epoch(
            active, self._train, size, self._first + phase_epoch, self._progress.batch
        )
        rate = len(self._train.split) / seconds
        trained: list[tuple[PhaseRun, TrainingResult]] = []
        for run, result in zip(active, results, strict=True):
            if isinstance(result, DivergedError):
                run.fail(result)
            else:
                trained.append((run, result))
        started = time.perf_counter()
        evaluations = evaluate([run for run, _ in trained], self._val, size)
        seconds = (seconds + time.perf_counter() - started) / len(active)
        for (run, result), evaluation in zip(trained, evaluations, strict=True):
            try:
                run.end_epoch(phase_epoch, result, evaluation, seconds, rate)
            except ThawError as error:
                run.fail(error)
        for run in self._active:
            try:
                run.save_sometimes()
            except ThawError as error:
                run.fail(error)
        self._agree()
        self._show(phase_epoch)

    def _agree(self) -> None:
        agree(next((run.error for run in self._runs if run.error is not None), None))

    def _show(self, phase_epoch: int) -> None:
        records = [
            (self._labels[id(run)], run.last)
            for run in self._runs
            if run.last is not None and run.last.phase_epoch == phase_epoch
        ]
        self._progress.epoch(records, self._config.epochs)

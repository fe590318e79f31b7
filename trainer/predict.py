"""What a sweep will take: its parts are measured on this machine and multiplied out."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn

from trainer.config import Augmentation, Config, OptimizerName
from trainer.data import PhotoRows, Split, to_augment
from trainer.environment import choose_device
from trainer.frozen import Batch, Engine, Source, Work, prepare
from trainer.grid import Plan, batches_of, trunk
from trainer.listing import Listing, list_photos
from trainer.loop import evaluate, train_epoch
from trainer.model import DEFAULT_ARCH, ModelSpec, build_model
from trainer.phase import Part, Sample, Stage
from trainer.prefix import Cut, in_order, trace
from trainer.preprocess import Photo, PhotoError, load_photo
from trainer.process import usable_cores
from trainer.rows import Header, Layout, RowFile, Rows
from trainer.runlog import find_run
from trainer.schema import Preprocess
from trainer.start import adopt
from trainer.together import part_of
from trainer.weights import NONE, choose_preprocess

_REPEATS: Final = 3
# A slow step is not repeated any more once its repetitions have taken so long.
_ENOUGH_SECONDS: Final = 1.0
# Heads that are trained as one product: more of them take longer in proportion.
_STACKED: Final = 16
# Small enough that repeating a step does not change how the network trains.
_NO_RATE: Final = 1e-12
# Photos to time decoding with, and to compare the folded network with the plain one.
_DECODED: Final = 16
_COMPARED: Final = 3
_PLAIN: Final = Augmentation()


@dataclass(frozen=True)
class Prediction:
    """Of training on this machine with an empty cache."""

    seconds: float
    cache_bytes: int


def predict(plan: Plan) -> Prediction:
    """How long the members of `plan` train, and what they leave in the cache.

    A parent that has to be trained first is part of it. Networks have random weights here, no
    pretrained ones are downloaded, and only a few photos are decoded. Nothing is written, except
    that the embedded sample is drawn where it is not there yet. Raises ThawError.
    """
    groups = _groups(plan)
    members = [member for group in groups for member in group.members]
    bench, total = _Bench(_Scene.of(plan.configs[0]), members), _Total()
    for group in groups:
        total.seconds += bench.cutting
        _add_photos(total, group, bench)
        _add_frozen(total, group, bench)
        _add_epochs(total, group, bench)
    return Prediction(total.seconds, sum(total.files.values()))


# --- multiplying out --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Members that share every batch; they start after `first_epoch`.

    `fresh` ones start from weights of their own, not from one network that all groups start from.
    """

    members: tuple[Config, ...]
    first_epoch: int
    fresh: bool

    @property
    def config(self) -> Config:
        """Of any of them, where it does not matter which."""
        return self.members[0]


class _Total:
    """Seconds so far, and the bytes of each file in the cache by what is in it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.files: dict[Hashable, int] = {}

    def add_once(self, content: Hashable, size: int, seconds: float) -> None:
        if content not in self.files:
            self.files[content] = size
            self.seconds += seconds


def _groups(plan: Plan) -> list[_Group]:
    first = plan.configs[0]
    fresh = first.phase == "transfer" and first.parent is None
    alike: dict[Hashable, list[Config]] = {}
    for config in plan.configs:
        alike.setdefault(batches_of(config), []).append(config)
    if first.parent is not None or fresh:
        return [_Group(tuple(found), 0, fresh) for found in alike.values()]
    before = trunk(first)
    after = [_Group(tuple(found), before.epochs, fresh) for found in alike.values()]
    return [_Group((before,), 0, fresh), *after]


def _add_photos(total: _Total, group: _Group, bench: _Bench) -> None:
    """Decoding and resizing, once for each size."""
    scene, kept = bench.scene, group.config.cache
    for split, augmentation in (("train", group.config.augmentation), ("val", _PLAIN)):
        preprocess, count = to_augment(augmentation, scene.preprocess), scene.count(split)
        size = _layout(preprocess.crop).file_bytes(count) if kept else 0
        seconds = count * bench.decode(preprocess)
        total.add_once(("photos", split, preprocess), size, seconds)


def _add_frozen(total: _Total, group: _Group, bench: _Bench) -> None:
    """The shared prefix: once for every view of the training photos, once for validation."""
    config, scene = group.config, bench.scene
    cuts = bench.cuts(group.members)
    if not cuts:
        return
    # Random weights are others for each seed, pretrained ones are not.
    drawn = config.seed if config.weights == NONE and group.fresh else None
    prefix: Hashable = (cuts[0], drawn) if config.cache else group
    for split, augmentation, views in (
        ("train", config.augmentation, _views(group)),
        ("val", _PLAIN, {None}),
    ):
        count = scene.count(split)
        size = Layout(cuts[0].parts).file_bytes(count) if config.cache else 0
        seconds = count * (bench.view(augmentation) + bench.frozen(None, cuts[0]))
        for view in views:
            total.add_once((split, prefix, view), size, seconds)


def _views(group: _Group) -> set[Hashable]:
    """What tells the views apart that the prefix has to see; None: the photos as they are."""
    config = group.config
    if not config.augmentation.active:
        return {None}
    epochs = range(group.first_epoch + 1, group.first_epoch + config.epochs + 1)
    # Without a cache nothing is left of an earlier epoch.
    different = config.distinct_views if config.cache else None
    numbers = epochs if different is None else {epoch % different for epoch in epochs}
    return {(number, batches_of(config)) for number in numbers}


def _add_epochs(total: _Total, group: _Group, bench: _Bench) -> None:
    """The tails: every member's steps and evaluations, the first of these before any step."""
    config, scene = group.config, bench.scene
    cuts = bench.cuts(group.members)
    later = bench.frozen(cuts[0], cuts[-1]) if cuts else 0.0
    step, evaluation = (later + seconds for seconds in bench.tails(group.members))
    if any(bench.part(member).cut is None for member in group.members):
        step += bench.view(config.augmentation)
        evaluation += bench.view(_PLAIN)
    total.seconds += config.epochs * scene.count("train") * step
    total.seconds += (config.epochs + 1) * scene.count("val") * evaluation


# --- what is measured -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scene:
    """What all members have in common."""

    config: Config
    network: nn.Module
    preprocess: Preprocess
    listing: Listing

    @classmethod
    def of(cls, config: Config) -> _Scene:
        if config.parent is None:
            listing = list_photos(config)
            arch = config.arch or DEFAULT_ARCH
            outputs = config.outputs or len(listing.classes)
            spec = ModelSpec(arch, outputs, config.head or (), config.pool or "avg")
            # The network first: it refuses a name that has no preprocessing.
            network = build_model(spec)
            return cls(config, network, choose_preprocess(arch, config.size), listing)
        parent = find_run(config.runs_dir, config.parent)
        config = adopt(config, parent)
        model, preprocess = parent.info["model"], Preprocess.from_dict(parent.info["preprocess"])
        spec = ModelSpec(model["arch"], model["num_classes"], tuple(model["head"]), model["pool"])
        return cls(config, build_model(spec), preprocess, list_photos(config))

    def count(self, split: str) -> int:
        return sum(item.split == split for item in self.listing.items)


class _Bench:
    """What the parts of a sweep take here, in seconds a photo; each is measured once."""

    def __init__(self, scene: _Scene, members: Sequence[Config]) -> None:
        started = time.perf_counter()
        self.scene = scene
        self._device = choose_device(scene.config.device)
        self._network = network = scene.network
        network.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        side = scene.preprocess.crop
        self._trace = trace(network, torch.rand(3, 3, side, side, device=self._device))
        kinds = {_kind(member): member for member in members}
        self._parts = {
            kind: part_of(member, self._network, self._trace) for kind, member in kinds.items()
        }
        # Every group traces and cuts its network as it was done here.
        self.cutting = time.perf_counter() - started
        self._photos = functools.cache(functools.partial(_decode_some, scene.listing))
        self._source = self._one_batch(_PLAIN, self.cuts(members))
        self._reach = self._stages()
        self._known: dict[Hashable, tuple[float, float]] = {}
        self.decode = functools.cache(self._decode)
        self.view = functools.cache(self._view)

    def part(self, member: Config) -> Part:
        return self._parts[_kind(member)]

    def cuts(self, members: Sequence[Config]) -> list[Cut]:
        """Where the tails of these members start, the one nearest to the photos first."""
        return in_order([self.part(member).cut for member in members])

    def frozen(self, start: Cut | None, stop: Cut) -> float:
        """The frozen part from one cut, or the normalised photos, to another."""
        return self._reach[stop] - (0.0 if start is None else self._reach[start])

    def tails(self, members: Sequence[Config]) -> tuple[float, float]:
        """A step and an evaluation of all members, from what crosses over at their cuts on; the
        mean of their epochs, where they free layers gradually."""
        alike: dict[Hashable, list[_Tail]] = {}
        for member in members:
            for tail in _tails(member, self.part(member)):
                alike.setdefault(tail.kind, []).append(tail)
        steps = evaluations = 0.0
        for kind, same in alike.items():
            # Linear ones take their steps as one product.
            number = min(len(same), _STACKED) if same[0].part.linear else 1
            if (kind, number) not in self._known:
                self._known[kind, number] = self._step_and_evaluation(same[0], number)
            step, evaluation = self._known[kind, number]
            weight = sum(tail.share for tail in same) / number
            steps += step * weight
            evaluations += evaluation * weight
        return steps, evaluations

    def _step_and_evaluation(self, tail: _Tail, number: int) -> tuple[float, float]:
        source, size = self._source, len(self._source.rows)
        learners = [tail.sample() for _ in range(number)]
        step = self._seconds(lambda: train_epoch(learners, source, size, 1, _silent), size)
        return step, self._seconds(lambda: evaluate(learners, source, size), size)

    def _stages(self) -> dict[Cut, float]:
        """The frozen part from the normalised photos up to each cut, in its fastest form."""
        source, total = self._source, 0.0
        before: Cut | None = None
        reach = {}
        for stage in source.engine.stages:
            entering = source.batch(source.rows).at(before)
            run = functools.partial(stage.run, *entering)
            with torch.inference_mode():
                total += self._seconds(run, len(source.rows))
            before, reach[stage.cut] = stage.cut, total
        return reach

    def _decode(self, preprocess: Preprocess) -> float:
        """Reading, decoding and resizing, on all cores as it is done for training."""
        return self._seconds(lambda: _decode_some(self.scene.listing, preprocess), _DECODED)

    def _view(self, augmentation: Augmentation) -> float:
        """From a decoded photo to what a network takes."""
        source = self._one_batch(augmentation, [])
        return self._seconds(lambda: source.photos(source.rows), len(source.rows))

    def _one_batch(self, augmentation: Augmentation, cuts: list[Cut]) -> _OneBatch:
        scene = self.scene
        photos = self._photos(to_augment(augmentation, scene.preprocess))
        photos = np.resize(photos, (scene.config.batch_size, *photos.shape[1:]))
        work = Work(
            preprocess=scene.preprocess,
            device=self._device,
            augmentation=augmentation,
            seed=scene.config.seed,
            views=None,
            passes=scene.count("train") * scene.config.epochs,
            precision=scene.config.precision,
            sample=torch.from_numpy(photos[:_COMPARED]),
        )
        engine = prepare(work, self._trace, cuts, {}, None, None)
        return _OneBatch(engine, _split(photos))

    def _seconds(self, run: Callable[[], object], photos: int) -> float:
        """For each photo: the median of some runs after one to warm up."""
        self._time(run)
        found: list[float] = []
        while len(found) < _REPEATS and sum(found) < _ENOUGH_SECONDS:
            found.append(self._time(run))
        return statistics.median(found) / photos

    def _time(self, run: Callable[[], object]) -> float:
        started = time.perf_counter()
        run()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started


def _kind(member: Config) -> tuple[str, str, str | None]:
    """What decides which part of the network a member trains."""
    return member.phase, member.unfreeze, member.gradual


@dataclass(frozen=True)
class _Tail:
    """What a member trains in `share` of its epochs."""

    part: Part
    stage: Stage
    optimizer: OptimizerName
    share: float

    @property
    def kind(self) -> Hashable:
        """Those of one kind take the same time."""
        return self.part.cut, self.stage.unfrozen, self.part.linear, self.optimizer

    def sample(self) -> Sample:
        return Sample.of(self.part, self.optimizer, _NO_RATE, stage=self.stage)


def _tails(member: Config, part: Part) -> list[_Tail]:
    ends = [*(stage.after for stage in part.stages[1:]), member.epochs]
    return [
        _Tail(part, stage, member.optimizer, (end - stage.after) / member.epochs)
        for stage, end in zip(part.stages, ends, strict=True)
    ]


class _OneBatch(Source):
    """One batch of photos, always the same: what they become is computed before it is timed."""

    def __init__(self, engine: Engine, split: Split) -> None:
        super().__init__(engine, split, augmented=True)
        self.rows = np.arange(len(split))
        self.open(1)
        self._batch = Batch(self, self.rows)

    def batch(self, rows: Rows) -> Batch:
        return self._batch


def _silent(photos: int, loss: float, accuracy: float) -> None:
    pass


def _decode_some(listing: Listing, preprocess: Preprocess) -> Photo:
    """Some of the photos, _DECODED in all: uint8 [n, S, S, 3]; grey where one cannot be read."""
    places = np.linspace(0, len(listing.items) - 1, _DECODED).round().astype(int)
    files = [listing.root / listing.items[place].file for place in places]

    def decode(path: Path) -> Photo:
        try:
            return load_photo(path, preprocess)
        except PhotoError:
            return np.full((preprocess.crop, preprocess.crop, 3), 128, np.uint8)

    with ThreadPoolExecutor(usable_cores()) as pool:
        return np.stack(list(pool.map(decode, files)))


def _split(photos: Photo) -> Split:
    """Photos in memory, of a class that does not matter."""
    rows = np.arange(len(photos))
    header = Header("", _layout(photos.shape[1]), len(photos), {})
    file = RowFile.temporary(header, None)
    file.write(rows, (photos,))
    names = tuple(map(str, rows))
    labels = np.zeros(len(rows), np.int64)
    return Split("", names, labels, PhotoRows(file, rows, lambda row: photos[row]), "")


def _layout(side: int) -> Layout:
    """Of decoded photos, as `trainer.data` keeps them."""
    return Layout((("uint8", (side, side, 3)),))

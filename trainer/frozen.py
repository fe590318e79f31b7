"""Photos as the parts of a network that train see them: view by view, computed once.

A view of a photo passes the frozen prefix once; what comes out goes to the cache and to every
network that trains on this batch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from trainer.augment import augment
from trainer.cache import Cache, Key, say
from trainer.config import Augmentation, Precision
from trainer.data import Split
from trainer.environment import describe
from trainer.forms import Form, FormName, Trial, choose_form, chosen_form
from trainer.model import InputNormalize
from trainer.prefix import Activations, Cut, Trace, in_order
from trainer.ranks import check_stop, from_first, meet, pieces, size, turns
from trainer.rows import Arrays, Header, Layout, RowFile, Rows
from trainer.schema import Preprocess

# What is used in every epoch may stay in memory up to here where it cannot go to the cache.
_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True)
class Stage:
    """One frozen stretch of a network: from the stage before it, or the photos, to `cut`."""

    cut: Cut
    run: Callable[..., Activations] = field(repr=False)


@dataclass(frozen=True)
class Engine:
    """What turns photos into what crosses the cuts.

    `stages` follow each other, the one nearest to the photos first; only what that one gives is
    cached, the rest is derived from it. Without stages the photos themselves are handed on.
    `identity` is everything that decides its numbers, see `prepare`.
    """

    normalize: InputNormalize
    device: torch.device
    augmentation: Augmentation
    crop: int
    seed: int
    views: int | None
    stages: tuple[Stage, ...]
    form: Form | None
    identity: dict[str, Any] = field(repr=False)
    cache: Cache | None

    def view(self, epoch: int) -> int:
        """The number of the view that an epoch trains on: its own, or one of `views` in turn."""
        return epoch if self.views is None else (epoch - 1) % self.views + 1

    @property
    def trials(self) -> tuple[Trial, ...]:
        return self.form.trials if self.form is not None else ()

    def to_dict(self) -> dict[str, Any] | None:
        """The "engine" of run.json."""
        if self.form is None:
            return None
        cut = self.stages[0].cut
        return {"cut": cut.at, "bytes_per_photo": cut.bytes_per_photo} | self.form.to_dict()


@dataclass(frozen=True)
class Work:
    """What an engine is prepared for. `passes` is the number of photos that will go through it,
    `sample` some of them, uint8 [n, S, S, 3]; see `choose_form` for `precision`."""

    preprocess: Preprocess
    device: torch.device
    augmentation: Augmentation
    seed: int
    views: int | None
    passes: int
    precision: Precision
    sample: torch.Tensor = field(repr=False)


def prepare(
    work: Work,
    trace: Trace | None,
    cuts: Sequence[Cut | None],
    origin: dict[str, Any],
    cache: Cache | None,
    memory: Path | None,
) -> Engine:
    """Build the engine for tails that start at `cuts` (None: at the photos).

    `origin` says what network it is; `memory` is the file that remembers trials, if any.
    """
    normalize = InputNormalize(work.preprocess).to(work.device)
    places = in_order(cuts) if trace is not None else []
    engine = functools.partial(
        Engine,
        normalize,
        work.device,
        work.augmentation,
        work.preprocess.crop,
        work.seed,
        work.views,
        cache=cache,
    )
    if trace is None or not places:
        return engine((), None, {})
    prefix = trace.part(None, places[0])
    crop = work.preprocess.crop
    photos = normalize(work.sample[:, :crop, :crop].to(work.device))
    form = _agreed_form(prefix, photos, work, memory)
    later = [Stage(b, trace.part(a, b).eval()) for a, b in pairwise(places)]
    identity = origin | _identity(prefix, places[0], form, work)
    return engine((Stage(places[0], form.run), *later), form, identity)


def _agreed_form(prefix: fx.GraphModule, photos: Tensor, work: Work, memory: Path | None) -> Form:
    """`choose_form`; of several processes that train together rank 0 chooses for all."""
    mine: list[Form] = []

    def choose() -> tuple[FormName, tuple[Trial, ...]]:
        mine.append(choose_form(prefix, photos, work.passes, memory, work.precision))
        return mine[0].name, mine[0].trials

    name, trials = from_first(choose)
    return mine[0] if mine else chosen_form(name, trials, prefix, photos)


def _identity(prefix: fx.GraphModule, cut: Cut, form: Form, work: Work) -> dict[str, Any]:
    environment = describe(work.device)
    return {
        "state": state_digest(prefix),
        "graph": hashlib.sha256(f"{prefix.code}{prefix!r}".encode()).hexdigest(),
        "cut": [cut.place, cut.at, list(map(list, cut.parts))],
        "form": form.name,
        "preprocess": work.preprocess.to_dict(),
        **{name: environment[name] for name in ("versions", "device", "cpu", "threads")},
    }


def state_digest(module: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    # Not state_dict: it leaves out buffers that are not persistent.
    for name, value in sorted([*module.named_parameters(), *module.named_buffers()]):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()


class Source:
    """One split of the photos; `open` a view, then fetch `batch` after batch of it."""

    def __init__(self, engine: Engine, split: Split, augmented: bool) -> None:
        self.engine, self.split = engine, split
        self.augmented = augmented and engine.augmentation.active
        self._resident = _resident(split, engine.device)
        self._latest: tuple[Rows, Tensor] | None = None
        self._view: int | None = None
        self._file: RowFile | None = None
        self._damage_said = 0

    def open(self, epoch: int | None = None) -> None:
        """Turn to the view that `epoch` trains on; None: the photos as they are."""
        view = self.engine.view(epoch) if self.augmented and epoch is not None else None
        if self._file is not None and view == self._view and not self._file.deleted:
            self._file.refresh()
            return
        self._view, self._file, self._latest = view, None, None
        if self.engine.stages and self.engine.cache is not None:
            self._file = self._open_file(self.engine.cache)
            self._damage_said = 0

    def _open_file(self, cache: Cache) -> RowFile | None:
        layout = Layout(self.engine.stages[0].cut.parts)
        file = cache.open(self.key, layout, len(self.split))
        if file is not None or self._view is not None:
            return file
        header = Header(self.key.digest, layout, len(self.split), {})
        if layout.file_bytes(len(self.split)) > _MEMORY_BYTES:
            return None
        return RowFile.temporary(header, None)

    @property
    def key(self) -> Key:
        """Of the activations in the view that is open."""
        engine = self.engine
        view: dict[str, Any] | None = None
        if self._view is not None:
            names = hashlib.sha256("\0".join(self.split.files).encode("utf-8", "surrogatepass"))
            view = {
                "augmentation": dataclasses.asdict(engine.augmentation),
                "crop": engine.crop,
                "seed": engine.seed,
                "view": self._view,
                "names": names.hexdigest(),
            }
        about = {"data": self.split.name, "cut": engine.stages[0].cut.at, "view": self._view}
        return Key(
            "activations", {**engine.identity, "photos": self.split.digest, "view": view}, about
        )

    def fill(self, batch_size: int, only_mine: bool) -> None:
        """Compute the open view where it is not in the cache, with a bar of its own; of several
        processes each its share. `only_mine`: what others compute is not needed here."""
        batches = pieces(len(self.split), batch_size, size())
        for mine, among in turns()[: 1 if only_mine else None]:
            self._compute_missing(batches[mine::among])
            meet()

    def _compute_missing(self, batches: Sequence[Rows]) -> None:
        if self._file is None:
            return
        self._file.refresh()  # others fill it too
        missing = [batch for batch in batches if not self._file.has(batch).all()]
        for batch in tqdm(
            missing, "Computing what is frozen", unit="batch", leave=False, disable=None
        ):
            check_stop()
            self._first(batch)

    def batch(self, rows: Rows) -> Batch:
        return Batch(self, rows)

    def photos(self, rows: Rows) -> Tensor:
        """Normalised photos [n, 3, H, W] on the device, in the open view."""
        # Asked for twice where one network trains whole and another behind a cut.
        if self._latest is None or self._latest[0] is not rows:
            self._latest = rows, self._make_photos(rows)
        return self._latest[1]

    def _make_photos(self, rows: Rows) -> Tensor:
        engine = self.engine
        if self._resident is not None:
            photos = self._resident[torch.from_numpy(rows).to(engine.device)]
        else:
            photos = torch.from_numpy(self.split.photos[rows]).to(engine.device)
        if self._view is not None:
            names = [self.split.files[row] for row in rows]
            photos = augment(
                photos, names, engine.augmentation, engine.crop, engine.seed, self._view
            )
        return engine.normalize(photos)

    def _first(self, rows: Rows) -> Activations:
        """What the first stage makes of the rows, from the cache where it is there."""
        file = self._file
        there = file.has(rows) if file is not None else np.zeros(len(rows), bool)
        if file is None or not there.any():
            return self._compute(rows)
        values, good = file.read(rows)
        if file.damaged > self._damage_said:
            say(f"{file.damaged} damaged rows in the cache are computed again.")
            self._damage_said = file.damaged
        if not good.all():
            # The whole batch, though a process that was killed has left a part of it: a single
            # photo is rounded differently, and the run would not be what it would have been.
            return self._compute(rows)
        return tuple(torch.from_numpy(value).to(self.engine.device) for value in values)

    def _compute(self, rows: Rows) -> Activations:
        photos = self.photos(rows)  # outside inference mode: a network may train on them too
        with torch.inference_mode():
            values = self.engine.stages[0].run(photos)
        if self._file is not None:
            self._store(self._file, rows, tuple(value.cpu().numpy() for value in values))
        # Cloned outside inference mode: autograd refuses to save inference tensors.
        return tuple(value.clone() for value in values)

    def _store(self, file: RowFile, rows: Rows, values: Arrays) -> None:
        try:
            file.write(rows, values)
        except OSError as error:
            self._file = None
            if self.engine.cache is not None:
                self.engine.cache.give_up(error)


def _resident(split: Split, device: torch.device) -> Tensor | None:
    """All photos of a split in a GPU's memory, uint8 [N, S, S, 3], where they leave it room."""
    if device.type != "cuda":
        return None
    shape = (len(split), split.photos.side, split.photos.side, 3)
    free, _ = torch.cuda.mem_get_info(device)
    if np.prod(shape) > free // 4:
        return None
    photos = torch.empty(shape, dtype=torch.uint8, device=device)
    for start in range(0, len(split), 256):
        rows = slice(start, start + 256)
        photos[rows] = torch.from_numpy(split.photos[rows]).to(device)
    return photos


class Batch:
    """Some photos of a source in its open view; each thing is computed when first asked for."""

    def __init__(self, source: Source, rows: Rows) -> None:
        self._source, self.rows = source, rows
        self._values: dict[int | None, Activations] = {}

    def part(self, positions: Rows) -> Batch:
        """Some of its rows, by their places in it."""
        return Batch(self._source, self.rows[positions])

    @property
    def labels(self) -> Tensor:
        """int64 [n], on the device."""
        source = self._source
        return torch.from_numpy(source.split.labels[self.rows]).to(source.engine.device)

    def at(self, cut: Cut | None) -> Activations:
        """What crosses over at `cut`, one of the engine's; normalised photos for None."""
        place = None if cut is None else cut.place
        if place not in self._values:
            self._values[place] = self._compute(place)
        return self._values[place]

    def _compute(self, place: int | None) -> Activations:
        if place is None:
            return (self._source.photos(self.rows),)
        first, *later = self._source.engine.stages
        if place == first.cut.place:
            return self._source._first(self.rows)
        # Each stage starts where the one before it ends.
        index = next(i for i, stage in enumerate(later) if stage.cut.place == place)
        before = (first, *later)[index]
        with torch.inference_mode():
            values = later[index].run(*self.at(before.cut))
        return tuple(value.clone() for value in values)

"""`python -m export.infer --engine ray`: many photos on Ray Data, into a folder of Parquet files.

Ray's workers classify one part of the photos each, and what was under way on one that died is begun
again; the files are written by this process alone (see `export.parts`). So each photo is in the
result once, however often it was stopped and started again.

Ray is optional: requirements-ray.txt. All nodes need Thaw, and photos that are not at a URL, under
the same paths; the model is sent to them.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from export.classifier import Classifier, Source
from export.infer import note, photos_of
from export.metadata import MOST_BYTES
from export.parts import Folder, Job, Plan, failures, fetched, is_url, photos_at, to_parquet
from export.session import Device
from trainer.cli import inert
from trainer.files import read_bounded
from trainer.process import usable_cores
from trainer.ray_cluster import RayError, connected, require_ray
from trainer.schema import ThawError

# How often a part is begun again whose worker died: one of its photos may be why.
_RETRIES: Final = 3
_STORE_BYTES: Final = 200_000_000  # and a model


def classify_on_ray(args: argparse.Namespace) -> int:
    """What `export.infer` does, into the folder `args.out`; returns the exit status.
    Raises ThawError."""
    _require()
    run_id = Classifier.load(args.model, "cpu").metadata.run_id  # or says what is wrong with it
    content = read_bounded(args.model, MOST_BYTES)
    out = Folder(args.out)
    plan = _planned(out, args, Job.of(args.paths, content, run_id, args.top))
    done = out.parts()
    if done:
        note(f"{len(done)} of {len(plan.parts)} parts are there already.")
    if left := [number for number in plan.parts if number not in done]:
        store, cpus = _STORE_BYTES + 3 * len(content), args.workers or usable_cores()
        with connected(args.ray_address, store, cpus, log=False) as ray:
            share = _Share.of(ray.cluster_resources(), args.device, args.workers)
            work = _Work(content, args.device, args.batch, plan.job, share)
            _classify(work, plan, left, out)
    return _status(out, plan)


def _require() -> None:
    require_ray()
    try:
        import fsspec  # noqa: F401
        import pyarrow  # noqa: F401
        import ray.data  # noqa: F401
    except ImportError as error:
        raise RayError(
            f"--engine ray needs Ray Data ({error}): pip install -r requirements-ray.txt"
        ) from error


def _planned(out: Folder, args: argparse.Namespace, job: Job) -> Plan:
    """What the same command has begun in this folder, or a new plan. Raises ThawError."""
    if (begun := out.plan()) is not None:
        if changed := begun.job.difference(job):
            raise RayError(f"{out.place} holds the results of {changed}. Name another --out.")
        return begun
    photos = [name for path in args.paths for name in _listed(path)]
    if not photos:
        raise RayError(f"No photos in {', '.join(args.paths)}.")
    plan = Plan(job, tuple(dict.fromkeys(photos)))
    out.begin(plan)
    return plan


def _listed(path: str) -> list[str]:
    return photos_at(path) if is_url(path) else [str(photo) for photo in photos_of(Path(path))]


def _classify(work: _Work, plan: Plan, left: Sequence[int], out: Folder) -> None:
    """Write the parts that are left, as they come."""
    told = {""}
    total = sum(len(plan.part(number)) for number in left)
    with tqdm(total=total, unit="img", disable=None, leave=False, dynamic_ncols=True) as bar:
        for row in _answers(work, plan, left):
            if row["note"] not in told:
                note(row["note"])
            told.add(row["note"])
            count, unread = failures(row["parquet"])
            out.write(row["part"], row["parquet"])
            for photo, error in unread:
                tqdm.write(f"failed: {inert(photo)}: {inert(error)}", sys.stderr)
            bar.update(count)


def _status(out: Folder, plan: Plan) -> int:
    """Of all that is in the folder. Raises RayError where parts are missing."""
    if missing := len(plan.parts) - len(out.parts()):
        raise RayError(
            f"{missing} of {len(plan.parts)} parts are missing: workers died over each of them "
            f"{_RETRIES + 1} times, without memory or over one of the photos. The same command "
            "tries only these again."
        )
    photos, failed = out.counts()
    print(f"{photos} photos, {failed} failed, in {inert(out.place)}", file=sys.stderr)
    return 1 if failed else 0


# --- on Ray -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Share:
    """How many workers there are, and what each has."""

    workers: int
    cpus: int
    gpus: int

    @classmethod
    def of(cls, resources: Mapping[str, float], device: Device, workers: int | None) -> _Share:
        """A core for each, or a GPU and its part of the cores. Raises RayError."""
        cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        if device in ("cuda", "tensorrt") and not gpus:
            raise RayError(f"--device {device}: Ray has no GPU here. Use --device cpu.")
        on_gpus = device != "cpu" and gpus > 0
        places = gpus if on_gpus else cpus
        chosen = workers or places
        if not 1 <= chosen <= places:
            raise RayError(f"Ray has room for {places} workers here; --workers {chosen} is more.")
        return cls(chosen, max(1, cpus // places) if on_gpus else 1, int(on_gpus))


@dataclass(frozen=True)
class _Work:
    """What each worker needs to know."""

    model: bytes
    device: Device
    batch: int | None
    job: Job
    share: _Share


def _answers(work: _Work, plan: Plan, left: Sequence[int]) -> Iterator[Mapping[str, Any]]:
    """What _Worker says of each part, in the order in which they are done; without those over
    which workers died. Raises RayError."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # one part that fails must not end the others
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "`ray_remote_args`")  # max_task_retries, until Ray 2.64
    rows = [{"part": n, "photos": list(map(os.fsencode, plan.part(n)))} for n in left]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Worker,
        fn_constructor_args=(work,),
        compute=ray.data.ActorPoolStrategy(size=min(work.share.workers, len(rows))),
        num_cpus=work.share.cpus,
        num_gpus=work.share.gpus,
        max_task_retries=_RETRIES,
    )
    for row in done.iter_rows():
        if row["problem"]:
            raise RayError(row["problem"])
        yield row


class _Worker:
    """In a process of Ray's."""

    def __init__(self, work: _Work) -> None:
        self._work, self._problem = work, ""
        try:
            cores = work.share.cpus
            self._classifier = Classifier.of(work.model, work.device, work.batch, cores=cores)
        except ThawError as error:
            self._problem = str(error)  # Ray would begin again and again

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The part's Parquet file, or the problem; and the note that a GPU does not work."""
        answer = {"part": row["part"], "parquet": b"", "note": "", "problem": self._problem}
        if not self._problem:
            answer["note"] = self._classifier.note or ""
            try:
                answer["parquet"] = self._parquet(list(map(os.fsdecode, row["photos"])))
            except ThawError as error:
                answer["problem"] = str(error)
        return answer

    def _parquet(self, names: list[str]) -> bytes:
        job, classifier = self._work.job, self._classifier
        results = classifier.classify(_sources(names, job.folder), job.top)
        named = [replace(found, photo=name) for found, name in zip(results, names, strict=True)]
        return to_parquet(named, classifier.provider, job, len(classifier.classes))


def _sources(names: Sequence[str], folder: str) -> Iterator[Source]:
    for remote, some in groupby(names, is_url):
        if remote:
            yield from fetched(list(some))
        else:
            yield from (Path(folder, name) for name in some)

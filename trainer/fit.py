"""The phases, from top to bottom: choose a network, freeze, fit; unfreeze, fit again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from trainer.config import Augmentation, Config, Schedule
from trainer.data import Photos, load_photos
from trainer.distributed import check_divisible
from trainer.environment import choose_device
from trainer.grid import NOT_TRAINING, SweepInfo, trunk
from trainer.model import DEFAULT_ARCH, ModelSpec, build_model, check_takes
from trainer.phase import PhaseRun, pretrained_labels
from trainer.progress import Progress, summary
from trainer.ranking import count
from trainer.ranks import check_team, each_alike, from_first, size
from trainer.resume import Resume, find_resume, resume_of
from trainer.run_writer import check_writable
from trainer.runlog import Run, find_run, is_being_written, list_runs, read_run
from trainer.schema import EpochRecord, Preprocess, Status, ThawError
from trainer.start import (
    Start,
    adopt,
    choose_weights,
    continued,
    newest_parent,
    sample_arch,
    start_from_run,
    start_from_weights,
)
from trainer.together import Member, train_together
from trainer.track import check_tracker
from trainer.weights import choose_preprocess

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run needs before its first epoch; `config` with everything resolved."""

    config: Config
    photos: Photos
    start: Start


def fit(config: Config, go_on: bool = False, once: bool = False) -> Run:
    """Train one phase as configured and return the finished run. Raises ThawError.

    With `go_on` a run that was interrupted and is configured alike goes on, where there is one;
    with `once` a run that is done and is configured alike is returned as it is.
    """
    check_before_work(config)
    job = prepare_finetune(config) if config.phase == "finetune" else prepare(config)
    if once and (done := _earlier(job, "done")):
        return done
    return _train_alone(job, _earlier(job, "interrupted", "running") if go_on else None)


def go_on_with(run: Run, config: Config) -> Run:
    """Train an interrupted run to its end, as `config`, its own settings, says. Raises ThawError.

    One that was stopped before its first checkpoint begins anew, in the same folder.
    """
    check_before_work(config)
    job = prepare_without_training(config)
    if not from_first(run.checkpoint(f"{config.phase}-last").is_file):
        print(f"Run {run.run_id} was stopped before its first checkpoint; it begins anew.")
        return _train_alone(job, again=run)
    fingerprint, origin = job.photos.fingerprint, job.start.origin
    # says why, where it cannot go on
    from_first(lambda: resume_of(run, config.phase, fingerprint, origin))
    return _train_alone(job, run)


def finetune_after(trunk: Run, config: Config) -> Run:
    """Train the finetune phase that a transfer run was trained for. Raises ThawError."""
    preprocess = Preprocess.from_dict(trunk.info["preprocess"])
    return _train_alone(_from_run(config, trunk, _load(config, preprocess)))


def _earlier(job: Job, *statuses: Status) -> Run | None:
    """The newest of them, other than the members of sweeps, whatever recipe asked for it."""
    wanted = _training(json.loads(json.dumps(job.config.to_dict())))
    for run in reversed(list_runs(job.config.runs_dir)):
        found = run.status in statuses and "sweep" not in run.info
        if found and _training(run.info.get("config", {})) == wanted:
            return run
    return None


def _training(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is trained; not who asked for it, where and how fast."""
    return {name: value for name, value in config.items() if name not in NOT_TRAINING}


def check_before_work(config: Config) -> None:
    """Nobody should wait for ten thousand photos to learn of these. Raises ThawError."""
    check_team(config.batch_size, choose_device(config.device))
    from_first(lambda: check_writable(config.runs_dir))
    check_tracker(config.track)
    if config.parent is None:
        arch = config.arch or DEFAULT_ARCH
        network = build_model(ModelSpec(arch, 2, config.head or (), config.pool or "avg"))
        if config.size is not None:
            check_takes(network, arch, config.size)
        if config.phase == "scratch" and size() > 1:
            check_divisible(network.train())


def prepare(config: Config, photos: Photos | None = None) -> Job:
    """direct, scratch and transfer: from weights, or from the run whose head trains further."""
    if config.parent is not None:
        parent, config, photos = find_parent(config, photos)
        assert parent is not None
        return _from_run(config, parent, photos)
    config, weights = _settled(config, lambda: choose_weights(config))
    arch = config.arch or DEFAULT_ARCH
    preprocess = choose_preprocess(arch, config.size)
    photos = photos or _load(config, preprocess)
    torch.manual_seed(config.seed)
    start = start_from_weights(config, arch, weights, preprocess, photos)
    if config.phase == "direct":
        photos = dataclasses.replace(photos, val=pretrained_labels(photos, start))
    return Job(config, photos, start)


def prepare_finetune(config: Config, photos: Photos | None = None) -> Job:
    """The top layers of a finished run, to be unfrozen and trained from its last frozen epoch."""
    parent, config, photos = find_parent(config, photos)
    if parent is None:
        parent = _transfer_first(config, photos)
    return _from_run(config, parent, photos)


def prepare_without_training(config: Config) -> Job:
    """As for training, but a finetune phase needs a run that is there. Raises ThawError."""
    if config.phase != "finetune":
        return prepare(config)
    parent, config, photos = find_parent(config)
    if parent is None:
        raise ThawError(
            "There is no finished transfer run of this data and architecture to finetune from. "
            "Train one with --phase transfer, or name a run with --from."
        )
    return _from_run(config, parent, photos)


def find_parent(config: Config, photos: Photos | None = None) -> tuple[Run | None, Config, Photos]:
    """The run that a finetune starts from, `--from` or the newest that fits; None where there is
    none. With it the settings that it decides, and the photos."""
    if config.parent is not None:
        named = config.parent
        parent = from_first(lambda: find_run(config.runs_dir, named))
        adopted = adopt(config, parent)
        preprocess = Preprocess.from_dict(parent.info["preprocess"])
        return parent, adopted, photos or _load(adopted, preprocess)
    settled, _ = _settled(config, lambda: (sample_arch(config), None))
    preprocess = choose_preprocess(settled.arch or DEFAULT_ARCH, settled.size)
    found = photos or _load(settled, preprocess)
    return from_first(lambda: newest_parent(settled, found.fingerprint)), settled, found


def _load(config: Config, preprocess: Preprocess) -> Photos:
    return each_alike(
        lambda: load_photos(config, preprocess), lambda photos: photos.fingerprint, "photos"
    )


def _settled(config: Config, settle: Callable[[], tuple[Config, T]]) -> tuple[Config, T]:
    """What rank 0 settles for all; each keeps its own cache folder."""
    found, value = from_first(settle)
    return dataclasses.replace(found, cache_dir=config.cache_dir), value


def _from_run(config: Config, parent: Run, photos: Photos) -> Job:
    start = from_first(lambda: start_from_run(config, parent, photos))
    if config.phase == "transfer":
        config, start = continued(config, start, parent)
    return Job(config, photos, start)


def _transfer_first(config: Config, photos: Photos) -> Run:
    print(
        "No finished transfer run of this data and architecture: running the transfer phase first."
    )
    return _train_alone(prepare(trunk(config), photos), then=config)


def _train_alone(
    job: Job,
    interrupted: Run | None = None,
    again: Run | None = None,
    then: Config | None = None,
) -> Run:
    """Train one run: go on with `interrupted`, or begin in the folder of `again`, or in a new one.
    `then` is what it is trained for, if it is not wanted for itself."""
    config, photos = job.config, job.photos
    _introduce(photos)
    resume = _resume(job, interrupted)
    with Progress(_photos_to_train(job, resume)) as progress:
        _say_where([0], [job], [resume])
        extra = {} if then is None else {"then": then.to_dict()}
        if again is not None and "then" in again.info:
            extra = {"then": again.info["then"]}
        member = Member(config, job.start, config.phase, extra, resume, again)
        (run,) = train_together([member], photos, progress)
        seconds = progress.seconds
    if run.error is not None:
        raise run.error
    print(_summary(run, seconds))
    return from_first(lambda: read_run(run.writer.path))


def _introduce(photos: Photos) -> None:
    for notice in photos.listing.notices:
        print(f"Note: {notice}")


def _photos_to_train(job: Job, resume: Resume | None = None) -> int:
    done = resume.phase_epoch if resume is not None else 0
    epochs = 0 if job.config.phase == "direct" else job.config.epochs - done
    return epochs * len(job.photos.train)


def _summary(run: PhaseRun, seconds: float) -> str:
    assert run.best is not None
    boundary = run.boundary if run.config.phase == "finetune" else None
    return summary(run.config.phase, run.best, boundary, seconds)


# --- many at once -------------------------------------------------------------------------------


def fit_together(
    configs: Sequence[Config],
    sweep: SweepInfo,
    interrupted: Mapping[int, Run],
    elsewhere: Sequence[Config] = (),
    watch: Callable[[int, EpochRecord], str | None] | None = None,
) -> list[Run]:
    """Train the members of a sweep; those that can share their batches train at once.

    `interrupted` are runs to go on with, by index in `configs`. `elsewhere` are further members,
    which other processes train: what is frozen is computed in the stretches that these need too,
    and rounded as if all were trained here. `watch` is asked after each epoch of a member, by
    index, and says why training it on is not worth while, or None. Returns their runs in the order
    of `configs`; a member that failed has the status "failed" and does not stop the others. Raises
    ThawError for what concerns all.
    """
    check_before_work(configs[0])
    all_jobs = _jobs([*configs, *elsewhere])
    alike = {i: group for group in _groups(all_jobs) for i in group}
    jobs = all_jobs[: len(configs)]
    _introduce(jobs[0].photos)
    resumes = [_resume(job, interrupted.get(i)) for i, job in enumerate(jobs)]
    for group in _groups(jobs):
        _even_out(group, resumes)
    again = {i: run for i, run in interrupted.items() if _begins_again(run, jobs[i], resumes[i])}
    groups = [_by_epoch(group, resumes) for group in _groups(jobs)]
    firsts = [part[0] for parts in groups for part in parts]
    photos = sum(_photos_to_train(jobs[first], resumes[first]) for first in firsts)
    done: dict[int, Run] = {}
    with Progress(photos) as progress:
        for number, parts in enumerate(groups, start=1):
            beside = [all_jobs[i].config for i in alike[parts[0][0]]]
            if len(groups) > 1:
                seed = beside[0].seed
                runs_here = sum(map(len, parts))
                tqdm.write(f"batches {number} of {len(groups)} (seed {seed}): {runs_here} runs")
            for part in parts:
                _say_where(part, jobs, resumes)
                members = [
                    Member(
                        jobs[i].config,
                        jobs[i].start,
                        sweep.places[i].group,
                        {"sweep": sweep.entry(i)},
                        resumes[i],
                        again.get(i),
                        None if watch is None else partial(watch, i),
                    )
                    for i in part
                ]
                runs = train_together(members, jobs[part[0]].photos, progress, beside)
                done |= {i: read_run(run.writer.path) for i, run in zip(part, runs, strict=True)}
    return [done[i] for i in range(len(configs))]


def _even_out(group: Sequence[int], resumes: list[Resume | None]) -> None:
    """Members that trained together and were killed while they wrote what they had reached: those
    an epoch ahead of the others go back by one, so that all go on together, rounded alike."""
    known = [one for i in group if (one := resumes[i]) is not None]
    if not known:
        return
    least = min(one.phase_epoch for one in known)
    for i in group:
        one = resumes[i]
        if one is not None and one.earlier is not None and one.earlier.phase_epoch == least:
            resumes[i] = one.earlier
    if least == 0 and any(resumes[i] is None for i in group):
        for i in group:
            resumes[i] = None


def _begins_again(run: Run, job: Job, resume: Resume | None) -> bool:
    """Whether a run, of which nothing is kept but maybe its epoch 0, is trained in its folder."""
    return resume is None and len(run.epochs) <= 1 and not is_being_written(run)


def _by_epoch(group: Sequence[int], resumes: Sequence[Resume | None]) -> list[list[int]]:
    """The group in parts that were interrupted after the same epoch, or not at all."""
    parts: dict[int | None, list[int]] = {}
    for i in group:
        resume = resumes[i]
        parts.setdefault(None if resume is None else resume.phase_epoch, []).append(i)
    return list(parts.values())


def _say_where(part: Sequence[int], jobs: Sequence[Job], resumes: Sequence[Resume | None]) -> None:
    resume, epochs = resumes[part[0]], jobs[part[0]].config.epochs
    if resume is not None:
        where = f"after epoch {resume.phase_epoch} of {epochs}"
        verb = "goes" if len(part) == 1 else "go"
        tqdm.write(f"{count(len(part), 'run')} {verb} on, interrupted {where}.")


def _jobs(configs: Sequence[Config]) -> list[Job]:
    """A job for each; those that start from the same network on the same photos share both."""
    known: dict[Config, Job] = {}
    jobs = []
    for config in configs:
        first = known.get(_place(config))
        if first is not None:
            job = _beside(first, config)
        else:
            job = prepare_finetune(config) if config.phase == "finetune" else prepare(config)
            known[_place(config)] = job
        jobs.append(job)
    return jobs


def _beside(first: Job, config: Config) -> Job:
    """The job of a config that has photos and network in common with another's."""
    if config.parent is None:
        return Job(dataclasses.replace(config, arch=first.config.arch), first.photos, first.start)
    parent, config, photos = find_parent(config, first.photos)
    assert parent is not None
    start = dataclasses.replace(first.start, epochs_done=0)
    if config.phase == "transfer":
        config, start = continued(config, start, parent)
    return Job(config, photos, start)


def _resume(job: Job, run: Run | None) -> Resume | None:
    if run is None:
        return None
    fingerprint, origin = job.photos.fingerprint, job.start.origin
    return from_first(lambda: find_resume(run, job.config.phase, fingerprint, origin))


def _groups(jobs: Sequence[Job]) -> list[list[int]]:
    """Which jobs see the same batches: same photos, network, seed, epochs and augmentation."""
    groups: dict[tuple[int, Config], list[int]] = {}
    for i, job in enumerate(jobs):
        like = dataclasses.replace(
            _place(job.config), augmentation=job.config.augmentation, seed=job.config.seed
        )
        groups.setdefault((id(job.start.network), like), []).append(i)
    return list(groups.values())


def _place(config: Config) -> Config:
    """The config without what changes neither the photos nor the network to start from."""
    augmentation = Augmentation(crop_from=config.augmentation.crop_from)
    return dataclasses.replace(
        config,
        phase=config.phase if config.parent is None else "finetune",
        # A parent's head is there already; without one it is drawn.
        seed=config.seed if config.parent is None else 0,
        lr=None,
        unfreeze="all",
        schedule=Schedule(),
        optimizer="adam",
        augmentation=augmentation,
        run_name=None,
        early_stop=None,
        label_smoothing=Config.label_smoothing,
        class_weights=Config.class_weights,
        layer_decay=Config.layer_decay,
        gradual=None,
    )

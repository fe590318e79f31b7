"""`python -m trainer sweep`: many runs from one parent, trained together, then ranked."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from trainer.__main__ import stop_on_signals
from trainer.cache import format_size
from trainer.cli import guarded, inert
from trainer.config import Augmentation, Config
from trainer.data import find_fingerprint
from trainer.grid import Place, Plan, Request, SweepInfo, plan, swept, trunk, word
from trainer.process import prepare_process
from trainer.ranking import count, ranking, table
from trainer.recipe import parse
from trainer.run_writer import check_writable
from trainer.runlog import Run, find_run, list_runs
from trainer.search import Watch, only, search

if TYPE_CHECKING:
    from trainer.predict import Prediction

_SCHEDULE: Final = ("name", "decay", "drop", "epochs_drop")
_PLAIN: Final = Augmentation()


def _fit(config: Config) -> Run:
    from trainer.fit import fit

    return fit(config, go_on=True)


def _fit_together(
    configs: Sequence[Config],
    sweep: SweepInfo,
    interrupted: Mapping[int, Run],
    watch: Watch | None = None,
) -> list[Run]:
    from trainer.fit import fit_together

    return fit_together(configs, sweep, interrupted, watch=watch)


def _predict(members: Plan) -> Prediction:
    from trainer.predict import predict

    return predict(members)


@dataclass(frozen=True)
class Engine:
    """What trains and what predicts; both import torch, so they are imported when called.

    `fit_together` returns one Run for each config, in their order, also for those that failed; the
    runs that it is given, by index, were interrupted: it goes on with them where it can. A `Watch`,
    by the same index, follows only where there is one.
    """

    fit: Callable[[Config], Run] = _fit
    fit_together: Callable[..., list[Run]] = _fit_together
    predict: Callable[[Plan], Prediction] = _predict


def main(argv: list[str] | None = None, engine: Engine | None = None) -> int:
    """The command line; returns the exit status.

    0 when at least one member is done, 1 when all failed, 2 for a mistake of the user's, 130 when
    interrupted.
    """
    stop_on_signals()
    return guarded(lambda: _run(parse(argv), engine))


def _run(request: Request, engine: Engine | None) -> int:
    engine = engine or _engine(request)
    return _dry_run(request, engine) if request.dry_run else _sweep(request, engine)


def _engine(request: Request) -> Engine:
    if request.cluster is None:
        return Engine()
    from trainer.on_ray import RayEngine

    on_ray = RayEngine(request.cluster)
    return Engine(on_ray.fit, on_ray.fit_together)


# --- training ---------------------------------------------------------------------------------


def _sweep(request: Request, engine: Engine) -> int:
    check_writable(request.members[0].runs_dir)
    prepare_process()
    with _saying_how_to_go_on():
        return _train_all(request, engine)


def _train_all(request: Request, engine: Engine) -> int:
    return _status(train_all(request, engine)[1].values())


def train_all(request: Request, engine: Engine) -> tuple[Plan, dict[int, Run]]:
    """Train what is not done yet and print the ranking; the runs are by index in the plan."""
    if request.search is not None:
        return _search(request, engine)
    whole = plan(request, _parent(request, engine))
    print(f"Sweep {inert(whole.name)}: {_extent(whole)}")
    known = {} if request.again else earlier(whole)
    done = {index: run for index, run in known.items() if run.status == "done"}
    if done:
        print(_already(whole, done))
    runs = done | _train(whole, known, engine)
    print(ranking(whole, runs))
    return whole, runs


def _search(request: Request, engine: Engine) -> tuple[Plan, dict[int, Run]]:
    def train(part: Plan, watch: Watch | None) -> dict[int, Run]:
        known = {} if request.again else earlier(part)
        done = {index: run for index, run in known.items() if run.status == "done"}
        return done | _train(part, known, engine, watch)

    whole, runs = search(request, _parent(request, engine), train)
    runs = earlier(whole) | runs  # those of an earlier start of this command
    print(ranking(whole, runs))
    return whole, runs


@contextlib.contextmanager
def _saying_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print("The same command goes on where this sweep was interrupted.")
        raise


def _train(
    whole: Plan, known: Mapping[int, Run], engine: Engine, watch: Watch | None = None
) -> dict[int, Run]:
    """Train the members that are not done; returns their runs by index in the plan."""
    indices = range(len(whole.members))
    rest = [index for index in indices if index not in known or known[index].status != "done"]
    if not rest:
        return {}
    part = whole.only(rest)
    interrupted = {i: known[index] for i, index in enumerate(rest) if index in known}
    if watch is None:
        runs = engine.fit_together(part.configs, part.info, interrupted)
    else:
        runs = engine.fit_together(part.configs, part.info, interrupted, only(watch, rest))
    return dict(zip(rest, runs, strict=True))


def _status(runs: Iterable[Run]) -> int:
    found = {run.status for run in runs}
    if "interrupted" in found:
        return 130
    return 0 if "done" in found else 1


def _parent(request: Request, engine: Engine) -> Run | None:
    """The one run that all members start from, trained first where there is none."""
    first = request.members[0]
    parent = _known_parent(first)
    if parent is None and first.phase == "finetune":
        print("No finished transfer run of this data and architecture: it is trained first.")
        parent = engine.fit(trunk(first))
    return parent


def _known_parent(config: Config) -> Run | None:
    if config.phase != "finetune":
        return None
    if config.parent is None:
        from trainer.fit import check_before_work

        check_before_work(config)
    return find_parent(config)


def find_parent(config: Config) -> Run | None:
    """The run to finetune from as `python -m trainer` would choose it; None: there is none yet.

    Raises ThawError where the run that was named does not exist or does not fit.
    """
    if config.parent is not None:
        from trainer.start import adopt

        parent = find_run(config.runs_dir, config.parent)
        adopt(config, parent)  # refuses what contradicts it
        return parent
    if not any(run.phase == "transfer" and run.status == "done" for run in _runs(config)):
        return None  # known without opening a photo
    from trainer.start import newest_parent, sample_arch

    return newest_parent(sample_arch(config), find_fingerprint(config))


def _runs(config: Config) -> list[Run]:
    return list_runs(config.runs_dir)


def earlier(whole: Plan, but: Collection[str] = ()) -> dict[int, Run]:
    """The newest run of each member that is done already or was interrupted, by the member's
    index in the plan; one that is done comes first. Those with an id in `but` do not count.

    In whichever sweep it was trained: more seeds or rates do not begin anew.
    """
    index_of = {place.key: index for index, place in enumerate(whole.info.places)}
    known: dict[int, Run] = {}
    for run in _runs(whole.configs[0]):
        entry = run.info.get("sweep")
        key = entry.get("key") if isinstance(entry, dict) else None
        index = index_of.get(key) if isinstance(key, str) else None
        # "running" is also what a run says that was killed.
        if index is None or run.status not in ("done", "interrupted", "running"):
            continue
        if run.run_id in but:
            continue
        if run.status == "done" or index not in known or known[index].status != "done":
            known[index] = run
    return known


# --- before training --------------------------------------------------------------------------


def _dry_run(request: Request, engine: Engine) -> int:
    prepare_process()  # as in training, which it predicts
    first = request.members[0]
    parent = _known_parent(first)
    whole = plan(request, parent)
    print(f"Sweep: {_extent(whole)}")
    print(grid_table(whole))
    if first.phase == "finetune" and parent is None:
        print("There is no finished transfer run to start from: one is trained first.")
    known = {} if request.again else earlier(whole)
    done = {index: run for index, run in known.items() if run.status == "done"}
    if done:
        print(_already(whole, done))
    rest = [index for index in range(len(whole.members)) if index not in done]
    if rest:
        print(_predicted(engine.predict(whole.only(rest)), first))
    print("Nothing was trained (--dry-run).")
    return 0


def _predicted(expected: Prediction, config: Config) -> str:
    said = f"Predicted: {_duration(expected.seconds)}"
    if not config.cache:
        return f"{said}."
    said += f", and {format_size(expected.cache_bytes)} of cache"
    if expected.cache_bytes > config.cache_limit:
        limit = format_size(config.cache_limit)
        return f"{said}, more than --cache-limit {limit}: what it cannot keep is computed again."
    return f"{said}; less where some of it is in the cache already."


def _extent(whole: Plan) -> str:
    controls = sum(place.control for place in whole.info.places)
    beside = f" and {count(controls, 'control')}" if controls else ""
    parent = whole.configs[0].parent
    origin = f", from run {inert(parent)}" if parent else ""
    groups = whole.batch_groups
    apart = f" in {groups} groups, one for each seed and augmentation" if groups > 1 else ""
    members = count(len(whole.members) - controls, "member")
    return f"{members}{beside}{origin}, trained together{apart}"


def _already(whole: Plan, done: Mapping[int, Run]) -> str:
    if len(done) == len(whole.members):
        return "All of these are done already; --again trains them anew."
    names = [whole.labels[index] for index in sorted(done)]
    more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{len(done)} of these {len(whole.members)} are done already "
        f"({inert('; '.join(names[:3]))}{more}); --again trains all anew."
    )


def grid_table(whole: Plan) -> str:
    """The members of a plan, one a line, with the settings that a sweep can vary."""
    rows = [
        _grid_row(label, config, place)
        for (label, config), place in zip(whole.members, whole.info.places, strict=True)
    ]
    return table(rows, left=("member", "lr", "layers", "schedule", "augmentation"))


def _grid_row(label: str, config: Config, place: Place) -> dict[str, str]:
    settings = swept(config)
    schedule = [word(name, settings[name]) for name in _SCHEDULE if settings[name] is not None]
    photos = [word(n, value) for n, value in settings.items() if value != getattr(_PLAIN, n, value)]
    return {
        "number": str(place.number),
        "member": label,
        "lr": "the parent's" if place.control else word("lr", config.lr).removeprefix("lr "),
        "layers": "head only" if place.control else settings["unfreeze"] or "",
        "schedule": "the parent's" if place.control else ", ".join(schedule),
        "augmentation": ", ".join(photos),
        "seed": str(config.seed),
    }


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


if __name__ == "__main__":
    sys.exit(main())

"""`python -m trainer sweep --search optuna`: members that Optuna proposes, instead of a grid.

Optuna proposes some members, they are trained together beside the control of a sweep, and it learns
how they ended before it proposes more. What it has learned lies in the runs folder, so the same
command goes on where it was interrupted. Optuna is optional: requirements-search.txt.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trainer.config import Config
from trainer.grid import SWEPT, Plan, Request, Search, SweepError, batches_of, grid, plan
from trainer.ranking import count, outcome
from trainer.runlog import Run
from trainer.schema import EpochRecord, ThawError

# Of these two values are the ends of a range; of everything else, values to choose from.
_RANGES: Final = (
    *("lr", "decay", "drop", "label_smoothing", "layer_decay"),
    *("brightness", "contrast", "rotation", "noise"),
)
_DIGITS: Final = 3  # of a value from a range: more tell nobody more
_AS_BAD_AS_CAN_BE: Final = 0.0
# No member is hopeless before so many epochs, and before so many others have ended.
_EPOCHS: Final = 3
_OTHERS: Final = 4

# Why a member of the plan, by index, is not worth training on after this epoch; None: it is.
Watch = Callable[[int, EpochRecord], str | None]
TrainAll = Callable[[Plan, Watch | None], Mapping[int, Run]]


def only(watch: Watch, indices: Sequence[int]) -> Watch:
    """For the plan of these members alone; it can be sent to another process if `watch` can."""
    return functools.partial(_indirect, watch, tuple(indices))


def _indirect(watch: Watch, indices: Sequence[int], index: int, record: EpochRecord) -> str | None:
    return watch(indices[index], record)


def space_of(given: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """What a search chooses from: the settings with several values. Raises SweepError."""
    if "pairs" in given:
        raise SweepError("--pairs: a search chooses by itself; give --lr and --unfreeze.")
    space = {name: given[name] for name in SWEPT if len(given.get(name, ())) > 1}
    if "seed" in space:
        raise SweepError("--seed: a search takes one. Train the best it finds with several seeds.")
    if not space:
        raise SweepError(
            "--search optuna: no flag has several values, so there is nothing to choose. Give the "
            "ends of a range, such as --lr 1e-6 1e-2, or values, such as --unfreeze 10 20 all."
        )
    return space


def corners(given: Mapping[str, Any], space: Mapping[str, tuple[Any, ...]]) -> tuple[Config, ...]:
    """Two members, the first and the last of all values. Raises SweepError for values that make no
    member."""
    ends = ({name: values[end] for name, values in space.items()} for end in (0, -1))
    return tuple(_member(given, chosen) for chosen in ends)


def _member(settings: Mapping[str, Any], chosen: Mapping[str, Any]) -> Config:
    (config,) = grid({**settings, **{name: (value,) for name, value in chosen.items()}})
    return config


def search(request: Request, parent: Run | None, train: TrainAll) -> tuple[Plan, dict[int, Run]]:
    """Train what Optuna proposes, round after round, all from `parent`; `train` returns the runs of
    a plan by index. Returns the plan of all members, the controls last, and their runs by index.

    Raises ThawError.
    """
    assert request.search is not None
    study = _Study(request, request.search, parent)
    print(f"Search {study.name}: {study.extent()}")
    known: dict[str, Run] = {}
    while part := study.next():
        runs = train(part, study.hopeless() if request.search.prune else None)
        known |= {part.info.places[index].key: run for index, run in runs.items()}
        study.learn(part, runs)
    whole = study.plan()
    keys = [place.key for place in whole.info.places]
    return whole, {index: known[key] for index, key in enumerate(keys) if key in known}


class _Study:
    """Optuna's study of one search, and the members that its trials stand for."""

    def __init__(self, request: Request, asked: Search, parent: Run | None) -> None:
        self._asked, self._parent = asked, parent
        # Beside these two every label names all that is searched, because they differ in all of it.
        self._corners = request.members
        self._id = plan(Request(self._corners), parent).id
        self._file = self._corners[0].runs_dir / f".{self._id}.search"
        self.name = request.name or f"search-{self._id[:6]}"
        self._study = self._open()
        self._trials: dict[int, list[Any]] = {}

    def _open(self) -> Any:
        """The study as it was left; what was being trained then is proposed again."""
        optuna = _optuna()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        try:
            study = _opened(self._file, self._id)
        except (ValueError, KeyError) as error:
            raise ThawError(
                f"What Optuna has learned cannot be read from {self._file}: {error}. Remove the "
                "file; members that are done are not trained again."
            ) from error
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)
        # By how much is known, or a search that goes on would propose the same again.
        seed = self._corners[0].seed + len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.TPESampler(seed=seed)
        return study

    def extent(self) -> str:
        ended = len(self._ended())
        known = f", {ended} of them known already" if ended else ""
        chosen = ", ".join(name.replace("_", " ") for name in self._asked.space)
        members = f"{count(self._asked.trials, 'member')}{known}"
        return f"{members}, {self._asked.at_once} at once; Optuna chooses {chosen}"

    def _ended(self) -> list[Any]:
        complete = _optuna().trial.TrialState.COMPLETE
        return list(self._study.get_trials(deepcopy=False, states=(complete,)))

    def next(self) -> Plan | None:
        """The members to train next, and their controls; None when there have been enough."""
        number = min(self._asked.at_once, self._asked.trials - len(self._ended()))
        if number <= 0:
            return None
        space = {name: _distribution(name, values) for name, values in self._asked.space.items()}
        proposed: dict[Config, list[Any]] = {}
        for _ in range(number):
            trial = self._study.ask(space)
            proposed.setdefault(self._chosen(trial), []).append(trial)
        self._trials = dict(enumerate(proposed.values()))
        return self._plan(list(proposed))

    def plan(self) -> Plan:
        """Of all members that have ended, in the order in which they were proposed."""
        return self._plan([])

    def _chosen(self, trial: Any) -> Config:
        chosen = {
            name: float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
            for name, value in trial.params.items()
        }
        return _member(self._asked.settings, chosen)

    def _plan(self, wanted: Sequence[Config]) -> Plan:
        """Of these members, or of all that have ended, each numbered as it was proposed."""
        ended = [self._chosen(trial) for trial in self._ended()]
        members = list(dict.fromkeys([*ended, *wanted]))
        whole = plan(Request((*members, *self._corners)), self._parent)
        indices = [members.index(config) for config in wanted or members]
        batches = {batches_of(whole.configs[index]) for index in indices}
        first_control = len(members) + len(self._corners)
        controls = [
            index
            for index in range(first_control, len(whole.members))
            if batches_of(whole.configs[index]) in batches
        ]
        part, trials = whole.only([*indices, *controls]), self._asked.trials
        places = tuple(
            dataclasses.replace(place, number=place.number - first_control + trials)
            if place.control
            else place
            for place in part.info.places
        )
        of = trials + len(whole.members) - first_control
        info = dataclasses.replace(part.info, id=self._id, name=self.name, of=of, places=places)
        return dataclasses.replace(part, info=info)

    def hopeless(self) -> Watch:
        """Watches the members of the plan that `next` gave."""
        numbers = {index: [t.number for t in trials] for index, trials in self._trials.items()}
        return _Hopeless(self._file.absolute(), self._id, numbers)

    def learn(self, part: Plan, runs: Mapping[int, Run]) -> None:
        """How the members ended; one that failed, as with a loss that diverged, counts as 0%."""
        for index, trials in self._trials.items():
            found = outcome(part.configs[index], runs[index])
            value = _AS_BAD_AS_CAN_BE if found is None else found.best.val_acc
            for trial in trials:
                self._study.tell(trial, value)


@dataclass(frozen=True)
class _Hopeless:
    """A `Watch`: Optuna's median rule over the best validation accuracy so far.

    It may be asked on any machine that sees `file`, where the study `name` is kept; `trials` are
    the numbers of those that stand for each member.
    """

    file: Path
    name: str
    trials: Mapping[int, Sequence[int]]

    def __call__(self, index: int, record: EpochRecord) -> str | None:
        found = [self._is_hopeless(number, record) for number in self.trials.get(index, ())]
        if not any(found):
            return None
        return f"Stopped early: below the median of the members after epoch {record.phase_epoch}."

    @functools.cached_property
    def _study(self) -> Any:
        return _opened(self.file, self.name)

    def _is_hopeless(self, number: int, record: EpochRecord) -> bool:
        study = self._study
        frozen = study.get_trials(deepcopy=False)[number]
        trial = _optuna().trial.Trial(study, frozen._trial_id)
        if record.phase_epoch not in frozen.intermediate_values:  # a task may have begun again
            trial.report(record.val_acc, record.phase_epoch)
        return bool(trial.should_prune())


def _opened(file: Path, name: str) -> Any:
    """The study in a file, a new one where there is none. Raises ValueError, KeyError."""
    optuna = _optuna()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(file))),
        pruner=optuna.pruners.MedianPruner(_OTHERS, _EPOCHS),
        study_name=name,
        direction="maximize",
        load_if_exists=True,
    )


def _distribution(name: str, values: tuple[Any, ...]) -> Any:
    distributions = _optuna().distributions
    if name in _RANGES and len(values) == 2:
        low, high = sorted(values)
        return distributions.FloatDistribution(low, high, log=name == "lr")
    return distributions.CategoricalDistribution(values)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ThawError(
            "--search optuna needs Optuna, which is not installed: "
            "pip install -r requirements-search.txt"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna

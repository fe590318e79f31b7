"""Thaw's trainer against the same training as users of other libraries write it.

    python -m tests.benchmarks.against_peers --data DIR --weights FILE --peers-python PY
        [--case augmented|plain|streaming|all-unfrozen|heads] [--peers plain,keras] [--rounds 3]

Every round runs Thaw, then each peer, each in a fresh process with start-up, decoding and the
filling of caches counted. All read the same split and weights and have the same allocator
(`--untuned`: the peers have glibc's default); a peer's loader workers (0, 1 or 2) and memory format
are what a short trial found fastest. How to make the environment of `--peers-python` is said in
tests/benchmarks/peers/__init__.py. A quick look: `--scale 0.05` takes that part of the epochs and
of the photos, and `--settings 1,NHWC` leaves out the trials.

| case | what runs |
| --- | --- |
| augmented | both phases, 25 + 20 epochs, all augmentations; then Thaw's finetune again, from the same parent and cache, against the peers' second phase alone |
| plain | transfer alone, 25 epochs, no augmentation |
| streaming | transfer, 2 epochs, everything computed anew (`--no-cache`): look at images/s |
| all-unfrozen | 1 + 2 epochs, the whole network but BatchNorm trains in the second: look at images/s |
| heads | sixteen learning rates in one sweep of Thaw's, against one of them |

Prints a table of medians and, last, one JSON line with everything.
"""  # noqa: E501  # a table's rows cannot be broken

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.peers.job import (
    BRIGHTNESS,
    CONTRAST,
    CROP_FROM,
    NOISE,
    PEERS,
    TURN,
    Job,
)
from trainer.config import Config
from trainer.listing import Item, list_photos
from trainer.runlog import Run, list_runs

_ROOT: Final = Path(__file__).resolve().parents[2]
_ENVIRONMENT: Final = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
# A trial is a few batches: enough to tell settings apart, little enough to try them all.
_TRIAL: Final = {"train": 32, "val": 6}
_RATES: Final = [f"{1e-4 * 1000 ** (i / 15):.3g}" for i in range(16)]
# Keras' pipeline chooses its own parallelism, and TensorFlow knows one format on a CPU.
_SETTLED: Final = ("keras",)
_AGAIN: Final = "thaw, finetune again"

Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What is measured where nothing else is asked for by flags."""

    transfer_epochs: int
    finetune_epochs: int = 0
    augment: bool = False
    everything: bool = False
    thaw: tuple[str, ...] = ()
    peers: tuple[str, ...] = tuple(PEERS)


_CASES: Final = {
    "augmented": Case(25, 20, augment=True),
    "plain": Case(25),
    "streaming": Case(2, thaw=("--no-cache",), peers=("plain",)),
    "all-unfrozen": Case(1, 2, everything=True, peers=("plain",)),
    "heads": Case(25, peers=()),
}


class NotRunError(Exception):
    """A command that failed; the message is the last line it wrote."""


# --- processes --------------------------------------------------------------------------------


def run(command: Sequence[str]) -> tuple[Result, str]:
    """Wall and CPU seconds of a process and all its children, and what it wrote to stdout."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=_ROOT, env=_ENVIRONMENT, stdout=output, stderr=errors
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise NotRunError(_last_line(errors.read()) or f"exit status {process.returncode}")
        return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime}, output.read()


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2].strip()


def run_peer(python: str, peer: str, job: Job) -> Result:
    """One peer once; its own figures beside those of the process."""
    measured, output = run([python, "-m", "tests.benchmarks.peers", peer, *job.to_flags()])
    own = json.loads(_last_line(output))
    return own | measured | {"own_wall": own["wall"], "own_cpu": own["cpu"]}


# --- Thaw -------------------------------------------------------------------------------------


def thaw_command(job: Job, folder: Path, what: Sequence[str]) -> list[str]:
    """Thaw's trainer for a job; `folder` holds its runs and its cache."""
    return [
        *(sys.executable, "-m", "trainer", *what, *_photos(job)),
        *("--weights", str(job.weights), "--data", str(job.data), "--split-file", str(job.split)),
        *("--seed", str(job.seed), "--device", "cpu"),
        *("--runs-dir", str(folder / "runs"), "--cache-dir", str(folder / "cache")),
    ]


def sweep_command(job: Job, folder: Path) -> list[str]:
    """Sixteen heads at once: the one place to change where the sweep's flags change."""
    what = ["sweep", "--phase", "transfer", "--epochs", str(job.transfer_epochs)]
    return thaw_command(job, folder, [*what, "--lr", *_RATES])


def _phases(job: Job) -> list[str]:
    """Both phases in one command, or the first alone."""
    epochs, lr = str(job.transfer_epochs), str(job.transfer_lr)
    if job.finetune_epochs == 0:
        return ["--phase", "transfer", "--epochs", epochs, "--lr", lr]
    return [*_second_phase(job), "--transfer-epochs", epochs, "--transfer-lr", lr]


def _second_phase(job: Job) -> list[str]:
    layers = "all" if job.unfreeze == "all" else "20"
    epochs, lr = str(job.finetune_epochs), str(job.finetune_lr)
    return ["--phase", "finetune", "--epochs", epochs, "--lr", lr, "--unfreeze", layers]


def _photos(job: Job) -> list[str]:
    if not job.augment:
        return []
    color = ["--brightness", str(BRIGHTNESS), "--contrast", str(CONTRAST)]
    place = ["--rotation", str(TURN), "--crop-from", str(CROP_FROM)]
    return [*color, *place, "--noise", str(NOISE)]


def run_thaw(job: Job, extra: Sequence[str] = ()) -> tuple[Result, Result | None]:
    """Thaw once with an empty cache and, where there is a second phase, that phase once more."""
    with tempfile.TemporaryDirectory(prefix="thaw-") as name:
        folder = Path(name)
        measured, _ = run(thaw_command(job, folder, [*_phases(job), *extra]))
        runs = list_runs(folder / "runs")
        first = measured | {str(r.phase): _of_phase(r) for r in runs}
        if job.finetune_epochs == 0:
            return first, None
        parent = next(r.run_id for r in runs if r.phase == "transfer")
        again = [*_second_phase(job), "--from", parent, *extra]
        measured, _ = run(thaw_command(job, folder, again))
        return first, measured | {"finetune": _of_phase(list_runs(folder / "runs")[-1])}


def _of_phase(run: Run) -> Result:
    """The same figures that the peers report; the last epoch counts, not the best."""
    trained = [epoch.images_per_second for epoch in run.epochs[1:]]
    return {
        "val_acc": run.epochs[-1].val_acc,
        "val_acc_before": run.epochs[0].val_acc,
        "images_per_second": statistics.harmonic_mean(trained),
        "seconds": sum(epoch.seconds for epoch in run.epochs),
    }


# --- the work ---------------------------------------------------------------------------------


def write_split(path: Path, items: Iterable[Item]) -> Path:
    """The CSV that Thaw takes with --split-file and all peers read."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "split"])
        writer.writerows((item.file, item.split) for item in items)
    return path


def make_job(arguments: argparse.Namespace, case: Case, folder: Path) -> Job:
    """Epochs and photos as asked for, and the split written."""
    data = arguments.data.absolute()
    items = list_photos(Config("transfer", data=str(data), limit=_limit(arguments))).items
    for item in items:
        (data / item.file).read_bytes()  # from the disk now, not in the middle of the first run
    transfer, finetune = arguments.transfer_epochs, arguments.finetune_epochs
    return Job(
        data=data,
        split=write_split(folder / "split.csv", items),
        weights=arguments.weights.absolute(),
        transfer_epochs=_scaled(case.transfer_epochs if transfer is None else transfer, arguments),
        finetune_epochs=_scaled(case.finetune_epochs if finetune is None else finetune, arguments),
        unfreeze="all" if case.everything else "top",
        augment=case.augment if arguments.augment is None else arguments.augment,
        seed=arguments.seed,
        untuned=arguments.untuned,
    )


def _scaled(epochs: int, arguments: argparse.Namespace) -> int:
    return math.ceil(epochs * arguments.scale)


def _limit(arguments: argparse.Namespace) -> int | None:
    if arguments.scale == 1:
        return arguments.limit
    items = list_photos(Config("transfer", data=str(arguments.data), limit=arguments.limit)).items
    largest = max(Counter(item.label for item in items).values())
    return max(4, math.ceil(largest * arguments.scale))


def trial_of(job: Job) -> Job:
    """A few batches, two epochs of each phase: the first of them warms up."""
    seen: Counter[tuple[int, str]] = Counter()
    items = []
    for split in ("train", "val"):
        for path, label in job.photos("train" if split == "train" else "val"):
            seen[label, split] += 1
            if seen[label, split] <= _TRIAL[split]:
                items.append(Item(path.relative_to(job.data).as_posix(), label, split))
    return dataclasses.replace(
        job,
        split=write_split(job.split.with_name("trial.csv"), items),
        transfer_epochs=2,
        finetune_epochs=2 if job.finetune_epochs else 0,
    )


def choose_settings(python: str, peer: str, job: Job) -> Result:
    """The fastest memory format, then the fastest number of workers, of a short trial each.

    Raises NotRunError where the peer does not run.
    """
    trial = trial_of(job)
    costs: dict[tuple[int, bool], float] = {}

    def fastest(candidates: Iterable[tuple[int, bool]]) -> tuple[int, bool]:
        for workers, last in set(candidates) - set(costs):
            asked = dataclasses.replace(trial, workers=workers, channels_last=last)
            costs[workers, last] = _cost(job, run_peer(python, peer, asked))
        return min(costs, key=costs.__getitem__)

    if peer in _SETTLED:
        fastest([(1, False)])
        return {}
    _, last = fastest([(1, False), (1, True)])
    workers, last = fastest((workers, last) for workers in (0, 1, 2))
    return {"workers": workers, "channels_last": last}


def _cost(job: Job, trial: Mapping[str, Any]) -> float:
    """Seconds that the training epochs would take, by each phase's last epoch of the trial."""
    return sum(phase.epochs * trial[phase.name]["epoch_seconds"][-1] for phase in job.phases)


# --- rounds -----------------------------------------------------------------------------------


@dataclass
class Measurements:
    """What was measured: the results of each name in the order of the rounds."""

    results: dict[str, list[Result]] = dataclasses.field(default_factory=dict)
    settings: dict[str, Result] = dataclasses.field(default_factory=dict)
    not_run: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, name: str, result: Result) -> None:
        self.results.setdefault(name, []).append(result)
        say(f"{name}: {json.dumps(result)}")  # hours may have gone into it: not only at the end

    def failed(self, name: str, error: NotRunError) -> None:
        self.not_run[name] = str(error)
        say(f"{name}: not run: {error}")


def say(text: str) -> None:
    """Progress; stdout is for the table and the JSON line."""
    print(text, file=sys.stderr, flush=True)


def race(
    job: Job, extra: Sequence[str], peers: Iterable[str], arguments: argparse.Namespace
) -> Measurements:
    """Thaw and the peers in turn. A peer that fails once is left out of later rounds."""
    measured = Measurements()
    if arguments.settings is None:
        run_thaw(trial_of(job), extra)  # its libraries come from the disk now, as the peers' do
    for peer in peers:
        try:
            measured.settings[peer] = _settings_for(peer, job, arguments)
            say(f"{peer}: {measured.settings[peer] or 'its own settings'}")
        except NotRunError as error:
            measured.failed(peer, error)
    for _ in range(arguments.rounds):
        first, again = run_thaw(job, extra)
        measured.add("thaw", first)
        if again is not None:
            measured.add(_AGAIN, again)
        for peer, settings in measured.settings.items():
            if peer in measured.not_run:
                continue
            asked = dataclasses.replace(job, **settings)
            try:
                measured.add(peer, run_peer(arguments.peers_python, peer, asked))
            except NotRunError as error:
                measured.failed(peer, error)
    return measured


def _settings_for(peer: str, job: Job, arguments: argparse.Namespace) -> Result:
    if arguments.settings is None:
        return choose_settings(arguments.peers_python, peer, job)
    known = arguments.settings
    return {} if peer in _SETTLED else known.get(peer, known.get("", {}))


def heads(job: Job, arguments: argparse.Namespace) -> Measurements:
    """Sixteen learning rates in one sweep, against a single run."""
    measured = Measurements()
    run_thaw(trial_of(job), arguments.thaw)
    for _ in range(arguments.rounds):
        measured.add("thaw", run_thaw(job, arguments.thaw)[0])
        with tempfile.TemporaryDirectory(prefix="thaw-") as folder:
            command = [*sweep_command(job, Path(folder)), *arguments.thaw]
            try:
                measured.add(f"sweep of {len(_RATES)}", run(command)[0])
            except NotRunError as error:
                measured.failed("sweep", error)
    return measured


# --- output -----------------------------------------------------------------------------------


def medians(results: Sequence[Result]) -> Result:
    """The median of every figure, phase by phase."""
    first = results[0]
    return {
        name: medians([result[name] for result in results])
        if isinstance(value, dict)
        else statistics.median(result[name] for result in results)
        for name, value in first.items()
        if isinstance(value, dict | int | float)
    }


def table(measured: Measurements) -> str:
    """Markdown, as docs/benchmarks.md has it; ratios are to Thaw."""
    figures = {name: medians(results) for name, results in measured.results.items()}
    lines = [
        "| | wall s | ratio | CPU s | ratio | transfer: val acc, images/s "
        "| finetune: val acc, images/s, s | workers, format |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in figures.items():
        base = figures["thaw"]
        cells = [name, f"{row['wall']:.1f}", _ratio(row, base, "wall")]
        cells += [f"{row['cpu']:.1f}", _ratio(row, base, "cpu"), _shown(row.get("transfer"))]
        finetune = row.get("finetune")
        seconds = f", {finetune['seconds']:.1f}" if finetune else ""
        cells += [_shown(finetune) + seconds, _settings(measured.settings.get(name))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {name} | not run: {reason} |" for name, reason in measured.not_run.items()]
    if _AGAIN in figures:
        lines += ["", _against_second_phase(figures)]
    return "\n".join(lines)


def _ratio(row: Result, base: Result, name: str) -> str:
    return f"{row[name] / base[name]:.2f}"


def _shown(phase: Result | None) -> str:
    if phase is None:
        return "–"
    return f"{phase['val_acc']:.2%}, {phase['images_per_second']:.0f}"


def _settings(settings: Result | None) -> str:
    if not settings:
        return "–"
    return f"{settings['workers']}, {'NHWC' if settings['channels_last'] else 'NCHW'}"


def _against_second_phase(figures: Mapping[str, Result]) -> str:
    """Thaw's second finetune, the whole process, against the peers' second phase alone."""
    again = figures[_AGAIN]["wall"]
    alone = {name: row["finetune"]["seconds"] for name, row in figures.items() if name in PEERS}
    others = [f"{name} {s:.1f} s (ratio {s / again:.2f})" for name, s in alone.items()]
    return f"Finetune again: Thaw {again:.1f} s; second phase alone: {', '.join(others) or '–'}."


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--peers-python", help="the Python of the peers' environment")
    parser.add_argument("--case", choices=_CASES, default="augmented")
    parser.add_argument("--peers", help=f"some of {','.join(PEERS)}; '' for none")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--transfer-epochs", type=int)
    parser.add_argument("--finetune-epochs", type=int)
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction)
    parser.add_argument("--limit", type=int, help="photos of each class")
    parser.add_argument("--scale", type=float, default=1, help="part of the epochs and photos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--settings",
        type=_parse_settings,
        metavar="[PEER=]WORKERS,NCHW|NHWC",
        help="instead of trials; several with spaces between them, one without PEER for the others",
    )
    parser.add_argument(
        "--thaw", type=shlex.split, default=[], metavar="FLAGS", help="more flags for Thaw"
    )
    parser.add_argument("--untuned", action="store_true", help="peers: glibc's own allocator")
    return parser


def _parse_settings(text: str) -> dict[str, Result]:
    """By peer; "" for all others."""
    found = {}
    for one in text.split():
        peer, _, setting = one.rpartition("=")
        workers, _, layout = setting.partition(",")
        if layout not in ("NCHW", "NHWC"):
            raise argparse.ArgumentTypeError(f"{one}: must be such as 1,NHWC or plain=1,NHWC")
        found[peer] = {"workers": int(workers), "channels_last": layout == "NHWC"}
    return found


def chosen_peers(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """Those asked for, else the case's own; ends the program where there are none such."""
    if arguments.peers is None:
        chosen = list(_CASES[arguments.case].peers)
    else:
        chosen = [name for name in arguments.peers.split(",") if name]
    if unknown := set(chosen) - set(PEERS):
        parser.error(f"--peers: no such peer: {', '.join(sorted(unknown))}")
    if chosen and not arguments.peers_python:
        parser.error("--peers-python is needed; see tests/benchmarks/peers/__init__.py")
    return chosen


def main() -> None:
    parser = make_parser()
    arguments = parser.parse_args()
    case, peers = _CASES[arguments.case], chosen_peers(parser, arguments)
    load = {"start": os.getloadavg()}
    with tempfile.TemporaryDirectory(prefix="against-peers-") as folder:
        job = make_job(arguments, case, Path(folder))
        if arguments.case == "heads":
            measured = heads(job, arguments)
        else:
            measured = race(job, [*case.thaw, *arguments.thaw], peers, arguments)
        photos = {"train": len(job.photos("train")), "val": len(job.photos("val"))}
    load["end"] = os.getloadavg()
    print(table(measured))
    print(f"\nLoad average: {load['start'][0]:.2f} at the start, {load['end'][0]:.2f} at the end.")
    asked = {name: str(value) for name, value in dataclasses.asdict(job).items()}
    everything = {"case": arguments.case, "job": asked, "photos": photos, "load": load}
    everything["medians"] = {name: medians(rows) for name, rows in measured.results.items()}
    print(json.dumps(everything | dataclasses.asdict(measured)))


if __name__ == "__main__":
    main()

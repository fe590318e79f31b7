"""`python -m trainer lr-find`: which learning rate to start from, by a short test."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tqdm import tqdm

from trainer.__main__ import build_parser, config_of
from trainer.cli import guarded
from trainer.config import Config, ConfigError
from trainer.files import write_atomically
from trainer.process import prepare_process
from trainer.run_writer import check_writable
from trainer.schema import LR_FIND, SCHEMA_VERSION

if TYPE_CHECKING:
    from trainer.fit import Job
    from trainer.lr_find import RangeTest

_LOW, _HIGH, _STEPS = 1e-8, 1.0, 100
_FEWEST: Final = 20
_LINES, _WIDTH = 20, 40
_EPILOG: Final = """\
Takes the flags of training. No run is written, and no network is kept: what is found is
printed, and its numbers go to lr-find/ in the runs folder.

examples:
  python -m trainer lr-find --from RUN --unfreeze 20
  python -m trainer lr-find --phase transfer --data photos/ --lr-min 1e-6
"""


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for, checked."""

    config: Config
    low: float
    high: float
    steps: int


def build_lr_find_parser() -> argparse.ArgumentParser:
    """The flags of `python -m trainer`, and the range of rates."""
    parser = build_parser()
    parser.prog = "python -m trainer lr-find"
    parser.description = (
        "Find a learning rate: train a copy at a rate that grows with every batch, until the loss\n"
        "diverges, and suggest the rates at which it fell."
    )
    parser.epilog = _EPILOG
    for action in parser._actions:
        if action.dest == "phase":
            action.required, action.metavar = False, "finetune|transfer|scratch"
            action.help = "what would train (finetune)"
    group = parser.add_argument_group("learning-rate finder")
    group.add_argument("--lr-min", type=float, metavar="X", help=f"first rate ({_LOW:g})")
    group.add_argument("--lr-max", type=float, metavar="X", help=f"last rate ({_HIGH:g})")
    group.add_argument("--steps", type=int, metavar="N", help=f"batches, one a rate ({_STEPS})")
    return parser


def parse(argv: Sequence[str] | None = None) -> Request:
    """Flags -> what to test. Raises ThawError for values that make no sense."""
    given = {
        k: v for k, v in vars(build_lr_find_parser().parse_args(argv)).items() if v is not None
    }
    for name, flag in (("lr", "--lr"), ("gradual", "--gradual"), ("name", "--schedule")):
        if name in given:
            raise ConfigError(f"{flag}: lr-find tries rates for one stage; leave {flag} away.")
    low, high = given.pop("lr_min", _LOW), given.pop("lr_max", _HIGH)
    steps = given.pop("steps", _STEPS)
    if not 0 < low < high <= 1e6:
        raise ConfigError(f"--lr-min {low:g} --lr-max {high:g}: must rise from above 0.")
    if steps < _FEWEST:
        raise ConfigError(f"--steps {steps}: must be {_FEWEST} or more.")
    config = config_of({"phase": "finetune"} | given)
    if config.phase == "direct":
        raise ConfigError("--phase direct: trains nothing. Give finetune, transfer or scratch.")
    return Request(config, low, high, steps)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 a mistake of the user's."""
    return guarded(lambda: _run(parse(argv)))


def _run(request: Request) -> int:
    check_writable(request.config.runs_dir)
    prepare_process()
    from trainer.fit import check_before_work, prepare_without_training
    from trainer.lr_find import find_rate

    check_before_work(request.config)
    job = prepare_without_training(request.config)
    config = dataclasses.replace(
        job.config,
        epochs=math.ceil(request.steps * job.config.batch_size / len(job.photos.train)),
    )
    job = dataclasses.replace(job, config=config)
    with tqdm(total=request.steps, unit="batch", disable=None, leave=False) as bar:
        found = find_rate(job, request.low, request.high, request.steps, lambda _: bar.update())
    path = _save(job, found)
    print("\n".join(_shown(found)))
    print(f"Written to {path}")
    return 0


def _save(job: Job, found: RangeTest) -> Path:
    config, folder = job.config, job.config.runs_dir / LR_FIND
    folder.mkdir(parents=True, exist_ok=True)
    layers = f"-{config.unfreeze}" if config.phase == "finetune" else ""
    stem = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{config.phase}{layers}"
    names = (f"{stem}-{number}" if number > 1 else stem for number in range(1, 1000))
    path = next(p for p in (folder / f"{name}.json" for name in names) if not p.exists())
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "time": time.time(),
        "config": config.to_dict(),
        "model": job.start.spec.to_dict(),
        "dataset": job.photos.to_dict(),
        "parent_run_id": job.start.origin.get("parent_run_id"),
        **found.to_dict(),
    }
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False).encode())
    return path


def _shown(found: RangeTest) -> list[str]:
    """A plot in text, and what to make of it."""
    from trainer.lr_find import steep, valley

    steps = sorted({round(i * (len(found.rates) - 1) / (_LINES - 1)) for i in range(_LINES)})
    low = min(found.smoothed, default=0.0)
    # Where it diverges the loss would flatten everything that was before.
    high = 1.5 * found.smoothed[0] if found.smoothed else 0.0
    lines = ["rate      loss, smoothed"]
    for step in steps if found.rates else ():
        loss = found.smoothed[step]
        part = min(1.0, (loss - low) / (high - low)) if high > low else 0.0
        bar = "#" * round(_WIDTH * part)
        lines.append(f"{found.rates[step]:<8.1e}  {loss:7.4f}  {bar}".rstrip())
    if found.diverged:
        last = f" after a rate of {found.rates[-1]:.1e}" if found.rates else " at the first rate"
        lines.append(f"The loss diverged{last}.")
    named = {
        "steepest fall": steep(found.rates, found.smoothed),
        "valley": valley(found.rates, found.smoothed),
    }
    said = [f"{name} --lr {rate:.1e}" for name, rate in named.items() if rate is not None]
    if not said:
        return [*lines, "The loss never fell: there is no rate to suggest. Try other --lr-min."]
    return [*lines, f"Suggested: {', '.join(said)}. A short test: compare a few rates around them."]

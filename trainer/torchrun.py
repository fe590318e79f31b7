"""`torchrun ... -m trainer ...`: one training by many processes, that goes on when they are started
anew."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Final

from trainer.__main__ import told
from trainer.cli import inert
from trainer.config import Config
from trainer.fit import fit
from trainer.grid import NOT_TRAINING
from trainer.ranks import from_first, joined, set_job
from trainer.resume_command import go_on, is_pending
from trainer.runlog import Run, list_runs

# The name that torchrun gives to all jobs that were given none.
_NO_NAME: Final = "none"


def train(config: Config) -> int:
    """Train as `trainer.fit.fit` does; a job that torchrun has started anew goes on with its own
    run. Returns 0; raises ThawError."""
    set_job(job_key(config))
    with joined():
        return told(config.runs_dir, lambda: _train(config))


def _train(config: Config) -> Run:
    run = from_first(lambda: earlier(config))
    if run is None:
        return fit(config)
    if run.status == "done" and not from_first(lambda: is_pending(run, list_runs(config.runs_dir))):
        print(f"Run {inert(run.run_id)} of this job is done.")
        return run
    return go_on(run, {"cache_dir": config.cache_dir})


def job_key(config: Config) -> str:
    """Of this torchrun and of what it was asked for."""
    asked = {name: value for name, value in config.to_dict().items() if name not in NOT_TRAINING}
    text = json.dumps([os.environ["TORCHELASTIC_RUN_ID"], asked], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def earlier(config: Config) -> Run | None:
    """The run that this job has begun before its processes were started anew, if it has.

    A job without a name of its own (--rdzv-id) is known as started anew only where torchrun counts
    a restart; one with a name also goes on when it is submitted again.
    """
    restarted = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    if not restarted and os.environ["TORCHELASTIC_RUN_ID"] == _NO_NAME:
        return None
    key, runs = job_key(config), list_runs(config.runs_dir)
    for run in reversed(runs):
        told_by = run.info.get("distributed")
        if isinstance(told_by, dict) and told_by.get("job") == key:
            unfinished = run.status == "interrupted" or is_pending(run, runs)
            return run if unfinished or (restarted and run.status == "done") else None
    return None

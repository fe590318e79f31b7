"""Trainings in processes of their own that something happens to: killed, stopped, out of space."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from trainer.runlog import Run

# Forked from a process that has imported torch already: starting takes no seconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.faults", "trainer.fit", "trainer.sweep", "PIL.Image"])
TIMES = ("seconds", "images_per_second", "peak_memory_bytes", "time")


def start(argv: list[str], fault: Callable[..., None] | None = None, *about: Any) -> BaseProcess:
    """`python -m trainer` with these arguments; `fault(*about)` is called first in the process."""
    process = _CONTEXT.Process(target=_train, args=(list(argv), fault, about), daemon=True)
    # Streamlit's AppTest leaves its script behind as __main__, which the process would import.
    with patch.dict(sys.modules, {"__main__": ModuleType("__main__")}):
        process.start()
    return process


def run(
    argv: list[str], fault: Callable[..., None] | None = None, *about: Any
) -> tuple[int | None, str]:
    """As `start`, to its end; the exit status and what it wrote to stderr."""
    with tempfile.NamedTemporaryFile() as errors:
        process = start([f"stderr={errors.name}", *argv], fault, *about)
        process.join(240)
        return process.exitcode, Path(errors.name).read_text()


def _train(argv: list[str], fault: Callable[..., None] | None, about: tuple[Any, ...]) -> None:
    target = os.devnull
    if argv[0].startswith("stderr="):
        target = argv.pop(0).removeprefix("stderr=")
    for descriptor, path in ((1, os.devnull), (2, target)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    import torch

    from trainer.__main__ import main

    torch.set_num_threads(1)
    if fault is not None:
        fault(*about)
    sys.exit(main(argv))


def kill_at(name: str, call: int) -> None:
    """A fault: the process is killed instead of this call, counted from 1, of `module:attribute`,
    such as "trainer.journal:Journal.write"."""

    def killed(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    replace_call(name, call, killed)


def replace_call(name: str, call: int, instead: Callable[..., Any]) -> None:
    """Have `instead` called in place of one call of a function, or method, of the program."""
    module, _, attributes = name.partition(":")
    *owners, last = attributes.split(".")
    owner: Any = importlib.import_module(module)
    for attribute in owners:
        owner = getattr(owner, attribute)
    original, left = getattr(owner, last), [call]

    def counted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        return (instead if left[0] == 0 else original)(*args, **kwargs)

    setattr(owner, last, counted)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def figures(run: Run) -> list[dict[str, Any]]:
    """Everything that is logged of each epoch, but how long it took."""
    return [
        {name: value for name, value in vars(epoch).items() if name not in TIMES}
        for epoch in run.epochs
    ]


def litter(folder: Path) -> list[str]:
    """What should not be left in the folder of a run that has ended."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))

"""The fastest form of the frozen prefix on this machine, chosen by a short trial.

Inference needs neither gradients nor BatchNorm as a step of its own. All forms compute the same
function; one whose numbers differ from the plain network's is never used.
"""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from trainer.cache import code_digest
from trainer.config import Precision
from trainer.files import write_atomically
from trainer.prefix import Activations

FormName = Literal["plain", "folded", "onnxruntime", "compiled", "bfloat16"]
Run = Callable[[Tensor], Activations]

# Largest difference from the plain network, as a fraction of its largest activation: forms that
# compute the same but for rounding, and the one that only those get who ask for it.
TOLERANCE: Final = 1e-3
_TOLERANCE_BF16: Final = 0.1
# A form that is not clearly faster is not worth what building it costs in every run.
_MARGIN: Final = 1.1
# With fewer forward passes than this ahead, a trial costs more than it can save.
_WORTH_A_TRIAL: Final = 2500
_ROUNDS: Final = 3
# Photos on which a form is compared with the plain network.
_COMPARED: Final = 8


@dataclass(frozen=True)
class Trial:
    """How one form did: images a second, largest difference (see TOLERANCE), or the problem."""

    form: FormName
    images_per_second: float | None = None
    difference: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Form:
    """A prefix ready to run: normalised photos [N, 3, H, W] -> activations, on the same device."""

    name: FormName
    run: Run = field(repr=False)
    trials: tuple[Trial, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For the "engine" of run.json."""
        return {"form": self.name, "trials": [asdict(trial) for trial in self.trials]}


def choose_form(
    prefix: fx.GraphModule,
    photos: Tensor,
    passes: int,
    memory: Path | None,
    precision: Precision = "fp32",
) -> Form:
    """The fastest equivalent form of `prefix` on the device of `photos`, a batch [N, 3, H, W] of
    what it will run on.

    `passes` photos are going to run through it. `memory` is a file that remembers the outcome, so
    that the same work always runs in the same form, and gives the same bits. With `precision` bf16
    the form may be one in bfloat16, which is not equivalent.
    """
    plain: Run = prefix.eval()
    if passes < _WORTH_A_TRIAL:
        run, trial = _checked("folded", prefix, photos)
        return Form("plain" if run is None else "folded", run or plain, (trial,))
    names = _candidates(photos, precision)
    work = _work(names, prefix, photos)
    if trials := _recall(memory, work):
        return chosen_form(_fastest(trials), trials, prefix, photos)
    built = {name: _checked(name, prefix, photos) for name in names}
    trials = _timed(built, photos)
    _remember(memory, work, trials)
    name = _fastest(trials)
    return Form(name, plain if name == "plain" else built[name][0] or plain, trials)


def chosen_form(
    name: FormName, trials: tuple[Trial, ...], prefix: fx.GraphModule, photos: Tensor
) -> Form:
    """The form that another trial has chosen; see `choose_form`. Built when it is first used."""
    plain: Run = prefix.eval()
    if name == "plain":
        return Form(name, plain, trials)
    return Form(name, _Later(lambda: _checked(name, prefix, photos)[0] or plain), trials)


class _Later:
    """A form that is built when it is first used: where everything is cached, it never is."""

    def __init__(self, build: Callable[[], Run]) -> None:
        self._build = build
        self._run: Run | None = None

    def __call__(self, batch: Tensor) -> Activations:
        if self._run is None:
            with torch.inference_mode(False):  # compilers cannot work in it
                self._run = self._build()
        return self._run(batch)


def _fastest(trials: tuple[Trial, ...]) -> FormName:
    """Of those about as fast as the fastest, the one that is simplest to build."""
    rates = {trial.form: trial.images_per_second or 0.0 for trial in trials}
    best = max(rates.values(), default=0.0)
    close = (form for form, rate in rates.items() if rate * _MARGIN >= best > 0)
    return next(close, "plain")


def _candidates(photos: Tensor, precision: Precision) -> tuple[FormName, ...]:
    """The forms to try, simplest first."""
    second: FormName = "compiled" if photos.is_cuda else "onnxruntime"
    return ("folded", second, "bfloat16") if precision == "bf16" else ("folded", second)


def _timed(built: Mapping[FormName, tuple[Run | None, Trial]], photos: Tensor) -> tuple[Trial, ...]:
    seconds: dict[FormName, list[float]] = {name: [] for name in built}
    for _ in range(_ROUNDS):  # in turn, so that a noisy moment hits all alike
        for name, (run, _) in built.items():
            if run is not None:
                seconds[name].append(_time(run, photos))
    return tuple(
        trial
        if run is None
        else replace(trial, images_per_second=len(photos) / statistics.median(seconds[name]))
        for name, (run, trial) in built.items()
    )


def _time(run: Run, photos: Tensor) -> float:
    started = time.perf_counter()
    with torch.inference_mode():
        run(photos)
    if photos.is_cuda:
        torch.cuda.synchronize(photos.device)
    return time.perf_counter() - started


def _checked(name: FormName, prefix: fx.GraphModule, photos: Tensor) -> tuple[Run | None, Trial]:
    """Build a form and compare it with the plain network on some of these photos."""
    few = photos[:_COMPARED]
    try:
        run = _BUILD[name](prefix, photos)
        with torch.inference_mode():
            difference = _difference(prefix(few), run(few))
    except Exception as error:  # a compiler or exporter fails in any way; the others still work
        return None, Trial(name, problem=f"{type(error).__name__}: {error}"[:200])
    if not difference <= (_TOLERANCE_BF16 if name == "bfloat16" else TOLERANCE):
        return None, Trial(name, difference=difference, problem="differs from the plain network")
    return run, Trial(name, difference=difference)


def _difference(expected: Activations, found: Activations) -> float:
    pairs = list(zip(expected, found, strict=True))
    largest = max(float(a.abs().max()) for a, _ in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / max(largest, 1e-30)


# --- the forms ----------------------------------------------------------------------------------


def _folded(prefix: fx.GraphModule, photos: Tensor) -> fx.GraphModule:
    """BatchNorm becomes part of the convolution before it: in a copy, and in the prefix only."""
    from torch.fx.experimental.optimization import fuse

    folded = fuse(copy.deepcopy(prefix).eval(), no_trace=True)
    folded.to(memory_format=torch.channels_last)
    assert isinstance(folded, fx.GraphModule)
    return folded


def _compiled(prefix: fx.GraphModule, photos: Tensor) -> Run:
    run: Run = torch.compile(_folded(prefix, photos), dynamic=False)
    return run


def _bfloat16(prefix: fx.GraphModule, photos: Tensor) -> Run:
    """Weights and activations in bfloat16, what crosses the cut in float32."""
    half: Run = _folded(prefix, photos).to(torch.bfloat16)
    if photos.is_cuda:
        half = torch.compile(half, dynamic=False)

    def run(batch: Tensor) -> Activations:
        return tuple(value.float() for value in half(batch.to(torch.bfloat16)))

    return run


def _onnxruntime(prefix: fx.GraphModule, photos: Tensor) -> Run:
    """Photo by photo, each core its own.

    What lies between two layers of one photo stays in its core's cache, and no core waits for
    another: half as fast again as whole batches with all cores on each layer.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        _onnx(_folded(prefix, photos), photos[:1]), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    pool = ThreadPoolExecutor(torch.get_num_threads(), "prefix")

    def one(photo: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        # numpy's copy: torch's would wake threads of its own.
        found: list[NDArray[np.float32]] = session.run(None, {name: np.ascontiguousarray(photo)})
        return found

    def run(batch: Tensor) -> Activations:
        parts = zip(*pool.map(one, np.split(batch.numpy(), len(batch))), strict=True)
        return tuple(torch.from_numpy(np.concatenate(values)) for values in parts)

    return run


def _onnx(module: fx.GraphModule, photo: Tensor) -> bytes:
    """For one photo [1, 3, H, W] at a time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # ONNX Runtime optimises by itself.
        program = torch.onnx.export(module, (photo,), dynamo=True, optimize=False, verbose=False)
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


_BUILD: Final[dict[FormName, Callable[[fx.GraphModule, Tensor], Run]]] = {
    "folded": _folded,
    "compiled": _compiled,
    "onnxruntime": _onnxruntime,
    "bfloat16": _bfloat16,
}


# --- remembering --------------------------------------------------------------------------------


def _recall(memory: Path | None, work: str) -> tuple[Trial, ...]:
    found = _read(memory).get(work, ())
    try:
        return tuple(Trial(**trial) for trial in found)
    except TypeError:
        return ()


def _remember(memory: Path | None, work: str, trials: tuple[Trial, ...]) -> None:
    if memory is None:
        return
    known = _read(memory) | {work: [asdict(trial) for trial in trials]}
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps(known, indent=1).encode())
    except OSError:
        pass  # a cache that cannot be written has its own notice


def _read(memory: Path | None) -> dict[str, Any]:
    try:
        known = json.loads(memory.read_text()) if memory is not None else {}
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _work(names: tuple[FormName, ...], prefix: fx.GraphModule, photos: Tensor) -> str:
    """What was tried: the same machine, program and shapes are expected to behave alike."""
    from trainer.environment import describe

    environment = describe(photos.device)
    parts = [environment[k] for k in ("versions", "device", "cpu", "threads")]
    text = json.dumps([names, code_digest(), *parts, list(photos.shape), prefix.code, repr(prefix)])
    return hashlib.sha256(text.encode()).hexdigest()

"""Whatever can run a model: ONNX Runtime, OpenVINO, PyTorch, each opened for `export.timing`.

torch and OpenVINO are imported only when one of theirs is opened.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tqdm import tqdm

from export.metadata import INPUT, OUTPUTS
from export.session import Device, Session, open_session
from export.timing import BenchError, Candidate, Opened
from trainer.preprocess import Photo
from trainer.process import usable_cores

_PROBABILITIES: Final = OUTPUTS[1]


def onnx_candidates(
    content: bytes, precision: str, device: Device, threads: int | None = None
) -> list[Candidate]:
    """What can run an ONNX file on "cpu", "cuda" or "tensorrt".

    `threads` is for the CPU; None leaves each engine its own choice, and takes a thread for each
    core where every core has a photo of its own.
    """
    if device != "cpu":
        name = _LABELS[device]
        return [Candidate("ONNX Runtime", precision, name, partial(_on_gpu, content, device))]
    each = threads or usable_cores()
    openers: dict[str, Callable[[], Opened]] = {
        "ONNX Runtime, all cores on it": partial(_all_cores, content, threads),
        "ONNX Runtime, a photo on each core": partial(_photo_on_each_core, content, each),
        "OpenVINO, all cores on it": partial(_openvino, content, threads),
        "OpenVINO, a photo on each core": partial(_openvino_streams, content, each),
    }
    return [Candidate(name, precision, "CPU", opener) for name, opener in openers.items()]


_LABELS: Final = {"cuda": "CUDA", "tensorrt": "TensorRT"}


def _on_gpu(content: bytes, device: Device) -> Opened:
    """As infer runs it with the same --batch: each size has buffers, and graphs, of its own.

    Those of the larger sizes are made at their first call. TensorRT takes minutes for each, and
    keeps what it built: in a second benchmark its load and first calls are those of a second start.
    """

    def of_size(size: int) -> Session:
        return open_session(content, device, size, tell=tell)

    sessions = {1: of_size(1)}

    def classify(photos: Photo) -> NDArray[np.float32]:
        size = len(photos)
        if size not in sessions:
            sessions[size] = of_size(size)
        return sessions[size].probabilities(photos)

    beside = " + CPU" if "CPUExecutionProvider" in sessions[1].provider else ""
    return Opened(classify, _LABELS[device] + beside)


def tell(text: str) -> None:
    tqdm.write(text, sys.stderr)


def _all_cores(content: bytes, threads: int | None) -> Opened:
    """All threads work on one layer of the whole batch."""
    session = open_session(content, "cpu")
    if threads is not None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        runtime = ort.InferenceSession(content, options, providers=[session.provider])
        session = Session(runtime, session.provider)
    return Opened(session.probabilities, "CPU")


def _photo_on_each_core(content: bytes, threads: int) -> Opened:
    """As many photos at once as there are threads, each on one core."""
    session = open_session(content, "cpu", one_core=True)
    pool = ThreadPoolExecutor(threads, "bench")

    def classify(photos: Photo) -> NDArray[np.float32]:
        return np.concatenate(list(pool.map(session.probabilities, np.split(photos, len(photos)))))

    return Opened(classify, "CPU")


# OpenVINO is taken from its own package: onnxruntime-openvino, which has it as a provider, cannot
# be installed beside onnxruntime-gpu. On some CPUs it would compute in bfloat16 if not told not to.
_OPENVINO: Final[dict[str, Any]] = {"INFERENCE_PRECISION_HINT": "f32"}


def _openvino(content: bytes, threads: int | None) -> Opened:
    chosen = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    compiled = _openvino_model(content, {"PERFORMANCE_HINT": "LATENCY", **chosen})
    return Opened(lambda photos: compiled([photos])[_PROBABILITIES], "CPU")


def _openvino_streams(content: bytes, threads: int) -> Opened:
    settings = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": threads}
    compiled = _openvino_model(content, {**settings, "INFERENCE_NUM_THREADS": threads})
    requests = importlib.import_module("openvino").AsyncInferQueue(compiled, threads)
    classes = compiled.output(_PROBABILITIES).partial_shape[1].get_length()

    def classify(photos: Photo) -> NDArray[np.float32]:
        probabilities = np.empty((len(photos), classes), np.float32)

        def keep(request: Any, place: int) -> None:
            probabilities[place] = request.get_tensor(_PROBABILITIES).data[0]

        requests.set_callback(keep)
        for place in range(len(photos)):
            requests.start_async({INPUT: photos[place : place + 1]}, place)
        requests.wait_all()
        return probabilities

    return Opened(classify, "CPU")


def _openvino_model(content: bytes, settings: dict[str, Any]) -> Any:
    try:
        openvino = importlib.import_module("openvino")
    except ImportError:
        raise BenchError("not installed (pip install openvino)") from None
    core = openvino.Core()
    return core.compile_model(core.read_model(content), "CPU", {**_OPENVINO, **settings})


@dataclass(frozen=True)
class _TorchForm:
    name: str
    precision: str
    channels_last: bool = True
    compiled: bool = False

    @property
    def dtype(self) -> str:
        return {"fp16": "float16", "bf16": "bfloat16"}.get(self.precision, "float32")


def torch_candidates(
    checkpoint: Path, device: Literal["cpu", "cuda"], compiled: bool = True
) -> list[Candidate]:
    """The network of a checkpoint in PyTorch: eager as torchvision gives it, eager in channels-last
    layout, and compiled; on a GPU also in half precision. Imports torch only when opened."""
    name = device.upper()
    return [
        Candidate(form.name, form.precision, name, partial(_torch, checkpoint, form, device))
        for form in _torch_forms(device)
        if compiled or not form.compiled
    ]


def _torch_forms(device: str) -> list[_TorchForm]:
    """Half precision is for GPUs: on a CPU it is slower (see docs/benchmarks.md)."""
    # On a GPU torch computes convolutions of float32 in TF32, if not told otherwise.
    all_of = ("fp32",) if device == "cpu" else ("tf32", "fp16", "bf16")
    return [
        _TorchForm("PyTorch, eager", all_of[0], channels_last=False),
        *(_TorchForm("PyTorch, eager, channels-last", precision) for precision in all_of),
        *(_TorchForm("PyTorch, compiled", precision, compiled=True) for precision in all_of),
    ]


def _torch(path: Path, form: _TorchForm, device: str) -> Opened:
    import torch

    from trainer.checkpoint import load_model
    from trainer.model import InputNormalize

    network, checkpoint = load_model(path)
    layout = torch.channels_last if form.channels_last else torch.contiguous_format
    dtype: torch.dtype = getattr(torch, form.dtype)
    network.to(device=device, dtype=dtype)
    network.to(memory_format=layout)
    normalize = InputNormalize(checkpoint.preprocess).to(device)

    def probabilities(photos: torch.Tensor) -> torch.Tensor:
        pixels = normalize(photos).to(dtype=dtype, memory_format=layout)
        return torch.softmax(network(pixels).float(), dim=1)

    run = _compile(probabilities, device) if form.compiled else probabilities

    def classify(photos: Photo) -> NDArray[np.float32]:
        with torch.inference_mode():
            found: NDArray[np.float32] = run(torch.from_numpy(photos).to(device)).cpu().numpy()
        return found

    return Opened(classify, device.upper())


def _compile(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    import torch

    # All forms share one code object, and past this limit torch silently stays eager.
    torch._dynamo.config.recompile_limit = 256
    if device == "cuda":  # with CUDA graphs, and kernels for each size of batch
        return torch.compile(function, mode="reduce-overhead", dynamic=False)
    # On a CPU a compilation takes half a minute: by torch's default, all sizes after the first
    # share the second.
    return torch.compile(function)


@contextlib.contextmanager
def cold_compiler() -> Iterator[None]:
    """torch.compile finds nothing that an earlier process compiled: its time is that of a start."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="thaw-bench-", ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before

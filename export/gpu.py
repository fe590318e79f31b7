"""What ONNX Runtime is told about a GPU, and buffers on it that stay where they are.

Written against the documentation of ONNX Runtime 1.31 and tested without a GPU only: the options as
data, the buffers on the CPU. Nothing here has run on a GPU yet. `export.session` therefore compares
what a GPU gives with what the CPU gives before a first photo is classified.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.metadata import INPUT, OUTPUTS
from trainer.config import default_cache_dir
from trainer.preprocess import Photo

Options = dict[str, str]
Floats = NDArray[np.float32]

_GRAPH_ID: Final = "gpu_graph_id"
# What onnxruntime-gpu 1.31 was built for; a build for the CPU does not say.
_CUDA: Final = "13"
_TENSORRT: Final = "10"


# --- what is there ------------------------------------------------------------------------------


def gpu_name() -> str | None:
    """The first GPU that the driver shows to this process, or None without one."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        failed = (
            driver.cuInit(0)
            or driver.cuDeviceGet(ctypes.byref(device), 0)
            or driver.cuDeviceGetName(name, len(name), device)
        )
    except (OSError, AttributeError):
        return None
    return None if failed else name.value.decode(errors="replace")


def missing_libraries(tensorrt: bool) -> list[str]:
    """Libraries that this onnxruntime needs and the system cannot load; none named on Windows."""
    if not sys.platform.startswith("linux"):
        return []
    cuda = _cuda_version()
    names = [f"lib{name}.so.{cuda}" for name in ("cudart", "cublas", "cublasLt")]
    names += ["libcurand.so.10", "libcudnn.so.9"]
    names += _tensorrt_libraries() if tensorrt else []
    return [name for name in names if not _loads(name)]


def tensorrt_package() -> str:
    """What pip should install: the TensorRT that this onnxruntime was built for. Without a version
    pip takes the newest, which it cannot load."""
    built_for = [name.rpartition(".")[2] for name in _tensorrt_libraries()]
    return f"tensorrt-cu{_cuda_version()}=={(built_for or [_TENSORRT])[0]}.*"


def _cuda_version() -> str:
    return str(getattr(ort, "cuda_version", "") or _CUDA).partition(".")[0]


def _tensorrt_libraries() -> list[str]:
    provider = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    try:
        names = set(re.findall(rb"\blibnv[a-z]+\.so\.\d+", provider.read_bytes()))
    except OSError:
        return []
    return sorted(name.decode() for name in names)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


# --- options ------------------------------------------------------------------------------------


def cuda_options(graphs: bool) -> Options:
    """Options of the CUDA provider.

    Convolutions are chosen by cuDNN's rules: trying all of them, the default, takes seconds for
    each size of a batch. TF32 is off, since a file in float32 was found equal in float32; one that
    may be less exact is exported as fp16.
    """
    return {
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",
        "enable_cuda_graph": str(int(graphs)),
    }


def tensorrt_options(
    precision: str, graphs: bool, photos: tuple[int, ...] | None, engines: Engines | None
) -> Options:
    """Options of the TensorRT provider.

    `photos` is the one shape that all batches have, [N, H, W, 3]; without it any will do, and an
    engine is built anew for sizes that it does not know. `engines` is where it is kept.
    """
    options = {
        "trt_fp16_enable": str(int(precision == "fp16")),
        "trt_int8_enable": str(int(precision == "int8")),
        "trt_cuda_graph_enable": str(int(graphs)),
    }
    if photos is not None:
        shape = f"{INPUT}:{'x'.join(map(str, photos))}"
        options |= {f"trt_profile_{limit}_shapes": shape for limit in ("min", "opt", "max")}
    if engines is not None:
        options |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(engines.folder),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(engines.timing),
        }
    return options


@dataclass(frozen=True)
class Engines:
    """Where TensorRT keeps the engine of one model for one GPU, and what its kernels took."""

    folder: Path
    timing: Path

    @classmethod
    def of(cls, content: bytes, batch: int) -> Engines:
        """Engines fit one model, batch size, GPU and version only, so all name the folder."""
        place = default_cache_dir() / "tensorrt"
        machine = [ort.__version__, gpu_name(), *_tensorrt_versions()]
        model = hashlib.sha256(content).hexdigest()
        return cls(place / _digest([model, batch, *machine]), place / f"timing-{_digest(machine)}")

    def prepare(self) -> bool:
        """Make the folders; returns whether an engine is kept already. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.timing.mkdir(parents=True, exist_ok=True)
        return any(self.folder.iterdir())

    def forget(self) -> None:
        """Remove the engine: it may be damaged."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _tensorrt_versions() -> list[str]:
    found = {str(d.metadata["Name"]): d.version for d in metadata.distributions()}
    return sorted(f"{k} {v}" for k, v in found.items() if k.lower().startswith("tensorrt"))


def _digest(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


# --- buffers ------------------------------------------------------------------------------------


class Buffers:
    """Runs batches through buffers on a device that are allocated once for each size.

    That is what CUDA graphs need: a replay reads and writes where the capture did. Batches have the
    sizes 1, 2, 4, ... up to `largest`, or with `one_size` that alone; a smaller group leaves the
    rest of its batch as it was, which no photo's result depends on.
    """

    def __init__(
        self,
        runtime: ort.InferenceSession,
        largest: int,
        one_size: bool = False,
        device: str = "cuda",
    ) -> None:
        self._runtime, self._largest, self._one_size = runtime, largest, one_size
        self._device = device
        self._of_size: dict[int, _OneSize] = {}
        # The CUDA provider keeps its captured graphs by thread, and only one may run at a time.
        self._thread = ThreadPoolExecutor(1, "gpu")

    def run(self, photos: Photo) -> Floats:
        """uint8 [N, H, W, 3] -> probabilities, float32 [N, classes]; from any thread."""
        starts = range(0, len(photos), self._largest)
        parts = [photos[start : start + self._largest] for start in starts]
        return np.concatenate(list(self._thread.map(self._run, parts)))

    def _run(self, photos: Photo) -> Floats:
        size = self._size(len(photos))
        if size not in self._of_size:
            graph = None if self._one_size else str(size)
            self._of_size[size] = _OneSize(self._runtime, size, graph, self._device)
        return self._of_size[size].run(photos)

    def _size(self, count: int) -> int:
        power = 1 << (count - 1).bit_length()
        return self._largest if self._one_size else min(power, self._largest)


class _OneSize:
    """The buffers for batches of one size, and on the host the photos on their way there."""

    def __init__(
        self, runtime: ort.InferenceSession, size: int, graph: str | None, device: str
    ) -> None:
        self._runtime = runtime
        (photos,) = (i for i in runtime.get_inputs() if i.name == INPUT)
        (output,) = (o for o in runtime.get_outputs() if o.name == OUTPUTS[1])
        half = output.type == "tensor(float16)"
        self._host = np.zeros((size, *photos.shape[1:]), np.uint8)
        self._photos = _allocate(list(self._host.shape), np.uint8, device)
        kind = np.float16 if half else np.float32
        self._probabilities = _allocate([size, *output.shape[1:]], kind, device)
        self._binding = runtime.io_binding()
        self._binding.bind_ortvalue_input(INPUT, self._photos)
        self._binding.bind_ortvalue_output(OUTPUTS[1], self._probabilities)
        self._options = ort.RunOptions()
        if graph is not None:
            self._options.add_run_config_entry(_GRAPH_ID, graph)

    def run(self, photos: Photo) -> Floats:
        self._host[: len(photos)] = photos
        self._photos.update_inplace(self._host)
        self._runtime.run_with_iobinding(self._binding, self._options)
        return np.array(self._probabilities.numpy()[: len(photos)], np.float32)


def _allocate(shape: list[int], kind: type[np.generic], device: str) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, device, 0)

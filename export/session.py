"""ONNX Runtime sessions that run where they were asked to run (onnxruntime and numpy, no torch)."""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import onnxruntime as ort

from export.metadata import ModelFileError
from trainer.schema import ThawError

Device = Literal["auto", "cpu", "cuda", "tensorrt"]
DEVICES: Final[tuple[Device, ...]] = ("auto", "cpu", "cuda", "tensorrt")

_CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"
_TENSORRT: Final = "TensorrtExecutionProvider"
# In order of preference; the last resort, the CPU, is left out on purpose.
_PROVIDERS: Final = {"cuda": [_CUDA], "tensorrt": [_TENSORRT, _CUDA]}

_INSTALL_GPU: Final = 'pip uninstall -y onnxruntime; pip install "onnxruntime-gpu[cuda,cudnn]"'
_INSTALL_LIBRARIES: Final = {
    "cuda": 'pip install "onnxruntime-gpu[cuda,cudnn]"',
    "tensorrt": 'pip install "onnxruntime-gpu[cuda,cudnn]" tensorrt',
}

# A folder that does not exist, so that weights outside the file are never found: a model is one
# file, and one from elsewhere must not choose what else is read from this disk.
_NO_FOLDER: Final = "/thaw/models-are-one-file"


class DeviceError(ThawError):
    """The device that was asked for does not work here; says what is missing."""


@dataclass(frozen=True)
class Session:
    """An open model. `provider` is what really runs it; `note` says why not the GPU, if it has one
    that does not work."""

    runtime: ort.InferenceSession
    provider: str
    note: str | None = None


def open_session(content: bytes, device: Device = "auto") -> Session:
    """Load a model from its bytes.

    `auto` is CUDA where that works, and the CPU elsewhere; `cuda` and `tensorrt` never fall back.
    Raises ModelFileError (not a model, or not self-contained) and DeviceError.
    """
    if device in ("cuda", "tensorrt"):
        return _on_gpu(content, device)
    note = None
    if device == "auto" and _CUDA in ort.get_available_providers() and _gpu_answers():
        try:
            return _on_gpu(content, "cuda")
        except DeviceError as error:
            note = str(error)
    return Session(_create(content, [_CPU]), _CPU, note)


def _on_gpu(content: bytes, device: Literal["cuda", "tensorrt"]) -> Session:
    _refuse_without_gpu(device)
    wanted = _PROVIDERS[device][0]
    with _hushed():
        _preload(device)
        try:
            runtime, everything = _create(content, _PROVIDERS[device], only_gpu=True), True
        except ModelFileError:
            # Either the provider did not start, or it leaves a few shape computations to the CPU.
            runtime, everything = _create(content, _PROVIDERS[device]), False
        if wanted not in runtime.get_providers():
            raise DeviceError(
                f"--device {device}: {wanted} did not start; its libraries are missing or of "
                f"another version. Install them: {_INSTALL_LIBRARIES[device]}; or use --device cpu."
            )
        runtime.disable_fallback()  # or a failing GPU is replaced by the CPU in silence
        _try_out(runtime, device)
    return Session(runtime, wanted if everything else f"{wanted} + {_CPU}")


def _refuse_without_gpu(device: Literal["cuda", "tensorrt"]) -> None:
    missing = []
    if _PROVIDERS[device][0] not in ort.get_available_providers():
        missing.append(
            f"this onnxruntime {ort.__version__} was built without {_PROVIDERS[device][0]}. "
            f"Install one that has it: {_INSTALL_GPU}."
        )
    if not _gpu_answers():
        missing.append(
            "no NVIDIA GPU answers. Install its driver (`nvidia-smi` must list the GPU) and the "
            f"libraries: {_INSTALL_LIBRARIES[device]}."
        )
    if missing:
        raise DeviceError(f"--device {device}: {' And '.join(missing)} Or use --device cpu.")


def _gpu_answers() -> bool:
    """Whether the driver sees a GPU; asked first, because loading CUDA takes seconds."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count = ctypes.c_int(0)
        started = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
        return started and count.value > 0
    except (OSError, AttributeError):
        return False


def _preload(device: Literal["cuda", "tensorrt"]) -> None:
    """Load CUDA, cuDNN and TensorRT from pip's packages, where the linker does not look."""
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    if device == "tensorrt":
        with contextlib.suppress(ImportError):
            __import__("tensorrt_libs")


def _create(content: bytes, providers: list[str], only_gpu: bool = False) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, and told by us
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", _NO_FOLDER
    )
    if only_gpu:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        return ort.InferenceSession(content, options, providers=providers)
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        if "xternal data" in str(error):
            raise ModelFileError(
                "its weights lie in another file. Thaw's models are one file: export it anew."
            ) from error
        raise ModelFileError(
            f"ONNX Runtime {ort.__version__} cannot load it ({_first_line(error)})."
        ) from error


def _try_out(runtime: ort.InferenceSession, device: str) -> None:
    """One black photo: missing libraries and a full GPU show only at the first convolution."""
    (first, *_) = runtime.get_inputs()
    if first.type != "tensor(uint8)":
        return  # not one of our models, and refused as such by what reads its metadata
    shape = [side if isinstance(side, int) else 1 for side in first.shape]
    try:
        runtime.run(None, {first.name: np.zeros(shape, np.uint8)})
    except Exception as error:
        raise DeviceError(
            f"--device {device}: the GPU fails on the first photo ({_first_line(error)}). Install "
            f"the libraries: {_INSTALL_LIBRARIES[device]}; or use --device cpu."
        ) from error


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep ONNX Runtime's own complaints, to both streams, off the screen: we say what is wrong."""
    ort.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        ort.set_default_logger_severity(2)  # ONNX Runtime's default


def _first_line(error: Any) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]

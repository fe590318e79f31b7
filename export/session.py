"""ONNX Runtime sessions that run where they were asked to run (onnxruntime and numpy, no torch).

What has to do with GPUs has been tested without one only; see `export.gpu`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export import gpu
from export.metadata import INPUT, OUTPUTS, ModelFileError
from trainer.preprocess import Photo
from trainer.process import usable_cores
from trainer.schema import ThawError

Device = Literal["auto", "cpu", "cuda", "tensorrt"]
DEVICES: Final[tuple[Device, ...]] = ("auto", "cpu", "cuda", "tensorrt")
Gpu = Literal["cuda", "tensorrt"]
Tell = Callable[[str], None]
Providers = list[tuple[str, gpu.Options]]

_CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"
_TENSORRT: Final = "TensorrtExecutionProvider"
_PROVIDER: Final[dict[Gpu, str]] = {"cuda": _CUDA, "tensorrt": _TENSORRT}

# A folder that does not exist, so that weights outside the file are never found: a model is one
# file, and one from elsewhere must not choose what else is read from this disk.
_NO_FOLDER: Final = "/thaw/models-are-one-file"

# Of a tensor whose content is elsewhere, in whatever part of a model: the key that names the place,
# behind its length, which may be written with more bytes than it needs. So it also does not matter
# whether that place is a link, or in which parts ONNX Runtime looks for such tensors.
_ELSEWHERE: Final = re.compile(rb"(?:\x08|\x88\x80*\x00)location")

# How far a probability from a GPU may be from the CPU's. Rounding to half precision stays well
# below; a graph that reads the wrong memory, or a driver that computes nonsense, does not.
_ALIKE: Final = 0.05


class DeviceError(ThawError):
    """The device that was asked for does not work here; says what is missing."""


@dataclass(frozen=True)
class Session:
    """An open model. `provider` is what really runs it, all that do if several do; `note` says why
    not the GPU, if it has one that does not work.

    Where `buffers` is set, `runtime` must not be run by itself: it replays CUDA graphs.
    """

    runtime: ort.InferenceSession
    provider: str
    note: str | None = None
    buffers: gpu.Buffers | None = None

    def probabilities(self, photos: Photo) -> NDArray[np.float32]:
        """uint8 [N, H, W, 3] -> float32 [N, classes]; any threads may call it at the same time."""
        if self.buffers is not None:
            return self.buffers.run(photos)
        (found,) = self.runtime.run([OUTPUTS[1]], {INPUT: photos})
        return np.asarray(found, np.float32)


def open_session(
    content: bytes,
    device: Device = "auto",
    batch: int | None = None,
    *,
    one_core: bool = False,
    tell: Tell | None = None,
) -> Session:
    """Load a model from its bytes.

    `auto` is CUDA where that works, and the CPU elsewhere; `cuda` and `tensorrt` never fall back.
    With `batch`, the most photos at a time, a GPU gets buffers and CUDA graphs for
    `Session.probabilities`, and TensorRT an engine for that size that is kept; other sizes are then
    padded. `one_core`: on the CPU a run stays on the core that calls it, and any number may run at
    once; otherwise all cores work on each layer. `tell` is told what takes minutes.
    Raises ModelFileError (not a model, or not self-contained) and DeviceError.
    """
    if _ELSEWHERE.search(content):
        raise _not_one_file()
    if device in ("cuda", "tensorrt"):
        _refuse_without_gpu(device)
    plain = Session(_create(content, [(_CPU, {})], threads=1 if one_core else _threads()), _CPU)
    if device in ("cuda", "tensorrt"):
        return _on_gpu(_Start(content, device, plain, batch), tell)
    if device == "auto" and _CUDA in ort.get_available_providers() and _gpu_answers():
        try:
            return _on_gpu(_Start(content, "cuda", plain, batch), tell)
        except DeviceError as error:
            return replace(plain, note=str(error))
    return plain


def _threads() -> int:
    """0, ONNX Runtime's own choice, unless this container has fewer cores than it would see."""
    cores = usable_cores()
    return cores if cores < (os.cpu_count() or 1) else 0


def _create(
    content: bytes, providers: Providers, threads: int = 0, only_gpu: bool = False
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, and told by us
    options.intra_op_num_threads = threads
    for key, value in {
        "session.model_external_initializers_file_folder_path": _NO_FOLDER,
        "session.record_ep_graph_assignment_info": "1",
        "session.disable_cpu_ep_fallback": str(int(only_gpu)),
    }.items():
        options.add_session_config_entry(key, value)
    try:
        # Its own fallback would start the model on the CPU, and print so.
        return ort.InferenceSession(content, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        if "xternal data" in str(error):
            raise _not_one_file() from error
        raise ModelFileError(
            f"ONNX Runtime {ort.__version__} cannot load it ({_first_line(error)})."
        ) from error


def _not_one_file() -> ModelFileError:
    return ModelFileError(
        "its weights lie in another file. Thaw's models are one file: export it anew."
    )


# --- on a GPU -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Start:
    """A model that is to run on a GPU as `plain` runs it on the CPU; see `open_session`."""

    content: bytes
    device: Gpu
    plain: Session
    batch: int | None

    def providers(self, graphs: bool, engines: gpu.Engines | None) -> Providers:
        """In order of preference; the last resort, the CPU, is left out on purpose."""
        if self.device == "cuda":
            return [(_CUDA, gpu.cuda_options(graphs))]
        about = self.plain.runtime.get_modelmeta().custom_metadata_map
        shape = (self.batch, *self._photo) if self.batch else None
        options = gpu.tensorrt_options(about.get("precision", "fp32"), graphs, shape, engines)
        return [(_TENSORRT, options), (_CUDA, gpu.cuda_options(False))]

    def buffers(self, runtime: ort.InferenceSession) -> gpu.Buffers | None:
        """Where no size of batch was named, ONNX Runtime makes new ones for each."""
        if self.batch is None:
            return None
        return gpu.Buffers(runtime, self.batch, one_size=self.device == "tensorrt")

    def examples(self) -> Photo:
        """Noise and a black photo, uint8 [2, H, W, 3]."""
        noise = np.random.default_rng(0).integers(0, 256, self._photo, np.uint8)
        return np.stack([noise, np.zeros_like(noise)])

    @property
    def _photo(self) -> tuple[int, ...]:
        return tuple(self.plain.runtime.get_inputs()[0].shape[1:])


def _on_gpu(start: _Start, tell: Tell | None) -> Session:
    _refuse_other_models(start)
    with _hushed():
        _preload(start.device)
        if missing := gpu.missing_libraries(start.device == "tensorrt"):
            raise DeviceError(
                f"--device {start.device}: {', '.join(missing)} cannot be loaded. Install: "
                f"{_install(start.device)}; or use --device cpu."
            )
        if start.device == "cuda" or start.batch is None:
            return _fastest_that_works(start, None)
        return _with_engine(start, gpu.Engines.of(start.content, start.batch), tell)


def _with_engine(start: _Start, engines: gpu.Engines, tell: Tell | None) -> Session:
    try:
        kept = engines.prepare()
    except OSError as error:
        raise DeviceError(
            f"--device tensorrt: cannot keep its engine in {engines.folder}: {error.strerror}. "
            "Name another cache folder with $THAW_CACHE; or use --device cuda."
        ) from error
    if not kept and tell is not None:
        tell("TensorRT builds an engine for this model and GPU. That takes minutes, and only once.")
    try:
        return _fastest_that_works(start, engines)
    except DeviceError:
        if not kept:
            raise
    engines.forget()  # it is damaged, or of a version that pip does not know of
    return _with_engine(start, engines, tell)


def _fastest_that_works(start: _Start, engines: gpu.Engines | None) -> Session:
    """With CUDA graphs, or else without."""
    problem = ""
    # Only the last may leave a few computations of shapes to the CPU and have no graphs.
    for graphs, only_gpu in ((True, True), (True, False), (False, False)):
        if start.batch is None and graphs:
            continue
        try:
            return _started(start, start.providers(graphs, engines), only_gpu)
        except DeviceError as error:
            problem = str(error)  # the error itself would keep the session, and the GPU's memory
    raise DeviceError(problem)


def _started(start: _Start, providers: Providers, only_gpu: bool) -> Session:
    (wanted, _), *_ = providers
    try:
        runtime = _create(start.content, providers, only_gpu=only_gpu)
        runtime.disable_fallback()  # or a failing GPU is replaced by the CPU in silence
        used = _used(runtime)
        if wanted not in used:
            raise DeviceError(f"{wanted} did not start, or takes no part of this model")
        session = Session(runtime, " + ".join(used), buffers=start.buffers(runtime))
        _refuse_other_results(session, start)
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        raise DeviceError(
            f"--device {start.device}: {_first_line(error)}. Install its libraries anew: "
            f"{_install(start.device)}; or use --device cpu."
        ) from error
    return session


def _used(runtime: ort.InferenceSession) -> list[str]:
    """The providers that really run the model, the one with the largest part first."""
    parts: Counter[str] = Counter()
    for part in runtime.get_provider_graph_assignment_info():
        parts[part.ep_name] += len(part.get_nodes())
    return [name for name, _ in parts.most_common()]


def _refuse_other_results(session: Session, start: _Start) -> None:
    """Missing libraries and a full GPU show only at the first convolution; a replayed graph that
    reads the wrong memory only at the second batch."""
    photos = start.examples()
    for batch in (photos, photos[::-1]):
        apart = np.abs(session.probabilities(batch) - start.plain.probabilities(batch)).max()
        if not apart <= _ALIKE:
            raise DeviceError(f"probabilities are {apart:.2f} off what the CPU gives")


def _refuse_other_models(start: _Start) -> None:
    inputs = [(i.name, i.type, len(i.shape)) for i in start.plain.runtime.get_inputs()]
    outputs = {output.name for output in start.plain.runtime.get_outputs()}
    if inputs != [(INPUT, "tensor(uint8)", 4)] or not outputs.issuperset(OUTPUTS):
        raise ModelFileError("it was not written by Thaw. Make one with `python -m export RUN`.")


def _refuse_without_gpu(device: Gpu) -> None:
    missing = []
    if _PROVIDER[device] not in ort.get_available_providers():
        missing.append(
            f"this onnxruntime {ort.__version__} was built without {_PROVIDER[device]}. "
            f"Install one that has it: pip uninstall -y onnxruntime; {_install(device)}."
        )
    if not _gpu_answers():
        missing.append(
            "no NVIDIA GPU answers. Install its driver (`nvidia-smi` must list the GPU) and the "
            f"libraries: {_install(device)}."
        )
    if missing:
        raise DeviceError(f"--device {device}: {' And '.join(missing)} Or use --device cpu.")


def _install(device: Gpu) -> str:
    tensorrt = f' "{gpu.tensorrt_package()}"' if device == "tensorrt" else ""
    return f'pip install "onnxruntime-gpu[cuda,cudnn]"{tensorrt}'


def _gpu_answers() -> bool:
    """Asked first, because loading CUDA takes seconds."""
    return gpu.gpu_name() is not None


def _preload(device: Gpu) -> None:
    """Load CUDA, cuDNN and TensorRT from pip's packages, where the linker does not look."""
    ort.preload_dlls()
    if device == "tensorrt":
        with contextlib.suppress(ImportError):
            __import__("tensorrt_libs")


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

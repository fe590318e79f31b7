"""Sessions on a GPU, as far as a machine without one can tell: what is asked for, and refusals.

A stand-in for a GPU computes with real ONNX Runtime on the CPU; only the names of its providers,
and what goes wrong, are made up.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from export import gpu, session
from export.gpu import Buffers, Engines, cuda_options, tensorrt_options
from export.infer import main
from export.metadata import ModelFileError
from export.session import DeviceError, Session, open_session
from trainer.preprocess import Photo
from trainer.runlog import Run

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
NO_GPU = pytest.mark.skipif(session._gpu_answers(), reason="needs a machine without a working GPU")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(exported: Run) -> Path:
    return exported.path / "model.onnx"


@pytest.fixture
def content(model: Path) -> bytes:
    return model.read_bytes()


@pytest.fixture
def plain(content: bytes) -> Session:
    return open_session(content, "cpu")


def photos(count: int, seed: int = 0) -> Photo:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), np.uint8)


# --- buffers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("one_size", [False, True])
def test_buffers_give_what_plain_runs_give(plain: Session, one_size: bool) -> None:
    """Whatever the size of a batch, and whatever was in the buffers before."""
    buffers = Buffers(plain.runtime, 4, one_size, "cpu")
    for seed, count in enumerate([4, 1, 3, 9, 2, 1]):
        batch = photos(count, seed)
        np.testing.assert_allclose(buffers.run(batch), plain.probabilities(batch), atol=1e-6)


def test_results_stay_when_the_buffers_are_used_again(plain: Session) -> None:
    buffers = Buffers(plain.runtime, 2, device="cpu")
    found = buffers.run(photos(2))
    buffers.run(photos(2, seed=1))
    np.testing.assert_allclose(found, plain.probabilities(photos(2)), atol=1e-6)


class Spy:
    """A runtime that notes for each run the thread, the buffers' shapes and the graph."""

    def __init__(self, runtime: ort.InferenceSession) -> None:
        self._runtime = runtime
        self.runs: list[tuple[int, int, str]] = []
        self.bindings: dict[int, set[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def run_with_iobinding(self, binding: ort.IOBinding, options: ort.RunOptions) -> None:
        self._runtime.run_with_iobinding(binding, options)
        (output,) = binding.get_outputs()
        try:
            graph = options.get_run_config_entry("gpu_graph_id")
        except RuntimeError:
            graph = ""
        self.runs.append((threading.get_ident(), output.shape()[0], graph))
        self.bindings.setdefault(output.shape()[0], set()).add(output.data_ptr())


def test_each_size_has_its_graph_and_keeps_its_place(plain: Session) -> None:
    spy = Spy(plain.runtime)
    buffers = Buffers(spy, 6, device="cpu")  # type: ignore[arg-type]
    for count in (6, 1, 3, 2, 6, 13, 1):
        buffers.run(photos(count))
    sizes = [(size, graph) for _, size, graph in spy.runs]
    assert sizes == [(n, str(n)) for n in (6, 1, 4, 2, 6, 6, 6, 1, 1)]
    assert all(len(places) == 1 for places in spy.bindings.values())


def test_one_size_is_the_only_one(plain: Session) -> None:
    """TensorRT's engine is built for it, and its only graph has no name."""
    spy = Spy(plain.runtime)
    buffers = Buffers(spy, 4, one_size=True, device="cpu")  # type: ignore[arg-type]
    for count in (1, 4, 5):
        assert len(buffers.run(photos(count))) == count
    assert [(size, graph) for _, size, graph in spy.runs] == [(4, "")] * 4


def test_all_threads_share_one_that_runs(plain: Session) -> None:
    """CUDA graphs belong to the thread that captured them."""
    spy = Spy(plain.runtime)
    buffers = Buffers(spy, 4, device="cpu")  # type: ignore[arg-type]
    batches = [photos(count, seed) for seed, count in enumerate([1, 2, 3, 4] * 5)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(buffers.run, batches))
    for batch, result in zip(batches, found, strict=True):
        np.testing.assert_allclose(result, plain.probabilities(batch), atol=1e-6)
    assert len({thread for thread, _, _ in spy.runs}) == 1
    assert spy.runs[0][0] != threading.get_ident()


# --- options ----------------------------------------------------------------------------------


def test_cuda_options() -> None:
    assert cuda_options(graphs=True) == {
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",
        "enable_cuda_graph": "1",
    }
    assert cuda_options(graphs=False)["enable_cuda_graph"] == "0"


def test_tensorrt_options(tmp_path: Path) -> None:
    engines = Engines(tmp_path / "e", tmp_path / "t")
    found = tensorrt_options("fp16", True, (8, 64, 64, 3), engines)
    assert found["trt_profile_max_shapes"] == "photos:8x64x64x3"
    assert found["trt_profile_min_shapes"] == found["trt_profile_opt_shapes"] == "photos:8x64x64x3"
    assert found["trt_engine_cache_path"] == str(tmp_path / "e")
    assert found["trt_timing_cache_path"] == str(tmp_path / "t")
    assert (found["trt_fp16_enable"], found["trt_int8_enable"]) == ("1", "0")
    assert found["trt_cuda_graph_enable"] == "1"
    loose = tensorrt_options("int8", False, None, None)
    assert (loose["trt_fp16_enable"], loose["trt_int8_enable"]) == ("0", "1")
    assert not any("profile" in name or "cache" in name for name in loose)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_this_onnxruntime_knows_the_options(provider: str, tmp_path: Path) -> None:
    library = Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{provider}.so"
    if not library.exists():
        pytest.skip(f"this onnxruntime has no {provider}")
    engines = Engines(tmp_path, tmp_path)
    options = {"cuda": cuda_options(True), "tensorrt": tensorrt_options("", True, (1,), engines)}
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        assert [name for name in options[provider] if data.find(name.encode()) < 0] == []


def test_an_engine_belongs_to_model_batch_gpu_and_versions(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "gpu_name", lambda: "NVIDIA H200")
    first = Engines.of(content, 64)
    assert Engines.of(content, 64) == first
    others = [Engines.of(content + b"0", 64), Engines.of(content, 32)]
    monkeypatch.setattr(gpu, "gpu_name", lambda: "NVIDIA L4")
    others.append(Engines.of(content, 64))
    monkeypatch.setattr(gpu, "_tensorrt_versions", lambda: ["tensorrt 10.9"])
    others.append(Engines.of(content, 64))
    monkeypatch.setattr(ort, "__version__", "1.99")
    others.append(Engines.of(content, 64))
    assert len({first.folder, *(other.folder for other in others)}) == 6
    assert others[0].timing == others[1].timing == first.timing != others[2].timing


def test_pip_is_asked_for_the_tensorrt_that_fits() -> None:
    assert gpu.tensorrt_package().startswith("tensorrt-cu13==")
    for library in gpu._tensorrt_libraries():
        assert f"=={library.rpartition('.')[2]}.*" in gpu.tensorrt_package()


# --- a stand-in for a GPU ---------------------------------------------------------------------


class OnGpu(Spy):
    """Runs on the CPU, says it runs on `used`, and may read its input only once."""

    def __init__(self, runtime: ort.InferenceSession, used: dict[str, int], stale: bool) -> None:
        super().__init__(runtime)
        self._used, self._stale = used, stale

    def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(ep_name=name, get_nodes=partial(range, count))
            for name, count in self._used.items()
        ]

    def run_with_iobinding(self, binding: ort.IOBinding, options: ort.RunOptions) -> None:
        if not (self._stale and self.runs):
            super().run_with_iobinding(binding, options)


Created = tuple[list[tuple[str, dict[str, str]]], bool]
Behaviour = Callable[[list[tuple[str, dict[str, str]]], bool], tuple[dict[str, int], bool]]


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Created]:
    """A GPU that works; the list fills with what is asked of it."""
    monkeypatch.setenv("THAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "_gpu_answers", lambda: True)
    monkeypatch.setattr(session, "_preload", lambda _: None)
    monkeypatch.setattr(gpu, "missing_libraries", lambda _: [])
    monkeypatch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    allocate = gpu._allocate
    monkeypatch.setattr(gpu, "_allocate", lambda shape, kind, _: allocate(shape, kind, "cpu"))
    created: list[Created] = []
    behave(monkeypatch, created, lambda providers, _: ({providers[0][0]: 9}, False))
    return created


REAL_CREATE = session._create


def behave(monkeypatch: pytest.MonkeyPatch, created: list[Created], behaviour: Behaviour) -> None:
    """`behaviour` says which providers take how many nodes, and whether inputs get stale."""

    def create(
        content: bytes, providers: Any, threads: int = 0, only_gpu: bool = False
    ) -> ort.InferenceSession:
        runtime = REAL_CREATE(content, [(CPU, {})], threads)
        if providers[0][0] == CPU:
            return runtime
        created.append((providers, only_gpu))
        return OnGpu(runtime, *behaviour(providers, only_gpu))  # type: ignore[return-value]

    monkeypatch.setattr(session, "_create", create)


def has_graphs(providers: list[tuple[str, dict[str, str]]]) -> bool:
    options = providers[0][1]
    return "1" in (options.get("enable_cuda_graph"), options.get("trt_cuda_graph_enable"))


def test_cuda_starts_with_graphs_and_nothing_on_the_cpu(
    content: bytes, plain: Session, created: list[Created]
) -> None:
    opened = open_session(content, "cuda", batch=4)
    assert (opened.provider, opened.note) == (CUDA, None)
    assert created == [([(CUDA, cuda_options(graphs=True))], True)]
    np.testing.assert_allclose(
        opened.probabilities(photos(5)), plain.probabilities(photos(5)), atol=1e-6
    )


def test_without_a_batch_there_are_no_graphs(content: bytes, created: list[Created]) -> None:
    """So that a session may also be run by itself, with batches of any size."""
    opened = open_session(content, "cuda")
    assert opened.buffers is None
    assert not any(has_graphs(providers) for providers, _ in created)


def test_shapes_may_be_left_to_the_cpu_and_that_is_told(
    content: bytes, created: list[Created], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shapes_on_cpu(_: object, only_gpu: bool) -> tuple[dict[str, int], bool]:
        if only_gpu:
            raise ModelFileError("fallback to CPU EP has been explicitly disabled")
        return {CPU: 2, CUDA: 9}, False

    behave(monkeypatch, created, shapes_on_cpu)
    assert open_session(content, "cuda", batch=4).provider == f"{CUDA} + {CPU}"
    assert [(has_graphs(p), only_gpu) for p, only_gpu in created] == [(True, True), (True, False)]


def test_a_graph_that_reads_old_memory_is_not_used(
    content: bytes, plain: Session, created: list[Created], monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(monkeypatch, created, lambda providers, _: ({CUDA: 9}, has_graphs(providers)))
    opened = open_session(content, "cuda", batch=4)
    assert not has_graphs(created[-1][0])
    np.testing.assert_allclose(
        opened.probabilities(photos(2)), plain.probabilities(photos(2)), atol=1e-6
    )


def test_a_gpu_with_other_results_is_refused(
    content: bytes, created: list[Created], monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(monkeypatch, created, lambda *_: ({CUDA: 9}, True))
    with pytest.raises(DeviceError, match=r"--device cuda: probabilities are 0\.\d+ off"):
        open_session(content, "cuda", batch=4)
    opened = open_session(content, "auto", batch=4)
    assert opened.provider == CPU
    assert "probabilities are" in str(opened.note)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_provider_that_takes_nothing_is_refused(
    content: bytes, device: Any, created: list[Created], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime would run such a model on the CPU in silence."""
    behave(monkeypatch, created, lambda *_: ({CPU: 9}, False))
    with pytest.raises(DeviceError, match=r"did not start, .* pip install .* --device cpu"):
        open_session(content, device, batch=4)


def test_an_onnx_of_others_is_refused(
    content: bytes, created: list[Created], tmp_path: Path
) -> None:
    other = onnx.load_model_from_string(content)
    other.graph.input[0].name = "x"
    for node in other.graph.node:
        node.input[:] = ["x" if name == "photos" else name for name in node.input]
    with pytest.raises(ModelFileError, match="not written by Thaw"):
        open_session(other.SerializeToString(), "cuda", batch=4)
    assert created == []


# --- TensorRT's engines -----------------------------------------------------------------------


def build(providers: list[tuple[str, dict[str, str]]]) -> Path:
    """Where TensorRT would write its engine."""
    return Path(providers[0][1]["trt_engine_cache_path"]) / "an.engine"


def test_an_engine_is_built_once(
    content: bytes, created: list[Created], monkeypatch: pytest.MonkeyPatch
) -> None:
    def builds(providers: Any, _: bool) -> tuple[dict[str, int], bool]:
        build(providers).write_bytes(b"engine")
        return {TENSORRT: 1}, False

    behave(monkeypatch, created, builds)
    told: list[str] = []
    for _ in range(2):
        opened = open_session(content, "tensorrt", batch=4, tell=told.append)
        assert opened.provider == TENSORRT
        assert len(opened.probabilities(photos(5))) == 5
    assert len(told) == 1
    assert "takes minutes" in told[0]
    (providers, only_gpu), _ = created
    assert only_gpu
    assert [name for name, _ in providers] == [TENSORRT, CUDA]
    assert providers[0][1]["trt_profile_max_shapes"] == "photos:4x64x64x3"
    assert providers[1][1] == cuda_options(graphs=False)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_tensorrt_computes_in_the_precision_that_was_exported(
    content: bytes, precision: str, created: list[Created]
) -> None:
    exported = onnx.load_model_from_string(content)
    kept = {entry.key: entry.value for entry in exported.metadata_props}
    onnx.helper.set_model_props(exported, kept | {"precision": precision})
    open_session(exported.SerializeToString(), "tensorrt", batch=4)
    options = created[0][0][0][1]
    assert options["trt_fp16_enable"] == str(int(precision == "fp16"))
    assert options["trt_int8_enable"] == str(int(precision == "int8"))


def test_a_damaged_engine_is_built_anew(
    content: bytes, created: list[Created], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash left half a file; ONNX Runtime then leaves the model to CUDA in silence."""
    place = Engines.of(content, 4)
    place.prepare()
    (place.folder / "an.engine").write_bytes(b"eng")

    def loads(providers: Any, _: bool) -> tuple[dict[str, int], bool]:
        engine = build(providers)
        if engine.exists() and engine.read_bytes() != b"engine":
            return {CUDA: 9}, False
        engine.write_bytes(b"engine")
        return {TENSORRT: 1}, False

    behave(monkeypatch, created, loads)
    assert open_session(content, "tensorrt", batch=4).provider == TENSORRT
    assert (place.folder / "an.engine").read_bytes() == b"engine"


def test_a_cache_folder_that_cannot_be_written(
    content: bytes, created: list[Created], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("THAW_CACHE", str(tmp_path / "file"))
    with pytest.raises(DeviceError, match=r"cannot keep its engine in .*\$THAW_CACHE"):
        open_session(content, "tensorrt", batch=4)


# --- a machine without a GPU ------------------------------------------------------------------


@NO_GPU
def test_no_driver_no_gpu() -> None:
    assert gpu.gpu_name() is None


@NO_GPU
def test_onnxruntime_itself_refuses_the_cpu_where_only_the_gpu_is_allowed(content: bytes) -> None:
    if CUDA not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA")
    with session._hushed():
        silent = session._create(content, [(CUDA, {})])
        assert session._used(silent) == [CPU]
        with pytest.raises(ModelFileError):
            session._create(content, [(CUDA, {})], only_gpu=True)


@NO_GPU
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_libraries_that_are_missing_are_named(
    model: Path, device: str, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    """A driver answers, but CUDA cannot start: real ONNX Runtime, on a machine without a GPU."""
    if session._PROVIDER[device] not in ort.get_available_providers():  # type: ignore[index]
        pytest.skip(f"this onnxruntime has no {device}")
    photo = model.parent / "data" / "rose" / "0.jpg"
    monkeypatch.setattr(session, "_gpu_answers", lambda: True)
    monkeypatch.setattr(gpu, "_loads", lambda name: "blas" not in name and "nvinfer" not in name)
    assert main([str(model), str(photo), "--device", device]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert f"error: --device {device}: libcublas.so." in err
    assert ("libnvinfer.so.10 cannot be loaded" in err) == (device == "tensorrt")
    assert "pip install" in err
    assert len(err.splitlines()) == 1


@NO_GPU
def test_a_provider_that_does_not_start_is_told_in_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    """All libraries seem to be there, and real ONNX Runtime fails all the same."""
    if CUDA not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA")
    photo = str(model.parents[2] / "data" / "rose" / "0.jpg")
    monkeypatch.setattr(session, "_gpu_answers", lambda: True)
    monkeypatch.setattr(gpu, "missing_libraries", lambda _: [])
    assert main([str(model), photo, "--device", "cuda"]) == 2
    err = capfd.readouterr().err
    assert f"error: --device cuda: {CUDA} did not start" in err
    assert len(err.splitlines()) == 1, "ONNX Runtime's own complaints must stay off the screen"
    assert main([str(model), photo, "--device", "auto"]) == 0
    out, err = capfd.readouterr()
    assert err.startswith("note: --device cuda: ")
    assert err.endswith(f"{CPU}\n")
    assert out.splitlines()[0].endswith(f" on {CPU}")

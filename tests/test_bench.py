"""The benchmark: what it times, what it says of what it cannot time, and its arithmetic."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest

from export import bench_text, engines
from export.bench import main, random_photos
from export.seal import seal
from export.session import DeviceError, Session, open_session
from export.timing import Candidate, Opened, measure
from trainer.runlog import Run

REPOSITORY = Path(__file__).resolve().parents[1]
CORES, EACH = "ONNX Runtime, all cores on it", "ONNX Runtime, a photo on each core"
EAGER, LAST = "PyTorch, eager", "PyTorch, eager, channels-last"
QUICK = ["--seconds", "0.001", "--rounds", "1", "--batches", "2", "--no-compile"]

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(exported: Run, tmp_path: Path) -> Path:
    """A model.onnx in its run's folder, all of it the test's own."""
    folder = tmp_path / "runs" / exported.run_id
    shutil.copytree(exported.path, folder)
    return folder / "model.onnx"


def figures(model: Path, *flags: str) -> dict[str, Any]:
    """What the command line writes as JSON."""
    out = model.parent / "figures.json"
    assert main([str(model), *QUICK, "--json", str(out), *flags]) == 0
    document: dict[str, Any] = json.loads(out.read_text())
    return document


def reasons(document: dict[str, Any], engine: str) -> list[str]:
    return [one["reason"] for one in document["left_out"] if one["engine"] == engine]


# --- measuring, on a clock that only the engines move -------------------------------------------


class Machine:
    """Engines that take scripted times; `calls` is who was called with how many photos."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def clock(self) -> float:
        return self.now

    def candidate(
        self, name: str, seconds: Callable[[int], float], value: float = 0.5
    ) -> Candidate:
        def classify(photos: np.ndarray) -> np.ndarray:
            self.calls.append((name, len(photos)))
            self.now += seconds(len(photos))
            return np.full((len(photos), 2), value, np.float32)

        def load() -> Opened:
            self.now += 3.0
            return Opened(classify, "CPU")

        return Candidate(name, "fp32", "CPU", load)


@pytest.fixture
def machine() -> Machine:
    return Machine()


PHOTOS = random_photos(4, 2)


def test_engines_take_turns(machine: Machine) -> None:
    both = [machine.candidate("A", lambda n: n), machine.candidate("B", lambda n: 10 * n)]
    measure(both, PHOTOS, [4], seconds=1, rounds=2, clock=machine.clock)
    first = [("A", 1), ("A", 4), ("B", 1), ("B", 4)]
    one_round = [("A", 1)] * 2 + [("B", 1)] * 2 + [("A", 4)] * 2 + [("B", 4)] * 2
    assert machine.calls == first + one_round * 2, "each is called once untimed and then timed"


def test_figures_are_medians_over_the_rounds(machine: Machine) -> None:
    """Rounds of 1 and 3 s, of 2 and 2 s, and one with a stranger on the machine."""
    first, untimed = 7.0, 0.0
    script: Iterator[float] = iter([first, untimed, 1, 3, untimed, 2, 2, untimed, 50])
    candidate = machine.candidate("A", lambda _: next(script))
    (row,) = measure([candidate], PHOTOS, [1], seconds=3.5, rounds=3, clock=machine.clock).rows
    (cell,) = row.cells
    assert row.load_seconds == 3
    assert cell.first_seconds == 7
    assert cell.calls == (2, 2, 1)
    assert cell.images_per_second == (0.5, 0.5, 0.02)
    assert cell.rate == 0.5
    assert cell.spread == pytest.approx(0.96)
    assert cell.p50_ms == (2000, 2000, 50000)
    assert row.p50_ms == 2000
    assert cell.p99_ms == pytest.approx((2980, 2000, 50000))
    assert row.p99_ms == pytest.approx(2980)


def test_batches_count_photos_not_calls(machine: Machine) -> None:
    candidate = machine.candidate("A", lambda photos: 2.0)
    (row,) = measure([candidate], PHOTOS, [4, 2], rounds=1, clock=machine.clock).rows
    assert {cell.batch: cell.rate for cell in row.cells} == {1: 0.5, 2: 1.0, 4: 2.0}
    assert row.best.batch == 4
    assert row.cell(3) is None


def test_off_by_is_the_difference_from_the_first(machine: Machine) -> None:
    both = [machine.candidate("A", lambda n: n), machine.candidate("B", lambda n: n, value=0.75)]
    rows = measure(both, PHOTOS, [2], rounds=1, clock=machine.clock).rows
    assert [row.difference for row in rows] == [0, 0.25]


def broken(photos: int) -> float:
    if photos > 1:
        raise MemoryError("no room\nfor that")
    return 1.0


def unable() -> Opened:
    raise DeviceError("no GPU answers.")


def test_what_fails_is_left_out_and_the_others_go_on(machine: Machine) -> None:
    measured = measure(
        [
            Candidate("gone", "fp32", "CUDA", unable),
            machine.candidate("nan", lambda n: n, value=float("nan")),
            machine.candidate("small", broken),
            machine.candidate("good", lambda n: n),
        ],
        PHOTOS,
        [1, 2, 4],
        rounds=1,
        clock=machine.clock,
    )
    assert {row.engine: [c.batch for c in row.cells] for row in measured.rows} == {
        "small": [1],
        "good": [1, 2, 4],
    }
    assert [(one.engine, one.batch, one.reason) for one in measured.left_out] == [
        ("gone", None, "no GPU answers."),
        ("nan", None, "it gives probabilities that are not finite numbers"),
        ("small", 2, "batches of 2 and more: MemoryError: no room"),
    ]


def test_slow_compilers_get_no_further_sizes(machine: Machine) -> None:
    slow = machine.candidate("slow", lambda n: 100.0)
    measured = measure([slow], PHOTOS, [2, 4], rounds=1, clock=machine.clock)
    assert [cell.batch for cell in measured.rows[0].cells] == [1, 2]
    assert "batches of 4 and more" in measured.left_out[0].reason


# --- the command line -------------------------------------------------------------------------


def test_measures_onnx_runtime_and_pytorch(model: Path, capsys: Capture) -> None:
    document = figures(model)
    out, err = capsys.readouterr()
    rows = {row["engine"]: row for row in document["rows"] if row["device"] == "CPU"}
    assert {CORES, EACH, EAGER, LAST} <= rows.keys()
    for row in rows.values():
        assert row["precision"] == "fp32"
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["load_seconds"] > 0
        assert [cell["batch"] for cell in row["cells"]] == [1, 2]
        assert all(cell["rate"] > 0 and cell["first_seconds"] > 0 for cell in row["cells"])
        assert row["difference"] < 1e-4, "all engines must compute the same"
    assert all(len(line) <= 100 for line in out.splitlines())
    assert "nothing is read or decoded" in " ".join(out.split())
    assert "Fastest for one photo: " in out
    assert out.splitlines()[-1].startswith(("Fastest for many: ", "  "))
    assert "Traceback" not in out + err


def test_the_head_tells_what_was_measured(model: Path, capsys: Capture) -> None:
    document = figures(model, "--torch", "none", "--threads", "1")
    head = capsys.readouterr().out.partition("one photo")[0]
    assert document["files"][0]["sha256"][:12] in head
    assert document["versions"]["onnxruntime"] in head
    assert "squeezenet1_1, 64 x 64, 3 classes, transfer epoch 3" in head
    assert document["cpu"] in head
    assert document["threads"] == 1
    assert "--threads 1" in head
    assert not [row for row in document["rows"] if row["engine"].startswith("PyTorch")]


def test_providers_that_do_not_work_say_why(model: Path) -> None:
    document = figures(model, "--torch", "none")
    measured = {row["device"].split()[0] for row in document["rows"]}
    told = {one["device"] for one in document["left_out"] if one["reason"]}
    for device in ("CUDA", "TensorRT"):
        assert (device in measured) != (device in told)


def test_a_gpu_that_was_asked_for_and_is_not_there(model: Path, capsys: Capture) -> None:
    try:
        open_session(model.read_bytes(), "cuda")
    except DeviceError:
        assert main([str(model), *QUICK, "--device", "cuda"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: --device cuda: ")
    else:
        pytest.skip("CUDA works here")


def test_a_gpu_gets_a_session_for_each_size(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for --batch: buffers and graphs are for one size. The GPU here is played by the CPU."""
    opened: list[tuple[str, int]] = []

    def open_on_gpu(content: bytes, device: str, batch: int, **_: object) -> Session:
        opened.append((device, batch))
        provider = "CUDAExecutionProvider + CPUExecutionProvider"
        return replace(open_session(content, "cpu"), provider=provider)

    monkeypatch.setattr(engines, "open_session", open_on_gpu)
    candidates = engines.onnx_candidates(model.read_bytes(), "fp16", "cuda")
    (row,) = measure(candidates, random_photos(2, 64), [1, 2], seconds=0.001, rounds=2).rows
    assert opened == [("cuda", 1), ("cuda", 2)]
    assert (row.engine, row.precision, row.device) == ("ONNX Runtime", "fp16", "CUDA + CPU")


def test_forms_of_pytorch(tmp_path: Path) -> None:
    def kinds(device: Literal["cpu", "cuda"], compiled: bool) -> list[tuple[str, str]]:
        found = engines.torch_candidates(tmp_path, device, compiled)
        return [(one.engine.rpartition(", ")[2], one.precision) for one in found]

    assert kinds("cpu", True) == [
        ("eager", "fp32"),
        ("channels-last", "fp32"),
        ("compiled", "fp32"),
    ]
    assert kinds("cuda", False) == [
        ("eager", "tf32"),
        ("channels-last", "tf32"),
        ("channels-last", "fp16"),
        ("channels-last", "bf16"),
    ]


def changed(model: Path, name: str, **props: str) -> None:
    """A copy of the model under another name that says these things of itself."""
    copy = onnx.load(model)
    for entry in copy.metadata_props:
        entry.value = props.get(entry.key, entry.value)
    del copy.metadata_props[-1]  # the seal of what it was
    content = copy.SerializeToString()
    model.with_name(name).write_bytes(content + seal(content))


def test_other_precisions_of_the_same_checkpoint(model: Path) -> None:
    changed(model, "model-int8.onnx", precision="int8")
    changed(model, "model-copy.onnx")  # nothing new
    changed(model, "another-fp16.onnx", precision="fp16")
    changed(model, "model-before-fp16.onnx", precision="fp16", checkpoint_sha256="0" * 64)
    model.with_name("model-fp16.onnx").write_bytes(b"damaged")
    model.with_name("model-gone.onnx").symlink_to("nowhere")
    document = figures(model.with_name("model-int8.onnx"), "--torch", "none", "--device", "cpu")
    rows = [(row["engine"], row["precision"]) for row in document["rows"]]
    assert [row for row in rows if row[0] == CORES] == [(CORES, "fp32"), (CORES, "int8")]
    assert reasons(document, "model-fp16.onnx")
    assert reasons(document, "model-gone.onnx")
    assert [Path(file["path"]).name for file in document["files"]] == [
        "model.onnx",
        "model-int8.onnx",
    ]


def test_many_sizes_fit_the_width(model: Path, capsys: Capture) -> None:
    sizes = [str(size) for size in range(1, 9)]
    flags = ["--torch", "none", "--device", "cpu", "--seconds", "0.001", "--rounds", "1"]
    assert main([str(model), *flags, "--batches", *sizes]) == 0
    out = capsys.readouterr().out
    assert out.count("images/s, in batches") == 2
    assert all(len(line) <= 100 for line in out.splitlines())


def test_how_far_ahead_of_pytorch(machine: Machine) -> None:
    ours = machine.candidate("ONNX Runtime", lambda n: 2.0)
    theirs = [machine.candidate("PyTorch, slow", lambda n: 9.0)]
    theirs += [machine.candidate("PyTorch, fast", lambda n: 5.0)]
    measured = measure([ours, *theirs], PHOTOS, [4], rounds=1, clock=machine.clock)
    *_, one, many = [line for line in bench_text.text(measured) if line.startswith("Fastest")]
    assert one.startswith("Fastest for one photo: ONNX Runtime (fp32, CPU), 2000.00 ms, 2.5 times")
    assert many.startswith("Fastest for many: ONNX Runtime (fp32, CPU), 2.0 images/s in batches")


def test_a_name_cannot_act(model: Path, capsys: Capture) -> None:
    hostile = model.with_name("\x1b[2J.onnx")
    model.rename(hostile)
    assert main([str(hostile), *QUICK, "--torch", "none", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err


# --- PyTorch ------------------------------------------------------------------------------------


def test_the_run_is_found_by_the_id_in_the_model(model: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "model.onnx"
    moved.parent.mkdir()
    shutil.move(model, moved)
    flags = ["--device", "cpu", "--runs-dir"]
    found = figures(moved, *flags, str(tmp_path / "runs"))
    assert EAGER in [row["engine"] for row in found["rows"]]
    without = figures(moved, *flags, str(tmp_path / "elsewhere"))
    assert "name it with --torch RUN" in reasons(without, "PyTorch")[0]


def test_only_the_checkpoint_that_the_model_was_made_of(model: Path, capsys: Capture) -> None:
    checkpoint = model.parent / "checkpoints" / "transfer-best.pt"
    checkpoint.write_bytes(checkpoint.read_bytes() + b"\0")
    document = figures(model, "--device", "cpu")
    assert "is not the checkpoint that model.onnx was made of" in reasons(document, "PyTorch")[0]
    capsys.readouterr()
    assert main([str(model), *QUICK, "--torch", str(model.parent)]) == 2
    assert "its SHA-256 is not" in capsys.readouterr().err
    assert (
        main([str(model), *QUICK, "--torch", "nothing", "--runs-dir", str(model.parents[1])]) == 2
    )
    assert "No run 'nothing'" in capsys.readouterr().err


def test_without_torch(model: Path) -> None:
    """As where only requirements-inference.txt was installed: torch, torchvision, onnx missing."""
    code = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'onnx', 'onnxscript'): sys.modules[name] = None\n"
        "from export.bench import main\n"
        f"sys.exit(main({[str(model), *QUICK]}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    out = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b"")
    assert f"\n{CORES}" in out
    assert "PyTorch: not installed here" in out


@pytest.mark.slow
def test_compiled(model: Path) -> None:
    out = model.parent / "figures.json"
    flags = ["--seconds", "0.01", "--rounds", "1", "--batches", "2", "4", "--device", "cpu"]
    assert main([str(model), *flags, "--json", str(out)]) == 0
    (row,) = [r for r in json.loads(out.read_text())["rows"] if r["engine"] == "PyTorch, compiled"]
    assert [cell["batch"] for cell in row["cells"]] == [1, 2, 4]
    assert row["cells"][0]["first_seconds"] > 1, "nothing compiled was found in a cache"
    assert row["difference"] < 1e-4


# --- user errors --------------------------------------------------------------------------------


def refused(argv: list[str], capsys: Capture) -> str:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err


def test_not_a_model(model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "Cannot read the model" in refused([str(tmp_path / "no.onnx")], capsys)
    bad = tmp_path / "bad.onnx"
    for content in (b"", b"not a model", model.read_bytes()[:5000]):
        bad.write_bytes(content)
        assert "is not a model that Thaw can use" in refused([str(bad)], capsys)
    foreign = onnx.load(model)
    del foreign.metadata_props[:]
    onnx.save(foreign, bad)
    assert "was not written by Thaw" in refused([str(bad)], capsys)


@pytest.mark.parametrize(
    "flags",
    [
        ["--batches", "0"],
        ["--batches", "two"],
        ["--batches", "5000"],
        ["--rounds", "0"],
        ["--seconds", "nan"],
        ["--seconds", "0"],
        ["--threads", "-1"],
        ["--device", "tpu"],
    ],
)
def test_settings_that_cannot_be(model: Path, flags: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(model), *flags])
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("place", ["no folder/figures.json", "."])
def test_an_unwritable_file_is_told_before_the_work(
    model: Path, tmp_path: Path, place: str, capsys: Capture
) -> None:
    assert "--json" in refused([str(model), *QUICK, "--json", str(tmp_path / place)], capsys)

"""The export: what the shipped file holds, and when it is refused. Real nets, photos and files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export import parity, to_onnx
from export.__main__ import main
from export.metadata import ModelMetadata, Which, file_name
from export.parity import Batch
from export.precision import Precision, tolerance_for
from export.to_onnx import OPSET, PhotoClassifier, convert, export_run, serialize
from tests.tiny_run import CLASSES, PREPROCESS, save_weights
from trainer.checkpoint import load_model
from trainer.cli import guarded
from trainer.preprocess import load_photo
from trainer.run_writer import RunWriter
from trainer.runlog import Run, checkpoint_path, read_run
from trainer.schema import PhaseRecord, ThawError


@pytest.fixture
def run(exported: Run, tmp_path: Path) -> Run:
    """The same run, not exported, in a folder of the test's own."""
    path = tmp_path / "runs" / exported.run_id
    shutil.copytree(exported.path, path)
    (path / "model.onnx").unlink()
    (path / "parity.json").unlink()
    return read_run(path)


@pytest.fixture(scope="module")
def graph(exported: Run) -> onnx.ModelProto:
    network, checkpoint = load_model(checkpoint_path(exported, "after"))
    return convert(PhotoClassifier(network, checkpoint.preprocess).eval(), checkpoint)


@pytest.fixture
def converted(graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a test that is not about it the seconds that torch.onnx takes."""
    monkeypatch.setattr(to_onnx, "convert", lambda *_: copy_of(graph))


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def props(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def photos_of(run: Run) -> np.ndarray:
    root = Path(run.info["dataset"]["root"])
    return np.stack([load_photo(file, PREPROCESS) for file in sorted(root.rglob("*.jpg"))])


def batches_of(run: Run) -> Iterator[Batch]:
    photos = photos_of(run)
    yield Batch(photos, np.zeros(len(photos), np.int64))


# --- what is shipped --------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5])
def test_the_file_gives_what_pytorch_gives(exported: Run, batch: int) -> None:
    photos = photos_of(exported)[:batch]
    network, checkpoint = load_model(checkpoint_path(exported, "after"))
    with torch.inference_mode():
        expected = PhotoClassifier(network, checkpoint.preprocess).eval()(torch.from_numpy(photos))
    session = onnxruntime.InferenceSession(exported.path / "model.onnx")
    logits, probabilities = session.run(["logits", "probabilities"], {"photos": photos})
    np.testing.assert_allclose(logits, expected[0], atol=5e-5)
    np.testing.assert_allclose(probabilities, expected[1], atol=5e-5)
    assert batch == 1 or logits.std(axis=0).min() > 0.01, "these photos must not all look alike"


def test_metadata_tell_all_that_is_needed(exported: Run) -> None:
    about = ModelMetadata.from_props(props(exported.path / "model.onnx"))
    hashes = (exported.path / "checkpoints" / "transfer-best.pt.sha256").read_text()
    assert about.classes == CLASSES
    assert about.preprocess == PREPROCESS
    assert (about.run_id, about.checkpoint) == (exported.run_id, "after")
    assert (about.phase, about.epoch, about.arch) == ("transfer", 3, "squeezenet1_1")
    assert about.checkpoint_sha256 == hashes.split()[0]
    assert about.versions.keys() == {"torch", "torchvision", "onnx", "onnxscript", "thaw"}
    assert about.precision == "fp32"
    assert about.parity["photos"] == 12
    assert about.parity["top1_agreement"] == 1.0


def test_a_file_from_before_there_were_precisions_is_fp32(exported: Run) -> None:
    older = props(exported.path / "model.onnx")
    del older["precision"]
    assert ModelMetadata.from_props(older).precision == "fp32"


@pytest.mark.parametrize(
    ("which", "precision", "name"),
    [
        ("after", "fp32", "model.onnx"),
        ("before", "fp32", "model-before.onnx"),
        ("after", "fp16", "model-fp16.onnx"),
        ("before", "int8", "model-before-int8.onnx"),
    ],
)
def test_every_model_has_a_name_of_its_own(which: Which, precision: Precision, name: str) -> None:
    assert file_name("model.onnx", which, precision) == name


def test_parity_json_belongs_to_the_file(exported: Run) -> None:
    figures = json.loads((exported.path / "parity.json").read_text())
    content = (exported.path / "model.onnx").read_bytes()
    assert figures["onnx_sha256"] == hashlib.sha256(content).hexdigest()
    assert figures["max_abs_logit_difference"] <= figures["tolerance"] <= 5e-5
    assert figures["provider"] == "CPUExecutionProvider"
    assert figures["versions"]["onnxruntime"] == onnxruntime.__version__


def test_one_clean_file_with_a_dynamic_batch(exported: Run) -> None:
    model = onnx.load(exported.path / "model.onnx", load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    (photos,) = model.graph.input
    shape = photos.type.tensor_type.shape.dim
    assert [(d.dim_param or d.dim_value) for d in shape] == ["N", 64, 64, 3]
    assert photos.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [output.name for output in model.graph.output] == ["logits", "probabilities"]
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    assert not any(onnx.external_data_helper.uses_external_data(t) for t in model.graph.initializer)
    assert not list(exported.path.glob(".*")), "a temporary file was left"


def test_nothing_is_computed_on_shapes(graph: onnx.ModelProto) -> None:
    """Such nodes run on the CPU, and a graph that has one cannot be captured on a GPU."""
    assert not {"Shape", "Range", "Gather"} & {node.op_type for node in graph.graph.node}


def test_no_trace_of_this_machine(exported: Run) -> None:
    content = (exported.path / "model.onnx").read_bytes()
    places = [Path(torch.__file__).parents[1], Path(to_onnx.__file__).parents[1], exported.path]
    places += [Path(sys.prefix), Path.home(), Path(exported.info["dataset"]["root"])]
    for place in (*map(str, places), "site-packages", "stack_trace"):
        assert place.encode() not in content


def test_same_checkpoint_same_bytes(exported: Run, run: Run) -> None:
    export_run(run)
    expected = (exported.path / "model.onnx").read_bytes()
    assert (run.path / "model.onnx").read_bytes() == expected


# --- the command line -------------------------------------------------------------------------


def test_prints_a_summary_and_nothing_else(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([run.run_id, "--runs-dir", str(run.path.parent)]) == 0
    out, err = capfd.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "written",
        "classes",
        "as PyTorch",
        "accuracy",
        "card",
        "next",
    ]
    assert f"python -m export.infer {run.path / 'model.onnx'}" in out
    assert "100% same class on 12 validation photos" in out
    assert err == ""


@pytest.mark.usefixtures("converted")
def test_the_trunk_is_written_beside_not_over_the_model(exported: Run, tmp_path: Path) -> None:
    """A finetune run: "before" is its parent's checkpoint, in a file of its own."""
    parent = tmp_path / exported.run_id
    shutil.copytree(exported.path, parent)
    info = dict(exported.info) | {
        "parent_run_id": exported.run_id,
        "parent_checkpoint": {"file": "transfer-best.pt"},
    }
    writer = RunWriter.create(tmp_path, "tuned", info | {"phases": []})
    writer.update(run_id=writer.run_id)
    writer.start_phase(PhaseRecord("finetune", 3, None, ("classifier.1",), 1))
    save_weights(writer.path / "checkpoints" / "finetune-best.pt", epoch=7)
    shutil.copy(parent / "predictions" / "after.npz", writer.path / "predictions")
    writer.close("done")
    tuned = read_run(writer.path)
    before, after = export_run(tuned, "before"), export_run(tuned)
    assert before.path.name == "model-before.onnx"
    assert after.path.name == "model.onnx"
    assert json.loads((tuned.path / "parity-before.json").read_text())["checkpoint"] == "before"
    assert before.metadata.checkpoint_sha256 != after.metadata.checkpoint_sha256


def test_unknown_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nothing", "--runs-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: No run 'nothing'")


@pytest.mark.parametrize(("raised", "status"), [(ThawError("no"), 2), (KeyboardInterrupt(), 130)])
def test_errors_without_a_traceback(
    raised: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        raise raised

    assert guarded(command) == status
    assert "Traceback" not in capsys.readouterr().err


def test_another_opset(run: Run) -> None:
    assert main([str(run.path), "--opset", "20"]) == 0
    model = onnx.load(run.path / "model.onnx")
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]


@pytest.mark.parametrize("opset", ["0", "17", "99", str(onnx.defs.onnx_opset_version())])
def test_an_opset_that_cannot_be_had(
    run: Run, opset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """onnx itself knows one opset more than ONNX Runtime reads."""
    assert main([str(run.path), "--opset", opset]) == 2
    err = capsys.readouterr().err
    assert f"--opset {opset}" in err
    assert "Use --opset 18" in err
    assert not (run.path / "model.onnx").exists()


@pytest.mark.parametrize("flags", [["--precision", "fp64"], ["--opset", "new"]])
def test_mistyped_flags(run: Run, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(run.path), *flags])
    assert flags[0] in capsys.readouterr().err


# --- refusals ---------------------------------------------------------------------------------


def perturbed(model: onnx.ModelProto, amount: float) -> onnx.ModelProto:
    """A copy of the model with one number of its first convolution changed."""
    copy = copy_of(model)
    weight = next(t for t in copy.graph.initializer if len(t.dims) == 4)
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] += amount
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    return copy


@pytest.mark.parametrize("amount", [0.01, float("nan")])
def test_a_changed_weight_is_refused_and_the_old_file_stays(
    run: Run, graph: onnx.ModelProto, amount: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = run.path / "model.onnx"
    old.write_bytes(b"an older model")
    monkeypatch.setattr(to_onnx, "convert", lambda *_: perturbed(graph, amount))
    new = run.path / "new.onnx"
    for output in (None, new):
        with pytest.raises(parity.ParityError, match=r"not (written|exported)"):
            export_run(run, output=output)
    assert old.read_bytes() == b"an older model"
    assert not new.exists()
    assert not (run.path / "parity.json").exists()
    assert not list(run.path.glob(".*"))


def test_what_was_measured_is_what_is_written(
    run: Run, converted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[bytes] = []

    def spy(network: torch.nn.Module, content: bytes, *rest: object) -> parity.Parity:
        measured.append(content)
        return parity.measure(network, content, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(to_onnx, "measure", spy)
    written = export_run(run).path.read_bytes()
    added = onnx.ModelProto.FromString(written.removeprefix(measured[0]))
    assert written.startswith(measured[0])
    assert {field.name for field, _ in added.ListFields()} == {"metadata_props"}


def flip_byte(run: Run) -> None:
    path = run.path / "checkpoints" / "transfer-best.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def delete_predictions(run: Run) -> None:
    (run.path / "predictions" / "after.npz").unlink()


def damage_predictions(run: Run) -> None:
    (run.path / "predictions" / "after.npz").write_bytes(b"PK\x03\x04")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip_byte, "SHA-256 does not match"),
        (delete_predictions, "has no predictions/after.npz"),
        (damage_predictions, "after.npz cannot be read"),
    ],
)
@pytest.mark.usefixtures("converted")
def test_harmed_runs_are_refused(
    run: Run, harm: Callable[[Run], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(run)
    assert main([str(run.path)]) == 2
    assert message in capsys.readouterr().err
    assert not (run.path / "model.onnx").exists()


@pytest.mark.usefixtures("converted")
def test_moved_data(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = Path(run.info["dataset"]["root"])
    gone = tmp_path / "gone"
    info = dict(run.info) | {"dataset": dict(run.info["dataset"]) | {"root": str(gone)}}
    (run.path / "run.json").write_text(json.dumps(info))
    assert main([str(run.path)]) == 2
    err = capsys.readouterr().err
    assert str(gone) in err
    assert "--data DIR" in err
    assert not (run.path / "model.onnx").exists()
    assert main([str(run.path), "--data", str(root)]) == 0


@pytest.mark.parametrize("place", ["no folder/m.onnx", "."])
def test_unwritable_output(
    run: Run, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run.path), "--output", str(tmp_path / place)]) == 2
    assert "--output" in capsys.readouterr().err


def test_a_full_disk(
    run: Run, converted: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(to_onnx, "write_atomically", full)
    assert main([str(run.path)]) == 2
    assert "No space left" in capsys.readouterr().err


# --- the comparison ---------------------------------------------------------------------------


def test_photos_are_spread_evenly(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "PHOTOS", 3)
    chosen = parity.validation_photos(run)
    assert [file.parent.name for file in chosen.files] == ["daisy", "rose", "tulip"]


def test_deleted_and_unreadable_photos_are_counted(run: Run, tmp_path: Path) -> None:
    data = shutil.copytree(run.info["dataset"]["root"], tmp_path / "data")
    (data / "daisy" / "0.jpg").unlink()
    (data / "rose" / "0.jpg").write_bytes(b"")
    photos = parity.validation_photos(run, data)
    assert photos.missing == 1
    assert sum(len(batch.photos) for batch in photos.batches(PREPROCESS)) == 10


def test_labels_stay_with_their_photos(run: Run, tmp_path: Path) -> None:
    """Also where photos in between are gone or unreadable."""
    data = shutil.copytree(run.info["dataset"]["root"], tmp_path / "data")
    names = [f"{name}/{number}.jpg" for name in CLASSES for number in range(4)]
    labels = np.repeat(range(3), 4)
    np.savez(run.predictions("after"), files=names, labels=labels, logits=np.ones((12, 3)))
    (data / "daisy" / "0.jpg").unlink()
    (data / "rose" / "0.jpg").write_bytes(b"")
    (batch,) = parity.validation_photos(run, data).batches(PREPROCESS)
    assert batch.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 4


@pytest.mark.parametrize(
    ("size", "tolerance"), [(0.0, 5e-7), (0.5, 2.5e-5), (1, 5e-5), (10, 5e-5), (20, 1e-4)]
)
def test_tolerance_follows_the_size_of_the_logits(size: float, tolerance: float) -> None:
    assert tolerance_for(size) == pytest.approx(tolerance)


def test_a_tie_counts_as_agreeing_and_only_a_tie() -> None:
    torch_logits = np.array([[1.0, 1.00001], [1.0, 2.0], [3.0, 0.0]], np.float32)
    onnx_logits = np.array([[1.00002, 1.0], [2.0, 1.0], [3.0, 0.0]], np.float32)
    assert parity._top1(torch_logits, onnx_logits, tie=5e-5) == (1, 1)


def test_a_batch_dependent_graph_is_refused(exported: Run, graph: onnx.ModelProto) -> None:
    """The sum over the batch, a thousandth of it: only other batch sizes show it."""
    model = copy_of(graph)
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "clean"
    total = onnx.helper.make_node("ReduceSum", ["clean"], ["total"], keepdims=1)
    small = onnx.helper.make_tensor("small", onnx.TensorProto.FLOAT, [1], [1e-3])
    model.graph.initializer.append(small)
    scaled = onnx.helper.make_node("Mul", ["total", "small"], ["scaled"])
    added = onnx.helper.make_node("Add", ["clean", "scaled"], ["logits"])
    softmax = onnx.helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1)
    kept = [node for node in model.graph.node if "probabilities" not in node.output]
    del model.graph.node[:]
    model.graph.node.extend([*kept, total, scaled, added, softmax])

    network, checkpoint = load_model(checkpoint_path(exported, "after"))
    classifier = PhotoClassifier(network, checkpoint.preprocess).eval()
    with pytest.raises(parity.ParityError, match=r"between batch sizes by [1-9]"):
        parity.measure(classifier, serialize(model, {}), batches_of(exported), 0)

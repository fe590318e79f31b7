"""Checkpoints, models, predictions and logs that others made: refused, and nothing in them runs."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.metadata import ModelFileError, ModelMetadata
from export.session import open_session
from tests.conftest import takes_less
from tests.test_evidence import predictions, save
from trainer.__main__ import main
from trainer.checkpoint import CheckpointError, load_model
from trainer.evidence import EvidenceError, load_predictions
from trainer.files import open_regular, read_bounded
from trainer.imports.hparams import read_hparams
from trainer.keras_weights import KerasError, read_keras
from trainer.model import ModelSpec, build_model
from trainer.recipe import build_sweep_parser, read_recipe
from trainer.runlog import list_runs
from trainer.schema import Preprocess, ThawError
from trainer.weights import Pretrained, WeightsError, _from_file, load_weights

# --- any file -----------------------------------------------------------------------------------


def test_only_regular_files_of_a_sensible_size_are_read(tmp_path: Path) -> None:
    """Whoever opens a pipe waits for ever, and /dev/zero has no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    for name, reason in {
        "pipe": "a pipe",
        "endless": "a device",
        "huge": "more than 16 MB",
    }.items():
        with pytest.raises(OSError, match=reason):
            read_bounded(tmp_path / name)
    for name in ("pipe", "endless", "a\0b", "x" * 5000, ""):
        with pytest.raises(OSError):
            open_regular(tmp_path / name).close()
    (tmp_path / "small").write_bytes(b"said")
    assert read_bounded(tmp_path / "small") == b"said"


# --- checkpoints and weights --------------------------------------------------------------------


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def checkpoint(path: Path, **changes: Any) -> Path:
    """One that its SHA-256 belongs to, whatever it says."""
    spec = ModelSpec("squeezenet1_1", 2)
    weights = build_model(spec).state_dict()
    content = {
        "schema_version": 1,
        "spec": spec.to_dict() | changes.pop("spec", {}),
        "classes": ["a", "b"],
        "preprocess": Preprocess().to_dict(),
        "phase": "transfer",
        "epoch": 1,
        "state_dict": weights,
        "optimizer": None,
    }
    torch.save(content | changes, path)
    return listed(path)


def listed(path: Path) -> Path:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(f"{path.name}.sha256").write_text(f"{digest}  {path.name}\n")
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"schema_version": "x"},
        {"classes": ["a"]},
        {"classes": [1, 2]},
        {"classes": None},
        {"spec": {"num_classes": 10**9}},
        {"spec": {"num_classes": "2"}},
        {"spec": {"head": [10**6]}},
        {"spec": {"head": [512.0]}},
        {"spec": {"arch": "timm:hf_hub:somebody/model"}},
        {"spec": {"arch": None}},
        {"spec": {"pool": "max"}},
        {"preprocess": {"resize": float("inf")}},
        {"preprocess": Preprocess().to_dict() | {"std": [float("nan")] * 3}},
        {"preprocess": Preprocess().to_dict() | {"mean": [10**400] * 3}},
        {"state_dict": {"x": "y"}},
        {"state_dict": [torch.zeros(2)]},
        {"state_dict": {"x": torch.zeros(1).expand(2, 10**9)}},
    ],
)
def test_a_checkpoint_that_lies_is_refused(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a network of a billion classes is built, and without asking any server."""
    monkeypatch.setattr("socket.socket.connect", None)
    with pytest.raises(ThawError):
        load_model(checkpoint(tmp_path / "a.pt", **changes))


def test_a_pickle_in_a_checkpoint_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for content in ({"spec": Payload()}, Payload()):
        torch.save(content, "a.pt")
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            load_model(listed(Path("a.pt")))
        Path("a.pt").write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            load_model(listed(Path("a.pt")))
        with pytest.raises(WeightsError, match="loaded safely: it holds more than tensors") as told:
            _from_file(Path("a.pt"))
        assert "weights_only" not in str(told.value)
    assert not Path("ran").exists()


def test_a_checkpoint_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    """torch unpacks compressed entries, though it writes none."""
    path = checkpoint(tmp_path / "a.pt")
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, bytes(len(content)) if "/data/" in name else content)
    with pytest.raises(CheckpointError, match="unpacks to more"):
        load_model(listed(path))


def test_a_pipe_in_place_of_a_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a pipe"):
        load_model(tmp_path / "a.pt")


def test_weights_without_values_are_refused(tmp_path: Path) -> None:
    spec = ModelSpec("squeezenet1_1", 2)
    network = build_model(spec)
    for odd in (torch.empty(64, 3, 3, 3, device="meta"), torch.zeros(64, 3, 3, 3).to_sparse()):
        torch.save(network.state_dict() | {"features.0.weight": odd}, tmp_path / "w.pt")
        given = _from_file(tmp_path / "w.pt")
        with pytest.raises(WeightsError, match=r"features\.0\.weight"):
            load_weights(network, Pretrained("w", "", given.tensors), with_head=True)


@pytest.mark.parametrize("how", ["linked", "external", "virtual"])
def test_keras_weights_from_other_files_are_refused(how: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(4 * 16))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["kernel:0"] = np.zeros(16, "f4")
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.attrs["layer_names"] = ["stem"]
        layer = file.create_group("stem")
        layer.attrs["weight_names"] = ["kernel:0"]
        if how == "linked":
            layer["kernel:0"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "kernel:0")
        elif how == "external":
            outside = [(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)]
            layer.create_dataset("kernel:0", (16,), "f4", external=outside)
        else:
            layout = h5py.VirtualLayout((16,), "f4")
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "kernel:0", (16,))
            layer.create_virtual_dataset("kernel:0", layout)
    network = build_model(ModelSpec("squeezenet1_1", 2))
    with pytest.raises(KerasError, match="refers to other files"):
        read_keras(tmp_path / "w.h5", "nasnet_mobile", network)


# --- models -------------------------------------------------------------------------------------


def elsewhere(location: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[16])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "64"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(part: str, location: str) -> bytes:
    """Adds 16 numbers that are in another file, as an initializer or deeper in the model."""
    photos = helper.make_tensor_value_info("photos", TensorProto.FLOAT, [16])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [16])
    add = helper.make_node("Add", ["photos", "w"], ["logits"])
    constant = helper.make_node("Constant", [], ["w"], value=elsewhere(location))
    nodes, initial, functions, sparse = [add], [], [], []
    if part == "initializer":
        initial = [elsewhere(location)]
    elif part == "constant":
        nodes = [constant, add]
    elif part == "branch":
        inner = helper.make_graph([constant, add], "then", [], [logits])
        same = helper.make_node("Identity", ["photos"], ["logits"])
        other = helper.make_graph([same], "else", [], [logits])
        nodes = [helper.make_node("If", ["c"], ["logits"], then_branch=inner, else_branch=other)]
        initial = [numpy_helper.from_array(np.array(True), "c")]
    elif part == "function":
        opset = [helper.make_opsetid("", 17)]
        body = [constant, add]
        functions = [helper.make_function("own", "F", ["photos"], ["logits"], body, opset)]
        nodes = [helper.make_node("F", ["photos"], ["logits"], domain="own")]
    else:
        indices = numpy_helper.from_array(np.arange(16), "i")
        sparse = [onnx.SparseTensorProto(values=elsewhere(location), indices=indices, dims=[16])]
    graph = helper.make_graph(nodes, "g", [photos], [logits], initial, sparse_initializer=sparse)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    made = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=9)
    return made.SerializeToString()


@pytest.mark.parametrize("part", ["initializer", "constant", "branch", "function", "sparse"])
def test_no_part_of_a_model_reads_another_file(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not through a link, which of either kind may lead out of the folder."""
    monkeypatch.chdir(tmp_path)
    Path("w").write_bytes(np.arange(16, dtype=np.float32).tobytes())
    Path("soft").symlink_to("w")
    os.link("w", "hard")
    places = ("w", "soft", "hard", "../w", str(Path("w").absolute()), "*/_ORT_MEM_ADDR_/*")
    for place in places:
        with pytest.raises(ModelFileError, match="in another file"):
            open_session(model(part, place), "cpu")


def test_onnx_runtime_itself_looks_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two locks: it would take the file from the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("export.session._ELSEWHERE", __import__("re").compile(rb"(?!)"))
    Path("w").write_bytes(bytes(64))
    for part in ("initializer", "constant", "branch", "function", "sparse"):
        with pytest.raises(ModelFileError):
            open_session(model(part, "w"), "cpu")


def test_metadata_of_any_content_are_refused() -> None:
    props = ModelMetadata(
        ("a", "b"), Preprocess(), "run", "after", "transfer", 1, "a" * 64, "arch", {}
    ).to_props()
    assert ModelMetadata.from_props(props).classes == ("a", "b")
    odd = ["", "null", "[]", "{}", "1e400", "9" * 5000, "[" * 100_000, '{"resize": 1e400}', "NaN"]
    odd += ['{"resize": 1e999, "crop": 1, "interpolation": "bicubic", "mean": [], "std": []}']
    for name in ("classes", "preprocess", "versions", "epoch", "precision", "thaw_format"):
        for value in odd:
            if name != "versions" or value not in ("[]", "{}"):
                with pytest.raises(ThawError):
                    ModelMetadata.from_props(props | {name: value})


# --- predictions --------------------------------------------------------------------------------


def test_predictions_that_unpack_to_too_much_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.evidence.MOST_BYTES", 100_000_000)  # of a gigabyte
    path = tmp_path / "after.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("logits", "labels", "files"):
            header = io.BytesIO()
            shape = {"descr": "<f4", "fortran_order": False, "shape": (10**8, 1)}
            np.lib.format.write_array_header_1_0(header, shape)
            with archive.open(f"{name}.npy", "w") as file:
                file.write(header.getvalue())
                for _ in range(4):
                    file.write(bytes(10_000_000))
    assert path.stat().st_size < 200_000
    with pytest.raises(EvidenceError, match=r"unpacked they have 0\.1 GB"):
        load_predictions(path)


def test_predictions_that_lie_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "after.npz"
    arrays: dict[str, Any] = {"labels": np.array([0, 1]), "files": np.array(["a", "b"])}
    for logits in (np.array([Payload()] * 2), np.zeros((2, 1)), np.zeros((2, 2, 2)), np.array("x")):
        np.savez(path, logits=logits, **arrays)
        with pytest.raises(EvidenceError):
            load_predictions(path)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(EvidenceError):
        load_predictions(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(EvidenceError, match="a pipe"):
        load_predictions(path)
    assert not Path("ran").exists()
    path.unlink()
    save(path, predictions({1}))
    assert len(load_predictions(path).files) > 1


# --- logs and settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 {lr: 1}\n"
        + "".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)),
        "a0: &a0 [1]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)),
        "lr: &a [*a]",
        "lr: " + "[" * 20_000,
        "lr: " + "9" * 60_000,
        "lr: " + "1:" * 30_000 + "1",
        'lr: !!bool "x"',
        'lr: !!timestamp "x"',
        "lr: !!python/object/apply:os.mkdir [ran]",
        "? [a]\n: 1",
        "lr: .nan",
        "lr: true",
    ],
)
def test_settings_beside_a_log_cost_and_run_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged mappings would grow ninefold with each line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hparams.yaml").write_text(text)
    assert takes_less(2, lambda: read_hparams(tmp_path))
    assert "lr" not in read_hparams(tmp_path)
    assert not Path("ran").exists()


def test_a_duration_of_any_length_is_no_reason_to_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, time_ in enumerate(("9" * 400, "9" * 5000)):
        log = tmp_path / f"log{number}" / "history.csv"
        log.parent.mkdir()
        log.write_text(f"epoch,train_loss,valid_loss,accuracy,time\n0,1,1,.5,{time_}:12\n")
        runs = tmp_path / f"runs{number}"
        assert main(["import", str(log), "--runs-dir", str(runs)]) == 0
        assert len(list_runs(runs)[0].epochs) == 1


def test_names_in_logs_lead_nowhere(tmp_path: Path) -> None:
    log = tmp_path / "..." / "history.csv"
    log.parent.mkdir()
    log.write_text("epoch,loss,val_loss,val_accuracy\n0,1,1,.5\n")
    arguments = ["import", str(log), "--runs-dir", str(tmp_path / "runs")]
    assert main([*arguments, "--run-name", "../../\x1b[2J/etc/passwd"]) == 0
    [run] = list_runs(tmp_path / "runs")
    assert run.path.parent == tmp_path / "runs"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[sweep]\nlr = " + "[" * 100_000,
        "[sweep]\nlr = " + "9" * 5000,
        "[sweep]\nepochs = 0x" + "f" * 5000,
        "[sweep]\nepochs = 1979-05-27",
        "[sweep]\nepochs = nan",
        "[sweep]\nlr = [[1]]",
        "[sweep]\nlr = {a = 1}",
        '[sweep]\nruns-dir = ["/etc"]',
        "sweep = 1",
        "\0",
    ],
)
def test_a_recipe_of_any_content_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ThawError):
        read_recipe(tmp_path / "r.toml", build_sweep_parser())


def test_lists_of_photos_with_odd_names(tmp_path: Path) -> None:
    from trainer.config import Config
    from trainer.listing import DataError, list_photos

    for name in ("a/1.jpg", "b/1.jpg"):
        (tmp_path / "d" / name).parent.mkdir(parents=True)
        (tmp_path / "d" / name).touch()
    for odd in ("x" * 5000, "a/../../etc/passwd", "/etc/passwd", "a/\0.jpg", "a\\..\\..\\x"):
        (tmp_path / "list").write_text(f"path,split\na/{odd},train\n")
        config = Config("transfer", data=str(tmp_path / "d"), split_file=tmp_path / "list")
        with pytest.raises(DataError):
            list_photos(config)
        (tmp_path / "list").write_text(f"{odd}\n")
        config = Config("transfer", data=str(tmp_path / "d"), exclude_file=tmp_path / "list")
        with pytest.raises(DataError):
            list_photos(config)

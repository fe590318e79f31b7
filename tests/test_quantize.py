"""fp16 and int8: what the files hold, what they cost, and when they are refused. Real nets, photos
and files; the networks have a head that was fitted to the photos, so that accuracy means
something."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from export import calibration, parity, quantize, to_onnx
from export.__main__ import main
from export.calibration import CalibrationError, training_photos
from export.half import in_half_precision, rounded_after_each_step
from export.metadata import ModelMetadata
from export.parity import Batch, ParityError, measure, validation_photos
from export.precision import PRECISIONS, Parity, Precision
from export.to_onnx import Exported, PhotoClassifier, convert, export_run, serialize
from trainer.checkpoint import Checkpoint, load_model, save_checkpoint
from trainer.config import Config
from trainer.listing import list_photos
from trainer.model import InputNormalize, ModelSpec, build_model, head_name
from trainer.preprocess import load_photo
from trainer.run_writer import RunWriter
from trainer.runlog import Run, checkpoint_path, read_run
from trainer.schema import PhaseRecord, Preprocess

PREPROCESS = Preprocess(resize=72, crop=64)
CLASSES = ("blue", "green", "red")


def read(root: Path, files: list[str]) -> np.ndarray:
    return np.stack([load_photo(root / file, PREPROCESS) for file in files])


def fitted(arch: str, photos: np.ndarray, labels: np.ndarray) -> dict[str, torch.Tensor]:
    """Random weights with the BatchNorm statistics of these photos, and a head that is a ridge
    regression on them."""
    torch.manual_seed(0)
    network = build_model(ModelSpec(arch, len(CLASSES)))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    pixels = InputNormalize(PREPROCESS)(torch.from_numpy(photos))
    head = network.get_submodule(head_name(network))
    seen: list[torch.Tensor] = []
    head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    with torch.no_grad():
        network.train()(pixels)
        network.eval()(pixels)
        features = torch.cat([seen[-1], torch.ones(len(labels), 1)], 1)
        wanted = 8 * torch.eye(len(CLASSES))[torch.from_numpy(labels)] - 4
        products = features.T @ features
        penalty = 0.01 * products.trace() * torch.eye(len(products))
        solved = torch.linalg.solve(products + penalty, features.T @ wanted)
        head.weight.copy_(solved[:-1].T)
        head.bias.copy_(solved[-1])
    return network.state_dict()


def make_fitted_run(folder: Path, data: Path, arch: str) -> Run:
    """A transfer run as the trainer leaves it."""
    listing = list_photos(Config("transfer", data=str(data)))
    train = [item for item in listing.items if item.split == "train"]
    validation = [item for item in listing.items if item.split == "val"]
    config = {"split_seed": 0, "val_fraction": 0.3, "limit": None, "split_file": None}
    dataset = {"name": "data", "root": str(data), "fingerprint": "0", "counts": {}}
    info = {"classes": CLASSES, "dataset": dataset, "config": config}
    writer = RunWriter.create(folder, arch, info)
    writer.start_phase(PhaseRecord("transfer", 0, None, (), 1))
    labels = np.array([item.label for item in train])
    weights = fitted(arch, read(data, [item.file for item in train]), labels)
    spec = ModelSpec(arch, len(CLASSES))
    path = writer.path / "checkpoints" / "transfer-best.pt"
    save_checkpoint(path, Checkpoint(spec, CLASSES, PREPROCESS, "transfer", 3, weights))
    arrays = io.BytesIO()
    np.savez(
        arrays,
        files=np.array([item.file for item in validation]),
        labels=np.array([item.label for item in validation]),
        logits=np.zeros((len(validation), len(CLASSES)), np.float32),
    )
    (writer.path / "predictions" / "after.npz").write_bytes(arrays.getvalue())
    writer.end_phase(3)
    writer.close("done")
    return read_run(writer.path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_photos: Any) -> Path:
    return make_photos(tmp_path_factory.mktemp("photos"), photos=20)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_fitted_run(tmp_path_factory.mktemp("runs"), data, "resnet18")


@pytest.fixture(scope="module")
def graph(run: Run) -> onnx.ModelProto:
    return graph_of(run)


@pytest.fixture(scope="module")
def mobile(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, onnx.ModelProto]:
    """A network with depthwise convolutions and squeeze-and-excite, and its graph."""
    run = make_fitted_run(tmp_path_factory.mktemp("runs"), data, "mobilenet_v3_small")
    return run, graph_of(run)


def graph_of(run: Run) -> onnx.ModelProto:
    network, checkpoint = load_model(checkpoint_path(run, "after"))
    return convert(PhotoClassifier(network, checkpoint.preprocess).eval(), checkpoint)


@pytest.fixture(scope="module")
def files(run: Run, graph: onnx.ModelProto) -> dict[str, Exported]:
    """The run in all precisions; the seconds of torch.onnx are spent once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "convert", lambda *_: copy_of(graph))
        return {p: export_run(run, precision=p) for p in ("fp32", "fp16", "int8")}


@pytest.fixture
def converted(graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "convert", lambda *_: copy_of(graph))


@pytest.fixture
def another(run: Run, tmp_path: Path) -> Run:
    """The same run, not exported, in a folder of the test's own."""
    path = tmp_path / "runs" / run.run_id
    shutil.copytree(run.path, path, ignore=shutil.ignore_patterns("*.onnx", "parity*", "*.md"))
    return read_run(path)


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def op_types(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def nothing_written(run: Run) -> bool:
    patterns = ("*.onnx", "parity*", "model-card*", ".*")
    return not [path for pattern in patterns for path in run.path.glob(pattern)]


# --- what is shipped --------------------------------------------------------------------------


def test_files_of_a_precision(files: dict[str, Exported]) -> None:
    names = {p: file.path.name for p, file in files.items()}
    assert names == {"fp32": "model.onnx", "fp16": "model-fp16.onnx", "int8": "model-int8.onnx"}
    for precision, file in files.items():
        held = {e.key: e.value for e in onnx.load(file.path).metadata_props}
        about = ModelMetadata.from_props(held)
        figures = json.loads(
            file.path.with_name(
                file.path.name.replace("model", "parity").replace("onnx", "json")
            ).read_text()
        )
        assert about.precision == about.parity["precision"] == figures["precision"] == precision
        assert figures["onnx_sha256"] == file.sha256
        assert about.parity == file.parity.to_dict()
    assert files["fp16"].size < 0.55 * files["fp32"].size
    assert files["int8"].size < 0.55 * files["fp32"].size


def test_the_network_has_learnt_something(files: dict[str, Exported]) -> None:
    """Or the accuracies below would mean nothing."""
    assert files["fp32"].parity.photos == 18
    assert files["fp32"].parity.accuracy_pytorch > 0.8


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_every_file_is_taken_for_what_it_is(files: dict[str, Exported], precision: str) -> None:
    """Same input and outputs, one clean file, any batch, no trace of this machine."""
    file = files[precision]
    content = file.path.read_bytes()
    model = onnx.load(file.path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    (photos,) = model.graph.input
    assert photos.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in photos.type.tensor_type.shape.dim] == [
        "N", 64, 64, 3,
    ]  # fmt: skip
    outputs = {o.name: o.type.tensor_type.elem_type for o in model.graph.output}
    assert outputs == dict.fromkeys(["logits", "probabilities"], onnx.TensorProto.FLOAT)
    assert [o.domain for o in model.opset_import] == [""]
    for place in (Path(torch.__file__).parents[1], Path(to_onnx.__file__).parents[1], file.path):
        assert str(place).encode() not in content
    session = onnxruntime.InferenceSession(content)
    zeros = np.zeros((5, 64, 64, 3), np.uint8)
    logits, probabilities = session.run(["logits", "probabilities"], {"photos": zeros})
    assert logits.dtype == probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)


def test_fp16_is_half_within_and_float_at_its_ends(files: dict[str, Exported]) -> None:
    model = onnx.load(files["fp16"].path)
    types = {t.name: t.data_type for t in model.graph.initializer}
    weights = [t for name, t in types.items() if name.startswith("network.")]
    assert set(weights) == {onnx.TensorProto.FLOAT16}
    assert types["normalize.scale"] == types["normalize.offset"] == onnx.TensorProto.FLOAT
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    assert [*softmax.input] == ["logits"], "the softmax must not see rounded logits again"


def test_int8_is_static_per_channel_and_mostly_8_bits(files: dict[str, Exported]) -> None:
    file = files["int8"]
    model = onnx.load(file.path)
    assert {"QuantizeLinear", "DequantizeLinear"} <= op_types(model)
    assert not {"DynamicQuantizeLinear", "BatchNormalization"} & op_types(model)
    tensors = {t.name: t for t in model.graph.initializer}
    weights = [
        t for t in tensors.values() if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4
    ]
    assert weights
    for weight in weights:
        scale = tensors[weight.name.replace("_quantized", "_scale")]
        assert [*scale.dims] == [weight.dims[0]]
        values = onnx.numpy_helper.to_array(weight)
        assert np.abs(values.astype(int)).max() <= 64, "or sums overflow on processors without VNNI"
    count = len(quantize._layers(onnx.load(file.path.with_name("model.onnx"))))
    assert len(file.kept_layers) < count
    assert json.loads((file.path.parent / "parity-int8.json").read_text())["kept_layers"] == list(
        file.kept_layers
    )


def test_int8_keeps_the_accuracy(files: dict[str, Exported]) -> None:
    figures = files["int8"].parity
    assert figures.accuracy >= figures.accuracy_pytorch - 0.01
    assert figures.top1_agreement > 0.9
    assert 0 < figures.max_abs_batch_difference + 1e-9 <= figures.tolerance


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_same_checkpoint_same_bytes(
    files: dict[str, Exported], another: Run, converted: None, precision: Precision
) -> None:
    again = export_run(another, precision=precision)
    assert again.path.read_bytes() == files[precision].path.read_bytes()


@pytest.mark.parametrize(
    ("precision", "lines"),
    [
        ("fp16", ["written", "classes", "as PyTorch", "accuracy", "card", "next"]),
        ("int8", ["written", "classes", "as PyTorch", "accuracy", "in float32", "card", "next"]),
    ],
)
def test_says_what_was_measured(
    another: Run,
    converted: None,
    precision: str,
    lines: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main([str(another.path), "--precision", precision]) == 0
    out, err = capfd.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == lines
    assert f"model-{precision}.onnx" in out
    assert err == ""


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_depthwise_networks_are_exported_or_refused_with_figures(
    mobile: tuple[Run, onnx.ModelProto], precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, graph = mobile
    monkeypatch.setattr(to_onnx, "convert", lambda *_: copy_of(graph))
    try:
        file = export_run(run, precision=precision)
    except ParityError as error:
        assert precision == "int8"
        assert re.search(r"has [\d.]+% of 18 validation photos right, PyTorch", str(error))
    else:
        assert file.parity.passed
        assert not file.kept_layers or precision == "int8"


# --- refusals ---------------------------------------------------------------------------------


def test_int8_that_loses_too_much_is_refused_with_the_figure(
    another: Run,
    converted: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As if all values were within a thousandth: whatever is kept, the rest is ruined."""
    monkeypatch.setattr(calibration._Seen, "best_range", lambda *_: (-1e-3, 1e-3))
    assert main([str(another.path), "--precision", "int8"]) == 2
    err = capsys.readouterr().err
    assert "In int8 the model has" in err
    assert "points, and 1 is the most allowed" in err
    assert "In float32 already" in err
    assert "--precision fp16" in err
    assert nothing_written(another)


def spoilt(model: onnx.ModelProto) -> onnx.ModelProto:
    """The largest weight of the first convolution with another sign."""
    weights = next(t for t in model.graph.initializer if len(t.dims) == 4)
    values = onnx.numpy_helper.to_array(weights).copy()
    values.flat[np.abs(values).argmax()] *= -30
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    return model


def test_a_changed_weight_in_fp16_is_refused(
    another: Run, graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_onnx, "convert", lambda *_: spoilt(copy_of(graph)))
    with pytest.raises(ParityError, match="does not give what PyTorch gives"):
        export_run(another, precision="fp16")
    assert nothing_written(another)


def test_changed_weights_in_int8_are_refused(
    another: Run, converted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(model: onnx.ModelProto, photos: np.ndarray) -> quantize.Quantized:
        """The head's rows change places, so that all classes are others."""
        found = quantize.quantize(model, photos)
        head = next(n for n in found.model.graph.node if "logits" in n.output[0])
        for name in head.input[1:]:
            maker = next((n for n in found.model.graph.node if name in n.output), None)
            held = name if maker is None else maker.input[0]
            for tensor in found.model.graph.initializer:
                if tensor.name == held:
                    values = np.roll(onnx.numpy_helper.to_array(tensor), 1, axis=0)
                    tensor.CopyFrom(onnx.numpy_helper.from_array(values, held))
        return found

    monkeypatch.setattr(to_onnx, "quantize", swapped)
    with pytest.raises(ParityError, match="it loses"):
        export_run(another, precision="int8")
    assert nothing_written(another)


class Hot(nn.Module):
    """Its values reach 65504 times 10 inside, and are small again at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
        nn.init.constant_(self.up.weight, 6e4)
        nn.init.uniform_(self.down.weight, 1e-5, 2e-5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.down(torch.relu(self.up(pixels)))).mean((2, 3))


def test_values_beyond_half_precision_are_refused() -> None:
    """ONNX Runtime's CPU computes fp16 in float32, where they stay finite; a GPU does not."""
    torch.manual_seed(0)
    network = PhotoClassifier(Hot(), PREPROCESS).eval()
    checkpoint = Checkpoint(ModelSpec("hot", 3), CLASSES, PREPROCESS, "transfer", 0, {})
    model = convert(network, checkpoint)
    photos = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    content = serialize(in_half_precision(model), {})
    session = onnxruntime.InferenceSession(content)
    assert np.isfinite(session.run(["logits"], {"photos": photos})[0]).all()
    with pytest.raises(ParityError, match="exceed 65504"):
        measure(network, content, iter([Batch(photos, np.zeros(4, np.int64))]), 0, "fp16")
    measure(network, serialize(model, {}), iter([Batch(photos, np.zeros(4, np.int64))]), 0)


def test_a_crash_of_onnx_runtime_is_not_ours(
    another: Run, converted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies as it loads a ViT in fp16."""
    monkeypatch.setattr(parity, "_LOAD", "import os; os.abort()")
    with pytest.raises(ParityError, match="crashes when it loads this network in fp16"):
        export_run(another, precision="fp16")
    assert nothing_written(another)


def test_rounding_after_each_step_is_what_torch_gives_in_half_precision(
    files: dict[str, Exported], run: Run
) -> None:
    """torch's kernels round at other places within a step, so nearly."""
    network, checkpoint = load_model(checkpoint_path(run, "after"))
    photos = read(Path(run.info["dataset"]["root"]), [f"red/{n:03d}.jpg" for n in range(8)])
    pixels = InputNormalize(checkpoint.preprocess)(torch.from_numpy(photos))
    with torch.inference_mode():
        exact = network(pixels).numpy()
        halves = network.half()(pixels.half()).float().numpy()
    content = rounded_after_each_step(files["fp16"].path.read_bytes())
    (rounded,) = onnxruntime.InferenceSession(content).run(["logits"], {"photos": photos})
    assert 0.2 < np.abs(rounded - exact).mean() / np.abs(halves - exact).mean() < 5


# --- the rule ---------------------------------------------------------------------------------

GOOD = Parity(
    photos=1000,
    photos_missing=0,
    max_abs_logit_difference=1e-5,
    max_abs_probability_difference=1e-6,
    max_abs_batch_difference=1e-6,
    max_abs_logit=8.0,
    tolerance=5e-5,
    top1_agreement=1.0,
    ties=0,
    accuracy=0.9,
    accuracy_pytorch=0.9,
    provider="CPUExecutionProvider",
)


@pytest.mark.parametrize(
    ("figures", "passes"),
    [
        ({}, True),
        ({"top1_agreement": 0.9999}, False),
        ({"max_abs_logit_difference": 6e-5}, False),
        ({"max_abs_logit_difference": float("nan")}, False),
        ({"max_abs_batch_difference": float("nan")}, False),
        ({"precision": "fp16", "top1_agreement": 0.999}, True),
        ({"precision": "fp16", "top1_agreement": 0.998}, False),
        ({"precision": "fp16", "max_abs_batch_difference": 1e-4}, False),
        ({"precision": "int8", "top1_agreement": 0.95, "accuracy": 0.89}, True),
        ({"precision": "int8", "accuracy": 0.95}, True),
        ({"precision": "int8", "accuracy": 0.889}, False),
        ({"precision": "int8", "max_abs_batch_difference": 1e-4}, False),
    ],
)
def test_what_may_be_written(figures: dict[str, Any], passes: bool) -> None:
    assert replace(GOOD, **figures).passed is passes


# --- calibration ------------------------------------------------------------------------------


def test_no_validation_photo_is_calibrated_on(run: Run) -> None:
    root = Path(run.info["dataset"]["root"])
    validation = validation_photos(run).names
    photos = training_photos(run, validation, PREPROCESS)
    seen = {photo.tobytes() for photo in photos}
    assert len(photos) == 60 - len(validation)
    assert not seen & {photo.tobytes() for photo in read(root, list(validation))}
    everything = [f"{name}/{number:03d}.jpg" for name in CLASSES for number in range(20)]
    with pytest.raises(CalibrationError, match="no training photos"):
        training_photos(run, everything, PREPROCESS)


def test_unreadable_training_photos_are_left_out(run: Run, tmp_path: Path) -> None:
    root = shutil.copytree(run.info["dataset"]["root"], tmp_path / "data")
    validation = validation_photos(run).names
    lost = next(p for p in root.rglob("*.jpg") if p.relative_to(root).as_posix() not in validation)
    lost.write_bytes(b"")
    assert len(training_photos(run, validation, PREPROCESS, root)) == 60 - len(validation) - 1


def test_int8_without_training_photos(
    another: Run, converted: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = Path(another.info["dataset"]["root"])
    for name in validation_photos(another).names:
        (tmp_path / "only" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tmp_path / "only" / name)
    command = [str(another.path), "--precision", "int8", "--data", str(tmp_path / "only")]
    assert main(command) == 2
    assert "no training photos" in capsys.readouterr().err
    assert nothing_written(another)


def observed(values: np.ndarray, activation: Any = calibration._as_it_is) -> tuple[float, float]:
    seen = calibration._Seen()
    seen.add(values.astype(np.float32), np.random.default_rng(0))
    return seen.best_range(activation)


def test_ranges_leave_outliers_out() -> None:
    values = np.append(np.random.default_rng(0).normal(size=200_000), 100)
    low, high = observed(values)
    assert -6 < low < -2
    assert 2 < high < 10
    assert observed(np.linspace(-1, 3, 400)) == pytest.approx((-1, 3), abs=0.35)
    assert observed(np.zeros(10)) == (0, 0)


def test_ranges_spend_nothing_on_what_an_activation_makes_zero() -> None:
    low, high = observed(np.linspace(-100, 5, 500), calibration._silu)
    assert -15 < low < -1
    assert high > 4


def test_activations_are_those_of_torch() -> None:
    values = torch.linspace(-100, 100, 401)
    numbers = values.numpy()
    np.testing.assert_allclose(calibration._silu(numbers), nn.functional.silu(values), atol=1e-4)
    np.testing.assert_allclose(
        calibration._hard_swish(numbers), nn.functional.hardswish(values), atol=1e-4
    )


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_biases_take_back_what_rounding_adds_on_average(groups: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 12, 1, groups=groups)
    values = torch.rand(50, 6, 4, 4) * torch.arange(1.0, 7).view(1, 6, 1, 1)
    weights = layer.weight.detach().numpy()
    node = onnx.helper.make_node("Conv", ["x", "w", "b"], ["y"], name="c", group=groups)
    step = np.abs(weights).max((1, 2, 3), keepdims=True) / 64
    rounded = nn.Conv2d(6, 12, 1, groups=groups)
    rounded.weight.data = torch.from_numpy(np.rint(weights / step) * step)
    rounded.bias.data = layer.bias.data
    shift = quantize._shift(quantize._Layer(node, weights, False), values.mean((0, 2, 3)).numpy())
    with torch.no_grad():
        expected = (rounded(values) - layer(values)).mean((0, 2, 3)).numpy()
    np.testing.assert_allclose(shift, expected, atol=1e-5)


def test_each_rung_keeps_more(graph: onnx.ModelProto, mobile: tuple[Run, onnx.ModelProto]) -> None:
    for model, depthwise in ((graph, False), (mobile[1], True)):
        layers = quantize._layers(onnx.shape_inference.infer_shapes(model))
        rungs = list(quantize._rungs(layers))
        assert rungs[0] == quantize._Rung(frozenset(), ())
        assert all(lower.kept < upper.kept for lower, upper in itertools.pairwise(rungs))
        assert len(rungs[-1].kept) < len(layers)
        words = rungs[-1].words
        assert ("depthwise convolutions (11)" in words) is depthwise
        assert ("squeeze-and-excite (18)" in words) is depthwise


def test_distance_of_logits() -> None:
    wanted = np.array([[1.0, -1.0], [3.0, -3.0]], np.float32)
    assert quantize._distance(wanted, wanted + 7) == np.inf, "the same class, all alike"
    assert quantize._distance(wanted, wanted * 1.1) == pytest.approx(20, abs=1e-4)
    assert quantize._distance(wanted, wanted * np.float32("nan")) == -np.inf

"""Weights that Keras published: the same network, found by name, or refused.

Keras itself is no requirement of Thaw. Where it is installed with TensorFlow (Keras's NASNet does
not run on PyTorch), the outputs of both are compared; that was last done with keras 3.15.1 and
tensorflow 2.21.0. The other tests use what was found out then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.conftest import Train
from trainer import keras_weights
from trainer.keras_weights import KerasError, Place, Published, places, read_keras
from trainer.model import ModelSpec, build_model
from trainer.weights import WeightsError, find_weights, load_weights

NASNET = "nasnet_mobile"
# Of every "layer/weight shape" of keras.applications.NASNetMobile, sorted.
KERAS_TENSORS = "adef8a0f80eaa40eaaaae4f20ba5077fbab85a3bea97dfb5b881f265234a2716"

Layers = dict[str, dict[str, NDArray[np.float32]]]


def lively(classes: int = 7) -> nn.Module:
    """Random weights in which also BatchNorm's numbers are not the ones it starts with."""
    torch.manual_seed(0)
    network = build_model(ModelSpec(NASNET, classes)).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.3)  # type: ignore[arg-type]
    return network


def as_in_keras(tensor: Tensor, place: Place) -> NDArray[np.float32]:
    return tensor.permute(tuple(np.argsort(place.order))).numpy()


def keras_layers(network: nn.Module) -> Layers:
    state = network.state_dict()
    layers: Layers = {}
    for name, place in places(network, NASNET).items():
        layers.setdefault(place.layer, {})[place.role] = as_in_keras(state[name], place)
    return layers


def write_published(
    path: Path, layers: Layers, *, chunked: bool = False, whole: bool = False
) -> Path:
    """As the published files are laid out; `chunked` as names that are too long for one attribute
    are, `whole` as `model.save` does."""
    with h5py.File(path, "w") as file:
        group = file.create_group("model_weights") if whole else file
        names = [b"input_1", *(name.encode() for name in layers)]
        if chunked:
            half = len(names) // 2
            group.attrs["layer_names0"], group.attrs["layer_names1"] = names[:half], names[half:]
        else:
            group.attrs["layer_names"] = names
        group.create_group("input_1").attrs["weight_names"] = []
        for name, weights in layers.items():
            layer = group.create_group(name)
            # Some versions of TensorFlow put the scope of the layer before its name.
            full = {f"a_scope/{name}/{role}:0": values for role, values in weights.items()}
            layer.attrs["weight_names"] = [each.encode() for each in full]
            for each, values in full.items():
                layer[each] = values
    return path


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return lively()


@pytest.fixture(scope="module")
def layers(network: nn.Module) -> Layers:
    return keras_layers(network)


def test_layers_names_and_shapes_are_those_of_keras() -> None:
    layers = keras_layers(build_model(ModelSpec(NASNET, 1000)))
    lines = sorted(
        f"{layer}/{role} {list(values.shape)}"
        for layer, weights in layers.items()
        for role, values in weights.items()
    )
    assert len(lines) == 1126
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == KERAS_TENSORS


@pytest.mark.parametrize("layout", [{}, {"chunked": True}, {"whole": True}])
def test_what_was_written_is_read(
    tmp_path: Path, network: nn.Module, layers: Layers, layout: dict[str, bool]
) -> None:
    path = write_published(tmp_path / "w.h5", layers, **layout)
    found = find_weights(NASNET, str(path))
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.tensors is not None
    state = network.state_dict()
    assert set(found.tensors) == {k for k in state if not k.endswith("num_batches_tracked")}
    assert all(torch.equal(state[name], tensor) for name, tensor in found.tensors.items())


def test_a_file_without_top_fills_all_but_the_head(
    tmp_path: Path, network: nn.Module, layers: Layers
) -> None:
    without = {name: weights for name, weights in layers.items() if name != "predictions"}
    found = find_weights(NASNET, str(write_published(tmp_path / "no-top.h5", without)))
    fresh = build_model(ModelSpec(NASNET, 3, head=(8,), pool="max"))
    load_weights(fresh, found, with_head=False)
    old, new = network.state_dict(), fresh.state_dict()
    body = [k for k in old if not k.startswith("predictions") and "num_batches" not in k]
    assert all(torch.equal(old[name], new[name]) for name in body)
    with pytest.raises(WeightsError, match=r"needs predictions\.weight"):
        load_weights(build_model(ModelSpec(NASNET, 7)), found, with_head=True)


def _without(layers: Layers, name: str) -> Layers:
    return {k: v for k, v in layers.items() if k != name}


WRONG: dict[str, tuple[Callable[[Layers], Layers], str]] = {
    "a layer is missing": (
        lambda layers: _without(layers, "adjust_bn_0"),
        r"of the 1126 tensors of nasnet_mobile it lacks 4 \(adjust_bn_0/gamma, .*\); it has 0 that",
    ),
    "a layer is unknown": (
        lambda layers: layers | {"dense": {"kernel": np.zeros((2, 2), np.float32)}},
        r"lacks 0; it has 1 \(dense/kernel\) that nasnet_mobile has not",
    ),
    "a tensor is missing": (
        lambda layers: layers | {"stem_bn1": {"gamma": np.ones(32, np.float32)}},
        r"lacks 3 \(stem_bn1/beta, stem_bn1/moving_mean, stem_bn1/moving_variance\)",
    ),
    "a shape is another": (
        lambda layers: layers | {"stem_conv1": {"kernel": np.zeros((3, 3, 3, 96), np.float32)}},
        r"stem_conv1/kernel has shape \[3, 3, 3, 96\], where \[3, 3, 3, 32\] is needed",
    ),
    "a tensor has fewer dimensions": (
        lambda layers: layers | {"stem_conv1": {"kernel": np.zeros((3, 3), np.float32)}},
        r"stem_conv1/kernel has shape \[3, 3\], where",
    ),
    "another network": (
        lambda layers: {"conv1": {"kernel": np.zeros((7, 7, 3, 64), np.float32)}},
        r"belongs to another network: .*lacks 1124 \(stem_conv1/kernel, .*1 \(conv1/kernel\)",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named(tmp_path: Path, layers: Layers, what: str) -> None:
    change, said = WRONG[what]
    path = write_published(tmp_path / "w.h5", change(layers))
    with pytest.raises(KerasError, match=said):
        find_weights(NASNET, str(path))


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.h5"
    with pytest.raises(WeightsError, match="No such file"):
        find_weights(NASNET, str(path))
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(KerasError, match="is not an HDF5 file that can be read"):
        find_weights(NASNET, str(path))
    with h5py.File(path, "w") as file:
        file["something"] = [1]
    with pytest.raises(KerasError, match="an HDF5 file without Keras layers"):
        find_weights(NASNET, str(path))
    with h5py.File(path, "w") as file:
        file.create_group("layers/conv2d/vars")
    with pytest.raises(KerasError, match=r"layout of Keras 3.*model\.save"):
        find_weights(NASNET, str(path))
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"gone"]
    with pytest.raises(KerasError, match="is not an HDF5 file that can be read"):
        find_weights(NASNET, str(path))
    with pytest.raises(KerasError, match="resnet18 give a state dict of PyTorch"):
        find_weights("resnet18", str(path))


def test_a_truncated_file_is_refused(tmp_path: Path, layers: Layers) -> None:
    path = write_published(tmp_path / "w.h5", layers)
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(KerasError, match="is not an HDF5 file that can be read"):
        find_weights(NASNET, str(path))


# --- the published file -----------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def publish(monkeypatch: pytest.MonkeyPatch, path: Path, md5: str | None = None) -> None:
    found = hashlib.md5(path.read_bytes()).hexdigest()
    published = Published(path.as_uri(), md5 or found)
    monkeypatch.setitem(keras_weights.PUBLISHED, NASNET, published)  # type: ignore[arg-type]


def test_imagenet_weights_are_downloaded_once(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, network: nn.Module, layers: Layers
) -> None:
    source = write_published(tmp_path / "NASNet-mobile.h5", layers)
    publish(monkeypatch, source)
    found = find_weights(NASNET, "imagenet")
    assert found.source == "ImageNet (Keras, NASNet-mobile.h5)"
    assert found.tensors is not None
    assert torch.equal(found.tensors["stem_bn1.bias"], network.state_dict()["stem_bn1.bias"])
    source.unlink()
    again = find_weights(NASNET, "imagenet")
    assert again.sha256 == found.sha256
    assert [path.name for path in hub.iterdir()] == ["NASNet-mobile.h5"]


def test_a_download_that_is_not_the_published_file_is_not_kept(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, layers: Layers
) -> None:
    publish(monkeypatch, write_published(tmp_path / "NASNet-mobile.h5", layers), md5="0" * 32)
    with pytest.raises(WeightsError, match=r"MD5 is [0-9a-f]{32}, that of the original 0{32}"):
        find_weights(NASNET, "imagenet")
    assert list(hub.iterdir()) == []


def test_without_network_the_way_out_is_said(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Published((tmp_path / "gone" / "NASNet-mobile.h5").as_uri(), "0" * 32)
    monkeypatch.setitem(keras_weights.PUBLISHED, NASNET, gone)  # type: ignore[arg-type]
    with pytest.raises(WeightsError) as error:
        find_weights(NASNET, "imagenet")
    said = str(error.value)
    assert f"are not at {hub / 'NASNet-mobile.h5'}" in said
    assert f"Download {gone.url} elsewhere and put it there" in said
    assert "--weights FILE" in said
    assert list(hub.iterdir()) == []


def test_a_damaged_file_that_is_there_is_not_used(hub: Path) -> None:
    hub.mkdir(parents=True)
    (hub / "NASNet-mobile.h5").write_bytes(b"half of it")
    with pytest.raises(WeightsError, match="is damaged: its MD5 is"):
        find_weights(NASNET, "imagenet")


@pytest.mark.slow
def test_direct_use_and_transfer_from_a_keras_file(
    train: Train, tmp_path: Path, layers: Layers
) -> None:
    path = str(write_published(tmp_path / "w.h5", layers))
    flags = ("--arch", NASNET, "--weights", path, "--size", "32")
    direct = train("--phase", "direct", *flags)
    assert len(direct.classes) == 7  # those of the file
    transfer = train("--phase", "transfer", "--epochs", "1", *flags)
    assert transfer.info["weights"]["source"] == path
    assert transfer.info["preprocess"]["mean"] == [0.5] * 3


# --- beside Keras -----------------------------------------------------------------------------


def keras_network(keras: Any, side: int, top: bool) -> Any:
    rng = np.random.default_rng(side)
    made = keras.applications.NASNetMobile(
        input_shape=(side, side, 3),
        include_top=top,
        weights=None,
        pooling=None if top else "max",
        classifier_activation=None,
    )
    for layer in made.layers:
        for weight in layer.weights:
            if weight.name in ("gamma", "moving_variance"):
                weight.assign(rng.uniform(0.5, 1.5, weight.shape).astype(np.float32))
            elif "kernel" not in weight.name:
                weight.assign(rng.normal(0, 0.3, weight.shape).astype(np.float32))
    return made


def layers_of(made: Any) -> Layers:
    values: Mapping[str, Any] = {layer.name: layer.weights for layer in made.layers}
    return {
        name: {weight.name: np.asarray(weight) for weight in weights}
        for name, weights in values.items()
        if weights
    }


@pytest.mark.slow
@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("side", [32, 33, 75, 224])
def test_outputs_are_those_of_keras(tmp_path: Path, side: int, top: bool) -> None:
    pytest.importorskip("tensorflow", reason="compares with Keras, which needs tensorflow")
    keras = pytest.importorskip("keras", reason="compares with Keras, which is not installed")
    from keras.src.legacy.saving import legacy_h5_format

    theirs = keras_network(keras, side, top)
    path = tmp_path / "w.h5"
    with h5py.File(path, "w") as file:  # as Keras itself writes the layout of the published files
        legacy_h5_format.save_weights_to_hdf5_group(file, theirs)
    ours = build_model(ModelSpec(NASNET, 1000, pool="avg" if top else "max")).eval()
    state = read_keras(path, NASNET, ours)
    assert ("predictions.bias" in state) == top
    ours.load_state_dict(ours.state_dict() | state)
    if not top:
        ours.predictions = nn.Identity()  # type: ignore[assignment]
    photos = np.random.default_rng(0).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    wanted = np.asarray(theirs(photos, training=False))
    with torch.inference_mode():
        found = ours(torch.from_numpy(photos).permute(0, 3, 1, 2)).numpy()
    assert wanted.std() > 0.5
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.slow
def test_our_writer_writes_what_keras_reads(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow", reason="compares with Keras, which needs tensorflow")
    keras = pytest.importorskip("keras", reason="compares with Keras, which is not installed")
    theirs = keras_network(keras, 32, True)
    layers = layers_of(theirs)
    path = write_published(tmp_path / "w.h5", layers)
    other = keras.applications.NASNetMobile(input_shape=(32, 32, 3), weights=None)
    other.load_weights(path)
    assert np.array_equal(np.asarray(other.layers[-1].weights[0]), layers["predictions"]["kernel"])

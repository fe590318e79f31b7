"""An fp32 graph in 8 bits: as many layers as keep the network what it is.

Rounding all of an EfficientNet to 8 bits ruins it: a few outliers in its first layers, and channels
of very different size in its depthwise convolutions, leave too few levels for the rest. So layers
are given back to float32, from few to many, until the logits are close enough to what they were, on
training photos. Validation photos have no part in the choice: they are for the judgement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from tqdm import tqdm

from export.calibration import Observed, observe
from export.metadata import INPUT, OUTPUTS
from export.session import open_session
from trainer.preprocess import Photo
from trainer.schema import ThawError

# How far the errors of the logits must be below the logits, in decibels. EfficientNet-B0 then gives
# another class to 2 photos in 100, about as often rightly as wrongly.
ENOUGH: Final = 25.0

_BATCH: Final = 8
_LAYERS: Final = ("Conv", "Gemm", "MatMul")
# Taken into the convolution before them, where that is in 8 bits.
_CLIPPING: Final = ("Relu", "Clip")
# Weights have 7 bits: processors without VNNI add pairs of products in 16 bits, and 8 overflow
# these in silence. What was measured here then holds elsewhere.
_TOP_WEIGHT: Final = 64

Floats = NDArray[np.float32]


class QuantizeError(ThawError):
    """A network that cannot be quantised."""


@dataclass(frozen=True)
class Quantized:
    """A graph of which part is in 8 bits. `kept` says in words what is not, `kept_layers` by the
    names of their weights; `distance` is how far below the logits their errors are, in decibels, on
    training photos."""

    model: onnx.ModelProto
    kept: tuple[str, ...]
    kept_layers: tuple[str, ...]
    distance: float


@dataclass(frozen=True)
class _Layer:
    node: Any
    weights: Floats
    on_vectors: bool  # its input has a height and width of 1

    @property
    def name(self) -> str:
        return str(self.node.name)

    @property
    def groups(self) -> int:
        return self._attribute("group", 1)

    @property
    def is_transposed(self) -> bool:
        """Whether the weights are [inputs, outputs], which torch writes without a bias."""
        return self.node.op_type != "Conv" and not self._attribute("transB", 0)

    def _attribute(self, name: str, default: int) -> int:
        return next((int(a.i) for a in self.node.attribute if a.name == name), default)


@dataclass(frozen=True)
class _Rung:
    kept: frozenset[str]
    words: tuple[str, ...]


def quantize(model: onnx.ModelProto, photos: Photo) -> Quantized:
    """Quantise the network; two thirds of the photos, uint8 [N, H, W, 3], are for its ranges, and
    the others to choose what is kept. Raises QuantizeError."""
    layers = _layers(onnx.shape_inference.infer_shapes(model))
    if not layers:
        raise QuantizeError("The network has no layer that 8 bits could be used for.")
    chosen_by = np.arange(len(photos)) % 3 == 2
    judges = photos[chosen_by] if chosen_by.any() else photos
    observed = observe(model, _tensors(model, layers), photos[~chosen_by])
    wanted = _logits(model, judges)
    tried: list[Quantized] = []
    rungs = list(_rungs(layers))
    with tqdm(rungs, "choosing layers", unit="try", leave=False, disable=None) as bar:
        for rung in bar:
            found = _without(rung, model, layers, observed)
            distance = _distance(wanted, _logits(found, judges))
            kept = tuple(_module(layer) for layer in layers if layer.name in rung.kept)
            tried.append(Quantized(found, rung.words, kept, distance))
            if distance >= ENOUGH:
                break
    return max(tried, key=lambda one: one.distance)


def _without(
    rung: _Rung, model: onnx.ModelProto, layers: Sequence[_Layer], observed: Observed
) -> onnx.ModelProto:
    try:
        quantised = [layer for layer in layers if layer.name not in rung.kept]
        return _with_8_bits(model, quantised, observed)
    except Exception as error:  # the quantiser raises whatever its many steps raise
        raise QuantizeError(
            "ONNX Runtime cannot quantise this network: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}. Use --precision fp16."
        ) from error


# --- what can be kept -------------------------------------------------------------------------


def _layers(model: onnx.ModelProto) -> list[_Layer]:
    """All layers with constant weights, in order."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    vectors = {info.name for info in model.graph.value_info if _is_vector(info)}
    return [
        _Layer(node, onnx.numpy_helper.to_array(weights[node.input[1]]), node.input[0] in vectors)
        for node in model.graph.node
        if node.op_type in _LAYERS and node.input[1] in weights
    ]


def _is_vector(info: Any) -> bool:
    sides = info.type.tensor_type.shape.dim[2:]
    return len(sides) == 2 and all(side.dim_value == 1 for side in sides)


def _module(layer: _Layer) -> str:
    return str(layer.node.input[1]).removeprefix("network.").removesuffix(".weight")


def _rungs(layers: Sequence[_Layer]) -> Iterator[_Rung]:
    """What is kept in float32, from nothing to half of the network; each rung keeps more."""
    names = [layer.name for layer in layers]
    body = layers[1:-1]
    groups = {
        "the first layer and the head": [names[0], names[-1]],
        "squeeze-and-excite": [x.name for x in body if x.node.op_type == "Conv" and x.on_vectors],
        "depthwise convolutions": [x.name for x in body if x.groups == len(x.weights) > 1],
    }
    kept: frozenset[str] = frozenset()
    words: tuple[str, ...] = ()
    yield _Rung(kept, words)
    for word, group in groups.items():
        if not kept.issuperset(group):
            kept, words = kept.union(group), (*words, f"{word} ({len(group)})")
            yield _Rung(kept, words)
    for part in (12, 4, 2):
        first = math.ceil(len(layers) / part)
        if not kept.issuperset(names[:first]):
            words_now = (*words, f"the first {first} of {len(layers)} layers")
            yield _Rung(kept.union(names[:first]), words_now)


# --- in 8 bits --------------------------------------------------------------------------------


def _tensors(model: onnx.ModelProto, layers: Sequence[_Layer]) -> list[str]:
    """What may get levels: what goes into layers and comes out of them, clipped or not."""
    names = [name for layer in layers for name in (layer.node.input[0], layer.node.output[0])]
    names += [node.output[0] for node in model.graph.node if node.op_type in _CLIPPING]
    return list(dict.fromkeys(names))


def _with_8_bits(
    model: onnx.ModelProto, layers: Sequence[_Layer], observed: Observed
) -> onnx.ModelProto:
    """A copy in which these layers are in 8 bits: QDQ, weights per channel, activations per tensor,
    which are unsigned because the kernels for x86 are faster so."""
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    ranges = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in observed.ranges.items()
    }
    clipping = [node.name for node in model.graph.node if node.op_type in _CLIPPING]
    quantizer = QDQQuantizer(
        _corrected(model, layers, observed),
        per_channel=True,
        reduce_range=True,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
        nodes_to_quantize=[*(layer.name for layer in layers), *clipping],
        nodes_to_exclude=[],
        op_types_to_quantize=[*_LAYERS, *_CLIPPING],
        extra_options={},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def _corrected(
    model: onnx.ModelProto, layers: Sequence[_Layer], observed: Observed
) -> onnx.ModelProto:
    """A copy whose biases take back what rounding the weights adds to each channel on average."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = {node.name: node for node in copy.graph.node}
    biases = {t.name: onnx.numpy_helper.to_array(t) for t in copy.graph.initializer}
    for layer in layers:
        node = nodes[layer.name]
        if len(node.input) < 3 or node.input[2] not in biases or layer.is_transposed:
            continue
        bias = biases[node.input[2]] - _shift(layer, observed.means[node.input[0]])
        node.input[2] = f"{node.name}_bias"  # of its own: layers may share one
        copy.graph.initializer.append(onnx.numpy_helper.from_array(bias, node.input[2]))
    read = {name for node in copy.graph.node for name in node.input}
    unread = [tensor for tensor in copy.graph.initializer if tensor.name not in read]
    for tensor in unread:
        copy.graph.initializer.remove(tensor)
    return copy


def _shift(layer: _Layer, mean: Floats) -> Floats:
    """What rounded weights add to each output channel, for inputs of this mean by channel."""
    outputs = len(layer.weights)
    weights = layer.weights.reshape(outputs, -1)
    step = np.abs(weights).max(axis=1, keepdims=True) / _TOP_WEIGHT
    step[step == 0] = 1
    added = (np.rint(weights / step) * step - weights).reshape(*layer.weights.shape[:2], -1).sum(2)
    by_group = added.reshape(layer.groups, -1, added.shape[1])
    shift: Floats = np.einsum("goi,gi->go", by_group, mean.reshape(layer.groups, -1)).ravel()
    return shift.astype(np.float32)


# --- how close --------------------------------------------------------------------------------


def _logits(model: onnx.ModelProto, photos: Photo) -> Floats:
    session = open_session(model.SerializeToString(), "cpu").runtime
    parts = [photos[start : start + _BATCH] for start in range(0, len(photos), _BATCH)]
    return np.concatenate([session.run([OUTPUTS[0]], {INPUT: part})[0] for part in parts])


def _distance(wanted: Floats, found: Floats) -> float:
    """Signal to noise in decibels; what is added to all logits of a photo alike is neither."""
    signal = np.square(wanted - wanted.mean(1, keepdims=True)).sum(dtype=np.float64)
    off = found - wanted
    noise = np.square(off - off.mean(1, keepdims=True)).sum(dtype=np.float64)
    if not np.isfinite(noise):
        return -math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf

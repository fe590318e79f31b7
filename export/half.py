"""A graph in half precision: weights and activations of the network, but not its ends."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

import numpy as np
import onnx
from onnx.utils import Extractor

from export.metadata import INPUT, OUTPUTS

# What may stand between the photos and the network: turning and normalising them.
_NORMALISING: Final = frozenset({"Cast", "Transpose", "Mul", "Add", "Sub", "Div"})


def in_half_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network in float16, with the normalisation before it and the softmax behind it in
    float32, as are the outputs.

    BatchNorm is folded into the convolutions by then, in float32, so each weight is rounded once.
    """
    # Both import much more than they need; only --precision fp16 waits for that.
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    core = Extractor(model).extract_model([INPUT, _normalised(model)], [OUTPUTS[0]])
    inside = {name for node in core.graph.node for name in node.output}
    ends = [node for node in model.graph.node if not inside.intersection(node.output)]
    half = convert_float_to_float16(core, keep_io_types=True)
    needed = {name for node in ends for name in node.input}
    converted = {weights.name for weights in half.graph.initializer}
    kept = [w for w in model.graph.initializer if w.name in needed - converted]

    result = onnx.ModelProto()
    result.CopyFrom(model)
    for field in ("node", "initializer", "value_info"):
        result.graph.ClearField(field)
    result.graph.node.extend([*ends, *half.graph.node])
    result.graph.initializer.extend([*kept, *half.graph.initializer])
    OnnxModel.graph_topological_sort(result.graph, is_deterministic=True)
    return result


def _normalised(model: onnx.ModelProto) -> str:
    """The tensor that the network itself begins with."""
    constants = {weights.name for weights in model.graph.initializer}
    readers = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    tensor = INPUT
    while True:
        following = [node for node in readers[tensor] if node.op_type != "Shape"]
        if len(following) != 1 or following[0].op_type not in _NORMALISING:
            return tensor
        if {*following[0].input} - constants != {tensor}:
            return tensor
        (tensor,) = following[0].output


def rounded_after_each_step(content: bytes) -> bytes:
    """The same model computed in float32, with every value rounded that a half-precision kernel
    would round: what a GPU gives, sums within one step apart.

    ONNX Runtime's CPU kernels know no float16: it leaves out the conversions between two steps, and
    values beyond 65504 then stay finite. Conversions that a graph itself asks for it keeps.
    """
    model = onnx.shape_inference.infer_shapes(onnx.ModelProto.FromString(content))
    halves = {info.name for info in model.graph.value_info if _is_half(info)}
    for weights in model.graph.initializer:
        _widen(weights)
    steps: list[onnx.NodeProto] = []
    for node in model.graph.node:
        steps.append(node)
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT16:
                attribute.i = onnx.TensorProto.FLOAT
            _widen(attribute.t)
        for place, name in enumerate(node.output):
            if name in halves:
                node.output[place] = f"{name}_exact"
                steps += _rounding(name)
    model.graph.ClearField("value_info")
    rounded = onnx.GraphProto(node=steps)  # copies them, so that the old list can go
    model.graph.ClearField("node")
    model.graph.node.extend(rounded.node)
    return model.SerializeToString()


def _is_half(info: onnx.ValueInfoProto) -> bool:
    return bool(info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16)


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == onnx.TensorProto.FLOAT16:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _rounding(name: str) -> list[onnx.NodeProto]:
    cast = onnx.helper.make_node
    return [
        cast("Cast", [f"{name}_exact"], [f"{name}_half"], to=onnx.TensorProto.FLOAT16),
        cast("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT),
    ]

"""The frozen prefix: what cannot change is computed once, and epochs run only the tail.

A network is cut where its frozen beginning ends and as few numbers as possible cross over. The cut
is found in the graph that torch.fx traces, so it works for any network that can be traced; one that
cannot runs whole, with a notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from trainer.model import head_name, trainable_modules

Activations = tuple[Tensor, ...]

# For values that cannot be stored photo by photo: sizes, lists, constants.
_UNFIT: Final = 1 << 60


@dataclass(frozen=True)
class Cut:
    """A network in two parts that share its modules.

    `prefix` maps normalised photos [N, 3, H, W] to activations, `tail` those to logits
    [N, classes]. `bytes_per_photo` cross over. `at` names the module where the tail begins.
    """

    prefix: nn.Module
    tail: nn.Module
    at: str
    bytes_per_photo: int


class _Tracer(fx.Tracer):
    """Traces down to modules without children.

    Torchvision's StochasticDepth is one of these: traced through, its training flag would be fixed
    at the value it has now.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        childless = not any(True for _ in m.children())
        return childless or super().is_leaf_module(m, module_qualified_name)


def cut(network: nn.Module, example: Tensor) -> Cut | None:
    """Cut a network before its first part that trains or draws at random in training.

    `example` is a batch [N, 3, H, W] of an unusual size, such as 3, so that no other dimension is
    mistaken for the batch. None where nothing of it is frozen, where it cannot be traced, or where
    the two parts would not give what the whole gives.
    """
    training = network.training
    network.eval()
    try:
        graph = _Tracer().trace(network)
        ShapeProp(fx.GraphModule(network, graph)).propagate(example)
        found = _cut_graph(network, list(graph.nodes))
        return found if found is not None and _equal(network, found, example) else None
    except Exception:  # tracing foreign code raises anything, and the whole network still works
        return None
    finally:
        network.train(training)


def _equal(network: nn.Module, found: Cut, example: Tensor) -> bool:
    with torch.inference_mode():
        # A GPU may choose another algorithm for the same layer from one call to the next.
        return torch.allclose(network(example), found.tail(*found.prefix(example)), atol=1e-4)


def _cut_graph(network: nn.Module, nodes: list[fx.Node]) -> Cut | None:
    first = next(i for i, node in enumerate(nodes) if _belongs_to_tail(network, node))
    # The latest of the smallest: what does not cost memory should not be computed again.
    place = min(range(first, 0, -1), key=lambda i: _size(nodes, i))
    crossing = _crossing(nodes, place)
    size = _size(nodes, place)
    if size >= _UNFIT or any(node.op == "placeholder" for node in crossing):
        return None
    return Cut(
        prefix=_prefix(network, nodes[:place], crossing),
        tail=_tail(network, nodes[place:], crossing),
        at=str(nodes[place].target),
        bytes_per_photo=size,
    )


def _belongs_to_tail(network: nn.Module, node: fx.Node) -> bool:
    if node.op == "output":
        return True
    name = str(node.target)
    if node.op == "get_attr":
        return name.rpartition(".")[0] in trainable_modules(network)
    if node.op != "call_module":
        return False
    trains = any(p.requires_grad for p in network.get_submodule(name).parameters())
    # The dropout in front of the head is live in every phase; see model.set_train_mode.
    return trains or name.partition(".")[0] == head_name(network).partition(".")[0]


def _crossing(nodes: list[fx.Node], place: int) -> list[fx.Node]:
    """The values made before `place` that are used from there on."""
    later = set(nodes[place:])
    return [node for node in nodes[:place] if any(user in later for user in node.users)]


def _size(nodes: list[fx.Node], place: int) -> int:
    """Bytes for each photo of what crosses over at `place`."""
    batch = next(node for node in nodes if node.op == "placeholder").meta["tensor_meta"].shape[0]
    return sum(_bytes(node.meta.get("tensor_meta"), batch) for node in _crossing(nodes, place))


def _bytes(meta: Any, batch: int) -> int:
    if not hasattr(meta, "shape") or len(meta.shape) == 0 or meta.shape[0] != batch:
        return _UNFIT
    return int(meta.shape[1:].numel() * meta.dtype.itemsize)


def _prefix(network: nn.Module, nodes: list[fx.Node], crossing: list[fx.Node]) -> nn.Module:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in crossing))
    return fx.GraphModule(network, graph)


def _tail(network: nn.Module, nodes: list[fx.Node], crossing: list[fx.Node]) -> nn.Module:
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"activation_{i}") for i, node in enumerate(crossing)}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(network, graph)


def compute(prefix: nn.Module, batches: Iterator[Tensor]) -> Activations:
    """The prefix over all photos, batch by batch: float32 [N, ...] each, on the CPU."""
    with torch.inference_mode():
        parts = [tuple(value.cpu() for value in prefix(batch)) for batch in batches]
    # Cloned outside inference mode: autograd refuses to save inference tensors.
    return tuple(torch.cat(values).clone() for values in zip(*parts, strict=True))

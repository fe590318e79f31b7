"""The frozen prefix: what cannot change is computed once, and epochs run only the tail.

A network is cut where its frozen beginning ends and as few numbers as possible cross over. The cut
is found in the graph that torch.fx traces, so it works for any network that can be traced; one that
cannot runs whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from trainer.model import head_name, trainable_modules

Activations = tuple[Tensor, ...]

# For values that cannot be stored photo by photo: sizes, lists, constants.
_UNFIT: Final = 1 << 60
# Activations this small cost nothing worth saving: of small photos all layers have such.
_SMALL: Final = 16 * 1024


@dataclass(frozen=True)
class Cut:
    """A place in a network. `at` names the module behind it; what crosses over there has, for each
    photo, these `parts`: (dtype name, shape) each."""

    place: int
    at: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    bytes_per_photo: int


class _Tracer(fx.Tracer):
    """Traces down to modules without children.

    Torchvision's StochasticDepth is one of these: traced through, its training flag would be fixed
    at the value it has now.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        childless = not any(True for _ in m.children())
        return childless or super().is_leaf_module(m, module_qualified_name)


class Trace:
    """The graph of a network, which can be cut into parts that share the network's modules.

    `example` is a batch [N, 3, H, W] of an unusual size, such as 3, so that no other dimension is
    mistaken for the batch. Raises whatever tracing foreign code raises.
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        self._network, self._example = network, example
        training = network.training
        network.eval()
        try:
            self._nodes = _trace(network, example)
        finally:
            network.train(training)

    def cut(self) -> Cut | None:
        """Where the network divides before its first part that trains now, or that draws at random
        in training.

        None where nothing is frozen, or where the parts would not give what the whole gives.
        """
        nodes = self._nodes
        head = head_name(self._network).partition(".")[0]
        first = next(i for i, n in enumerate(nodes) if _belongs_to_tail(self._network, head, n))
        # The latest of the small ones: what does not cost memory should not be computed again.
        sizes = {i: self._size(i) for i in range(first, 0, -1)}
        enough = max(min(sizes.values()), _SMALL)
        place = next(i for i, size in sizes.items() if size <= enough)
        crossing = self._crossing(place)
        if sizes[place] >= _UNFIT or any(node.op == "placeholder" for node in crossing):
            return None
        metas = [node.meta["tensor_meta"] for node in crossing]
        parts = tuple((str(m.dtype).removeprefix("torch."), tuple(m.shape[1:])) for m in metas)
        found = Cut(place, str(nodes[place].target), parts, sizes[place])
        return found if self._fits(found) else None

    def part(self, start: Cut | None, stop: Cut | None) -> fx.GraphModule:
        """From one place to another; None is the photos, or the logits.

        Takes the activations at `start` (or normalised photos [N, 3, H, W]) as its arguments and
        returns a tuple of those at `stop` (or the logits [N, classes], no tuple).
        """
        first = 0 if start is None else start.place
        last = len(self._nodes) if stop is None else stop.place
        graph = fx.Graph()
        entering = [] if start is None else self._crossing(first)
        copies = {node: graph.placeholder(f"activation_{i}") for i, node in enumerate(entering)}
        for node in self._nodes[first:last]:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if stop is not None:
            graph.output(tuple(copies[node] for node in self._crossing(last)))
        return fx.GraphModule(self._network, graph)

    def _fits(self, found: Cut) -> bool:
        training = self._network.training
        self._network.eval()
        try:
            prefix, tail = self.part(None, found), self.part(found, None)
            with torch.inference_mode():
                # A GPU may choose another algorithm for the same layer from one call to the next.
                whole, parts = self._network(self._example), tail(*prefix(self._example))
            return torch.allclose(whole, parts, atol=1e-4)
        finally:
            self._network.train(training)

    def _crossing(self, place: int) -> list[fx.Node]:
        """The values made before `place` that are used from there on."""
        later = set(self._nodes[place:])
        return [n for n in self._nodes[:place] if any(user in later for user in n.users)]

    def _size(self, place: int) -> int:
        """Bytes for each photo of what crosses over at `place`."""
        batch = len(self._example)
        return sum(_bytes(n.meta.get("tensor_meta"), batch) for n in self._crossing(place))


def trace(network: nn.Module, example: Tensor) -> Trace | None:
    """`Trace`, or None for a network that cannot be traced; it still works whole."""
    try:
        return Trace(network, example)
    except Exception:  # tracing foreign code raises anything
        return None


def _trace(network: nn.Module, example: Tensor) -> list[fx.Node]:
    graph = _Tracer().trace(network)
    ShapeProp(fx.GraphModule(network, graph)).propagate(example)
    return list(graph.nodes)


def _belongs_to_tail(network: nn.Module, head: str, node: fx.Node) -> bool:
    if node.op == "output":
        return True
    name = str(node.target)
    if node.op == "get_attr":
        return name.rpartition(".")[0] in trainable_modules(network)
    if node.op != "call_module":
        return False
    trains = any(p.requires_grad for p in network.get_submodule(name).parameters())
    # The dropout in front of the head is live in every phase; see model.set_train_mode.
    return trains or name.partition(".")[0] == head


def _bytes(meta: Any, batch: int) -> int:
    if not hasattr(meta, "shape") or len(meta.shape) == 0 or meta.shape[0] != batch:
        return _UNFIT
    return int(meta.shape[1:].numel() * meta.dtype.itemsize)


def in_order(cuts: Sequence[Cut | None]) -> list[Cut]:
    """The different places among `cuts`, from the photos to the logits."""
    different = {found.place: found for found in cuts if found is not None}
    return [different[place] for place in sorted(different)]

"""What the backward pass can compute again instead of reading it, what that frees, and what it takes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from slcompile import torch_private
from slcompile.cost import Matmul, Rates, rates
from slcompile.ops import LINEAR_FACTORED, WEIGHT_OPS
from slcompile.passes.buffers import size_of
from slcompile.passes.choose_lowering import matmul_of
from slcompile.passes.graph import arguments, name_of, nodes_of_backward, trunk
from slcompile.passes.recompute_inputs import inputs_of_products, makers
from slcompile.passes.save_low_rank import results_to_recompute

KINDS = ("input", "results", "hidden matrix", "weight")


@dataclass(frozen=True, eq=False)
class Recomputable:
    """A part of the forward pass that the backward pass can compute again.

    Attributes:
        kind: One of ``KINDS``: what makes a matmul's input element by element; a factored matmul's results and what
            follows from them by the way; its hidden matrix; a composed weight that is kept otherwise.
        name: Where the model calls for it, as far as the graph knows.
        nodes: Are tagged MUST_RECOMPUTE. No node is in two.
        reads: Are tagged MUST_SAVE, unless they are computed again, too.
        freed: Bytes that are saved for the backward pass, of ``nodes``.
        seconds: Predicted, to compute it again.
    """

    kind: str
    name: str
    nodes: frozenset[fx.Node]
    freed: int
    seconds: float
    reads: frozenset[fx.Node] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return f"{self.kind} of {self.name}: {self.freed / 1e6:,.2f} MB, {1e3 * self.seconds:.3g} ms"


def find_recomputable(graph: fx.Graph, saved: Collection[str], device: torch.device) -> list[Recomputable]:
    """Finds what frees something where it is computed again, those first that free the most for their time.

    An analysis: it changes nothing.

    Args:
        graph: A joint graph of forward and backward.
        saved: Names of the nodes that are saved for the backward pass where nothing is asked for.
        device: Where the graph will run.
    """
    backward = nodes_of_backward(graph)
    at = rates(device)
    found: list[Recomputable] = []
    taken: set[fx.Node] = set()

    def add(kind: str, name: str, nodes: set[fx.Node], seconds: float, reads: Collection[fx.Node] = ()) -> None:
        own = frozenset(nodes - taken)
        freed = sum(_bytes(node) for node in own if node.name in saved)
        if freed:
            taken.update(own)
            found.append(Recomputable(kind, name, own, freed, seconds, frozenset(reads)))

    for x, shown in inputs_of_products(graph, backward).items():
        nodes = makers(x, shown, backward)
        add("input", name_of(x), nodes, _moved(nodes) / at.memory + at.launch)
    results, _ = results_to_recompute(graph, backward)
    for node, nodes in results.items():
        hiddens = arguments(node)[1]
        seconds = sum(
            matmul.factored(tokens, at, *rest) - hidden for matmul, tokens, hidden, rest in _products(node, at)
        )
        add("results", name_of(node), nodes, seconds + _moved(nodes - {node}) / at.memory, hiddens)
    for node in graph.nodes:
        if node in backward or node.target is not LINEAR_FACTORED:
            continue
        for hidden, (_, _, seconds, _) in zip(arguments(node)[1], _products(node, at), strict=True):
            if "ac_graph_id" not in hidden.meta:
                add("hidden matrix", name_of(hidden), {hidden}, seconds)
    for node in graph.nodes:
        source = trunk(node)[0]
        if source.target in WEIGHT_OPS and node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE:
            add("weight", name_of(source), {node}, matmul_of(source, source.meta["val"].dtype).compose(at))
    return sorted(found, key=lambda each: -each.freed / each.seconds)


def _products(node: fx.Node, at: Rates) -> Iterator[tuple[Matmul, int, float, tuple[Any, ...]]]:
    """Yields for each weight of a ``linear_factored`` its sizes, the tokens, seconds of its hidden matrix, and ways."""
    x, hiddens, factors, values, _, _, transposed, *vector = arguments(node)
    tokens, width = map(torch_private.size_hint, x.meta["val"].shape)
    for hidden, factor, each in zip(hiddens, factors, values, strict=True):
        rank = int(hidden.meta["val"].shape[1])
        outputs = int(factor.meta["val"].shape[1 if transposed else 0])
        rows, columns = (width, outputs) if transposed else (outputs, width)
        matmul = Matmul(rows, columns, rank, each.meta["val"].numel(), x.meta["val"].dtype, *vector)
        yield matmul, tokens, matmul.hidden(tokens, at, transposed), (transposed, len(hiddens))


def _moved(nodes: Collection[fx.Node]) -> int:
    """Returns the bytes that are read from outside of some nodes, and those that are written for the outside."""
    inputs = {each for node in nodes for each in node.all_input_nodes} - set(nodes)
    outputs = [node for node in nodes if any(user not in nodes for user in node.users)]
    return sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return size_of(value) if isinstance(value, Tensor) else 0

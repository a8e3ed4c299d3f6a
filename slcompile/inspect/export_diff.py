"""A model beside its ONNX file: their ops have other names, but weights have the same and link the two graphs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from torch import nn

from slcompile.inspect.explanation import Explanation
from slcompile.inspect.graph_diff import GraphDiff, Link
from slcompile.inspect.nodes import ModuleStack, Node
from slcompile.inspect.onnx_graph import onnx_snapshot
from slcompile.models import unwrapped
from slcompile.names import SUFFIX, plain_name
from slcompile.weight.placing import dense_names

_PRODUCTS = frozenset("Einsum Gemm MatMul".split())
_ENDS = ("placeholder", "output")
_VIEWS = frozenset("Cast Identity Reshape Slice Split Squeeze Transpose Unsqueeze".split())


def export_diff(model: nn.Module, found: Explanation, path: str | os.PathLike[str]) -> GraphDiff:
    """Compares the captured graphs of a model with the graph of an ONNX file that was exported from it.

    Each matmul that reads a weight is linked to the one of the file that reads the weight of this name, in order where
    there are several, and marked as rewritten; so are weights of another shape or dtype, and others are kept. All else
    is removed or new: the two sets of ops do not compare.

    Args:
        model: Dense or factorized.
        found: What ``explain`` found in it.
        path: The ONNX file; weights are not read.

    Raises:
        ImportError: onnx is not installed.
        ValueError: There is no such file, it holds no ONNX model, or none of the model's weights.
    """
    after = onnx_snapshot(path).nodes
    aliases: dict[int, list[str]] = {}
    for name, parameter in unwrapped(model).named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(plain_name(name))
    first = {name: names[0] for names in aliases.values() for name in names}
    first |= {name: name for name in dense_names(unwrapped(model)) if name not in first}
    if not any(node.id in first for node in after):
        raise ValueError(f"{path} holds no weight of the model: {Path(path).name} was made from another one")
    before = list(_captured(found))
    wanted: dict[str, list[str]] = {}
    for row in found.matmuls:
        if row.graph is not None:
            wanted.setdefault(first.get(row.name, row.name), []).append(_id(found, row.graph, row.node))
    links = _links(wanted, _readers(after, first))
    return _linked(f"{found.model} -> {Path(path).name}", before, after, links, first)


def _captured(found: Explanation) -> Iterator[Node]:
    """Yields the nodes of all captured graphs."""
    for graph in found.graphs:
        number, _, stage = graph.name.removeprefix("graph ").partition(", ")
        if stage == "captured":
            for node in graph.before:
                inputs = tuple(_id(found, int(number), each) for each in node.inputs)
                yield node._replace(id=_id(found, int(number), node.id), inputs=inputs)


def _id(found: Explanation, number: int, node: str) -> str:
    """Returns a node's id among those of all captured graphs."""
    return f"{number}.{node}" if any(each.name == "graph 1, captured" for each in found.graphs) else node


def _readers(nodes: Sequence[Node], first: Mapping[str, str]) -> dict[str, list[str]]:
    """Returns the products that read each weight, perhaps transposed or cast, by its name; of unknown ones, too."""
    shown: dict[str, set[str]] = {}  # node -> the weights that it shows
    found: dict[str, list[str]] = {}
    for node in nodes:
        factors = node.inputs[:2] if node.target == "Gemm" else node.inputs  # the third one is added
        weights = {weight for each in factors for weight in shown.get(each, ())}
        if node.weight or node.id in first:  # a compact file composes what has the weight's name
            shown[node.id] = {first.get(node.id, node.id)}
        elif node.target in _PRODUCTS:
            for weight in weights:
                found.setdefault(weight, []).append(node.id)
        elif node.target in _VIEWS:
            shown[node.id] = weights
    return found


def _links(wanted: Mapping[str, Sequence[str]], readers: Mapping[str, Sequence[str]]) -> list[Link]:
    links: list[Link] = []
    for weight in dict.fromkeys([*wanted, *readers]):
        ours, theirs = wanted.get(weight, ()), readers.get(weight, ())
        links += [Link(weight, *pair) for pair in zip_longest(ours, theirs, fillvalue="")]
    return links


def _linked(
    name: str, before: Sequence[Node], after: Sequence[Node], links: Sequence[Link], first: Mapping[str, str]
) -> GraphDiff:
    """Returns the two graphs with the status of each node."""
    stacks: dict[str, ModuleStack] = {}
    for node in before:
        stacks.update((path, node.module[: depth + 1]) for depth, (path, _) in enumerate(node.module))
    olds = {node.id: node for node in before}
    origins = {link.after: olds[link.before] for link in links if link.before and link.after}
    weights = _weights(before, first)
    afters = []
    for node in after:
        old = origins.get(node.id) or weights.get(first.get(node.id, "")) or _same_end(node, before)
        status = "new" if old is None else "rewritten" if node.id in origins else "kept"
        if old is not None and (node.weight or node.id in first):
            is_same = old.op == "placeholder" and (old.shape, old.dtype) == (node.shape, node.dtype)
            status = "kept" if is_same else "rewritten"
        module: ModuleStack = max((stacks.get(path, ()) for path, _ in node.module), key=len, default=())
        afters.append(node._replace(status=status, origins=(old.id,) if old else (), module=module))
    became = {origin: node.status for node in afters for origin in node.origins}
    befores = tuple(node._replace(status=became.get(node.id, "removed")) for node in before)
    return GraphDiff(name, befores, tuple(afters), tuple(links))


def _weights(nodes: Sequence[Node], first: Mapping[str, str]) -> dict[str, Node]:
    """Returns name of each weight -> the node that stands for it; of a factorized one, the node that composes it."""
    found: dict[str, Node] = {}
    factors: dict[str, str] = {}  # node -> the weight
    for node in nodes:
        name, is_factor, _ = node.weight.partition(f"{SUFFIX}.")
        if is_factor:
            factors[node.id] = name
        elif node.weight:
            found[first.get(name, name)] = node
        for name in {factors[each] for each in node.inputs if each in factors}:
            found.setdefault(first.get(name, name), node)
    return found


def _same_end(node: Node, before: Sequence[Node]) -> Node | None:
    """Finds the model's input or output that is this one of the file: Dynamo calls ``x`` ``l_x_``, or by its number."""
    ends = [each for each in before if each.op == node.op and not each.weight] if node.op in _ENDS else []
    if node.op == "output":
        return ends[-1] if ends else None
    return next((each for each in ends if each.id.strip("_").endswith(node.id)), ends[0] if len(ends) == 1 else None)

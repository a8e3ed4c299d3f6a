"""Marks inputs of factorized matmuls to be made again in the backward pass, where norms or pointwise ops make them."""

from __future__ import annotations

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from slcompile.ops import LINEAR_FACTORED, WEIGHT_OPS
from slcompile.passes.buffers import size_of
from slcompile.passes.graph import Decision, PassReport, arguments, name_of, nodes_of_backward, op_name, trunk

# What shows a matrix as it is.
SAME = frozenset(("view", "reshape", "_unsafe_view", "permute", "t", "convert_element_type", "_to_copy", "clone"))
SMALL = 8
"""What is smaller than an input by this factor, such as a norm's scale of each token, is not worth making again."""


def recompute_inputs(gm: fx.GraphModule, save: str = "auto") -> PassReport:
    """Tags what makes the inputs of matmuls with factorized weights, element by element, as MUST_RECOMPUTE.

    The gradient of a weight reads the matmul's input. The partitioner saves it, also where it was made by a norm's
    scaling or an activation function of what the backward pass reads too: a residual stream, the results of the matmul
    before. From that it is made again, by the kernel that computes the gradient of the activation function, or one
    like it. Legal because all of it is pure.

    Left: inputs for which something else would have to be saved in their place, of the same size; those in a region
    that the user checkpoints. What several matmuls or others read is made again for all of them.

    Args:
        gm: A joint graph of forward and backward; only the nodes' meta changes. Forward alone is left as it is.
        save: With ``"all"`` nothing is changed.
    """
    report = PassReport()
    backward = nodes_of_backward(gm.graph)
    if save == "all" or not backward:
        return report
    for x, shown in inputs_of_products(gm.graph, backward).items():
        if found := makers(x, shown, backward):
            for node in found:
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            name = name_of(x)
            report.replaced.append(Decision(name, "", f"input of {name}", tuple(x.meta["val"].shape), node=x.name))
        else:
            detail = "it is not made, element by element, of what is saved"
            report.left.append(Decision(name_of(x), "not_by_the_way", detail, node=x.name))
    return report


def inputs_of_products(graph: fx.Graph, backward: set[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """Finds what the forward pass multiplies with factorized weights, factored or composed.

    Returns:
        Each tensor that some op makes -> what shows it as it is to the products.
    """
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        x: fx.Node | None = None
        if node in backward:
            continue
        if node.target is LINEAR_FACTORED:
            x = arguments(node)[0]
        elif op_name(node) in ("mm", "addmm"):
            operands = arguments(node)[-2:]
            weights = [trunk(each)[0].target in WEIGHT_OPS for each in operands]
            x = operands[weights.index(False)] if sum(weights) == 1 else None
        shown: set[fx.Node] = set()
        while x is not None and x.op == "call_function" and op_name(x) in SAME:
            shown.add(x)
            x = x.all_input_nodes[0]
        if x is not None and x.op == "call_function":
            found.setdefault(x, set()).update(shown)
    return found


def makers(x: fx.Node, shown: set[fx.Node], backward: set[fx.Node]) -> set[fx.Node]:
    """Returns the pointwise ops that make ``x``, up to what is saved anyway; none where that is too little.

    They end at what other nodes of the forward pass read, at what is no pointwise op, and at what is small. Each large
    tensor that they end at must be read by the backward pass, too, or be an input of the graph: else it would have to
    be saved in the place of ``x``.

    Args:
        x: One that ``inputs_of_products`` returns, and ...
        shown: ... what shows it to the products, which is among what is returned.
        backward: As ``nodes_of_backward`` returns it.
    """
    if not all(map(_is_by_the_way, (x, *shown))):
        return set()
    large = size_of(x.meta["val"]) // SMALL
    found = set(shown)
    waiting = [x]
    while waiting:
        node = waiting.pop()
        has_others = node is not x and any(user not in found and user not in backward for user in node.users)
        if has_others or not _is_by_the_way(node) or size_of(node.meta["val"]) <= large:
            continue
        found.add(node)
        waiting += [each for each in node.all_input_nodes if each.op == "call_function"]
    for node in sorted(found - shown):  # views of what they end at belong to that
        if getattr(node.target, "is_view", False) and found.isdisjoint(node.all_input_nodes):
            found.remove(node)
    for end in {each for node in found for each in node.all_input_nodes} - found:
        value = end.meta.get("val")
        is_large = isinstance(value, torch.Tensor) and size_of(value) > large
        if end.op == "call_function" and is_large and backward.isdisjoint(_readers(end)):
            return set()
    return found


def _readers(node: fx.Node) -> set[fx.Node]:
    """Returns what reads a node, also through what shows the same matrix."""
    found = set(node.users)
    for user in node.users:
        if op_name(user) in SAME:
            found |= _readers(user)
    return found


def _is_by_the_way(node: fx.Node) -> bool:
    is_op = isinstance(node.target, torch._ops.OpOverload) and "ac_graph_id" not in node.meta
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    is_pure = torch.Tag.nondeterministic_seeded not in tags
    return is_op and is_pure and (torch.Tag.pointwise in tags or op_name(node) in SAME)

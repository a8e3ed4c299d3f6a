"""Marks the results of factored matmuls to be computed again in the backward pass, from the hidden matrices alone."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from slcompile.ops import LINEAR_FACTORED
from slcompile.passes.graph import Decision, PassReport, arguments, name_of, nodes_of_backward, op_name
from slcompile.passes.recompute_inputs import SAME

# What is not computed again by the way, as pointwise ops and norms are.
_HEAVY = ("mm", "bmm", "conv", "attention", "sort", "scatter", "embedding")


def save_low_rank(gm: fx.GraphModule, save: str = "low_rank") -> PassReport:
    """Tags the results of ``linear_factored`` in the forward pass as MUST_RECOMPUTE, and hidden matrices as MUST_SAVE.

    Of a result [T, N] the backward pass then has the hidden matrix [T, R], which the gradient of the factor reads
    anyway, and multiplies once more with the other factor and with S: a sixth of what the matmul costs in a step, or
    less. Pointwise ops, norms and views of results are computed again too. Legal because all of it is pure.

    Left: results whose input itself follows from a result that is computed again, so that one never leads to another
    through a whole model; those that are only added to something (a residual stream: the sum has to be saved in any
    case); those in a region that the user checkpoints.

    Args:
        gm: A joint graph of forward and backward; only the nodes' meta changes. Forward alone is left as it is.
        save: ``"low_rank"``; with anything else nothing is changed.
    """
    report = PassReport()
    backward = nodes_of_backward(gm.graph)
    if save != "low_rank" or not backward:
        return report
    found, report.left = results_to_recompute(gm.graph, backward)
    for node, again in found.items():
        for each in again:
            each.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        for hidden in arguments(node)[1]:
            hidden.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        name, matmuls = name_of(node), len(arguments(node)[1])
        report.replaced.append(Decision(name, "", f"results of {name}", matmuls=matmuls, node=node.name))
    return report


def results_to_recompute(graph: fx.Graph, backward: set[fx.Node]) -> tuple[dict[fx.Node, set[fx.Node]], list[Decision]]:
    """Finds the factored matmuls whose results can be computed again, and says why the others cannot.

    Returns:
        Each of the matmuls, with what is computed again for it: itself, and what follows from its results by the way
        and was not found for a matmul before.
    """
    left: list[Decision] = []
    maker: dict[fx.Node, fx.Node] = {}  # of what is computed again, the matmul that it was found for
    for node in graph.nodes:
        if node in backward:
            continue
        again = maker.keys()
        if node.target is not LINEAR_FACTORED:
            if _follows(node, again):
                maker[node] = next(maker[each] for each in node.all_input_nodes if each in maker)
        elif reason := _why_not(node, again):
            left.append(Decision(name_of(node), *reason, node=node.name))
        else:
            maker[node] = node
    found: dict[fx.Node, set[fx.Node]] = {}
    for node, matmul in maker.items():
        found.setdefault(matmul, set()).add(node)
    return found, left


def _why_not(node: fx.Node, again: Collection[fx.Node]) -> tuple[str, str] | None:
    """A reason and a sentence, where a factored matmul's results are not to be computed again."""
    if "ac_graph_id" in node.meta:
        return "checkpointed", "it lies in a region that the user checkpoints"
    if arguments(node)[0] in again:
        return "follows", "its input follows from a result that is computed again"
    if all(_is_only_added(each) for each in node.users):
        return "added", "it is only added to something, and the sum is saved in any case"
    return None


def _follows(node: fx.Node, again: Collection[fx.Node]) -> bool:
    """Whether a node is computed again by the way, from something that is computed again."""
    if (
        node.op != "call_function"
        or not any(each in again for each in node.all_input_nodes)
        or "ac_graph_id" in node.meta
    ):
        return False
    return node.target is operator.getitem or (_is_by_the_way(node) and not _joins(node, again))


def _is_by_the_way(node: fx.Node) -> bool:
    is_random = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    return not is_random and not any(each in op_name(node) for each in _HEAVY)


def _joins(node: fx.Node, again: Collection[fx.Node]) -> bool:
    """Whether a node adds a tensor that is not computed again to one that is: a residual stream."""
    shapes = [each.meta["val"].shape for each in node.all_input_nodes if each not in again]
    return op_name(node) in ("add", "sub") and node.meta["val"].shape in shapes


def _is_only_added(result: fx.Node) -> bool:
    """Whether all that reads a result, as it is or in another shape or dtype, adds it to another tensor."""
    return all(op_name(user) == "add" or (op_name(user) in SAME and _is_only_added(user)) for user in result.users)

"""Marks the results of factored matmuls to be computed again in the backward pass, from the hidden matrices alone."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from slcompile.passes.graph import Decision, PassReport, arguments, op_name

_FACTORED = torch.ops.slcompile.linear_factored.default
# What shows a matrix as it is, and what is not computed again by the way, as pointwise ops and norms are.
_SAME = frozenset(("view", "reshape", "_unsafe_view", "permute", "t", "convert_element_type", "_to_copy", "clone"))
_HEAVY = ("mm", "bmm", "conv", "attention", "sort", "scatter", "embedding")


def save_low_rank(gm: fx.GraphModule, save: str = "low_rank") -> PassReport:
    """Tags the results of ``linear_factored`` in the forward pass as MUST_RECOMPUTE, and hidden matrices as MUST_SAVE.

    What follows from the results by the way is tagged with them. Of a result [T, N] the backward pass then has the
    hidden matrix [T, R], which the gradient of the factor reads anyway, and multiplies once more with the other
    factor and with S: a sixth of what the matmul costs in a step, or less. Pointwise ops, norms and views of
    results are computed again too, and so is what makes the input of these matmuls from a tensor that several
    others read (a norm's scaling of a residual stream). Legal because all of it is pure.

    Left: results whose input itself follows from a result that is computed again, so that one never leads to another
    through a whole model; those that are only added to something (a residual stream: the sum has to be saved in any
    case); those in a region that the user checkpoints.

    Args:
        gm: A joint graph of forward and backward; only the nodes' meta changes. Forward alone is left as it is.
        save: ``"low_rank"``; with ``"all"`` nothing is changed.
    """
    report = PassReport()
    tangents = [node for node in gm.graph.nodes if node.op == "placeholder" and str(node.target).startswith("tangents")]
    if save == "all" or not tangents:
        return report
    backward: set[fx.Node] = set(tangents)
    again: set[fx.Node] = set()
    makers: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if any(each in backward for each in node.all_input_nodes):
            backward.add(node)
        elif node.target is not _FACTORED:
            if _follows(node, again):
                again.add(node)
        elif reason := _why_not(node, again):
            report.left.append(Decision(node.name, *reason))
        else:
            again.add(node)
            makers |= _makers(arguments(node)[0])
            for hidden in arguments(node)[1]:
                hidden.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            report.replaced.append(Decision(node.name, matmuls=len(arguments(node)[1])))
    for node in again | makers:
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    return report


def _why_not(node: fx.Node, again: set[fx.Node]) -> tuple[str, str] | None:
    """A reason and a sentence, where a factored matmul's results are not to be computed again."""
    if "ac_graph_id" in node.meta:
        return "checkpointed", "it lies in a region that the user checkpoints"
    if arguments(node)[0] in again:
        return "follows", "its input follows from a result that is computed again"
    if all(_is_only_added(each) for each in node.users):
        return "added", "it is only added to something, and the sum is saved in any case"
    return None


def _follows(node: fx.Node, again: set[fx.Node]) -> bool:
    """Whether a node is computed again by the way, from something that is computed again."""
    if node.op != "call_function" or again.isdisjoint(node.all_input_nodes) or "ac_graph_id" in node.meta:
        return False
    return node.target is operator.getitem or (_is_by_the_way(node) and not _joins(node, again))


def _is_by_the_way(node: fx.Node) -> bool:
    is_random = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    return not is_random and not any(each in op_name(node) for each in _HEAVY)


def _joins(node: fx.Node, again: set[fx.Node]) -> bool:
    """Whether a node adds a tensor that is not computed again to one that is: a residual stream."""
    shapes = [each.meta["val"].shape for each in node.all_input_nodes if each not in again]
    return op_name(node) in ("add", "sub") and node.meta["val"].shape in shapes


def _makers(x: fx.Node) -> set[fx.Node]:
    """The pointwise ops and views that make ``x`` and nothing else, up to what others read too."""
    found: set[fx.Node] = set()
    waiting = [x]
    while waiting:
        node = waiting.pop()
        is_pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
        has_others = node is not x and any(user not in found for user in node.users)
        if has_others or not (is_pointwise or op_name(node) in _SAME):
            continue
        found.add(node)
        waiting += [each for each in node.all_input_nodes if each.op == "call_function"]
    return found


def _is_only_added(result: fx.Node) -> bool:
    """Whether all that reads a result, as it is or in another shape or dtype, adds it to another tensor."""
    return all(op_name(user) == "add" or (op_name(user) in _SAME and _is_only_added(user)) for user in result.users)

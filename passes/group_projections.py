"""Makes one op of factored matmuls with the same input: q, k and v, or gate and up."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from slcompile import torch_private
from slcompile.cost import why_no_kernels
from slcompile.ops import LINEAR_FACTORED
from slcompile.passes.graph import Decision, Inserter, PassReport, arguments, op_name, transposes

FEW_TOKENS = 64
"""Up to so many, the hidden matrices of siblings are made in one launch; above, the vendor's matmuls are faster."""


def group_projections(gm: fx.GraphModule) -> PassReport:
    """Merges ``linear_factored`` nodes of one input, direction and kind of support; their hidden matrices on GPUs too.

    Legal because the op works on lists, entry by entry. What a later sibling needs is moved before the first one;
    where that would need a result of the group itself, the sibling is left. So are nodes without a sibling.
    """
    report = PassReport()
    groups: dict[Any, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=LINEAR_FACTORED):
        x, _, _, values, _, _, transposed, *vector = arguments(node)
        groups.setdefault((x, transposed, values[0].meta["val"].dim(), *vector), []).append(node)
    # Each group in the graph's order as it is by then: merging another one may have moved its members.
    for first, *others in map(sorted, groups.values()):
        if not others:
            report.left.append(Decision(first.name, "alone", "no other factored matmul reads its input"))
            continue
        group = [first]
        for node in others:
            needed = _needed_after(first, node)
            if any(each in group for each in needed):
                report.left.append(Decision(node.name, "depends", f"it needs the result of {first.name}"))
                continue
            for each in needed:
                first.prepend(each)
            group.append(node)
        if len(group) > 1:
            _merge(Inserter(gm.graph), group)
            report.replaced.append(Decision(", ".join(each.name for each in group), matmuls=len(group)))
    if report.replaced:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return report


def _needed_after(first: fx.Node, node: fx.Node) -> list[fx.Node]:
    """Returns what ``node`` depends on, of ``first`` and the nodes behind it, in the graph's order."""
    wanted, behind = set(node.all_input_nodes), []
    each = node.prev
    while each is not first.prev:
        if each in wanted:
            behind.append(each)
            wanted.update(each.all_input_nodes)
        each = each.prev
    return behind[::-1]


def _merge(insert: Inserter, group: list[fx.Node]) -> None:
    first = group[0]
    x, *_ = arguments(first)
    lists = [[each for node in group for each in arguments(node)[position]] for position in range(1, 6)]
    lists[0] = _projected(insert, first, x, lists[0])
    merged = insert.call(first, LINEAR_FACTORED, x, *lists, *arguments(first)[6:])
    results = iter([insert.call(first, operator.getitem, merged, index) for index in range(len(lists[0]))])
    for node in group:
        own = [next(results) for _ in arguments(node)[1]]
        for user in list(node.users):
            user.replace_all_uses_with(own[arguments(user)[1]], propagate_meta=False)


def _projected(insert: Inserter, before: fx.Node, x: fx.Node, hiddens: list[fx.Node]) -> list[fx.Node]:
    """Returns the hidden matrices, in one op where that is faster and each is ``scale * x @ factor^T``, as an addmm."""
    tokens, device = x.meta["val"].shape[0], x.meta["val"].device
    few = torch_private.size_hint(tokens) <= FEW_TOKENS and isinstance(tokens, int)
    if why_no_kernels(device) or not few:
        return hiddens
    factors, scales = [], []
    for hidden in hiddens:
        if op_name(hidden) != "addmm" or arguments(hidden)[1] is not x or hidden.kwargs.get("beta") != 0:
            return hiddens
        factor = arguments(hidden)[2]
        factors.append(factor.all_input_nodes[0] if transposes(factor) else insert.transpose(before, factor))
        scales.append(hidden.kwargs.get("alpha", 1))
    many = insert.call(before, torch.ops.slcompile.project.default, x, factors, scales)
    return [insert.call(before, operator.getitem, many, index) for index in range(len(hiddens))]

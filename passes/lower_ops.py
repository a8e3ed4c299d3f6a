"""Turns the ops that the other passes work on into what a device runs: ATen on CPU, Triton launches on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from slcompile.ops.linear_factored import linear_factored_aten
from slcompile.ops.values_grad import values_grad_aten
from slcompile.ops.weight_grads import weight_grads_aten
from slcompile.passes.graph import Decision, Inserter, PassReport, arguments, op_name

_ATEN: dict[Any, Callable[..., Any]] = {
    torch.ops.slcompile.linear_factored.default: linear_factored_aten,
    torch.ops.slcompile.values_grad.default: values_grad_aten,
    torch.ops.slcompile.weight_grads.default: weight_grads_aten,
}


def lower_ops(gm: fx.GraphModule) -> PassReport:
    """Replaces each of our ops by its implementation, traced, so that Inductor fuses what is around it.

    The last pass: it runs on the forward and the backward graph after they were partitioned, so that a composed weight
    is recomputed as one node. On CPU ``compose`` and ``compose_backward`` stay calls of their ATen implementation:
    they write in place, which Inductor would lower to slow scatters.
    """
    report = PassReport("lower_ops")
    insert = Inserter(gm.graph)
    for node in list(gm.graph.nodes):
        if not str(node.target).startswith("slcompile."):
            continue
        lowered = _ATEN.get(node.target)
        if lowered is None:
            report.skipped.append(Decision(node.name, "in_place", f"{op_name(node)} runs its ATen implementation"))
            continue
        results = insert.inline(node, lowered, *arguments(node))
        if isinstance(results, fx.Node):
            node.replace_all_uses_with(results, propagate_meta=False)
        else:
            for user in list(node.users):
                user.replace_all_uses_with(results[arguments(user)[1]], propagate_meta=False)
        report.rewritten.append(Decision(node.name))
    if report.rewritten:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return report

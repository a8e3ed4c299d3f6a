"""Makes one op of the product that is a weight's gradient and of its projection on the factors."""

from __future__ import annotations

import torch
from torch import fx

from slcompile.ops import STRUCTURE_OPS
from slcompile.passes.graph import Decision, Inserter, PassReport, arguments, op_name, trunk


def fuse_weight_grads(gm: fx.GraphModule) -> PassReport:
    """Replaces ``compose_backward(mm(left^T, right), ...)`` by ``weight_grads(left, right, ...)``.

    The ops of other structures that have both are replaced likewise (``slcompile.ops.STRUCTURE_OPS``).

    Legal where nothing else reads the product: casts and an even or odd number of transposes may lie between. The
    product is then no node of its own, so that a lowering is free never to form it. A gradient that is a sum (a weight
    that several matmuls read), that came through a view, or that something else reads too, is left.
    """
    report = PassReport()
    insert = Inserter(gm.graph)
    fused_ops = {torch.ops.slcompile.compose_backward.default: torch.ops.slcompile.weight_grads.default}
    fused_ops |= {ops.backward: ops.grads for ops in STRUCTURE_OPS.values()}
    for node in [node for node in gm.graph.nodes if node.target in fused_ops]:
        product, swapped, exclusive = trunk(arguments(node)[0])
        shape = tuple(arguments(node)[0].meta["val"].shape)
        if op_name(product) != "mm":
            while op_name(product) in ("view", "getitem"):  # of a convolution's backward op
                product = product.all_input_nodes[0]
            detail = f"the gradient comes from {op_name(product)}, not from one product"
            report.left.append(Decision(node.name, "not_a_product", detail, shape))
            continue
        if not exclusive or len(arguments(node)[0].users) > 1:
            report.left.append(Decision(node.name, "shared", "something else reads the dense gradient", shape))
            continue
        first, second = arguments(product)
        # G = first @ second, or its transpose: then G = second^T @ first^T.
        left, right = (second, insert.transpose(node, first)) if swapped else (insert.transpose(node, first), second)
        fused = insert.call(node, fused_ops[node.target], left, right, *arguments(node)[1:])
        node.replace_all_uses_with(fused, propagate_meta=False)
        report.replaced.append(Decision(node.name, shape=shape))
    if report.replaced:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return report

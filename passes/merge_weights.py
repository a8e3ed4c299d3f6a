"""The inverse of parameterize_weights on graphs that read their weights as attributes."""

from __future__ import annotations

import operator

from torch import fx, nn

from slcompile.names import SUFFIX
from slcompile.ops import WEIGHT_OPS
from slcompile.passes.graph import Decision, PassReport, op_name


def merge_weights(gm: fx.GraphModule) -> PassReport:
    """Replaces each weight op over ``path.weight_sl.*`` by a get_attr of ``path.weight``, where that is dense again.

    What shows a convolution's weight as it is stored goes with the op. A weight op whose weight is still factorized, or
    whose operands are placeholders, is left.
    """
    report = PassReport()
    for node in list(gm.graph.nodes):
        if node.target not in WEIGHT_OPS:
            continue
        operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
        first = operands[0]
        path = str(first.target).rpartition(".")[0].removesuffix(SUFFIX) if first.op == "get_attr" else ""
        parameter = _attribute(gm, path) if path else None
        if not isinstance(parameter, nn.Parameter):
            report.left.append(Decision(node.name, "still_factorized", "its factors are what the graph reads"))
            continue
        with gm.graph.inserting_before(node):
            dense = gm.graph.get_attr(path)
        dense.meta = dict(node.meta)
        for view in list(node.users):
            if op_name(view) == "view" and view.args[1:] == (tuple(parameter.shape),):
                dense.meta = dict(view.meta)
                view.replace_all_uses_with(dense, propagate_meta=False)
                gm.graph.erase_node(view)
        node.replace_all_uses_with(dense, propagate_meta=False)
        gm.graph.erase_node(node)
        for operand in operands:
            if not operand.users:
                gm.graph.erase_node(operand)
        report.replaced.append(Decision(path))
    if report.replaced:
        gm.recompile()
    return report


def _attribute(gm: fx.GraphModule, path: str) -> object:
    try:
        return operator.attrgetter(path)(gm)
    except AttributeError:
        return None

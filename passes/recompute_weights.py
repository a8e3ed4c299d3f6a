"""Marks composed weights to be recomputed in the backward pass, or to be kept for it."""

from __future__ import annotations

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from slcompile.ops import WEIGHT_OPS
from slcompile.passes.graph import Decision, PassReport


def recompute_weights(gm: fx.GraphModule, keep: bool = False) -> PassReport:
    """Tags every weight op, and what is computed from composed weights alone, as MUST_RECOMPUTE.

    The partitioner would otherwise save each composed weight for the backward pass, where the input's gradient
    needs it: more memory than dense training. Legal because the ops are pure. Views and dtype casts are tagged too
    (a bfloat16 copy made by autocast is as large), and so is any other node that reads nothing but tagged ones,
    such as a concatenation of weights. A node that reads an activation is left alone.

    Args:
        gm: Only the nodes' meta changes.
        keep: Whether the user wants speed rather than memory: then those of these nodes that an activation meets, or
            what they are views of, are MUST_SAVE, and only what leads to them is recomputed.
    """
    report = PassReport()
    tagged: set[fx.Node] = set()
    for node in gm.graph.nodes:
        is_weight = node.target in WEIGHT_OPS
        inputs = node.all_input_nodes
        if not is_weight and not (node.op == "call_function" and inputs and all(each in tagged for each in inputs)):
            continue
        tagged.add(node)
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        # A weight belongs to no checkpointed region: between two regions the partitioner would save it after all.
        node.meta.pop("ac_graph_id", None)
        if is_weight:
            report.replaced.append(Decision(node.name, shape=tuple(node.meta["val"].shape)))
    for node in tagged if keep else ():
        if any(user not in tagged for user in node.users):
            while getattr(node.target, "is_view", False):  # the partitioner recomputes views whatever their policy is
                node = node.all_input_nodes[0]
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return report

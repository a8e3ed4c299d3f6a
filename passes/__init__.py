"""The passes, in the order in which they run. Read this page from top to bottom to know what happens to a graph.

1. On the captured graph, before autograd:

   find_matmuls            which parameters do matmuls read, and what else reads them? (an analysis: changes nothing)
   parameterize_weights    each chosen weight W becomes compose(B, A, values, seed, scale)

   ``slcompile.rewrite`` runs the two on any torch.fx graph, the backend on a model that is still dense. After that
   the modules themselves compose their weights, and Dynamo captures graphs that already hold ``compose``.

2. On the joint graph of forward and backward (Inductor's ``joint_custom_pre_pass``), in the order of JOINT_PASSES:

   recompute_weights       composed weights are recomputed in the backward pass, never kept

3. When weights are merged to dense again:

   merge_weights           compose(...) becomes the dense parameter, in graphs that read attributes

A pass is a function ``verb_noun(gm, ...) -> PassReport`` in a file of its name. To add one to the joint graph, write
the function and put it into JOINT_PASSES. Passes treat every op of ``slcompile.ops.WEIGHT_OPS`` alike.
"""

from __future__ import annotations

from slcompile.passes.find_matmuls import find_matmuls
from slcompile.passes.graph import Decision, PassReport, run
from slcompile.passes.merge_weights import merge_weights
from slcompile.passes.parameterize_weights import parameterize_weights
from slcompile.passes.recompute_weights import recompute_weights

JOINT_PASSES = (recompute_weights,)

__all__ = [
    "JOINT_PASSES",
    "Decision",
    "PassReport",
    "find_matmuls",
    "merge_weights",
    "parameterize_weights",
    "recompute_weights",
    "run",
]

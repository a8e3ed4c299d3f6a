"""The passes, in the order in which they run. Read this page from top to bottom to know what happens to a graph.

1. On the captured graph, before autograd:

   find_matmuls            which parameters do matmuls and convolutions read, and what else? (an analysis)
   parameterize_weights    each chosen weight W becomes compose(B, A, values, seed, scale)

   ``slcompile.rewrite`` runs the two on any torch.fx graph, the backend on a model that is still dense. After that
   the modules themselves compose their weights, and Dynamo captures graphs that already hold ``compose``.

2. On the joint graph of forward and backward (Inductor's ``joint_custom_pre_pass``), in the order of ``joint_passes``:

   flatten_convolutions    a convolution with kernels of size 1 becomes a matmul, where that pays once it is factored
   fuse_weight_grads       a weight's gradient and its projection on the factors become one op, weight_grads
   choose_lowering         each matmul: compose the weight, or multiply with the factors? the cheaper of the two
   group_projections       factored matmuls with the same input become one op: q/k/v, gate/up
   recompute_weights       composed weights are recomputed in the backward pass, or kept if the user asks for speed
   recompute_inputs        inputs of matmuls that norms and pointwise ops make are made again there
   save_low_rank           results of factored matmuls, too, if the user asks for memory: hidden matrices are saved

   With a memory budget, the partitioner is asked how much a step takes (``custom_partitioner_fn``), in the place of the
   last two:

   liveness                when is each buffer of a step allocated and freed? (an analysis: changes nothing)
   recomputable            what can be computed again, what does that free, how long does it take? (an analysis, too)
   fit_budget              the least of it with which a step's peak fits is computed again

3. On the forward and the backward graph, after they were partitioned (``post_grad_custom_pre_pass``), ``post_passes``:

   lower_ops               our ops become ATen on CPU and Triton launches on GPUs; Inductor compiles them with the rest
   read_transposed         matmuls read the transposed copy that our kernels need of an activation: it alone is written

4. When weights are merged to dense again:

   merge_weights           compose(...) becomes the dense parameter, in graphs that read attributes

A pass is a function ``verb_noun(gm, ...) -> PassReport`` in a file of its name. ``run`` times it and names its report.
To add one to the joint graph, write the function, put it into ``joint_passes`` and its name into
``slcompile.config.SKIPPABLE``: the option ``skip_passes`` leaves those of ``joint_passes`` and ``post_passes`` out by
name. Passes treat every op of ``slcompile.ops.WEIGHT_OPS`` alike; they know lowerings for ``compose`` and for those in
``slcompile.ops.STRUCTURE_OPS``.
"""

from __future__ import annotations

import functools

import torch

from slcompile.config import SLConfig
from slcompile.passes.choose_lowering import choose_lowering
from slcompile.passes.find_matmuls import find_matmuls
from slcompile.passes.fit_budget import BudgetReport, fit_budget
from slcompile.passes.flatten_convolutions import flatten_convolutions
from slcompile.passes.fuse_weight_grads import fuse_weight_grads
from slcompile.passes.graph import Decision, GraphPass, PassReport, pass_name, run
from slcompile.passes.group_projections import group_projections
from slcompile.passes.lower_ops import lower_ops
from slcompile.passes.merge_weights import merge_weights
from slcompile.passes.parameterize_weights import parameterize_weights
from slcompile.passes.read_transposed import read_transposed
from slcompile.passes.recompute_inputs import recompute_inputs
from slcompile.passes.recompute_weights import recompute_weights
from slcompile.passes.save_low_rank import save_low_rank

RECOMPUTING = ("recompute_inputs", "save_low_rank", "fit_budget")
"""Names of the passes whose reports say in a sentence each what the backward pass computes again."""


def joint_passes(config: SLConfig, device: torch.device | None = None) -> tuple[GraphPass, ...]:
    """Returns the passes on the joint graph, in order; for another device than it was captured on, if one is given."""
    save = config.save if config.budget is None else "all"
    return _without_skipped(
        config,
        functools.partial(flatten_convolutions, lowering=config.lowering, device=device),
        fuse_weight_grads,
        functools.partial(choose_lowering, lowering=config.lowering, device=device),
        group_projections,
        functools.partial(recompute_weights, keep=config.keep_weights),
        functools.partial(recompute_inputs, save=save),
        functools.partial(save_low_rank, save=save),
    )


def post_passes(config: SLConfig) -> tuple[GraphPass, ...]:
    """Returns the passes on the forward and the backward graph, in order."""
    return _without_skipped(config, functools.partial(lower_ops, autotune=config.autotune), read_transposed)


def _without_skipped(config: SLConfig, *passes: GraphPass) -> tuple[GraphPass, ...]:
    return tuple(each for each in passes if pass_name(each) not in config.skip_passes)


__all__ = [
    "RECOMPUTING",
    "BudgetReport",
    "Decision",
    "PassReport",
    "choose_lowering",
    "find_matmuls",
    "fit_budget",
    "flatten_convolutions",
    "fuse_weight_grads",
    "group_projections",
    "joint_passes",
    "lower_ops",
    "merge_weights",
    "parameterize_weights",
    "post_passes",
    "read_transposed",
    "recompute_inputs",
    "recompute_weights",
    "run",
    "save_low_rank",
]

"""The ops, torch only. One file an op: formula and shapes, reference, schema, fake, autograd."""

from __future__ import annotations

import torch

from slcompile.ops.block_low_rank import BLOCK_LOW_RANK
from slcompile.ops.compose import compose, compose_backward, compose_reference
from slcompile.ops.cp import CP
from slcompile.ops.factored_ops import STRUCTURE_OPS, FactoredOps, define
from slcompile.ops.linear_factored import linear_factored
from slcompile.ops.project import project
from slcompile.ops.tensor_train import TENSOR_TRAIN
from slcompile.ops.values_grad import values_grad
from slcompile.ops.weight_grads import weight_grads

WEIGHT_OPS: list[torch._ops.OpOverload] = [torch.ops.slcompile.compose.default]
"""Ops that make a dense weight from trained parameters. Passes treat them alike and know nothing else of them."""


LINEAR_FACTORED = torch.ops.slcompile.linear_factored.default
"""The op that multiplies with a weight's factors, for several weights at once."""


def register_weight_op(op: torch._ops.OpOverload) -> None:
    """Adds an op, which returns a dense weight and takes its trained parts first, to ``WEIGHT_OPS``."""
    if op not in WEIGHT_OPS:
        WEIGHT_OPS.append(op)


KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the Triton kernels of these ops compute with; other dtypes run in ATen on every device."""

__all__ = [
    "BLOCK_LOW_RANK",
    "CP",
    "KERNEL_DTYPES",
    "LINEAR_FACTORED",
    "STRUCTURE_OPS",
    "TENSOR_TRAIN",
    "WEIGHT_OPS",
    "FactoredOps",
    "compose",
    "compose_backward",
    "compose_reference",
    "define",
    "linear_factored",
    "project",
    "register_weight_op",
    "values_grad",
    "weight_grads",
]

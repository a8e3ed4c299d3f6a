"""values_grad: dvalues = G at the support, where G_NK = left_TN^T @ right_TK, without forming G.

Only the P entries at the support are computed: a dot product over the tokens for each, ``2 T P`` of the ``2 T N K``
operations of the dense gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slcompile.ops.sparse_cpu import sparse_dots, transposed_copy
from slcompile.ops.vector_cpu import vector_dots


@torch.library.custom_op("slcompile::values_grad", mutates_args=())
def values_grad(left: Tensor, right: Tensor, values: Tensor, support: Tensor, vector: int = 1) -> Tensor:
    """Returns gradient of ``values`` from the two matrices whose product is the weight's gradient.

    Args:
        left: [T, N]: the output's gradient for a weight [out, in], the input for a weight [in, out].
        right: [T, K]: the other of the two, of the same dtype.
        values: [N, groups] or [P]; its numbers are not read.
        support: The seed or the flat index (see ``slcompile.ops.compose``).
        vector: Rows that share their columns.

    Returns:
        Shape and dtype of ``values``. It has no autograd: passes insert it after autograd has run.
    """
    return values_grad_aten(left, right, values, support, vector)


@values_grad.register_fake
def _(left, right, values, support, vector=1):
    return torch.empty_like(values).contiguous()


def values_grad_aten(left: Tensor, right: Tensor, values: Tensor, support: Tensor, vector: int = 1) -> Tensor:
    """Returns the same for CPU."""
    if vector > 1:
        return vector_dots(left, right, values, support, vector)
    return sparse_dots(transposed_copy(left), transposed_copy(right), values, support)

"""weight_grads: the gradients of one weight's factors, from the two matrices whose product is the weight's gradient.

    G_NK = left_TN^T @ right_TK,   dB = scale * G @ A^T,   dA = scale * B^T @ G,   dvalues = G at the support

One op, so that a kernel can take ``values`` from the tile of G that it has in registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slcompile.ops.compose import compose_backward


@torch.library.custom_op("slcompile::weight_grads", mutates_args=())
def weight_grads(
    left: Tensor, right: Tensor, B: Tensor, A: Tensor, values: Tensor, support: Tensor, scale: float, vector: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gradients of B, A and values, each with its parameter's shape and dtype.

    Args:
        left: [T, N]: the output's gradient for a weight [out, in], the input for a weight [in, out].
        right: [T, K]: the other of the two, of the same dtype.
        B, A, values, support, scale, vector: As for ``compose``.

    It has no autograd: passes insert it after autograd has run.
    """
    with torch.autocast(left.device.type, enabled=False):
        return weight_grads_aten(left, right, B, A, values, support, scale, vector)


@weight_grads.register_fake
def _(left, right, B, A, values, support, scale, vector=1):
    return torch.empty_like(B).contiguous(), torch.empty_like(A).contiguous(), torch.empty_like(values).contiguous()


def weight_grads_aten(
    left: Tensor, right: Tensor, B: Tensor, A: Tensor, values: Tensor, support: Tensor, scale: float, vector: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the same in ATen, for CPU: the dense gradient, and its projections."""
    return compose_backward(left.t() @ right, B, A, values, support, scale, vector)

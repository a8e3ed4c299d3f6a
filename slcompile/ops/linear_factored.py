"""linear_factored: a matmul with a factorized weight that never forms it.

    x W^T:  y_TN = hidden_TR @ B_NR^T + x_TK @ S_NK^T + bias_N,   hidden = scale * x @ A^T
    x W:    y_TK = hidden_TR @ A_RK   + x_TN @ S_NK,              hidden = scale * x @ B

T tokens; N rows, K columns, R rank of ``W = scale * B @ A + S``. The second is the input gradient of the first, and
the forward of a weight that is stored [in, out]. ``hidden`` is an argument, because the weight gradients read it too.

It works on lists, one entry for each weight that multiplies the same ``x``: sibling projections share a launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slcompile.ops.sparse_cpu import sparse_addmm, transposed_copy
from slcompile.ops.vector_cpu import vector_addmm


@torch.library.custom_op("slcompile::linear_factored", mutates_args=())
def linear_factored(
    x: Tensor,
    hiddens: Sequence[Tensor],
    factors: Sequence[Tensor],
    values: Sequence[Tensor],
    supports: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    transposed: bool,
    vector: int = 1,
) -> list[Tensor]:
    """Multiplies one input with factorized weights.

    Args:
        x: [T, K], or [T, N] where ``transposed``; float32, bfloat16, float16 or float64.
        hiddens: [T, R] each, like x.
        factors: B [N, R] each, or A [R, K] where ``transposed``; like x.
        values: [N, groups] or [P] each, like x.
        supports: The seed or the flat index of each (see ``slcompile.ops.compose``).
        biases: [N] or None for each.
        transposed: Whether to multiply with W rather than with its transpose.
        vector: Rows that share their columns, of each.

    Returns:
        [T, N] each, or [T, K] where ``transposed``. It has no autograd: passes insert it after autograd has run.
    """
    results = linear_factored_aten(x, hiddens, factors, values, supports, biases, transposed, vector)
    return [result.contiguous() for result in results]


@linear_factored.register_fake
def _(
    x: Tensor,
    hiddens: Sequence[Tensor],
    factors: Sequence[Tensor],
    values: Sequence[Tensor],
    supports: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    transposed: bool,
    vector: int = 1,
) -> list[Tensor]:
    return [x.new_empty((x.shape[0], factor.shape[1 if transposed else 0])) for factor in factors]


def linear_factored_aten(
    x: Tensor,
    hiddens: Sequence[Tensor],
    factors: Sequence[Tensor],
    values: Sequence[Tensor],
    supports: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    transposed: bool,
    vector: int = 1,
) -> list[Tensor]:
    """Returns the same for CPU. In ATen, the results are transposes of matrices with the tokens in the columns."""
    if vector > 1:
        each_of = zip(factors, hiddens, values, supports, biases, strict=True)
        return [
            vector_addmm(factor, hidden, each, support, x, bias, transposed, vector)
            for factor, hidden, each, support, bias in each_of
        ]
    x_T = transposed_copy(x)
    results = []
    for hidden, factor, each, support, bias in zip(hiddens, factors, values, supports, biases, strict=True):
        result = sparse_addmm(factor, hidden, each, support, x_T, transposed).t()
        results.append(result if bias is None else result + bias)
    return results

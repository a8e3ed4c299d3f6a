"""compose on GPUs: W_NK = scale * B_NR @ A_RK, by the vendor's matmul, and then S_NK added in place at the support.

A kernel of our own that adds S to tiles of the product before it stores them would save reading and writing the entries
at the support. By its generated code for sm_90 it was estimated at 0.9 of this time at the paper's 7B widths and at 1.3
of it at 1B's odd ones, that is at 1 % of a step either way, and it was ten times the code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slcompile.cost.devices import aligned
from slcompile.kernels.entries import add_
from slcompile.ops.quantized import as_base


def compose(
    B: Tensor,
    A: Tensor,
    values: Tensor,
    support: Tensor,
    scale: float,
    dtype: torch.dtype | None = None,
    vector: int = 1,
    base: Tensor | None = None,
) -> Tensor:
    """Composes a weight, or one for each of E experts.

    Args:
        B: [N, R] or [E, N, R], float32, bfloat16 or float16, of any strides.
        A: [R, K] or [E, R, K], like B.
        values: [N, groups] or [E, N, groups] for the stratified and the vector support, whose row of expert e is
            ``e * N + row``; [P] for the uniform one, of the E * N rows.
        support: The seed, one integer, or the sorted flat index [P], int32 or int64.
        scale: Factor of the low-rank part.
        dtype: Of the result, to which the factors are rounded for their product, as autocast does; None is B's.
        vector: Rows that share their columns.
        base: [N, K] or [E, N, K], which the rest is added to, rounded like the factors, or packed as uint8; None for
            nothing.

    Returns:
        [N, K] or [E, N, K], its rows neighbours in memory with a gap where that aligns them.
    """
    dtype = dtype or B.dtype
    columns = A.shape[-1]
    onto = None if base is None else aligned_rows(as_base(base, columns, dtype))
    W = scaled_product(B.to(dtype), aligned_rows(A.to(dtype)), scale, onto)
    if not values.numel():
        return W.narrow(-1, 0, columns)
    groups = values if values.dim() == 1 else values.flatten(end_dim=-2)
    # Experts are further rows of one support.
    add_(W.view(-1, W.shape[-1]), groups, support, columns, vector)
    return W.narrow(-1, 0, columns)


def scaled_product(first: Tensor, second: Tensor, scale: float, onto: Tensor | None = None) -> Tensor:
    """Computes ``scale * first @ second``, of one or of several matrices, added to another one if there is one."""
    if first.dim() == 3:
        # Inductor would scale the result in a pass of its own; scaling the smaller operand is exact for powers of two.
        product = first * scale @ second if first.numel() <= second.numel() else first @ (second * scale)
        return product if onto is None else onto + product
    if onto is not None:
        return torch.addmm(onto, first, second, alpha=scale)
    # beta=0: the first argument counts for nothing, but Inductor's own matmuls read it, so that it has to be a number.
    # A number that is there saves the launch that would make one. The product is scaled before it is rounded.
    return torch.addmm(first.narrow(0, 0, 1).narrow(1, 0, 1), first, second, beta=0, alpha=scale)


def aligned_rows(matrix: Tensor) -> Tensor:
    """Returns the matrix with zeros after each row, where its rows are contiguous and the vendor's matmuls need that.

    It is a factor, small beside the matrix that it makes: the copy costs less than a product with odd rows.
    """
    columns = matrix.shape[-1]
    more = aligned(columns, matrix.dtype) - columns
    return torch.nn.functional.pad(matrix, (0, more)) if more else matrix

"""weight_grads, compose_backward and values_grad on GPUs, the twins of the ops of these names.

G_NK = left_TN^T @ right_TK and its projections are the vendor's matmuls, its entries at the support a kernel's.
T tokens, N rows, K columns, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slcompile.cost.devices import aligned
from slcompile.kernels import vector_products
from slcompile.kernels.compose import aligned_rows, scaled_product
from slcompile.kernels.entries import read


def weight_grads(
    left: Tensor, right: Tensor, B: Tensor, A: Tensor, values: Tensor, support: Tensor, scale: float, vector: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gradients of B, A and values, each contiguous, with its parameter's shape and dtype.

    Args:
        left: [T, N], float32, bfloat16 or float16, of any strides.
        right: [T, K], like left.
        B: [N, R]. Where its dtype is not left's, it is rounded to that for its product with G, as autocast does.
        A: [R, K], likewise.
        values: [N, groups] for the stratified and vector supports, [P] for the uniform one; its numbers are not read.
        support: The seed, one integer, or the sorted flat index [P], int32 or int64.
        scale: Factor of the low-rank part.
        vector: Rows that share their columns.
    """
    # G is rounded to the dtype of its factors, as it is where autograd makes it.
    return compose_backward(_dense_grad(left, right), B, A, values, support, scale, vector)


def compose_backward(
    G: Tensor, B: Tensor, A: Tensor, values: Tensor, support: Tensor, scale: float, vector: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the same from a dense gradient, [N, K], or [E, N, K] of E experts, whose factors begin with E."""
    columns = A.shape[-1]
    grad_B = scaled_product(G, aligned_rows(A.to(G.dtype)).narrow(-1, 0, columns).mT, scale)
    grad_A = scaled_product(B.to(G.dtype).mT, G, scale)
    rows = values if values.dim() == 1 else values.flatten(end_dim=-2)
    if not values.numel():
        return grad_B.to(B.dtype), grad_A.to(A.dtype), torch.empty_like(values)
    grad_values = read(G.reshape(-1, columns) if G.dim() == 3 else G, rows, support, vector).view(values.shape)
    return grad_B.to(B.dtype), grad_A.to(A.dtype), grad_values


def values_grad(
    left: Tensor, right: Tensor, values: Tensor, support: Tensor, vector: int = 1, *, autotune: bool = False
) -> Tensor:
    """Returns gradient of values alone, contiguous, with its shape and dtype. Arguments as above."""
    if vector_products.serves(left, vector):
        return vector_products.values_grad(left, right, values, support, vector, autotune=autotune)
    return read(_dense_grad(left, right), values, support, vector)


def _dense_grad(left: Tensor, right: Tensor) -> Tensor:
    """Computes G [N, K], of which rows or columns are contiguous and aligned."""
    rows, columns = left.shape[1], right.shape[1]
    if aligned(columns, right.dtype) != columns and aligned(rows, left.dtype) == rows:
        return (right.t() @ left).t()
    return aligned_rows(left.t() @ right).narrow(1, 0, columns)

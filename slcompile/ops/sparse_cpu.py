"""What the factored lowering runs on CPU: S times a dense matrix, and the products' entries at the support, in ATen.

Both take dense operands transposed, a row of tokens for each feature: then each row of ``S @ x_KT`` is a weighted sum
of rows, an embedding bag, whose kernels are vectorised over the tokens and do irregular bags. Neither a scatter nor a
dense S is needed. They are ops of their own for their tag: Inductor, free to choose, hands over strided operands, for
which the same ATen calls take 30 times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slcompile.support import stratified_columns

_TAGS = (torch.Tag.needs_contiguous_strides,)


@torch.library.custom_op("slcompile::sparse_addmm", mutates_args=(), tags=_TAGS)
def sparse_addmm(
    factor: Tensor, hidden: Tensor, values: Tensor, support: Tensor, dense: Tensor, transposed: bool
) -> Tensor:
    """The factor times ``hidden_TR^T``, plus S or its transpose times ``dense``, with the tokens in the columns.

    Args:
        factor: B [N, R], or A [R, K] where ``transposed``.
        hidden: [T, R].
        values, support: Of S [N, K], as for ``slcompile.ops.compose``.
        dense: [K, T], or [N, T] where ``transposed``, contiguous.
        transposed: Whether S^T multiplies it.

    Returns:
        [N, T], or [K, T] where ``transposed``, contiguous.
    """
    result, factor = factor.shape[transposed], factor.t() if transposed else factor
    rows, columns = (dense.shape[0], result) if transposed else (result, dense.shape[0])
    row, column = entries(values, support, rows, columns)
    weights = values.flatten()
    bag, entry = (column, row) if transposed else (row, column)
    if transposed:
        bag, order = bag.sort(stable=True)
        entry, weights = entry.index_select(0, order), weights.index_select(0, order)
    counts = torch.bincount(bag, minlength=result)
    starts = (counts.cumsum(0) - counts).to(entry.dtype)
    with torch.autocast(dense.device.type, enabled=False):
        sparse = torch.ops.aten._embedding_bag_forward_only(dense, entry, starts, False, 0, False, weights)[0]
        return sparse.addmm_(factor, hidden.t())


@sparse_addmm.register_fake
def _(factor: Tensor, hidden: Tensor, values: Tensor, support: Tensor, dense: Tensor, transposed: bool) -> Tensor:
    return dense.new_empty((factor.shape[transposed], dense.shape[1]))


@torch.library.custom_op("slcompile::sparse_dots", mutates_args=(), tags=_TAGS)
def sparse_dots(left: Tensor, right: Tensor, values: Tensor, support: Tensor) -> Tensor:
    """``left @ right^T`` at the support.

    Args:
        left: [N, T], contiguous.
        right: [K, T], contiguous, of the same dtype.
        values, support: As for ``slcompile.ops.compose``; the numbers of ``values`` are not read.

    Returns:
        Shape and dtype of ``values``.
    """
    row, column = entries(values, support, left.shape[0], right.shape[0])
    starts = row[:1]  # not read: the bag of each entry is given, which is its row
    # The gradient of an embedding bag's weights is this dot product.
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(left, right, column, starts, row, 0)
    return dots.to(values.dtype).view(values.shape)


@sparse_dots.register_fake
def _(left: Tensor, right: Tensor, values: Tensor, support: Tensor) -> Tensor:
    return torch.empty_like(values).contiguous()


def entries(values: Tensor, support: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Row and column of each non-zero, by row and then by column as ``values`` are; [P] each, int32 if it fits.

    Args:
        values, support: As for ``slcompile.ops.compose``.
        rows, columns: Shape of the weight.
    """
    dtype = torch.int32 if max(rows, columns, values.numel()) < 2**31 else torch.int64
    if values.dim() == 1:
        return (support // columns).to(dtype), (support % columns).to(dtype)
    groups = values.shape[1]
    row = torch.arange(rows, dtype=dtype, device=values.device).unsqueeze(1).expand(rows, groups)
    return row.flatten(), stratified_columns(support, rows, columns, groups).flatten().to(dtype)

"""What the factored lowering runs on CPU: S times a dense matrix, and the products' entries at the support, in ATen.

Both take dense operands transposed, a row of tokens for each feature: then each row of ``S @ x_KT`` is a weighted sum
of rows, an embedding bag, whose kernels are vectorised over the tokens and do irregular bags. Neither a scatter nor a
dense S is needed. They are ops of their own for their tag: Inductor, free to choose, hands over strided operands, for
which the same ATen calls take 30 times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

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
    weights = values.flatten()
    if transposed:
        entry, starts, order = _kept(_bags_of_columns, values, support, rows, columns)
        weights = weights.index_select(0, order)
    else:
        _, entry = _kept(entries, values, support, rows, columns)
        starts = _starts(values, support, rows, columns)
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
    row, column = _kept(entries, values, support, left.shape[0], right.shape[0])
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
    dtype = _index_dtype(values, rows, columns)
    if values.dim() == 1:
        return (support // columns).to(dtype), (support % columns).to(dtype)
    groups = values.shape[1]
    row = torch.arange(rows, dtype=dtype, device=values.device).repeat_interleave(groups)
    return row, stratified_columns(support, rows, columns, groups).flatten().to(dtype)


def _starts(values: Tensor, support: Tensor, rows: int, columns: int) -> Tensor:
    """Where each row's entries begin, of the dtype of ``entries``."""
    if values.dim() == 2:
        dtype = _index_dtype(values, rows, columns)
        return torch.arange(0, values.numel(), values.shape[1], dtype=dtype, device=values.device)
    return _begins(entries(values, support, rows, columns)[0], rows)


def _bags_of_columns(values: Tensor, support: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries sorted by column: their rows, where each column's begin, and their positions among ``values``."""
    row, column = entries(values, support, rows, columns)
    column, order = column.sort(stable=True)
    return row.index_select(0, order), _begins(column, columns), order.to(row.dtype)


def _begins(bag: Tensor, bags: int) -> Tensor:
    counts = torch.bincount(bag, minlength=bags)
    return (counts.cumsum(0) - counts).to(bag.dtype)


def _index_dtype(values: Tensor, rows: int, columns: int) -> torch.dtype:
    return torch.int32 if max(rows, columns, values.numel()) < 2**31 else torch.int64


_memory: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Seed -> what was made from it: 16 bytes for each non-zero, as long as the seed tensor lives."""


def _kept(
    make: Callable[..., tuple[Tensor, ...]], values: Tensor, support: Tensor, rows: int, columns: int
) -> tuple[Tensor, ...]:
    """What ``make`` returns, made once for a seed: it takes longer than the product. A flat index is not kept."""
    if values.dim() == 1:
        return make(values, support, rows, columns)
    made = _memory.setdefault(support, {})
    key = (make, int(support), rows, columns, values.shape[1])
    if key not in made:
        for old in [each for each in made if each[1:] != key[1:]]:  # of a seed that was overwritten
            del made[old]
        made[key] = make(values, support, rows, columns)
    return cast(tuple[Tensor, ...], made[key])


def kept_bytes() -> int:
    """Bytes of what is kept for the seeds that are alive."""
    return sum(each.nbytes for made in _memory.values() for tensors in made.values() for each in tensors)


def transposed_copy(matrix: Tensor) -> Tensor:
    """The transpose, contiguous."""
    # Not .contiguous(): whether a matrix with a symbolic number of tokens is contiguous already would be guarded.
    return matrix.t().clone(memory_format=torch.contiguous_format)

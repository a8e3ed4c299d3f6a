"""What the factored lowering runs on CPU: S times a dense matrix, and the products' entries at the support, in ATen.

Both take dense operands transposed, a row of tokens for each feature: then each row of ``S @ x_KT`` is a weighted sum
of rows, an embedding bag, whose kernels are vectorised over the tokens and do irregular bags. Neither a scatter nor a
dense S is needed. Of few tokens, MKL's sparse products are faster. They are ops of their own for their tag: Inductor,
free to choose, hands over strided operands, for which the same ATen calls take 30 times as long.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from slcompile.ops.support import stratified_columns

_TAGS = (torch.Tag.needs_contiguous_strides,)

FEW_TOKENS = 12
"""Below so many, rows are too short for embedding bags; measured with 2 threads of an AMD EPYC (Zen 4)."""


@torch.library.custom_op("slcompile::sparse_addmm", mutates_args=(), tags=_TAGS)
def sparse_addmm(
    factor: Tensor, hidden: Tensor, values: Tensor, support: Tensor, dense: Tensor, transposed: bool
) -> Tensor:
    """Computes the factor times ``hidden_TR^T``, plus S or S^T times ``dense``, with the tokens in the columns.

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
        bounds, entry, order = kept(_by_column, values, support, rows, columns)
        weights = weights.index_select(0, order)
    else:
        bounds, entry, _ = kept(_by_row, values, support, rows, columns)
    with torch.autocast(dense.device.type, enabled=False):
        if dense.shape[1] < FEW_TOKENS and torch.backends.mkl.is_available():
            return _few_addmm(factor, hidden, bounds, entry, weights, dense)
        sparse = torch.ops.aten._embedding_bag_forward_only(dense, entry, bounds, False, 0, False, weights, True)[0]
        return sparse.addmm_(factor, hidden.t())


@sparse_addmm.register_fake
def _(factor: Tensor, hidden: Tensor, values: Tensor, support: Tensor, dense: Tensor, transposed: bool) -> Tensor:
    return dense.new_empty((factor.shape[transposed], dense.shape[1]))


@torch.library.custom_op("slcompile::sparse_dots", mutates_args=(), tags=_TAGS)
def sparse_dots(left: Tensor, right: Tensor, values: Tensor, support: Tensor) -> Tensor:
    """Computes ``left @ right^T`` at the support.

    Args:
        left: [N, T], contiguous.
        right: [K, T], contiguous, of the same dtype.
        values, support: As for ``slcompile.ops.compose``; the numbers of ``values`` are not read.

    Returns:
        Shape and dtype of ``values``.
    """
    bounds, column, row = kept(_by_row, values, support, left.shape[0], right.shape[0])
    starts = bounds[:1]  # not read: the bag of each entry is given, which is its row
    # The gradient of an embedding bag's weights is this dot product.
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(left, right, column, starts, row, 0)
    return dots.to(values.dtype).view(values.shape)


@sparse_dots.register_fake
def _(left: Tensor, right: Tensor, values: Tensor, support: Tensor) -> Tensor:
    return torch.empty_like(values).contiguous()


def entries(values: Tensor, support: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Returns row and column of each non-zero, by row and then by column as ``values`` are; [P] each, int32 if it fits.

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


def _by_row(values: Tensor, support: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the entries in CSR: where each row's begin, and the last one's end; their columns; and their rows."""
    row, column = entries(values, support, rows, columns)
    return _bounds(row, rows), column, row


def _by_column(values: Tensor, support: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the entries in CSC: where each column's begin; their rows; and their positions among ``values``."""
    row, column = entries(values, support, rows, columns)
    column, order = column.sort(stable=True)
    return _bounds(column, columns), row.index_select(0, order), order.to(row.dtype)


def _bounds(bag: Tensor, bags: int) -> Tensor:
    counts = torch.bincount(bag, minlength=bags)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(bag.dtype)


def _few_addmm(factor: Tensor, hidden: Tensor, bounds: Tensor, entry: Tensor, weights: Tensor, dense: Tensor) -> Tensor:
    """Computes ``sparse_addmm`` for few tokens; MKL's sparse products are of float32 and float64 only."""
    wide = torch.promote_types(dense.dtype, torch.float32)
    shape = (bounds.numel() - 1, dense.shape[0])
    _spend_csr_warning()
    matrix = torch.sparse_csr_tensor(bounds, entry, weights.to(wide), shape, check_invariants=False)
    sparse = torch.mm(matrix, dense.to(wide)).to(dense.dtype)
    if dense.dtype == wide and len(hidden) == 1 and factor.is_contiguous():
        # Twice the same token: MKL reads a row-major matrix faster for two vectors than for one.
        return sparse.add_(torch.mm(factor, hidden.expand(2, -1).contiguous().t())[:, :1])
    return sparse.addmm_(factor, hidden.t())


def _index_dtype(values: Tensor, rows: int, columns: int) -> torch.dtype:
    return torch.int32 if max(rows, columns, values.numel()) < 2**31 else torch.int64


@functools.cache
def _spend_csr_warning() -> None:
    """Has torch warn once of its CSR tensors' beta state where no user sees it: they meet none of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


_memory: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Support -> what was made from it: 16 bytes for each non-zero, as long as the seed or flat index lives."""


def kept(
    make: Callable[..., tuple[Tensor, ...]], values: Tensor, support: Tensor, rows: int, columns: int
) -> tuple[Tensor, ...]:
    """Returns what ``make`` returns, made once for a support: it takes longer than the product."""
    if values.dim() == 1 and support.is_inference():  # it does not count what is written to it
        return make(values, support, rows, columns)
    made = _memory.setdefault(support, {})
    # The sum, too: .data and torch.distributed write positions without counting it.
    state = int(support) if values.dim() == 2 else (support._version, support.data_ptr(), int(support.sum()))
    key = (make, state, rows, columns, values.shape)
    found = made.get(key)
    if found is None:
        for old in list(made):  # other threads add to it
            if old[1:] != key[1:]:  # of a support that was overwritten
                made.pop(old, None)
        found = made[key] = make(values, support, rows, columns)
    return cast(tuple[Tensor, ...], found)


def kept_bytes() -> int:
    """Returns bytes of what is kept for the supports that are alive."""
    return sum(each.nbytes for made in _memory.values() for tensors in made.values() for each in tensors)


def transposed_copy(matrix: Tensor) -> Tensor:
    """Returns the transpose, contiguous."""
    # Not .contiguous(): whether a matrix with a symbolic number of tokens is contiguous already would be guarded.
    return matrix.t().clone(memory_format=torch.contiguous_format)

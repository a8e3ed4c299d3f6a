"""The entries of a dense matrix at the support are read, or added to.

Read, they are the gradient of values; what is added completes ``scale * B @ A``. Each non-zero is read or written by
one thread, once: no atomics, the same bits each time.

Prefixes: p_ pointer, o_ offset, i_ program index. N rows, K columns, P non-zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slcompile.kernels.launch import launchable, on_device_of
from slcompile.kernels.support import mix32, stratified_column

BLOCK_ROWS = 16
BLOCK_GROUPS = 64
"""Non-zeros of a program: of a few rows, so that where a group begins is computed once for all of them."""


@triton.jit
def stratified_entries(
    mixed_seed, rows, columns, groups, stride_row, stride_column,
    VECTOR: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """Where the non-zeros of a program are in ``values`` and in the matrix, and which of them there are.

    It loads nothing: torch takes what a function loads from for written to, where its results become an address.
    """
    blocks = tl.cdiv(groups, BLOCK_GROUPS)
    # 64-bit, after the division: the matrix may have more than 2**31 elements.
    o_row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_group = (tl.program_id(0) % blocks) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    column = stratified_column(mixed_seed, o_row[:, None], o_group[None, :], columns, groups, VECTOR)
    is_there = (o_row < rows)[:, None] & (o_group < groups)[None, :]
    return o_row[:, None] * groups + o_group[None, :], o_row[:, None] * stride_row + column * stride_column, is_there


@triton.jit
def uniform_entries(flat, columns, stride_row, stride_column):
    """Where entries of the flat index are in the matrix."""
    row = flat // columns
    return row.to(tl.int64) * stride_row + (flat - row * columns).to(tl.int64) * stride_column


@triton.jit
def read_kernel(
    p_matrix, p_support, p_values, rows, columns, groups, size, stride_row, stride_column,
    STRATIFIED: tl.constexpr, VECTOR: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """Computes values = matrix at the support."""
    if STRATIFIED:
        mixed_seed = mix32(tl.load(p_support).to(tl.uint32))
        o_value, o_entry, is_there = stratified_entries(
            mixed_seed, rows, columns, groups, stride_row, stride_column, VECTOR, BLOCK_ROWS, BLOCK_GROUPS
        )
    else:
        BLOCK: tl.constexpr = BLOCK_ROWS * BLOCK_GROUPS
        o_value = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        is_there = o_value < size
        flat = tl.load(p_support + o_value, mask=is_there, other=0)
        o_entry = uniform_entries(flat, columns, stride_row, stride_column)
    b_entry = tl.load(p_matrix + o_entry, mask=is_there, other=0.0)
    tl.store(p_values + o_value, b_entry.to(p_values.dtype.element_ty), mask=is_there)


@triton.jit
def add_kernel(
    p_matrix, p_support, p_values, rows, columns, groups, size, stride_row, stride_column,
    STRATIFIED: tl.constexpr, VECTOR: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """Computes matrix at the support += values, in float32, rounded once."""
    if STRATIFIED:
        mixed_seed = mix32(tl.load(p_support).to(tl.uint32))
        o_value, o_entry, is_there = stratified_entries(
            mixed_seed, rows, columns, groups, stride_row, stride_column, VECTOR, BLOCK_ROWS, BLOCK_GROUPS
        )
    else:
        BLOCK: tl.constexpr = BLOCK_ROWS * BLOCK_GROUPS
        o_value = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        is_there = o_value < size
        flat = tl.load(p_support + o_value, mask=is_there, other=0)
        o_entry = uniform_entries(flat, columns, stride_row, stride_column)
    b_sum = tl.load(p_matrix + o_entry, mask=is_there, other=0.0).to(tl.float32)
    b_sum += tl.load(p_values + o_value, mask=is_there, other=0.0).to(tl.float32)
    tl.store(p_matrix + o_entry, b_sum.to(p_matrix.dtype.element_ty), mask=is_there)


def read(matrix: Tensor, values: Tensor, support: Tensor, vector: int = 1) -> Tensor:
    """Reads a matrix at the support.

    Args:
        matrix: [N, K], float32, bfloat16 or float16, of any strides.
        values: [N, groups] for the stratified and vector supports, [P] for the uniform one; its numbers are not read.
        support: The seed, one integer, or the sorted flat index [P], int32 or int64.
        vector: Rows that share their columns.

    Returns:
        Of the shape and dtype of values, contiguous.
    """
    found = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    _launch(read_kernel, matrix, support, found, matrix.shape[1], vector)
    return found


def add_(matrix: Tensor, values: Tensor, support: Tensor, columns: int, vector: int = 1) -> None:
    """Adds values to a matrix at the support, in place.

    Args:
        matrix: [N, K or more], like ``read``'s.
        values: [N, groups] or [P], of any dtype.
        support: As for ``read``.
        columns: K: further columns have no non-zeros.
        vector: As for ``read``.
    """
    _launch(add_kernel, matrix, support, values.contiguous(), columns, vector)


def _launch(kernel: Any, matrix: Tensor, support: Tensor, values: Tensor, columns: int, vector: int) -> None:
    stratified = values.dim() > 1
    rows, groups = matrix.shape[0], values.shape[-1]
    size = values.numel()
    if stratified:
        programs = triton.cdiv(rows, BLOCK_ROWS) * triton.cdiv(groups, BLOCK_GROUPS)
    else:
        programs = triton.cdiv(size, BLOCK_ROWS * BLOCK_GROUPS)
    with on_device_of(matrix):
        launchable(kernel)[(programs,)](
            matrix, support.contiguous(), values, rows, columns, groups, size, *matrix.stride(),
            STRATIFIED=stratified, VECTOR=vector, BLOCK_ROWS=BLOCK_ROWS, BLOCK_GROUPS=BLOCK_GROUPS,
        )  # fmt: skip

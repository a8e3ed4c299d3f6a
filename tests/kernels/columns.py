"""A kernel that writes the columns of a support: what the kernels compute on the way, to be compared with torch's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slcompile.kernels.launch import on_device_of
from slcompile.kernels.support import mix32, stratified_column

BLOCK = 256


@triton.jit
def stratified_columns_kernel(
    p_seed, p_columns, first_row, size, columns, groups, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes the columns of the non-zeros, one for each element of a block."""
    i_block = tl.program_id(0)
    # 64-bit: a weight may have more than 2**31 non-zeros.
    o_flat = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = o_flat // groups
    mixed_seed = mix32(tl.load(p_seed).to(tl.uint32))
    column = stratified_column(mixed_seed, first_row + row, o_flat - row * groups, columns, groups, VECTOR)
    tl.store(p_columns + o_flat, column, mask=o_flat < size)


def stratified_columns(
    seed: Tensor, rows: int, columns: int, groups: int, *, first_row: int = 0, vector: int = 1
) -> Tensor:
    """Computes what ``slcompile.ops.support.stratified_columns`` does, for a seed on a GPU."""
    result = torch.empty(rows, groups, dtype=torch.int64, device=seed.device)
    grid = (triton.cdiv(result.numel(), BLOCK),)
    with on_device_of(seed):
        stratified_columns_kernel[grid](seed, result, first_row, result.numel(), columns, groups, vector, BLOCK)
    return result

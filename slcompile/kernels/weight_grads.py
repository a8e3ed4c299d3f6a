"""weight_grads in Triton: G_NK = left_TN^T @ right_TK, projected on B, A and values; the twin of the op of that name.

A program makes one tile of G in float32 accumulators. Each non-zero lies in one tile, whose program stores its gradient
from there: rounded once, to the dtype of values, written once, without atomics. The tile itself is stored in the dtype
of left, for the two projections, which the vendor's matmuls do; for ``values_grad`` it is not stored at all.

Prefixes: p_ pointer, b_ block, o_ offset. T tokens, N rows, K columns, R rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slcompile.kernels.build import device_class, dot_precision, launchable, on_device_of
from slcompile.kernels.compose import (
    ALIGNMENT,
    BAND,
    PIECE,
    SEGMENT,
    TABLE,
    launch_options,
    stratified_groups,
    stratified_table,
    tile_of,
    uniform_bounds,
    uniform_column,
    uniform_segments,
)
from slcompile.kernels.support import mix32

CONFIGS = {
    "sm_80": triton.Config({"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_T": 32}, num_warps=8, num_stages=4),
    "sm_90": triton.Config({"BLOCK_N": 128, "BLOCK_K": 256, "BLOCK_T": 64}, num_warps=8, num_stages=3),
    "gfx942": triton.Config({"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_T": 32}, num_warps=8, num_stages=2),
}
"""For 16-bit operands, one a device class; the same bound on BLOCK_N as in ``compose``."""

CONFIG_32 = triton.Config({"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_T": 16}, num_warps=4, num_stages=2)
"""For float32 operands: without TF32 there are no matrix instructions, and each product is held in registers."""


@triton.jit
def finish(
    tile,
    p_G,
    p_grad_values,
    p_support,
    p_bounds,
    o_n,
    first_column,
    rows,
    columns,
    groups,
    width,
    STORE_G: tl.constexpr,
    STRATIFIED: tl.constexpr,
    TABLE: tl.constexpr,
    SEGMENT: tl.constexpr,
    PIECE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Stores a tile of G and what it holds at the support, PIECE columns at a time."""
    BLOCK_N: tl.constexpr = tile.shape[0]
    BLOCK_K: tl.constexpr = tile.shape[1]
    if BLOCK_K > PIECE:
        left, right = tl.split(tl.permute(tl.reshape(tile, (BLOCK_N, 2, BLOCK_K // 2)), (0, 2, 1)))
        finish(
            left, p_G, p_grad_values, p_support, p_bounds, o_n, first_column,
            rows, columns, groups, width, STORE_G, STRATIFIED, TABLE, SEGMENT, PIECE, VECTOR,
        )  # fmt: skip
        finish(
            right, p_G, p_grad_values, p_support, p_bounds, o_n, first_column + BLOCK_K // 2,
            rows, columns, groups, width, STORE_G, STRATIFIED, TABLE, SEGMENT, PIECE, VECTOR,
        )  # fmt: skip
    else:
        if STORE_G:
            o_k = first_column + tl.arange(0, BLOCK_K)
            mask = (o_n < rows)[:, None] & (o_k < width)[None, :]
            tl.store(p_G + o_n[:, None] * width + o_k[None, :], tile.to(p_G.dtype.element_ty), mask=mask)
        # Rounded before it is gathered: half the registers.
        rounded = tile.to(p_grad_values.dtype.element_ty)
        if STRATIFIED:
            mixed_seed = mix32(tl.load(p_support).to(tl.uint32))
            begin, end = stratified_groups(first_column, columns, groups, BLOCK_K)
            for group in range(begin, end, TABLE):
                position, b_column, there = stratified_table(
                    mixed_seed, o_n, o_n, rows, group, first_column, columns, groups, TABLE, VECTOR
                )
                # The first and the last group may have their non-zero in another tile.
                there &= (b_column >= 0) & (b_column < BLOCK_K)
                b_entry = tl.gather(rounded, tl.where(there, b_column, 0), 1)
                tl.store(p_grad_values + position, b_entry, mask=there)
        else:
            o_start, o_end = uniform_segments(o_n, first_column, columns, BLOCK_K, SEGMENT)
            start = tl.load(p_bounds + o_start, mask=o_n < rows, other=0)
            count = tl.load(p_bounds + o_end, mask=o_n < rows, other=0) - start
            for first in range(0, tl.max(count).to(tl.int32), TABLE):
                o_entry = first + tl.arange(0, TABLE)
                position = start[:, None] + o_entry[None, :]
                there = o_entry[None, :] < count[:, None]
                flat = tl.load(p_support + position, mask=there, other=0)
                b_column = uniform_column(flat, o_n, first_column, columns, BLOCK_K)
                b_entry = tl.gather(rounded, b_column, 1)
                tl.store(p_grad_values + position, b_entry, mask=there)


@triton.jit
def weight_grads_kernel(
    p_left,
    p_right,
    p_support,
    p_bounds,
    p_G,
    p_grad_values,
    tokens,
    rows,
    columns,
    groups,
    width,
    stride_left_t,
    stride_left_n,
    stride_right_t,
    stride_right_k,
    STORE_G: tl.constexpr,
    STRATIFIED: tl.constexpr,
    PRECISION: tl.constexpr,
    TABLE: tl.constexpr,
    SEGMENT: tl.constexpr,
    BAND: tl.constexpr,
    PIECE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    first_row, first_column = tile_of(tl.program_id(0), rows, columns, BLOCK_N, BLOCK_K, BAND)
    o_n = first_row + tl.arange(0, BLOCK_N)
    o_k = first_column + tl.arange(0, BLOCK_K)
    o_t = tl.arange(0, BLOCK_T).to(tl.int64)

    p_l = p_left + o_n[:, None] * stride_left_n + o_t[None, :] * stride_left_t
    p_r = p_right + o_t[:, None] * stride_right_t + o_k[None, :] * stride_right_k
    tile = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for t in range(0, tokens, BLOCK_T):
        b_left = tl.load(p_l, mask=(o_n < rows)[:, None] & (o_t < tokens - t)[None, :], other=0.0)
        b_right = tl.load(p_r, mask=(o_t < tokens - t)[:, None] & (o_k < columns)[None, :], other=0.0)
        tile = tl.dot(b_left, b_right, tile, input_precision=PRECISION)
        # 64-bit: tokens times a row passes 2**31.
        p_l += BLOCK_T * tl.cast(stride_left_t, tl.int64)
        p_r += BLOCK_T * tl.cast(stride_right_t, tl.int64)

    finish(
        tile, p_G, p_grad_values, p_support, p_bounds, o_n, first_column,
        rows, columns, groups, width, STORE_G, STRATIFIED, TABLE, SEGMENT, PIECE, VECTOR,
    )  # fmt: skip


@functools.cache
def tuned_kernel() -> Any:
    """``weight_grads_kernel``, timed with each configuration once for each shape; made when it is first asked for."""
    others = [
        triton.Config({"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_T": 64}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_T": 64}, num_warps=4, num_stages=3),
    ]
    key = ["tokens", "rows", "columns", "STORE_G"]
    return triton.autotune([*CONFIGS.values(), CONFIG_32, *others], key, cache_results=True)(weight_grads_kernel)


def launch(
    left: Tensor, right: Tensor, values: Tensor, support: Tensor, G: Tensor | None, vector: int, autotune: bool
) -> Tensor:
    """Launches the kernel, and returns the gradient of values.

    ``G``, if it is given, is filled: [N, K or more], contiguous, its further columns with zeros.
    """
    assert left.dtype == right.dtype
    tokens, rows = left.shape
    columns = right.shape[1]
    stratified = values.dim() > 1
    support = support.contiguous()
    grad_values = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    bounds = None if stratified else uniform_bounds(support, rows, columns)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(rows, meta["BLOCK_N"]) * triton.cdiv(columns, meta["BLOCK_K"]),)

    if autotune:
        kernel, options = tuned_kernel(), {}
    else:
        config = CONFIG_32 if left.dtype == torch.float32 else CONFIGS[device_class(left.device)]
        kernel, options = weight_grads_kernel, launch_options(config)
    with on_device_of(left):
        launchable(kernel)[grid](
            left,
            right,
            support,
            bounds,
            G,
            grad_values,
            tokens,
            rows,
            columns,
            values.shape[-1],
            0 if G is None else G.shape[1],
            *left.stride(),
            *right.stride(),
            STORE_G=G is not None,
            STRATIFIED=stratified,
            PRECISION=dot_precision(),
            TABLE=TABLE,
            SEGMENT=SEGMENT,
            BAND=BAND,
            PIECE=PIECE,
            VECTOR=vector,
            **options,
        )
    return grad_values


def weight_grads(
    left: Tensor,
    right: Tensor,
    B: Tensor,
    A: Tensor,
    values: Tensor,
    support: Tensor,
    scale: float,
    vector: int = 1,
    *,
    autotune: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of B, A and values, each contiguous, with its parameter's shape and dtype.

    Args:
        left: [T, N], float32, bfloat16 or float16, of any strides.
        right: [T, K], like left.
        B: [N, R]. Where its dtype is not left's, it is rounded to that for its product with G, as autocast does.
        A: [R, K], likewise.
        values: [N, groups] for the stratified and vector supports, [P] for the uniform one; its numbers are not read.
        support: The seed, one integer, or the sorted flat index [P], int32 or int64.
        scale: Factor of the low-rank part.
        vector: Rows that share their columns.
        autotune: Whether to time a few configurations, once for each shape, instead of taking the device's.
    """
    # G is rounded to the dtype of its factors, as it is where autograd makes it; float32 would take twice the memory.
    # Its rows begin at multiples of ALIGNMENT: what both its store and the vendor's matmuls are fast with.
    columns = right.shape[1]
    G = torch.empty((left.shape[1], columns + -columns % ALIGNMENT), dtype=left.dtype, device=left.device)
    grad_values = launch(left, right, values, support, G, vector, autotune)
    G = G[:, :columns]
    # beta=0: the first argument is not read, and alpha is applied before rounding.
    grad_B = torch.addmm(G.new_empty(1, 1), G, A.to(G.dtype).t(), beta=0, alpha=scale)
    grad_A = torch.addmm(G.new_empty(1, 1), B.to(G.dtype).t(), G, beta=0, alpha=scale)
    return grad_B.to(B.dtype), grad_A.to(A.dtype), grad_values


def values_grad(
    left: Tensor, right: Tensor, values: Tensor, support: Tensor, vector: int = 1, *, autotune: bool = False
) -> Tensor:
    """Gradient of values alone, contiguous, with its shape and dtype; G is not stored. Arguments as above."""
    return launch(left, right, values, support, None, vector, autotune)

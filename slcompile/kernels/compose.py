"""compose in Triton: W_NK = scale * B_NR @ A_RK + S_NK, written once; the twin of ``slcompile.ops.compose``.

A program makes one tile of W in float32 and rounds each element once. How S gets into the tile:

- Stratified: the columns and values of the groups that touch the tile are a small table (the tile's rows, a group
  each), and each element looks up its own group in it: no index, no scatter. Hashing once an entry instead of once an
  element is what makes this cheap: some 20 integer operations an element would cost as much time as the low-rank dot.
- Uniform: the entries of one row of the tile are neighbours in the sorted index. The tile is stored, and after a
  barrier each entry is stored over it, its low-rank part taken from the accumulators: no atomics, still rounded once.

Prefixes: p_ pointer, b_ block, o_ offset, i_ program index. E experts, N rows, K columns, R rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slcompile.kernels.build import device_class, dot_precision, launchable, on_device_of
from slcompile.kernels.support import mix32, stratified_column

CONFIGS = {
    "sm_80": triton.Config({"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_R": 32}, num_warps=8, num_stages=4),
    "sm_90": triton.Config({"BLOCK_N": 128, "BLOCK_K": 256, "BLOCK_R": 64}, num_warps=8, num_stages=3),
    "gfx942": triton.Config({"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_R": 32}, num_warps=8, num_stages=2),
}
"""For 16-bit operands, one a device class.

BLOCK_N * TABLE is at least the threads of a program: Triton 3.6 and 3.7 cannot compile ``tl.gather`` of less.
"""

CONFIG_32 = triton.Config({"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 16}, num_warps=4, num_stages=2)
"""For float32 operands: without TF32 there are no matrix instructions, and each product is held in registers."""

TABLE = 4
"""Entries of a row that are held at a time: at a density of 0.05, PIECE columns touch at most 3 groups."""

PIECE = 32
"""Columns of a tile that S is added to at a time: a whole tile's look-ups have no room in the registers."""

SEGMENT = 32
"""Columns between the boundaries that the uniform support is searched for; divides PIECE."""

ALIGNMENT = 16
"""A row stride divisible by this many elements is what lets Triton load a row several elements at a time."""

BAND = 8
"""Tiles that a run of programs goes down before it goes right, so that both factors' blocks stay in the L2 cache."""


@triton.jit
def tile_of(i_tile, rows, columns, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr):
    """First row and first column, int64, of the tile of a program."""
    down = tl.cdiv(rows, BLOCK_N)
    right = tl.cdiv(columns, BLOCK_K)
    band = i_tile // (BAND * right)
    height = min(down - band * BAND, BAND)
    inside = i_tile % (BAND * right)
    i_n = band * BAND + inside % height
    i_k = inside // height
    return i_n.to(tl.int64) * BLOCK_N, i_k.to(tl.int64) * BLOCK_K


@triton.jit
def group_of(column, columns, groups):
    """The group that a column lies in; 64-bit, as their product passes 2**31."""
    return (((column + 1).to(tl.int64) * groups - 1) // columns).to(tl.int32)


@triton.jit
def stratified_groups(first_column, columns, groups, BLOCK_K: tl.constexpr):
    """The first group that touches the tile, and the one after the last."""
    last_column = min(first_column + BLOCK_K, columns) - 1
    return group_of(first_column, columns, groups), group_of(last_column, columns, groups) + 1


@triton.jit
def stratified_table(
    mixed_seed, o_row, o_n, rows, group, first_column, columns, groups, TABLE: tl.constexpr, VECTOR: tl.constexpr
):
    """TABLE groups from ``group``, of each row of the tile.

    It loads nothing: torch takes what a function loads from for written to, where its results become an address.

    Returns, [BLOCK_N, TABLE] each: where in ``values``, column within the tile, outside of it too, and whether
    row and group are there.
    """
    o_group = group + tl.arange(0, TABLE)
    column = stratified_column(mixed_seed, o_row[:, None], o_group[None, :], columns, groups, VECTOR) - first_column
    mask = (o_n < rows)[:, None] & (o_group < groups)[None, :]
    return o_row[:, None] * groups + o_group[None, :], column.to(tl.int32), mask


@triton.jit
def stratified_slots(group, first_column, columns, groups, TABLE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which of TABLE groups from ``group`` each column of the tile [BLOCK_K] lies in; some other where in none."""
    # Counting the groups that begin at or before a column takes no division for each column.
    start = (group + tl.arange(0, TABLE)).to(tl.int64) * columns // groups - first_column
    begun = start[None, :] <= tl.arange(0, BLOCK_K)[:, None]
    return tl.maximum(tl.sum(begun.to(tl.int32), 1) - 1, 0)


@triton.jit
def uniform_segments(o_row, first_column, columns, BLOCK_K: tl.constexpr, SEGMENT: tl.constexpr):
    """Where in the bounds of the support the first entry of each row of the tile is, and the one after the last."""
    segments = tl.cdiv(columns, SEGMENT)
    # The last segment's end is the next row's beginning; a tile's last columns may lie beyond both.
    first = min(first_column // SEGMENT, segments)
    last = min(first + BLOCK_K // SEGMENT, segments)
    return o_row * segments + first, o_row * segments + last


@triton.jit
def uniform_column(flat, o_row, first_column, columns, BLOCK_K: tl.constexpr):
    """Column within the tile of entries [BLOCK_N, TABLE] of the flat index; some column in the place of no entry."""
    # The difference is small, so it may be taken mod 2**32: half the registers.
    origin = (o_row * columns + first_column).to(tl.uint32)
    column = (flat.to(tl.uint32) - origin[:, None]).to(tl.int32)
    return tl.minimum(tl.maximum(column, 0), BLOCK_K - 1)


@triton.jit
def add_table(tile, b_column, b_value, slot):
    """Adds to each element of the tile the value in its column's slot, where that entry is in its column.

    Where a column is in no group of the table, its slot holds an entry of another group, so of another column.
    """
    # Column and value travel in one word: one look-up an element instead of two.
    width: tl.constexpr = b_value.dtype.primitive_bitwidth
    narrow: tl.constexpr = tl.uint16 if width == 16 else tl.uint32
    wide: tl.constexpr = tl.uint32 if width == 16 else tl.uint64
    outside = (b_column < 0) | (b_column >= tile.shape[1])
    b_column = tl.where(outside, tile.shape[1], b_column)
    b_table = (b_column.to(wide) << width) | b_value.to(narrow, bitcast=True).to(wide)
    found = tl.gather(b_table, tl.broadcast_to(slot[None, :], tile.shape), 1)
    hit = (found >> width).to(tl.int32) == tl.arange(0, tile.shape[1])[None, :]
    # Still narrow: this is what goes through shared memory to the threads that hold the tile.
    b_sparse = tl.where(hit, found, 0).to(narrow).to(b_value.dtype, bitcast=True)
    return tile + b_sparse.to(tl.float32)


@triton.jit
def finish(
    tile,
    p_values,
    p_support,
    p_bounds,
    p_w,
    o_row,
    o_n,
    first_column,
    rows,
    columns,
    groups,
    stride_Wn,
    stride_Wk,
    STRATIFIED: tl.constexpr,
    TABLE: tl.constexpr,
    SEGMENT: tl.constexpr,
    PIECE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Adds S to a tile and stores it, PIECE columns at a time."""
    BLOCK_N: tl.constexpr = tile.shape[0]
    BLOCK_K: tl.constexpr = tile.shape[1]
    if BLOCK_K > PIECE:
        left, right = tl.split(tl.permute(tl.reshape(tile, (BLOCK_N, 2, BLOCK_K // 2)), (0, 2, 1)))
        finish(
            left, p_values, p_support, p_bounds, p_w, o_row, o_n, first_column,
            rows, columns, groups, stride_Wn, stride_Wk, STRATIFIED, TABLE, SEGMENT, PIECE, VECTOR,
        )  # fmt: skip
        finish(
            right, p_values, p_support, p_bounds, p_w, o_row, o_n, first_column + BLOCK_K // 2,
            rows, columns, groups, stride_Wn, stride_Wk, STRATIFIED, TABLE, SEGMENT, PIECE, VECTOR,
        )  # fmt: skip
    else:
        o_k = first_column + tl.arange(0, BLOCK_K)
        if STRATIFIED:
            mixed_seed = mix32(tl.load(p_support).to(tl.uint32))
            begin, end = stratified_groups(first_column, columns, groups, BLOCK_K)
            for group in range(begin, end, TABLE):
                position, b_column, there = stratified_table(
                    mixed_seed, o_row, o_n, rows, group, first_column, columns, groups, TABLE, VECTOR
                )
                b_value = tl.load(p_values + position, mask=there, other=0.0)
                slot = stratified_slots(group, first_column, columns, groups, TABLE, BLOCK_K)
                tile = add_table(tile, b_column, b_value, slot)
        mask = (o_n < rows)[:, None] & (o_k < columns)[None, :]
        tl.store(p_w + o_n[:, None] * stride_Wn + o_k[None, :] * stride_Wk, tile.to(p_w.dtype.element_ty), mask=mask)
        if not STRATIFIED:
            # Other threads of this program have stored what is now stored again.
            tl.debug_barrier()
            o_start, o_end = uniform_segments(o_row, first_column, columns, BLOCK_K, SEGMENT)
            start = tl.load(p_bounds + o_start, mask=o_n < rows, other=0)
            count = tl.load(p_bounds + o_end, mask=o_n < rows, other=0) - start
            for first in range(0, tl.max(count).to(tl.int32), TABLE):
                o_entry = first + tl.arange(0, TABLE)
                position = start[:, None] + o_entry[None, :]
                there = o_entry[None, :] < count[:, None]
                flat = tl.load(p_support + position, mask=there, other=0)
                b_column = uniform_column(flat, o_row, first_column, columns, BLOCK_K)
                b_value = tl.load(p_values + position, mask=there, other=0.0).to(tl.float32)
                b_sum = tl.gather(tile, b_column, 1) + b_value
                p_entry = p_w + o_n[:, None] * stride_Wn + (first_column + b_column) * stride_Wk
                tl.store(p_entry, b_sum.to(p_w.dtype.element_ty), mask=there)


@triton.jit
def compose_kernel(
    p_B,
    p_A,
    p_values,
    p_support,
    p_bounds,
    p_W,
    scale,
    rows,
    columns,
    rank,
    groups,
    width,
    stride_Be,
    stride_Bn,
    stride_Br,
    stride_Ae,
    stride_Ar,
    stride_Ak,
    stride_We,
    stride_Wn,
    stride_Wk,
    STRATIFIED: tl.constexpr,
    PRECISION: tl.constexpr,
    TABLE: tl.constexpr,
    SEGMENT: tl.constexpr,
    BAND: tl.constexpr,
    PIECE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first_row, first_column = tile_of(tl.program_id(0), rows, columns, BLOCK_N, BLOCK_K, BAND)
    i_expert = tl.program_id(1).to(tl.int64)
    o_n = first_row + tl.arange(0, BLOCK_N)
    o_k = first_column + tl.arange(0, BLOCK_K)
    o_r = tl.arange(0, BLOCK_R).to(tl.int64)

    p_b = p_B + i_expert * stride_Be + o_n[:, None] * stride_Bn + o_r[None, :] * stride_Br
    p_a = p_A + i_expert * stride_Ae + o_r[:, None] * stride_Ar + o_k[None, :] * stride_Ak
    tile = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for r in range(0, rank, BLOCK_R):
        b_b = tl.load(p_b, mask=(o_n < rows)[:, None] & (o_r < rank - r)[None, :], other=0.0)
        b_a = tl.load(p_a, mask=(o_r < rank - r)[:, None] & (o_k < width)[None, :], other=0.0)
        tile = tl.dot(b_b, b_a, tile, input_precision=PRECISION)
        p_b += BLOCK_R * tl.cast(stride_Br, tl.int64)
        p_a += BLOCK_R * tl.cast(stride_Ar, tl.int64)
    tile *= scale

    # Experts are further rows of one support.
    finish(
        tile, p_values, p_support, p_bounds, p_W + i_expert * stride_We, i_expert * rows + o_n, o_n, first_column,
        rows, columns, groups, stride_Wn, stride_Wk, STRATIFIED, TABLE, SEGMENT, PIECE, VECTOR,
    )  # fmt: skip


@functools.cache
def tuned_kernel() -> Any:
    """``compose_kernel``, timed with each configuration once for each shape; made when it is first asked for."""
    wide = [
        triton.Config({"BLOCK_N": 128, "BLOCK_K": 256, "BLOCK_R": 64}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_R": 64}, num_warps=4, num_stages=3),
    ]
    key = ["rows", "columns", "rank"]
    return triton.autotune([*CONFIGS.values(), CONFIG_32, *wide], key, cache_results=True)(compose_kernel)


def launch_options(config: triton.Config) -> dict[str, int]:
    """What a launch gets of a configuration; ``all_kwargs`` has more, which ``wrap_triton`` does not take."""
    return {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}


def uniform_bounds(support: Tensor, rows: int, columns: int) -> Tensor:
    """How many entries come before each segment of SEGMENT columns of each row, and how many there are.

    Args:
        support: [P], the sorted flat index.
        rows: Of the whole weight.
        columns: Of the whole weight.

    Returns:
        Of support's dtype and shape [rows * ceil(columns / SEGMENT) + 1].
    """
    row = torch.arange(rows, device=support.device).unsqueeze(1) * columns
    position = row + torch.arange(0, columns, SEGMENT, device=support.device)
    position = torch.cat([position.flatten(), position.new_full((1,), rows * columns)])
    return torch.searchsorted(support, position.to(support.dtype), out_int32=support.dtype == torch.int32)


def compose(
    B: Tensor,
    A: Tensor,
    values: Tensor,
    support: Tensor,
    scale: float,
    dtype: torch.dtype | None = None,
    vector: int = 1,
    *,
    transposed: bool = False,
    autotune: bool = False,
) -> Tensor:
    """Composes a weight, or one for each of E experts.

    Args:
        B: [N, R] or [E, N, R], float32, bfloat16 or float16, of any strides.
        A: [R, K] or [E, R, K], like B.
        values: [N, groups] or [E, N, groups] for the stratified and the vector support, whose row of expert e is
            ``e * N + row``; [P] for the uniform one, of the E * N rows.
        support: The seed, one integer, or the sorted flat index [P], int32 or int64.
        scale: Factor of the low-rank part.
        dtype: Of the result; None is B's.
        vector: Rows that share their columns.
        transposed: Whether the result's rows, not its columns, are neighbours in memory.
        autotune: Whether to time a few configurations, once for each shape, instead of taking the device's.

    Returns:
        [N, K] with strides (K, 1), or (1, N) if transposed; with experts [E, N, K], one such matrix after another.
    """
    experts = B.shape[0] if B.dim() == 3 else 1
    rows, rank = B.shape[-2:]
    columns = A.shape[-1]
    stratified = values.dim() > 1
    values, support = values.contiguous(), support.contiguous()
    shape = (experts, columns, rows) if transposed else (experts, rows, columns)
    W = torch.empty(shape, dtype=dtype or B.dtype, device=B.device)
    W = W.transpose(1, 2) if transposed else W
    bounds = None if stratified else uniform_bounds(support, experts * rows, columns)
    expert_B, expert_A = (B, A) if B.dim() == 3 else (B.unsqueeze(0), A.unsqueeze(0))
    if A.stride(-1) == 1 and A.stride(-2) % ALIGNMENT:
        # Rows that begin anywhere are loaded an element at a time; A is small next to W, so a copy costs less.
        expert_A = torch.nn.functional.pad(expert_A, (0, -columns % ALIGNMENT))

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["BLOCK_N"]) * triton.cdiv(columns, meta["BLOCK_K"]), experts

    if autotune:
        kernel, options = tuned_kernel(), {}
    else:
        config = CONFIG_32 if B.dtype == torch.float32 else CONFIGS[device_class(B.device)]
        kernel, options = compose_kernel, launch_options(config)
    with on_device_of(B):
        launchable(kernel)[grid](
            expert_B,
            expert_A,
            values,
            support,
            bounds,
            W,
            scale,
            rows,
            columns,
            rank,
            values.shape[-1],
            expert_A.shape[-1],
            *expert_B.stride(),
            *expert_A.stride(),
            *W.stride(),
            STRATIFIED=stratified,
            PRECISION=dot_precision(),
            TABLE=TABLE,
            SEGMENT=SEGMENT,
            BAND=BAND,
            PIECE=PIECE,
            VECTOR=vector,
            **options,
        )
    return W if B.dim() == 3 else W.squeeze(0)

"""The vector support's three products with S, for many tokens, on matrix units.

V rows share their columns (V is 16 or more), so that S is a dense matrix [V, G] for each block of rows, multiplied with
G columns of x. In x^T the tokens of a column lie side by side: 256 bytes for each column that a program reads.

    y_TN = hidden_TR @ B_NR^T + x_TK @ S_NK^T + bias_N       one product, whose sum goes on over the columns of S
    dvalues_NG = left_TN^T @ right_TK at the support         split over the tokens
    y_TK = hidden_TR @ A_RK + x_TN @ S_NK + bias_K           first z = x @ S for each block and group, which is written;
                                                             then to each column what the blocks that hold it add

Everything is summed in float32, in one order, without atomics; z alone is rounded before it is added up. Matrices are
padded where their sizes are odd, so that no mask cuts what is read at once.

T tokens, N rows, K columns, R rank, G groups of a row. Prefixes: p_ pointer, b_ block, o_ offset, i_ program index.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_true

from slcompile.cost.devices import gpu_class
from slcompile.cost.matmul import LEAST_VECTOR, VECTOR_SPLIT
from slcompile.kernels.launch import Tiled, dot_precision, launchable, on_device_of
from slcompile.kernels.siblings import check, sum_splits
from slcompile.ops.support import block_columns

GROUPS = 64
"""Rows of values are padded to a multiple of it, the most groups that a program reads at once."""


@triton.jit
def add_through_rank(
    b_y, p_hidden, p_factor, o_t, o_n, tokens, outputs, ranks, s_hidden, s_output, s_rank,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """b_y[t, n] + the sum of hidden[t, r] * factor[n, r] over r."""
    for r in range(0, ranks, BLOCK_R):
        o_r = (r + tl.arange(0, BLOCK_R)).to(tl.int64)
        b_hidden = tl.load(
            p_hidden + o_t[:, None] * s_hidden + o_r[None, :],
            mask=(o_t < tokens)[:, None] & (o_r < ranks)[None, :],
            other=0.0,
        )
        b_factor = tl.load(
            p_factor + o_r[:, None] * s_rank + o_n[None, :] * s_output,
            mask=(o_r < ranks)[:, None] & (o_n < outputs)[None, :],
            other=0.0,
        )
        b_y = tl.dot(b_hidden, b_factor, b_y, input_precision=PRECISION)
    return b_y


@triton.jit
def vector_product_kernel(
    p_hidden, p_factor, p_x, p_columns, p_values, p_bias, p_y,
    tokens, rows, ranks, groups, blocks, s_hidden, s_row, s_rank, s_x, s_values, s_y,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """y[t, n] = sum of hidden[t, r] * factor[n, r] over r, of x[column, t] * value over row n's non-zeros, bias[n].

    A program's rows may be of several blocks: what the columns of one give is multiplied with zeros for the others.
    """
    row_blocks = tl.cdiv(rows, BLOCK_N)
    # 64-bit, after the division. Programs of the same tokens run together, which x is read from the cache for.
    i_n = (tl.program_id(0) % row_blocks).to(tl.int64)
    o_t = (tl.program_id(0) // row_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_y = add_through_rank(
        tl.zeros([BLOCK_T, BLOCK_N], tl.float32),
        p_hidden, p_factor, o_t, o_n, tokens, rows, ranks, s_hidden, s_row, s_rank, PRECISION, BLOCK_R,
    )  # fmt: skip
    BLOCKS: tl.constexpr = (BLOCK_N + VECTOR - 1) // VECTOR
    first = i_n * BLOCK_N // VECTOR
    pieces = tl.cdiv(groups, BLOCK_G)
    for piece in range(BLOCKS * pieces):
        block = first + piece // pieces
        o_g = piece % pieces * BLOCK_G + tl.arange(0, BLOCK_G)
        in_g = (o_g < groups) & (block < blocks)
        column = tl.load(p_columns + block * groups + o_g, mask=in_g, other=0).to(tl.int64)
        b_x = tl.load(p_x + column[None, :] * s_x + o_t[:, None], mask=in_g[None, :] & (o_t < s_x)[:, None], other=0.0)
        in_n = (o_n // VECTOR == block) & (block < blocks)
        b_value = tl.load(p_values + o_n[None, :] * s_values + o_g[:, None], mask=in_n[None, :], other=0.0)
        b_y = tl.dot(b_x, b_value, b_y, input_precision=PRECISION)
    if BIAS:
        b_y += tl.load(p_bias + o_n, mask=o_n < rows, other=0.0).to(tl.float32)[None, :]
    b_y = b_y.to(p_y.dtype.element_ty)
    tl.store(p_y + o_t[:, None] * s_y + o_n[None, :], b_y, mask=(o_t < tokens)[:, None] & (o_n < s_y)[None, :])


@triton.jit
def vector_values_kernel(
    p_left, p_right, p_columns, p_partial, tokens, rows, groups, s_left, s_right, total,
    PRECISION: tl.constexpr, VECTOR: tl.constexpr, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """partial[split, n, g] = sum of left[t, n] * right[column of g, t] over the tokens of a split, float32."""
    pieces = tl.cdiv(groups, BLOCK_G)
    i_split = tl.program_id(1).to(tl.int64)
    block = (tl.program_id(0) // pieces).to(tl.int64)
    o_g = tl.program_id(0) % pieces * BLOCK_G + tl.arange(0, BLOCK_G)
    in_g = o_g < groups
    column = tl.load(p_columns + block * groups + o_g, mask=in_g, other=0).to(tl.int64)
    o_n = block * VECTOR + tl.arange(0, VECTOR)
    b_sum = tl.zeros([BLOCK_G, VECTOR], tl.float32)
    first = i_split * SPLIT
    for t in range(first, tl.minimum(first + SPLIT, tokens), BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        b_right = tl.load(
            p_right + column[:, None] * s_right + o_t[None, :], mask=in_g[:, None] & (o_t < s_right)[None, :], other=0.0
        )
        b_left = tl.load(p_left + o_t[:, None] * s_left + o_n[None, :], mask=(o_t < tokens)[:, None], other=0.0)
        b_sum = tl.dot(b_right, b_left, b_sum, input_precision=PRECISION)
    o_partial = i_split * total + o_n[None, :] * groups + o_g[:, None]
    tl.store(p_partial + o_partial, b_sum, mask=in_g[:, None] & (o_n < rows)[None, :])


@triton.jit
def vector_blocks_kernel(
    p_x, p_values, p_z, tokens, groups, blocks, s_x, s_values, s_z,
    PRECISION: tl.constexpr, VECTOR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """z[block * groups + g, t] = sum of x[t, n] * values[n, g] over the rows n of a block."""
    block = (tl.program_id(0) % blocks).to(tl.int64)
    o_t = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_n = block * VECTOR + tl.arange(0, VECTOR)
    b_x = tl.load(p_x + o_t[None, :] * s_x + o_n[:, None], mask=(o_t < tokens)[None, :], other=0.0)
    for g in range(0, groups, BLOCK_G):
        o_g = g + tl.arange(0, BLOCK_G)
        b_value = tl.load(p_values + o_n[None, :] * s_values + o_g[:, None])
        b_z = tl.dot(b_value, b_x, input_precision=PRECISION).to(p_z.dtype.element_ty)
        o_z = (block * groups + o_g)[:, None] * s_z + o_t[None, :]
        tl.store(p_z + o_z, b_z, mask=(o_g < groups)[:, None] & (o_t < s_z)[None, :])


@triton.jit
def vector_order_kernel(p_columns, p_order, p_begin, columns, groups, blocks, BLOCK: tl.constexpr):
    """Sorts a group's non-zeros by their columns: order[begin[k] ...] are the rows of z that column k adds up."""
    group = tl.program_id(0)
    o_block = tl.arange(0, BLOCK)
    in_block = o_block < blocks
    column = tl.load(p_columns + o_block * groups + group, mask=in_block, other=columns)
    rank = tl.zeros([BLOCK], tl.int32)
    for block in range(blocks):
        other = tl.load(p_columns + block * groups + group)
        rank += ((other < column) | ((other == column) & (block < o_block))).to(tl.int32)
    tl.store(p_order + group * blocks + rank, o_block * groups + group, mask=in_block)
    first = group.to(tl.int64) * columns // groups
    last = (group + 1).to(tl.int64) * columns // groups
    for k in range(first, last):
        tl.store(p_begin + k, group * blocks + tl.sum((column < k).to(tl.int32)))
    if last == columns:
        tl.store(p_begin + columns, groups * blocks)


@triton.jit
def vector_product_transposed_kernel(
    p_hidden, p_factor, p_z, p_order, p_begin, p_bias, p_y,
    tokens, columns, ranks, s_hidden, s_rank, s_column, s_z, s_y,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[t, k] = sum of hidden[t, r] * factor[r, k] over r, of z[., t] over the blocks that hold column k, bias[k]."""
    column_blocks = tl.cdiv(columns, BLOCK_K)
    o_k = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_t = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    begin = tl.load(p_begin + o_k, mask=o_k < columns, other=0)
    count = tl.load(p_begin + o_k + 1, mask=o_k < columns, other=0) - begin
    b_y = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for place in range(tl.max(count)):
        there = place < count
        o_z = tl.load(p_order + begin + place, mask=there, other=0).to(tl.int64)
        in_z = there[None, :] & (o_t < s_z)[:, None]
        b_y += tl.load(p_z + o_z[None, :] * s_z + o_t[:, None], mask=in_z, other=0.0).to(tl.float32)
    b_y = add_through_rank(
        b_y, p_hidden, p_factor, o_t, o_k, tokens, columns, ranks, s_hidden, s_column, s_rank, PRECISION, BLOCK_R
    )
    if BIAS:
        b_y += tl.load(p_bias + o_k, mask=o_k < columns, other=0.0).to(tl.float32)[None, :]
    b_y = b_y.to(p_y.dtype.element_ty)
    tl.store(p_y + o_t[:, None] * s_y + o_k[None, :], b_y, mask=(o_t < tokens)[:, None] & (o_k < s_y)[None, :])


PRODUCT, PRODUCT_64 = (  # the second where 64 rows or more share their columns
    Tiled(
        vector_product_kernel,
        name,
        {"BLOCK_T": (128,), "BLOCK_N": (64, 128), "BLOCK_R": (64,), "BLOCK_G": (32, 64)},
        ["rows", "ranks", "groups"],
    )
    for name in ("vector_product", "vector_product_64")
)
VALUES = Tiled(
    vector_values_kernel, "vector_values", {"BLOCK_T": (64, 128), "BLOCK_G": (64,)}, ["rows", "groups"]
)  # fmt: skip
BLOCKS = Tiled(vector_blocks_kernel, "vector_blocks", {"BLOCK_T": (128, 256), "BLOCK_G": (64,)}, ["blocks", "groups"])
TRANSPOSED = Tiled(
    vector_product_transposed_kernel,
    "vector_product_transposed",
    {"BLOCK_T": (128,), "BLOCK_K": (64, 128), "BLOCK_R": (64,)},
    ["columns", "ranks"],
)


def serves(x: Tensor, vector: int) -> bool:
    """Returns whether these kernels multiply x: enough rows share their columns, and it has many tokens.

    A symbolic number of tokens is guarded to one side of what other kernels are for.
    """
    few = gpu_class(x.device).factored_tokens
    return vector >= LEAST_VECTOR and (few is None or guard_or_true(x.shape[0] > few))


def linear_factored(
    x: Tensor,
    hiddens: Sequence[Tensor],
    factors: Sequence[Tensor],
    values: Sequence[Tensor],
    supports: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    transposed: bool,
    vector: int,
    *,
    autotune: bool = False,
) -> list[Tensor]:
    """Completes what the vendor's matmul began: ``hidden @ factor^T + x @ S^T + bias`` of each sibling, or transposed.

    Args:
        x: [T, K], or [T, N] if transposed; float32, bfloat16 or float16, of any strides.
        hiddens: [T, R] each, like x, scaled.
        factors: B [N, R] each, or A [R, K] if transposed; like x, of any strides.
        values: [N, G] each, like x.
        supports: The seed of each.
        biases: [N], or [K] if transposed, or None for each, like x.
        transposed: Whether to multiply with W rather than with its transpose.
        vector: Rows that share their columns, 16 or more.
        autotune: Measures several tiles at the first call for a shape, instead of taking the device's default.

    Returns:
        [T, N] each, or [T, K] if transposed; like x, its rows neighbours in memory with a gap where that aligns them.
    """
    check(x, [*hiddens, *factors, *values, *(bias for bias in biases if bias is not None)])
    each_of = list(zip(hiddens, factors, values, supports, biases, strict=True))
    if transposed:
        x = _with_columns(x, vector)
        return [_transposed(x, *each, vector, autotune) for each in each_of]
    x_T = tokens_side_by_side(x)
    return [_product(x_T, x.shape[1], *each, vector, autotune) for each in each_of]


def _product(
    x_T: Tensor,
    columns: int,
    hidden: Tensor,
    factor: Tensor,
    values: Tensor,
    support: Tensor,
    bias: Tensor | None,
    vector: int,
    autotune: bool,
) -> Tensor:
    (tokens, ranks), (rows, groups) = hidden.shape, values.shape
    hidden, padded = hidden.contiguous(), _padded_values(values, vector)
    y = x_T.new_empty(tokens, _padded_columns(rows, vector))
    columns_of = _columns_of(values, support, columns, vector)
    kernel, tile = (PRODUCT if vector < 64 else PRODUCT_64).to_launch(x_T, autotune)

    def grid(meta):
        return (triton.cdiv(rows, meta["BLOCK_N"]) * triton.cdiv(tokens, meta["BLOCK_T"]),)

    with on_device_of(x_T):
        kernel[grid](
            hidden, factor, x_T, columns_of, padded, None if bias is None else bias.contiguous(), y,
            tokens, rows, ranks, groups, triton.cdiv(rows, vector),
            hidden.stride(0), *factor.stride(), x_T.stride(0), padded.stride(0), y.stride(0),
            BIAS=bias is not None, PRECISION=dot_precision(), VECTOR=vector, **tile,
        )  # fmt: skip
    return y.narrow(1, 0, rows)


def _transposed(
    x: Tensor,
    hidden: Tensor,
    factor: Tensor,
    values: Tensor,
    support: Tensor,
    bias: Tensor | None,
    vector: int,
    autotune: bool,
) -> Tensor:
    (tokens, ranks), (rows, groups), columns = hidden.shape, values.shape, factor.shape[1]
    hidden, padded, factor = hidden.contiguous(), _padded_values(values, vector), _with_columns(factor, 16)
    blocks = triton.cdiv(rows, vector)
    columns_of = _columns_of(values, support, columns, vector)
    order, begin = inverse(columns_of, columns)
    z = x.new_empty(blocks * groups, _whole(tokens))
    y = x.new_empty(tokens, factor.shape[1])
    z_kernel, z_tile = BLOCKS.to_launch(x, autotune)
    y_kernel, y_tile = TRANSPOSED.to_launch(x, autotune)

    def z_grid(meta):
        return (blocks * triton.cdiv(tokens, meta["BLOCK_T"]),)

    def y_grid(meta):
        return (triton.cdiv(columns, meta["BLOCK_K"]) * triton.cdiv(tokens, meta["BLOCK_T"]),)

    with on_device_of(x):
        z_kernel[z_grid](
            x, padded, z, tokens, groups, blocks, x.stride(0), padded.stride(0), z.stride(0),
            PRECISION=dot_precision(), VECTOR=vector, **z_tile,
        )  # fmt: skip
        y_kernel[y_grid](
            hidden, factor, z, order, begin, None if bias is None else bias.contiguous(), y,
            tokens, columns, ranks, hidden.stride(0), *factor.stride(), z.stride(0), y.stride(0),
            BIAS=bias is not None, PRECISION=dot_precision(), **y_tile,
        )  # fmt: skip
    return y.narrow(1, 0, columns)


def inverse(columns_of: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Returns for each column which blocks hold it, in their order.

    Args:
        columns_of: [blocks, G], int32.
        columns: K.

    Returns:
        Flat positions in ``columns_of``, ordered by its entries, int32 [blocks * G], and where those of each column
        begin and the last end, int32 [K + 1].
    """
    blocks, groups = columns_of.shape
    order = torch.empty(blocks * groups, dtype=torch.int32, device=columns_of.device)
    begin = torch.empty(columns + 1, dtype=torch.int32, device=columns_of.device)
    with on_device_of(columns_of):
        launchable(vector_order_kernel)[(groups,)](
            columns_of, order, begin, columns, groups, blocks, BLOCK=triton.next_power_of_2(blocks)
        )
    return order, begin


def values_grad(
    left: Tensor, right: Tensor, values: Tensor, support: Tensor, vector: int, *, autotune: bool = False
) -> Tensor:
    """Returns gradient of ``values``: ``left^T @ right`` at the support, without the other entries.

    Args:
        left: [T, N], float32, bfloat16 or float16, of any strides.
        right: [T, K], like left.
        values: [N, G]; its numbers are not read.
        support: The seed.
        vector: Rows that share their columns, 16 or more.
        autotune: As above.

    Returns:
        Of the shape and dtype of values, contiguous.
    """
    (tokens, columns), (rows, groups) = right.shape, values.shape
    left, right_T = _with_columns(left, vector), tokens_side_by_side(right)
    columns_of = _columns_of(values, support, columns, vector)
    found = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    splits = triton.cdiv(tokens, VECTOR_SPLIT)
    partial = torch.empty(splits, rows * groups, dtype=torch.float32, device=values.device)
    kernel, tile = VALUES.to_launch(left, autotune)

    def grid(meta):
        return triton.cdiv(rows, vector) * triton.cdiv(groups, meta["BLOCK_G"]), splits

    with on_device_of(left):
        kernel[grid](
            left, right_T, columns_of, partial,
            tokens, rows, groups, left.stride(0), right_T.stride(0), partial.shape[1],
            PRECISION=dot_precision(), VECTOR=vector, SPLIT=VECTOR_SPLIT, **tile,
        )  # fmt: skip
    sum_splits(partial, [None] * 3, [found], [None])
    return found


def _whole(tokens: int) -> int:
    """Returns the tokens and so many more, one at least, that a row of them is aligned."""
    return (tokens // 64 + 1) * 64


def tokens_side_by_side(x: Tensor) -> Tensor:
    """Returns x^T with zeros after the tokens of a row, which aligns it; all that read it share it as one node.

    At least one token is added, so that Inductor makes the copy in a kernel of its own, which goes through both
    matrices in tiles. Of x's size, it would be stored by a norm that makes x, each number far from the next.
    """
    return _made_once(torch.nn.functional.pad(x, (0, 0, 0, _whole(x.shape[0]) - x.shape[0])).t().contiguous())


def _columns_of(values: Tensor, support: Tensor, columns: int, vector: int) -> Tensor:
    """Returns the columns of each block of rows, int32 [blocks, G]."""
    rows, groups = values.shape
    return _made_once(block_columns(support, rows, columns, groups, vector).int())


def _made_once(tensor: Tensor) -> Tensor:
    """Returns the tensor as it is; Inductor makes what as_strided reads once, and not for each launch that reads it."""
    return tensor.as_strided(tensor.shape, tensor.stride())


def _with_columns(matrix: Tensor, of: int) -> Tensor:
    """Returns the matrix, its rows contiguous, with zeros for columns up to a multiple."""
    more = _padded_columns(matrix.shape[1], of) - matrix.shape[1]
    return _made_once(torch.nn.functional.pad(matrix, (0, more))) if more else matrix.contiguous()


def _padded_columns(columns: int, of: int) -> int:
    """Returns the columns if they are a multiple; else so many that rows are aligned as Inductor aligns them."""
    return columns if columns % of == 0 else columns + -columns % max(64, of)


def _padded_values(values: Tensor, vector: int) -> Tensor:
    """Returns values with zeros for rows of a whole last block and for groups up to a multiple of ``GROUPS``."""
    more = (0, -values.shape[1] % GROUPS, 0, -values.shape[0] % vector)
    return torch.nn.functional.pad(values, more) if any(more) else values.contiguous()

"""linear_factored: y_TN = hidden_TR @ B_NR^T + x_TK @ S_NK^T + bias_N, with hidden_TR = scale * x_TK @ A_RK^T.

Its input gradient, too: y_TK = hidden_TR @ A_RK + x_TN @ S_NK, with hidden_TR = scale * x_TN @ B_NR.

For few tokens, where reading the weight is all that costs time: each factor and each value is read once from memory
and W_NK = scale * B @ A + S is never formed. Projections of one input (query, key and value; gate and up) are siblings
and share a launch. The vector support has kernels for many tokens, too: ``vector_products``.

T tokens, N rows, K columns, R rank, G groups of a row. ``values`` and ``support`` are [N, G] and the seed for the
stratified support, [P] and the sorted flat index [P] for the uniform one.

Prefixes: p_ pointer, b_ block, o_ offset, i_ program index. A parameter of one sibling ends in its number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from slcompile.cost.matmul import SPLIT
from slcompile.kernels import vector_products
from slcompile.kernels.launch import Tiled, dot_precision, on_device_of
from slcompile.kernels.siblings import (
    batches,
    bias_parameters,
    check,
    four,
    partial_sums,
    pick,
    strides,
    sum_splits,
    token_block,
)
from slcompile.kernels.support import mix32, stratified_column


@triton.jit
def linear_factored_kernel(
    p_x,
    p_hidden_0, p_hidden_1, p_hidden_2, p_hidden_3,
    p_factor_0, p_factor_1, p_factor_2, p_factor_3,
    p_values_0, p_values_1, p_values_2, p_values_3,
    p_support_0, p_support_1, p_support_2, p_support_3,
    p_entry_0, p_entry_1, p_entry_2, p_entry_3,
    p_bias_0, p_bias_1, p_bias_2, p_bias_3,
    p_y_0, p_y_1, p_y_2, p_y_3,
    rows_0, rows_1, rows_2, rows_3,
    ranks_0, ranks_1, ranks_2, ranks_3,
    groups_0, groups_1, groups_2, groups_3,
    s_row_0, s_row_1, s_row_2, s_row_3,
    s_rank_0, s_rank_1, s_rank_2, s_rank_3,
    tokens, columns,
    COUNT: tl.constexpr, UNIFORM: tl.constexpr, BIASES: tl.constexpr, PRECISION: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """y[t, n] = sum of hidden[t, r] * factor[n, r] over r, of x[t, column] * value over row n's non-zeros, bias[n].

    x comes as [token blocks, columns, BLOCK_T], padded with zeros, so that the tokens of a column, which a non-zero
    needs together, are one read of up to 128 bytes. BIASES has a bit for each sibling that has a bias.
    """
    i_sibling = tl.program_id(1)
    p_hidden = pick(i_sibling, p_hidden_0, p_hidden_1, p_hidden_2, p_hidden_3, COUNT)
    p_factor = pick(i_sibling, p_factor_0, p_factor_1, p_factor_2, p_factor_3, COUNT)
    p_values = pick(i_sibling, p_values_0, p_values_1, p_values_2, p_values_3, COUNT)
    p_support = pick(i_sibling, p_support_0, p_support_1, p_support_2, p_support_3, COUNT)
    p_y = p_y_0
    if COUNT > 1:
        p_y = tl.where(i_sibling == 1, p_y_1, p_y)
    if COUNT > 2:
        p_y = tl.where(i_sibling == 2, p_y_2, p_y)
    if COUNT > 3:
        p_y = tl.where(i_sibling == 3, p_y_3, p_y)
    rows = pick(i_sibling, rows_0, rows_1, rows_2, rows_3, COUNT)
    ranks = pick(i_sibling, ranks_0, ranks_1, ranks_2, ranks_3, COUNT)
    s_row = pick(i_sibling, s_row_0, s_row_1, s_row_2, s_row_3, COUNT)
    s_rank = pick(i_sibling, s_rank_0, s_rank_1, s_rank_2, s_rank_3, COUNT)

    token_blocks = tl.cdiv(tokens, BLOCK_T)
    # 64-bit, after the division: the weight may have more than 2**31 elements.
    i_t = (tl.program_id(0) % token_blocks).to(tl.int64)
    i_n = (tl.program_id(0) // token_blocks).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = o_n < rows
    # The grid fits the widest sibling: in a narrower one, the blocks after the last have nothing to read.
    is_inside = i_n * BLOCK_N < rows

    # A matrix instruction takes 8 tokens or more; one token alone is padded for it, and only for it.
    DOT_T: tl.constexpr = 16 if BLOCK_T == 1 else BLOCK_T
    o_dot = i_t * BLOCK_T + tl.arange(0, DOT_T)
    in_dot = o_dot < tokens if BLOCK_T > 1 else tl.arange(0, DOT_T) < 1
    b_dot = tl.zeros([BLOCK_N, DOT_T], tl.float32)
    for r in range(0, tl.where(is_inside, ranks, 0), BLOCK_R):
        o_r = r + tl.arange(0, BLOCK_R)
        in_r = o_r < ranks
        b_factor = tl.load(
            p_factor + o_n[:, None] * s_row + o_r[None, :].to(tl.int64) * s_rank,
            mask=in_n[:, None] & in_r[None, :],
            other=0.0,
        )
        b_hidden = tl.load(
            p_hidden + o_dot[None, :] * ranks + o_r[:, None], mask=in_dot[None, :] & in_r[:, None], other=0.0
        )
        b_dot = tl.dot(b_factor, b_hidden, b_dot, input_precision=PRECISION)

    # The non-zeros: as many of a row at once as make GATHER elements of x. One accumulator for each, summed at the
    # end, so that no reduction stands between one gather and the next.
    BLOCK_G: tl.constexpr = 64 if BLOCK_T == 1 else GATHER // (BLOCK_N * BLOCK_T)
    if UNIFORM:
        p_entry = pick(i_sibling, p_entry_0, p_entry_1, p_entry_2, p_entry_3, COUNT)
        first = tl.load(p_entry + o_n, mask=in_n, other=0).to(tl.int64)
        last = tl.load(p_entry + o_n + 1, mask=in_n, other=0).to(tl.int64)
        groups = tl.max(last - first)
    else:
        groups = pick(i_sibling, groups_0, groups_1, groups_2, groups_3, COUNT)
        mixed_seed = mix32(tl.load(p_support).to(tl.uint32))
    p_tokens = p_x + i_t * columns * BLOCK_T + tl.arange(0, BLOCK_T)[None, None, :]
    b_gather = tl.zeros([BLOCK_N, BLOCK_G, BLOCK_T], tl.float32)
    for g in range(0, tl.where(is_inside, groups, 0), BLOCK_G):
        o_g = g + tl.arange(0, BLOCK_G)
        if UNIFORM:
            o_entry = first[:, None] + o_g[None, :]
            in_entry = o_entry < last[:, None]
            position = tl.load(p_support + o_entry, mask=in_entry, other=0).to(tl.int64)
            column = tl.where(in_entry, position - o_n[:, None] * columns, 0)
        else:
            o_entry = o_n[:, None] * groups + o_g[None, :]
            in_entry = in_n[:, None] & (o_g < groups)[None, :]
            column = stratified_column(mixed_seed, o_n[:, None], o_g[None, :], columns, groups, VECTOR)
        b_value = tl.load(p_values + o_entry, mask=in_entry, other=0.0).to(tl.float32)
        b_x = tl.load(p_tokens + column[:, :, None] * BLOCK_T, mask=in_entry[:, :, None], other=0.0)
        b_gather += b_value[:, :, None] * b_x.to(tl.float32)

    b_y = tl.sum(b_gather, 1)
    if BLOCK_T == 1:
        b_y += tl.sum(b_dot, 1)[:, None]
    else:
        b_y += b_dot
    if BIASES != 0:
        p_bias = pick(i_sibling, p_bias_0, p_bias_1, p_bias_2, p_bias_3, COUNT)
        has_bias = ((BIASES >> i_sibling) & 1) != 0
        b_y += tl.load(p_bias + o_n, mask=in_n & has_bias, other=0.0).to(tl.float32)[:, None]
    tl.store(p_y + o_t[None, :] * rows + o_n[:, None], b_y, mask=in_n[:, None] & (o_t < tokens)[None, :])


@triton.jit
def linear_factored_transposed_kernel(
    p_x, p_partial,
    p_hidden_0, p_hidden_1, p_hidden_2, p_hidden_3,
    p_factor_0, p_factor_1, p_factor_2, p_factor_3,
    p_values_0, p_values_1, p_values_2, p_values_3,
    p_support_0, p_support_1, p_support_2, p_support_3,
    columns_0, columns_1, columns_2, columns_3,
    ranks_0, ranks_1, ranks_2, ranks_3,
    groups_0, groups_1, groups_2, groups_3,
    s_rank_0, s_rank_1, s_rank_2, s_rank_3,
    s_column_0, s_column_1, s_column_2, s_column_3,
    begin_1, begin_2, begin_3,
    tokens, rows, total, s_x_token, s_x_row,
    COUNT: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, TOUCHED: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Computes the part of a split, float32, over the ranks r and the rows n of the split.

    partial[split, t, k] = sum of hidden[t, r] * factor[r, k] and of x[t, n] * S[n, k].

    TOUCHED is a power of two that is no less than the number of groups which have a column in a block of BLOCK_K.
    """
    i_split = tl.program_id(1)
    i_sibling = tl.program_id(2)
    p_hidden = pick(i_sibling, p_hidden_0, p_hidden_1, p_hidden_2, p_hidden_3, COUNT)
    p_factor = pick(i_sibling, p_factor_0, p_factor_1, p_factor_2, p_factor_3, COUNT)
    p_values = pick(i_sibling, p_values_0, p_values_1, p_values_2, p_values_3, COUNT)
    p_support = pick(i_sibling, p_support_0, p_support_1, p_support_2, p_support_3, COUNT)
    columns = pick(i_sibling, columns_0, columns_1, columns_2, columns_3, COUNT)
    ranks = pick(i_sibling, ranks_0, ranks_1, ranks_2, ranks_3, COUNT)
    groups = pick(i_sibling, groups_0, groups_1, groups_2, groups_3, COUNT)
    s_rank = pick(i_sibling, s_rank_0, s_rank_1, s_rank_2, s_rank_3, COUNT)
    s_column = pick(i_sibling, s_column_0, s_column_1, s_column_2, s_column_3, COUNT)
    begin = pick(i_sibling, 0, begin_1, begin_2, begin_3, COUNT)

    token_blocks = tl.cdiv(tokens, BLOCK_T)
    # 64-bit, after the division: the weight and the partial sums may have more than 2**31 elements.
    o_t = (tl.program_id(0) % token_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_column = (tl.program_id(0) // token_blocks).to(tl.int64) * BLOCK_K
    o_k = first_column + tl.arange(0, BLOCK_K)
    in_t, in_k = o_t < tokens, o_k < columns
    # The grid fits the widest sibling: in a narrower one, the blocks after the last have nothing to read.
    is_inside = first_column < columns

    b_sum = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    share = tl.cdiv(tl.cdiv(ranks, tl.num_programs(1)), BLOCK_R) * BLOCK_R
    first_rank = i_split * share
    for r in range(first_rank, tl.where(is_inside, tl.minimum(first_rank + share, ranks), first_rank), BLOCK_R):
        o_r = (r + tl.arange(0, BLOCK_R)).to(tl.int64)
        in_r = o_r < ranks
        b_hidden = tl.load(
            p_hidden + o_t[:, None] * ranks + o_r[None, :], mask=in_t[:, None] & in_r[None, :], other=0.0
        )
        b_factor = tl.load(
            p_factor + o_r[:, None] * s_rank + o_k[None, :] * s_column, mask=in_r[:, None] & in_k[None, :], other=0.0
        )
        b_sum = tl.dot(b_hidden, b_factor, b_sum, input_precision=PRECISION)

    # A column's group, counted from the first one that has a column in this block.
    group_of = ((o_k + 1) * groups - 1) // columns
    first_group = ((first_column + 1) * groups - 1) // columns
    # Columns beyond the last are in no group; the index that they get has to exist.
    o_touched = tl.minimum(group_of - first_group, TOUCHED - 1).to(tl.int32)
    o_g = first_group + tl.arange(0, TOUCHED)
    mixed_seed = mix32(tl.load(p_support).to(tl.uint32))
    first_row = i_split * SPLIT
    for n in range(first_row, tl.where(is_inside, tl.minimum(first_row + SPLIT, rows), first_row), BLOCK_N):
        o_n = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
        in_n = o_n < rows
        b_x = tl.load(
            p_x + o_t[:, None] * s_x_token + o_n[None, :] * s_x_row, mask=in_t[:, None] & in_n[None, :], other=0.0
        )
        b_value = tl.load(
            p_values + o_n[:, None] * groups + o_g[None, :], mask=in_n[:, None] & (o_g < groups)[None, :], other=0.0
        )
        # Once for each non-zero, then spread over the columns of its group: the hash is most of the arithmetic.
        column = stratified_column(mixed_seed, o_n[:, None], o_g[None, :], columns, groups, VECTOR)
        b_index = tl.broadcast_to(o_touched[None, :], [BLOCK_N, BLOCK_K])
        b_column = tl.gather((column - first_column).to(tl.int32), b_index, 1)
        b_S = tl.where(b_column == tl.arange(0, BLOCK_K)[None, :], tl.gather(b_value, b_index, 1), 0.0)
        b_sum = tl.dot(b_x, b_S.to(b_x.dtype), b_sum, input_precision=PRECISION)
    o_partial = i_split.to(tl.int64) * total + begin + o_t[:, None] * columns + o_k[None, :]
    tl.store(p_partial + o_partial, b_sum, mask=in_t[:, None] & in_k[None, :])


PRODUCT = Tiled(
    linear_factored_kernel,
    "linear_factored",
    {"BLOCK_N": (16, 32), "BLOCK_R": (64,), "GATHER": (4096, 8192)},
    ["columns", "rows_0", "rows_1", "ranks_0", "groups_0", "BLOCK_T"],
)
TRANSPOSED = Tiled(
    linear_factored_transposed_kernel,
    "linear_factored_transposed",
    {"BLOCK_K": (32, 64), "BLOCK_R": (64,), "BLOCK_N": (64, 128)},
    ["rows", "columns_0", "columns_1", "ranks_0", "groups_0", "BLOCK_T"],
)


def linear_factored(
    x: Tensor,
    hiddens: Sequence[Tensor],
    factors: Sequence[Tensor],
    values: Sequence[Tensor],
    supports: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    transposed: bool = False,
    vector: int = 1,
    *,
    autotune: bool = False,
) -> list[Tensor]:
    """Completes what ``project`` began, for each sibling: ``hidden @ factor^T + x @ S^T + bias``, or transposed.

    Not transposed, a program owns a block of rows: it reads their part of B once, computes or reads the columns of
    their non-zeros, and gathers these columns' tokens from a copy of x with its tokens side by side (x stays in the
    cache: it is T / R of the factor).

    Transposed, ``hidden @ factor + x @ S``: a program owns a block of columns and a piece of the rows, recomputes the
    non-zeros of the groups that touch its columns (a value is read about twice), and makes of them a small dense tile
    for a matrix instruction. As in ``project``, a second launch adds up the pieces in one order.

    Args:
        x: [T, K], or [T, N] if transposed; float32, bfloat16 or float16, of any strides.
        hiddens: [T, R] each, like x, scaled; best contiguous, as ``project`` makes them: others are copied.
        factors: B [N, R] each, or A [R, K] if transposed; like x, of any strides.
        values: [N, G] each for the stratified support, [P] for the uniform one; like x; best contiguous.
        supports: The seed or the sorted flat index of each, an integer tensor. All siblings have the same kind.
        biases: [N], or [K] if transposed, or None for each, like x; None if there are none.
        transposed: Whether to multiply with W rather than with its transpose: the input gradient, and the forward of
            a weight that is stored [in, out].
        vector: Rows that share their columns, of each.
        autotune: As for ``project``.

    Returns:
        [T, N] each, or [T, K] if transposed; like x, contiguous, or with a gap between rows where that aligns them.

    Raises:
        NotImplementedError: transposed with the uniform support, whose non-zeros are in the order of rows: to find a
            column's, one would have to search all of them, or add with atomics in an order that varies. Compose W.
    """
    biases = [None] * len(factors) if biases is None else biases
    assert len(hiddens) == len(factors) == len(values) == len(supports) == len(biases)
    assert len({each.dim() for each in values}) == 1, "one kind of support for all siblings"
    if vector_products.serves(x, vector):
        return vector_products.linear_factored(
            x, hiddens, factors, values, supports, biases, transposed, vector, autotune=autotune
        )
    check(x, [*hiddens, *factors, *values, *(bias for bias in biases if bias is not None)])
    hiddens, values = [each.contiguous() for each in hiddens], [each.contiguous() for each in values]
    supports = [each.contiguous() for each in supports]
    if transposed:
        return _transposed(x, hiddens, factors, values, supports, biases, vector, autotune)

    tokens, columns = x.shape
    results = [x.new_empty(tokens, factor.shape[0]) for factor in factors]
    block_t = token_block(tokens)
    token_blocks = triton.cdiv(tokens, block_t)
    # [token blocks, K, BLOCK_T], see the kernel. One token is in this form already.
    padded = torch.nn.functional.pad(x, (0, 0, 0, token_blocks * block_t - tokens))
    x_blocks = padded.view(token_blocks, block_t, columns).transpose(1, 2).contiguous()
    uniform = values[0].dim() == 1
    kernel, tile = PRODUCT.to_launch(x, autotune)
    for some in batches(len(factors)):
        part = factors[some]
        rows, ranks = [each.shape[0] for each in part], [each.shape[1] for each in part]
        groups = [None if uniform else each.shape[1] for each in values[some]]
        entries = [_row_entries(each, count, columns) if uniform else None
                   for each, count in zip(supports[some], rows, strict=True)]  # fmt: skip
        bias, has_bias = bias_parameters(biases[some])

        def grid(meta, rows=rows):
            return triton.cdiv(max(rows), meta["BLOCK_N"]) * token_blocks, len(rows)

        with on_device_of(x):
            kernel[grid](
                x_blocks, *four(hiddens[some]), *four(part), *four(values[some]), *four(supports[some]),
                *four(entries), *bias, *four(results[some]),
                *four(rows), *four(ranks), *four(groups), *strides(part), tokens, columns,
                COUNT=len(part), UNIFORM=uniform, BIASES=has_bias, PRECISION=dot_precision(),
                VECTOR=vector, BLOCK_T=block_t, **tile,
            )  # fmt: skip
    return results


def _transposed(
    x: Tensor,
    hiddens: Sequence[Tensor],
    factors: Sequence[Tensor],
    values: Sequence[Tensor],
    supports: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    vector: int,
    autotune: bool,
) -> list[Tensor]:
    if values[0].dim() == 1:
        raise NotImplementedError("linear_factored(transposed=True) has no kernel for the uniform support: compose it")
    tokens, rows = x.shape
    results = [x.new_empty(tokens, factor.shape[1]) for factor in factors]
    block_t = max(16, token_block(tokens))
    kernel, tile = TRANSPOSED.to_launch(x, autotune)
    # Of all tiles that may be used: the widest block of columns, and the most threads to a row, 64 to a warp.
    tiles = TRANSPOSED.tried
    widest = tile.get("BLOCK_K", max(tiles["BLOCK_K"]))
    least = triton.cdiv(64 * tile.get("num_warps", 4), tile.get("BLOCK_N", min(tiles["BLOCK_N"])))
    for some in batches(len(factors)):
        outputs, part = results[some], factors[some]
        partial, begins = partial_sums(x, outputs, rows)
        ranks, columns = [each.shape[0] for each in part], [each.shape[1] for each in part]
        groups = [each.shape[1] for each in values[some]]
        # With fewer, tl.gather would have a source smaller than the program, for which AMD's compiler fails.
        touched = least
        for count, of in zip(groups, columns, strict=True):
            # Consecutive columns c and c + 1 differ by at most one group, c and c + d by at most ceil(d * G / K).
            while touched < triton.cdiv((widest - 1) * count, of) + 1:
                touched *= 2

        def grid(meta, columns=columns):
            blocks = triton.cdiv(max(columns), meta["BLOCK_K"]) * triton.cdiv(tokens, block_t)
            return blocks, triton.cdiv(rows, SPLIT), len(columns)

        with on_device_of(x):
            kernel[grid](
                x, partial, *four(hiddens[some]), *four(part), *four(values[some]), *four(supports[some]),
                *four(columns), *four(ranks), *four(groups), *strides(part), *begins,
                tokens, rows, partial.shape[1], *x.stride(),
                COUNT=len(part), PRECISION=dot_precision(), SPLIT=SPLIT, TOUCHED=touched,
                VECTOR=vector, BLOCK_T=block_t, **tile,
            )  # fmt: skip
        sum_splits(partial, begins, outputs, biases[some])
    return results


def _row_entries(index: Tensor, rows: int, columns: int) -> Tensor:
    """Finds where each row's entries begin in a sorted flat index, and where the last ends, [rows + 1]."""
    # Of what it knows, Inductor would compute the product in 32 bits: a zero that is read is none of that.
    zero = index.narrow(0, 0, 1) & 0
    starts = (torch.arange(rows + 1, dtype=index.dtype, device=index.device) + zero) * columns
    return torch.searchsorted(index, starts, out_int32=index.dtype == torch.int32)

"""project: hidden_TR = scale * x_TK @ factor_RK^T, for several factors that read the same x.

T tokens, K columns, R rank. For few tokens, where reading the factor is all that costs time: each is read once.

Prefixes: p_ pointer, b_ block, o_ offset, i_ program index. A parameter of one sibling ends in its number.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from slcompile.cost.matmul import SPLIT
from slcompile.kernels.launch import Tiled, dot_precision, on_device_of
from slcompile.kernels.siblings import (
    batches,
    check,
    four,
    partial_sums,
    pick,
    strides,
    sum_splits,
    token_block,
)


@triton.jit
def project_kernel(
    p_x, p_partial,
    p_factor_0, p_factor_1, p_factor_2, p_factor_3,
    scale_0, scale_1, scale_2, scale_3,
    ranks_0, ranks_1, ranks_2, ranks_3,
    s_rank_0, s_rank_1, s_rank_2, s_rank_3,
    s_column_0, s_column_1, s_column_2, s_column_3,
    begin_1, begin_2, begin_3,
    tokens, columns, total, s_x_token, s_x_column,
    COUNT: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split, t, r] = scale * sum of x[t, k] * factor[r, k] over the columns k of the split, float32."""
    i_split = tl.program_id(1)
    i_sibling = tl.program_id(2)
    p_factor = pick(i_sibling, p_factor_0, p_factor_1, p_factor_2, p_factor_3, COUNT)
    scale = pick(i_sibling, scale_0, scale_1, scale_2, scale_3, COUNT)
    ranks = pick(i_sibling, ranks_0, ranks_1, ranks_2, ranks_3, COUNT)
    s_rank = pick(i_sibling, s_rank_0, s_rank_1, s_rank_2, s_rank_3, COUNT)
    s_column = pick(i_sibling, s_column_0, s_column_1, s_column_2, s_column_3, COUNT)
    begin = pick(i_sibling, 0, begin_1, begin_2, begin_3, COUNT)

    token_blocks = tl.cdiv(tokens, BLOCK_T)
    # 64-bit, after the division: the weights and the partial sums may have more than 2**31 elements.
    i_t = (tl.program_id(0) % token_blocks).to(tl.int64)
    i_r = (tl.program_id(0) // token_blocks).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    in_t, in_r = o_t < tokens, o_r < ranks

    b_sum = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    first = i_split * SPLIT
    # The grid fits the widest sibling: in a narrower one, the blocks after the last have nothing to read.
    end = tl.where(i_r * BLOCK_R < ranks, tl.minimum(first + SPLIT, columns), first)
    for k in range(first, end, BLOCK_K):
        o_k = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        in_k = o_k < columns
        b_x = tl.load(
            p_x + o_t[:, None] * s_x_token + o_k[None, :] * s_x_column, mask=in_t[:, None] & in_k[None, :], other=0.0
        )
        b_factor = tl.load(
            p_factor + o_k[:, None] * s_column + o_r[None, :] * s_rank, mask=in_k[:, None] & in_r[None, :], other=0.0
        )
        b_sum = tl.dot(b_x, b_factor, b_sum, input_precision=PRECISION)
    o_partial = i_split.to(tl.int64) * total + begin + o_t[:, None] * ranks + o_r[None, :]
    # Of a number that comes as float64, the product would be of float64.
    tl.store(p_partial + o_partial, b_sum * tl.cast(scale, tl.float32), mask=in_t[:, None] & in_r[None, :])


PROJECT = Tiled(
    project_kernel,
    "project",
    {"BLOCK_R": (16, 32), "BLOCK_K": (64, 128)},
    ["columns", "ranks_0", "ranks_1", "s_column_0", "BLOCK_T"],
)


def project(x: Tensor, factors: Sequence[Tensor], scales: Sequence[float], *, autotune: bool = False) -> list[Tensor]:
    """Projects tokens to ranks: ``scale * x @ factor^T`` for each sibling.

    A long sum over few tokens has too few results to fill a GPU: at rank 512, 16 blocks of ranks are 16 programs,
    and one multiprocessor draws a small part of the memory's bandwidth. So the columns are cut into pieces of SPLIT,
    each summed by its own program (64 of them for [512, 2048], 256 for [1024, 4096], each with 32 KiB in flight), and
    a second, small launch adds up the pieces in float32, in one order, without atomics: the same bits each time. The
    pieces are a share of T / SPLIT of the factor's elements. Summed by whoever reads them, they would be read again by
    each of ``linear_factored``'s programs, more than the factor itself.

    Args:
        x: [T, K], float32, bfloat16 or float16, of any strides.
        factors: [R, K] each, like x, of any strides: B^T, a view, for the input gradient.
        scales: One for each factor.
        autotune: Measures several tiles at the first call for a shape, instead of taking the device's default.

    Returns:
        [T, R] each, like x, contiguous.
    """
    assert len(factors) == len(scales)
    check(x, factors)
    tokens, columns = x.shape
    results = [x.new_empty(tokens, factor.shape[0]) for factor in factors]
    block_t = max(16, token_block(tokens))
    kernel, tile = PROJECT.to_launch(x, autotune)
    for some in batches(len(factors)):
        outputs, part = results[some], factors[some]
        partial, begins = partial_sums(x, outputs, columns)
        ranks = [factor.shape[0] for factor in part]

        def grid(meta, ranks=ranks):
            blocks = triton.cdiv(max(ranks), meta["BLOCK_R"]) * triton.cdiv(tokens, block_t)
            return blocks, triton.cdiv(columns, SPLIT), len(ranks)

        with on_device_of(x):
            kernel[grid](
                x, partial, *four(part), *four(scales[some]), *four(ranks), *strides(part), *begins,
                tokens, columns, partial.shape[1], *x.stride(),
                COUNT=len(part), PRECISION=dot_precision(), SPLIT=SPLIT, BLOCK_T=block_t, **tile,
            )  # fmt: skip
        sum_splits(partial, begins, outputs, [None] * len(part))
    return results

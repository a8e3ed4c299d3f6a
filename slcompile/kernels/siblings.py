"""What the kernels share that work on siblings, the projections of one input, in one launch: parameters, long sums.

A long sum over few tokens is cut into pieces, each added up by its own program; ``sum_splits`` adds up the pieces.

Prefixes: p_ pointer, b_ block, o_ offset, i_ program index. A parameter of one sibling ends in its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from slcompile.cost.matmul import SPLIT
from slcompile.kernels.launch import launchable, on_device_of

SIBLINGS = 4
"""Most projections in one launch; more take several."""

SUM_BLOCK = 256


@triton.jit
def pick(i_sibling, first, second, third, fourth, COUNT: tl.constexpr):
    """Picks the parameter of a sibling.

    Use it for inputs only. torch.compile cannot tell through this call which pointer is written, so kernels select
    output pointers inline.
    """
    found = first
    if COUNT > 1:
        found = tl.where(i_sibling == 1, second, found)
    if COUNT > 2:
        found = tl.where(i_sibling == 2, third, found)
    if COUNT > 3:
        found = tl.where(i_sibling == 3, fourth, found)
    return found


@triton.jit
def sum_splits_kernel(
    p_partial,
    p_sum_0, p_sum_1, p_sum_2, p_sum_3,
    p_bias_0, p_bias_1, p_bias_2, p_bias_3,
    size_0, size_1, size_2, size_3,
    width_0, width_1, width_2, width_3,
    begin_1, begin_2, begin_3,
    total, splits,
    COUNT: tl.constexpr, BIASES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum[t, j] = partial[0, t, j] + partial[1, t, j] + ... + bias[j], always in this order.

    BIASES has a bit for each sibling that has a bias.
    """
    i_sibling = tl.program_id(1)
    size = pick(i_sibling, size_0, size_1, size_2, size_3, COUNT)
    begin = pick(i_sibling, 0, begin_1, begin_2, begin_3, COUNT)
    p_sum = p_sum_0
    if COUNT > 1:
        p_sum = tl.where(i_sibling == 1, p_sum_1, p_sum)
    if COUNT > 2:
        p_sum = tl.where(i_sibling == 2, p_sum_2, p_sum)
    if COUNT > 3:
        p_sum = tl.where(i_sibling == 3, p_sum_3, p_sum)

    o_sum = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_sum = o_sum < size
    p_split = p_partial + begin + o_sum
    b_sum = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        b_sum += tl.load(p_split, mask=in_sum, other=0.0)
        p_split += total
    if BIASES != 0:
        p_bias = pick(i_sibling, p_bias_0, p_bias_1, p_bias_2, p_bias_3, COUNT)
        width = pick(i_sibling, width_0, width_1, width_2, width_3, COUNT)
        has_bias = ((BIASES >> i_sibling) & 1) != 0
        b_sum += tl.load(p_bias + o_sum % width, mask=in_sum & has_bias, other=0.0).to(tl.float32)
    tl.store(p_sum + o_sum, b_sum, mask=in_sum)


def check(x: Tensor, others: Sequence[Tensor]) -> None:
    """Asserts that all operands have the one dtype, which kernels multiply."""
    assert x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    assert all(each.dtype == x.dtype for each in others), "one dtype for all"


def token_block(tokens: int) -> int:
    """Returns BLOCK_T: the smallest that holds all tokens, or 64. An unbacked SymInt counts as many tokens."""
    return next((block for block in (1, 16, 32) if guard_or_false(tokens <= block)), 64)


def batches(count: int) -> list[slice]:
    """Returns which siblings each launch takes."""
    return [slice(first, first + SIBLINGS) for first in range(0, count, SIBLINGS)]


def four(values: Sequence[Any]) -> list[Any]:
    """Returns one parameter for each sibling that there may be; Triton drops a None."""
    return [*values, *[None] * (SIBLINGS - len(values))]


def strides(factors: Sequence[Tensor]) -> list[Any]:
    """Returns the row strides of each sibling's factor, then the column strides."""
    return four([each.stride(0) for each in factors]) + four([each.stride(1) for each in factors])


def partial_sums(x: Tensor, outputs: Sequence[Tensor], terms: int) -> tuple[Tensor, list[Any]]:
    """Makes room for the pieces of long sums, float32 [splits, all elements]; says where outputs 1, 2, 3 begin."""
    begins = [0]
    for output in outputs:
        begins.append(begins[-1] + output.numel())
    partial = torch.empty(triton.cdiv(terms, SPLIT), begins[-1], dtype=torch.float32, device=x.device)
    return partial, four(begins[:-1])[1:]


def bias_parameters(biases: Sequence[Tensor | None]) -> tuple[list[Any], int]:
    """Returns the biases as parameters, and a bit for each one that there is."""
    present = [bias for bias in biases if bias is not None]
    bits = sum(1 << index for index, bias in enumerate(biases) if bias is not None)
    # Beside siblings that have one, a missing bias is an address too, but is not read.
    return four([(present[0] if bias is None else bias).contiguous() for bias in biases] if present else []), bits


def sum_splits(
    partial: Tensor, begins: Sequence[Any], outputs: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> None:
    """Fills outputs, [T, any] each."""
    sizes, widths = [each.numel() for each in outputs], [each.shape[1] for each in outputs]
    splits, total = partial.shape
    bias, has_bias = bias_parameters(biases)
    with on_device_of(partial):
        launchable(sum_splits_kernel)[triton.cdiv(max(sizes), SUM_BLOCK), len(sizes)](
            partial, *four(outputs), *bias, *four(sizes), *four(widths), *begins, total, splits,
            COUNT=len(sizes), BIASES=has_bias, BLOCK=SUM_BLOCK,
        )  # fmt: skip

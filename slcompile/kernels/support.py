"""Stratified and vector support in Triton: the same integers as ``slcompile.ops.support``, which has the formula.

Prefixes: p_ pointer, o_ offset, i_ program index.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix32(x):
    """The 32-bit finaliser of ``slcompile.ops.support.mix32``; uint32 in, uint32 out."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def stratified_column(mixed_seed, row, group, columns, groups, VECTOR: tl.constexpr):
    """Column of the one non-zero of ``group`` in ``row``, int64; VECTOR rows share theirs.

    ``mixed_seed`` is ``mix32(seed)`` in uint32, made once a program; ``row`` and ``group`` are integer tensors of any
    width, not negative, ``columns`` and ``groups`` integers below 2**31.
    """
    # uint32 arithmetic wraps, which is the "mod 2**32" of the formula.
    counter = (row // VECTOR).to(tl.uint32) * groups + group.to(tl.uint32)
    mixed = mix32(counter ^ mixed_seed)
    # 64-bit: group * columns passes 2**31 long before either of them does.
    group = group.to(tl.int64)
    start = group * columns // groups
    width = (group + 1) * columns // groups - start
    return start + tl.umulhi(mixed, width.to(tl.uint32)).to(tl.int64)

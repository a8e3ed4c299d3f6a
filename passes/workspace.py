"""What our ops allocate besides their results: while their kernels run on a GPU, and for good on the CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from slcompile.cost import aligned
from slcompile.cost.matmul import FEW_TOKENS, LEAST_VECTOR, VECTOR_SPLIT
from slcompile.ops import LINEAR_FACTORED, STRUCTURE_OPS
from slcompile.passes.graph import arguments
from slcompile.torch_private import size_hint


def workspace(node: fx.Node, device: str) -> int:
    """Returns the bytes that an op of ours allocates besides its results while its kernels run."""
    values_grad = torch.ops.slcompile.values_grad.default
    grads = {torch.ops.slcompile.weight_grads.default, *(ops.grads for ops in STRUCTURE_OPS.values())}
    if device != "cuda":
        return 0
    if node.target is LINEAR_FACTORED:
        x, _, _, values, _, _, transposed, *vector = arguments(node)
        return _gathered(x, max(values, key=_elements), vector, transposed)
    if node.target not in grads | {values_grad}:
        return 0
    if node.target is values_grad:
        _, right, values, _, *vector = arguments(node)
        if gathered := _gathered(right, values, vector, False):
            return gathered + 4 * _elements(values) * -(-size_hint(right.meta["val"].shape[0]) // VECTOR_SPLIT)
    left, right = (each.meta["val"] for each in arguments(node)[:2])  # [T, N], [T, K]: G is [N, K]
    rows, columns = size_hint(left.shape[1]), size_hint(right.shape[1])
    padded = aligned(columns, right.dtype)
    # Copied with aligned rows where neither its rows nor its columns are aligned.
    both = padded != columns and aligned(rows, left.dtype) != rows
    return rows * (columns + (padded if both else 0)) * left.itemsize


def _gathered(x: fx.Node, values: fx.Node, vector: list[int], transposed: bool) -> int:
    """Returns the bytes of x^T, or of the products with blocks of S; 0 where kernels make neither."""
    tokens, width = map(size_hint, x.meta["val"].shape)
    if not vector or vector[0] < LEAST_VECTOR or tokens <= FEW_TOKENS:
        return 0
    return tokens * (_elements(values) // vector[0] if transposed else width) * x.meta["val"].itemsize


def _elements(node: fx.Node) -> int:
    return size_hint(node.meta["val"].numel())


def kept_on_cpu(node: fx.Node) -> tuple[str, str, int] | None:
    """Returns, for an op that reads S on CPU, its support's name, what is kept of it, and bytes."""
    ops = torch.ops.slcompile
    places: dict[Any, tuple[int, int]] = {  # where values and the support are, and where vector is
        ops.vector_addmm.default: (2, 7),
        ops.vector_dots.default: (2, 4),
        ops.compose.default: (2, 6),
        ops.compose_backward.default: (3, 6),
    }
    first, last = places.get(node.target, (0, 0))
    if vector := arguments(node)[last : last + 1] if last else ():
        values, support = arguments(node)[first : first + 2]
        *rows, groups = values.meta["val"].shape
        blocks = -(-math.prod(rows) // vector[0])
        return (support.name, "columns of blocks", 4 * blocks * groups) if vector[0] > 1 else None
    if node.target not in (ops.sparse_addmm.default, ops.sparse_dots.default):
        return None
    _, _, values, support, *rest = arguments(node)
    by_column = node.target is ops.sparse_addmm.default and rest[1]
    # Two int32 for each non-zero, beside the bounds of its rows or columns.
    size = 8 * values.meta["val"].numel() + 4 * (node.meta["val"].shape[0] + 1)
    return support.name, "by column" if by_column else "by row", size

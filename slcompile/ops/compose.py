"""compose: W_NK = scale * B_NR @ A_RK + S_NK, with S holding ``values`` at the support (SLTrain, eq. 2).

A weight that stays, the frozen base, is one more term: W_NK = base_NK + scale * B_NR @ A_RK + S_NK.

Backward, with G_NK = dL/dW:  dB = scale * G @ A^T,  dA = scale * B^T @ G,  dvalues = G at the support; dbase = G,
which is not made where the base is frozen.

N rows, K columns, R rank, P non-zeros. ``values`` and ``support`` are [N, groups] and the seed (one element) for
the stratified and the vector support, [P] and the flat index [P] for the uniform one. ``vector`` is how many rows
share their columns: 1 but for the vector support. A stack of E matrices (the experts of a mixture)
has B [E, N, R], A [E, R, K] and values [E, N, groups]; its support is that of one matrix of E * N rows. Without a
sparse part there are no groups.

The ops are opaque (no ``triton_op``) so that they reach the joint graph whole: passes find them
there, and AOTAutograd decomposes a triton_op before any custom pass runs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from slcompile.ops.quantized import as_base, dequantize_reference
from slcompile.ops.register_op import register_op
from slcompile.ops.support import flat_positions
from slcompile.ops.vector_cpu import kept_columns


def compose_reference(
    B: Tensor, A: Tensor, values: Tensor, support: Tensor, scale: float, vector: int = 1, base: Tensor | None = None
) -> Tensor:
    """Computes the formula as the paper writes it, in ops that every transform of autograd can differentiate."""
    shape = (*B.shape[:-1], A.shape[-1])
    sparse = torch.zeros(math.prod(shape), dtype=values.dtype, device=values.device)
    sparse = sparse.scatter(0, flat_positions(values, support, A.shape[-1], vector).long(), values.flatten())
    added = scale * (B @ A) + sparse.view(shape)
    if base is None:
        return added
    return added + (base if base.is_floating_point() else dequantize_reference(base, A.shape[-1], B.dtype))


@register_op()
def compose(
    B: Tensor,
    A: Tensor,
    values: Tensor,
    support: Tensor,
    scale: float,
    dtype: torch.dtype | None = None,
    vector: int = 1,
    base: Tensor | None = None,
) -> Tensor:
    """Composes a weight.

    Args:
        B: [N, R] or [E, N, R], float32, bfloat16, float16 or float64.
        A: [R, K] or [E, R, K], like B.
        values: [N, groups], [E, N, groups] or [P], like B.
        support: The seed or the flat index, an integer tensor (see the file's first lines).
        scale: Factor of the low-rank part.
        dtype: Of the result; None is B's.
        vector: Rows that share their columns.
        base: [N, K] or [E, N, K], which the rest is added to; rounded to B's dtype. Or uint8: packed
            (``slcompile.ops.quantized``).

    Returns:
        [N, K] or [E, N, K], contiguous, whatever autocast says.
    """
    with torch.autocast(B.device.type, enabled=False):
        weight = (
            _scaled_product(B, A, scale)
            if base is None
            else _added_product(as_base(base, A.shape[-1], B.dtype), B, A, scale)
        )
        # The support has no repetition, so both are exact and deterministic.
        if _has_kept_columns(values, vector):
            entries = values.flatten(0, -2)
            weight.flatten(0, -2).scatter_add_(1, _columns_of_rows(entries, support, A.shape[-1], vector), entries)
        else:
            weight.view(-1).index_add_(0, flat_positions(values, support, A.shape[-1], vector), values.flatten())
        return weight if dtype is None else weight.to(dtype)


@torch.library.register_fake("slcompile::compose")
def _(B, A, values, support, scale, dtype=None, vector=1, base=None):
    return B.new_empty((*B.shape[:-1], A.shape[-1]), dtype=dtype)


def _scaled_product(first: Tensor, second: Tensor, scale: float) -> Tensor:
    # beta=0: the first argument is not read, and alpha is applied before rounding to the operands' dtype.
    product = torch.addmm if first.dim() == 2 else torch.baddbmm
    return product(first.new_empty((1,) * first.dim()), first, second, beta=0, alpha=scale)


def _added_product(base: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
    return (torch.addmm if first.dim() == 2 else torch.baddbmm)(base, first, second, alpha=scale)


def _has_kept_columns(values: Tensor, vector: int) -> bool:
    """Whether columns are kept from call to call: on CPUs, where the factored lowering keeps the same ones."""
    return vector > 1 and values.is_cpu and values.numel() > 0


def _columns_of_rows(entries: Tensor, support: Tensor, columns: int, vector: int) -> Tensor:
    """Returns int64 columns of entries [rows, groups], from those of blocks."""
    blocks = kept_columns(entries, support, columns, vector).long()
    return blocks.repeat_interleave(vector, 0)[: len(entries)]


@register_op()
def compose_backward(
    grad: Tensor, B: Tensor, A: Tensor, values: Tensor, support: Tensor, scale: float, vector: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Projects a weight's gradient to those of B, A and values; shapes as for ``compose``, each in its own dtype."""
    with torch.autocast(B.device.type, enabled=False):
        grad = grad.to(B.dtype)
        grad_B = _scaled_product(grad, A.mT, scale)
        grad_A = _scaled_product(B.mT, grad, scale)
        if _has_kept_columns(values, vector):
            columns = _columns_of_rows(values.flatten(0, -2), support, A.shape[-1], vector)
            grad_values = grad.flatten(0, -2).gather(1, columns).view(values.shape)
        else:
            positions = flat_positions(values, support, A.shape[-1], vector)
            grad_values = grad.reshape(-1).index_select(0, positions).view(values.shape)
    return grad_B, grad_A, grad_values


@torch.library.register_fake("slcompile::compose_backward")
def _(grad, B, A, values, support, scale, vector=1):
    return torch.empty_like(B).contiguous(), torch.empty_like(A).contiguous(), torch.empty_like(values).contiguous()


def _setup_compose(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    B, A, values, support, ctx.scale, _, ctx.vector, base = inputs
    ctx.base_dtype = base.dtype if base is not None and base.requires_grad else None
    ctx.save_for_backward(B, A, values, support)


def _compose_vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    base_grad = None if ctx.base_dtype is None else grad.to(ctx.base_dtype)
    return *compose_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.vector), None, None, None, None, base_grad


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, B, A, _, support, ctx.scale, ctx.vector = inputs
    ctx.save_for_backward(grad, B, A, support)


def _backward_vjp(ctx: Any, u: Tensor, v: Tensor, w: Tensor) -> tuple[Any, ...]:
    # compose_backward is linear in each argument, so its own derivative is made of the same two products:
    # dgrad = scale * (u A + B v) + scatter(w), dB = scale * grad v^T, dA = scale * u^T grad.
    grad, B, A, support = ctx.saved_tensors
    factors = torch.cat([u, B], -1), torch.cat([A, v], -2)
    grad_grad = compose(*factors, w, support, ctx.scale, grad.dtype, ctx.vector)
    with torch.autocast(B.device.type, enabled=False):
        cast = grad.to(B.dtype)
        return grad_grad, ctx.scale * (cast @ v.mT), ctx.scale * (u.mT @ cast), None, None, None, None


torch.library.register_autograd("slcompile::compose", _compose_vjp, setup_context=_setup_compose)
torch.library.register_autograd("slcompile::compose_backward", _backward_vjp, setup_context=_setup_backward)

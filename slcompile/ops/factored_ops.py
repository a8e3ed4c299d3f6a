"""Ops of a structure whose two factors follow from smaller parts: W = base + scale * B @ A, (B, A) = factors(*parts).

B [N, R] and A [R, K]; or n blocks on the diagonal, B [n, N/n, R] and A [n, R, K/n], beside which W is the base, or 0.
Backward, with G_NK = dL/dW:  dB = scale * G @ A^T,  dA = scale * B^T @ G  (of G's diagonal blocks), and from these the
gradients of the parts by ``spread``.

A structure says ``factors`` and ``spread`` in ATen, and ``define`` makes its three ops: one composes W, one projects
W's gradient on the parts, and one makes the parts' gradients from the two matrices whose product is W's gradient. They
are opaque until the last pass, as ``compose`` is, and ``FactoredOps`` is how passes multiply without W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slcompile.ops.quantized import dequantize, dequantize_reference

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class FactoredOps:
    """The ops of a structure, and its formulas in ATen.

    All take the parts, then ``scale``; what ``compose`` takes after that is a base [N, K], or None.

    Attributes:
        parts: Names of the parts, in order.
        factors: Returns B and A of the parts.
        spread: Returns the parts' gradients, of those of B and A and the parts.
        compose: ``(*parts, scale, base=None) -> W`` [N, K], of the parts' dtype.
        backward: ``(G, *parts, scale) ->`` a gradient for each part.
        grads: ``(left [T, N], right [T, K], *parts, scale) ->`` the same for G = left^T @ right.
    """

    parts: tuple[str, ...]
    factors: Callable[..., Factors]
    spread: Callable[..., tuple[Tensor, ...]]
    compose: torch._ops.OpOverload
    backward: torch._ops.OpOverload
    grads: torch._ops.OpOverload

    def composed(self, *arguments: Any) -> Tensor:
        """Computes what ``compose`` does, in ops that every transform of autograd can differentiate."""
        *parts, scale, base = _with_base(arguments, len(self.parts))
        return _composed(*self.factors(*parts), scale, base, dequantize_reference)

    def multiply(self, x: Tensor, transposed: bool, *arguments: Any) -> Tensor:
        """Multiplies without W.

        Args:
            x: [T, K], or [T, N] where ``transposed``.
            transposed: Whether by W rather than by its transpose.
            arguments: The parts and the scale.

        Returns:
            x W^T [T, N], or x W [T, K]; of x's dtype.
        """
        *parts, scale = arguments
        B, A = (each.to(x.dtype) for each in self.factors(*parts))
        first, second = (B, A) if transposed else (A.mT, B.mT)
        if B.dim() == 2:
            return _scaled(x, first, scale) @ second
        return _joined(torch.bmm(_scaled(_split(x, len(B)), first, scale), second))

    def grads_composed(self, left: Tensor, right: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """Computes what ``grads`` does by W's gradient."""
        return tuple(self.backward(left.t() @ right, *arguments))

    def gradients(self, left: Tensor, right: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """Computes what ``grads`` does without W's gradient; each in its part's dtype."""
        *parts, scale = arguments
        B, A = (each.to(left.dtype) for each in self.factors(*parts))
        if B.dim() == 3:
            left, right = _split(left, len(B)), _split(right, len(B))
        grad_B, grad_A = left.mT @ _scaled(right, A.mT, scale), _scaled(left, B, scale).mT @ right
        dtype = parts[0].dtype
        return self.spread(grad_B.to(dtype), grad_A.to(dtype), *parts)


STRUCTURE_OPS: dict[Any, FactoredOps] = {}
"""Each op of a structure that can be multiplied with without W -> the structure's ops."""


def define(
    name: str,
    parts: tuple[str, ...],
    factors: Callable[..., Factors],
    spread: Callable[..., tuple[Tensor, ...]],
) -> FactoredOps:
    """Makes the ops ``name``, ``name_backward`` and ``name_grads``, and enters them into ``STRUCTURE_OPS``.

    Args:
        name: Of the op that composes the weight, with its namespace.
        parts, factors, spread: As in ``FactoredOps``.
    """
    count = len(parts)
    tensors, results = ", ".join(f"Tensor {part}" for part in parts), ", ".join(["Tensor"] * count)

    def composed(*arguments: Any) -> Tensor:
        *given, scale, base = _with_base(arguments, count)
        with torch.autocast(given[0].device.type, enabled=False):
            return _composed(*factors(*given), scale, base, dequantize)

    def composed_fake(*arguments: Any) -> Tensor:
        B, A = factors(*arguments[:count])
        blocks = len(B) if B.dim() == 3 else 1
        return B.new_empty((blocks * B.shape[-2], blocks * A.shape[-1]))

    def projected(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *given, scale = arguments
        with torch.autocast(grad.device.type, enabled=False):
            B, A = factors(*given)
            grad = grad.to(B.dtype)
            grad = grad if B.dim() == 2 else _diagonal_blocks(grad, len(B))
            return spread(_scaled(grad, A.mT, scale), _scaled(B.mT, grad, scale), *given)

    def like_parts(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(part.new_empty(part.shape) for part in arguments[-count - 1 : -1])

    def projected_of(left: Tensor, right: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        with torch.autocast(left.device.type, enabled=False):
            return tuple(backward(left.t() @ right, *arguments))

    compose = torch.library.custom_op(
        name, composed, mutates_args=(), schema=f"({tensors}, float scale, Tensor? base=None) -> Tensor"
    )
    backward = torch.library.custom_op(
        f"{name}_backward", projected, mutates_args=(), schema=f"(Tensor grad, {tensors}, float scale) -> ({results})"
    )
    grads = torch.library.custom_op(
        f"{name}_grads",
        projected_of,
        mutates_args=(),
        schema=f"(Tensor left, Tensor right, {tensors}, float scale) -> ({results})",
    )
    compose.register_fake(composed_fake)
    backward.register_fake(like_parts)
    grads.register_fake(like_parts)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *given, ctx.scale, base = inputs
        ctx.base_dtype = base.dtype if base is not None and base.requires_grad else None
        ctx.save_for_backward(*given)

    def vjp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        base_grad = None if ctx.base_dtype is None else grad.to(ctx.base_dtype)
        return *backward(grad, *ctx.saved_tensors, ctx.scale), None, base_grad

    def setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    def vjp_of_backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        linearized = torch.func.vjp(lambda grad, *given: projected(grad, *given, ctx.scale), *ctx.saved_tensors)
        return *linearized[1](cotangents), None

    compose.register_autograd(vjp, setup_context=setup)
    backward.register_autograd(vjp_of_backward, setup_context=setup_backward)
    namespace, _, op = name.partition("::")
    overloads = (getattr(getattr(torch.ops, namespace), op + suffix).default for suffix in ("", "_backward", "_grads"))
    made = FactoredOps(parts, factors, spread, *overloads)
    STRUCTURE_OPS.update(dict.fromkeys((made.compose, made.backward, made.grads), made))
    return made


def _with_base(arguments: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    return arguments if len(arguments) == count + 2 else (*arguments, None)


def _composed(B: Tensor, A: Tensor, scale: float, base: Tensor | None, unpack: Callable[..., Tensor]) -> Tensor:
    product = _scaled(B, A, scale)
    if product.dim() == 3:  # [n, N/n, K/n], each block where the first and the third of four dimensions are equal
        product = torch.diag_embed(product.movedim(0, -1), dim1=0, dim2=2).flatten(2).flatten(0, 1)
    if base is None:
        return product
    wide = base.to(B.dtype) if base.is_floating_point() else unpack(base, product.shape[-1], B.dtype)
    return (wide + product).contiguous()  # whatever the strides of the base are


def _scaled(first: Tensor, second: Tensor, scale: float) -> Tensor:
    # beta=0: the first argument is not read, and the product is scaled as it is written.
    product = torch.addmm if first.dim() == 2 else torch.baddbmm
    return product(second[(slice(1),) * second.dim()], first, second, beta=0, alpha=scale)


def _diagonal_blocks(matrix: Tensor, count: int) -> Tensor:
    """Returns the blocks [n, N/n, K/n] on the diagonal of a matrix [N, K]."""
    rows, columns = (size // count for size in matrix.shape)
    return matrix.view(count, rows, count, columns).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _split(x: Tensor, count: int) -> Tensor:
    """Returns [T, K] as [n, T, K/n]."""
    return x.unflatten(1, (count, -1)).transpose(0, 1)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)

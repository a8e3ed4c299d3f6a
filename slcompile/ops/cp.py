"""compose_cp: W, cut into H heads of N/H rows, as a sum of R outer products of three vectors (LoRTA, arXiv 2410.04060).

    W[(h, i), j] = base + scale * sum_r  C[h, r] B[i, r] A[r, j]

C [H, R], B [N/H, R], A [R, K]: the heads share B and A, and each weighs the R products in its own way.
"""

from __future__ import annotations

from torch import Tensor

from slcompile.ops.factored_ops import Factors, define


def factors(C: Tensor, B: Tensor, A: Tensor) -> Factors:
    """Multiplies each head's weights with the shared rows."""
    return (C.unsqueeze(1) * B).flatten(0, 1), A


def spread(grad_rows: Tensor, grad_A: Tensor, C: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the parts' gradients."""
    grad = grad_rows.view(len(C), *B.shape)
    return (grad * B).sum(1), (grad * C.unsqueeze(1)).sum(0), grad_A


CP = define("slcompile::compose_cp", ("C", "B", "A"), factors, spread)

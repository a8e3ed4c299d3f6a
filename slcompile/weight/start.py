"""What a converted weight starts from: is there something learned to keep, and its best approximation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slcompile.ops.support import flat_positions

TRAINED_RATIO = 1.5
"""A weight looks trained if its largest singular value is above this many Marchenko-Pastur edges."""


@torch.no_grad()
def looks_trained(weight: Tensor, iterations: int = 8) -> bool:
    """Returns whether a weight's spectrum is not that of independent random entries.

    Independent entries of variance v give a largest singular value near ``sqrt(v) * (sqrt(rows) + sqrt(columns))``,
    the edge of the Marchenko-Pastur law; learning adds directions far above it. The mean is removed first, and a
    few power iterations give a lower bound. A constant weight has learned nothing.

    Args:
        weight: [rows, columns], or a stack of such; computed in float32 on its device.
        iterations: Power iterations, each two matrix-vector products.
    """
    if weight.dim() > 2:
        return any(looks_trained(each, iterations) for each in weight)
    rows, columns = weight.shape
    weight = weight.float()
    if bool(weight.min() == weight.max()):
        return False  # not by the variance: rounding leaves a little of it, and its spectrum is no noise
    mean, variance = weight.mean(), weight.var(correction=0)
    generator = torch.Generator("cpu").manual_seed(0)  # the user's generator is left where it was
    right = torch.randn(columns, generator=generator, device="cpu", dtype=torch.float32).to(weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        for _ in range(iterations):
            left = weight @ right - mean * right.sum()
            right = weight.t() @ left - mean * left.sum()
            right = right / right.norm()
        top = (weight @ right - mean * right.sum()).norm()
    edge = variance.sqrt() * (math.sqrt(rows) + math.sqrt(columns))
    return bool(top > TRAINED_RATIO * edge)


@torch.no_grad()
def spectral_factors(
    weight: Tensor, rank: int, scale: float, values: Tensor, support: Tensor, vector: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the truncated SVD ``U sqrt(s) . sqrt(s) V^T / scale``, and the residual at the support.

    Args:
        weight: [rows, columns], or a stack of such.
        rank, scale: Of the low-rank part.
        values, support, vector: Of ``compose``; of ``values`` only the shape is used.

    Returns:
        B [..., rows, rank], A [..., rank, columns] and values, float32.
    """
    weight = weight.float()
    B, A = low_rank_factors(weight, rank, scale)
    positions = flat_positions(values, support, weight.shape[-1], vector)
    residual = (B @ A).mul_(-scale).add_(weight)
    return B, A, residual.view(-1).index_select(0, positions).view(values.shape)


@torch.no_grad()
def low_rank_factors(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Returns B [..., rows, rank] and A [..., rank, columns], ``scale * B @ A`` the truncated SVD; float32."""
    weight = weight.float()
    oversampled = min(rank + 8, *weight.shape[-2:])
    U, s, V = torch.svd_lowrank(weight, q=oversampled, niter=4)
    root = (s[..., :rank] / scale).sqrt().unsqueeze(-2)
    return U[..., :rank] * root, (V[..., :rank] * root).mT

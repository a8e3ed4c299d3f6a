"""project: hidden_TR = scale * x_TK @ factor_RK^T, for several factors that read the same x.

The first half of ``linear_factored`` for sibling projections: on GPUs one launch makes the hidden matrices of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("slcompile::project", mutates_args=())
def project(x: Tensor, factors: Sequence[Tensor], scales: Sequence[float]) -> list[Tensor]:
    """Multiplies one input with several factors.

    Args:
        x: [T, K], float32, bfloat16, float16 or float64.
        factors: [R, K] each, of x's dtype.
        scales: One for each factor.

    Returns:
        [T, R] each. It has no autograd: passes insert it after autograd has run.
    """
    with torch.autocast(x.device.type, enabled=False):
        return project_aten(x, factors, scales)


@project.register_fake
def _(x: Tensor, factors: Sequence[Tensor], scales: Sequence[float]) -> list[Tensor]:
    return [x.new_empty((x.shape[0], factor.shape[0])) for factor in factors]


def project_aten(x: Tensor, factors: Sequence[Tensor], scales: Sequence[float]) -> list[Tensor]:
    """Computes the same in ATen, for CPU."""
    return [(x @ factor.t()) * scale for factor, scale in zip(factors, scales, strict=True)]

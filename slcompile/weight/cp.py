"""CPWeight: a sum of outer products of three vectors, one of them over heads (LoRTA, arXiv 2410.04060)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from slcompile.config import SLConfig
from slcompile.ops import CP
from slcompile.weight.parts_weight import PartsWeight
from slcompile.weight.start import low_rank_factors
from slcompile.weight.structure import register

SWEEPS = 10
"""Rounds of alternating least squares in which a trained weight is approximated."""


@register
class CPWeight(PartsWeight):
    """A weight ``W[(h, i), j] = scale * sum_r C[h, r] B[i, r] A[r, j]`` [rows, columns], or a base and that.

    Parameters ``C`` [heads, rank], ``B`` [rows/heads, rank], ``A`` [rank, columns]: heads, which are ``config.blocks``
    equal parts of the stored rows, share B and A. Without ``config.blocks`` there are about as many heads as a head has
    rows, which takes fewest parameters.
    """

    structure = "cp"
    op = CP.compose
    ops = CP
    main = ("B", "A")
    takes_blocks = True
    sharable = ("B", "A")

    C: Tensor

    @classmethod
    @override
    def misfit_of(cls, shape: Sequence[int], config: SLConfig) -> str:
        blocks = cls.blocks_for(shape, config)
        return (
            f"has {shape[0]} rows, which blocks={blocks} does not divide"
            if shape[0] % blocks
            else super().misfit_of(shape, config)
        )

    @classmethod
    @override
    def blocks_for(cls, shape: Sequence[int], config: SLConfig) -> int:
        rows = shape[0]
        divisors = (each for each in range(1, rows + 1) if rows % each == 0)
        return config.blocks or min(divisors, key=lambda heads: heads + rows // heads)

    @classmethod
    @override
    def part_shapes(cls, shape: Sequence[int], config: SLConfig) -> dict[str, tuple[int, ...]]:
        blocks, rank = cls.blocks_for(shape, config), cls.rank_of(shape, config)
        rows, columns = shape
        return {"C": (blocks, rank), "B": (rows // blocks, rank), "A": (rank, columns)}

    @override
    def draw_others(self) -> None:
        self.C.bernoulli_(0.5).mul_(2).sub_(1)  # random signs, with which different heads tell the products apart

    @torch.no_grad()
    @override
    def approximate(self, dense: Tensor) -> None:
        """Sets the parts by alternating least squares, from the truncated SVD of ``dense``."""
        dense = dense.float()
        rows, A = low_rank_factors(dense, self.rank, 1.0)
        # Each column of the rows' factor, as a matrix [heads, rows of a head], by its first singular vectors.
        U, s, V = torch.linalg.svd(rows.view(self.blocks, -1, self.rank).movedim(-1, 0), full_matrices=False)
        C, B, A = U[..., 0].mT, V[:, 0].mT * s[:, 0], A.mT
        tensor = dense.reshape(self.blocks, -1, dense.shape[1])
        for _ in range(SWEEPS):
            half = torch.einsum("hij,jr->hir", tensor, A)
            C = _solved(torch.einsum("hir,ir->hr", half, B), B, A)
            B = _solved(torch.einsum("hir,hr->ir", half, C), C, A)
            A = _solved(torch.einsum("hij,hr,ir->jr", tensor, C, B), C, B)
        norms = [each.norm(dim=0).clamp_min(torch.finfo(each.dtype).tiny) for each in (C, B, A)]
        size = (math.prod(norms) / self.scale) ** (1 / 3)  # the same for the three vectors of a product
        C, B, A = (each / norm * size for each, norm in zip((C, B, A), norms, strict=True))
        self.set_parts({"C": C, "B": B, "A": A.mT})


def _solved(product: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Solves for one of three matrices by least squares, given the tensor's product with the other two."""
    gram = (first.mT @ first) * (second.mT @ second)
    return product @ torch.linalg.pinv(gram, hermitian=True)

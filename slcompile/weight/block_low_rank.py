"""BlockLowRankWeight: products of low rank on the diagonal (MELoRA, arXiv 2402.17263)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from slcompile.config import SLConfig
from slcompile.cost import Matmul
from slcompile.ops import BLOCK_LOW_RANK
from slcompile.weight.parts_weight import PartsWeight
from slcompile.weight.start import low_rank_factors
from slcompile.weight.structure import register

BLOCKS = 4
"""Blocks on the diagonal, unless the user says otherwise."""


@register
class BlockLowRankWeight(PartsWeight):
    """A weight ``W = scale * diagonal(B_1 A_1, ..., B_n A_n)`` [rows, columns], or a base and that.

    Parameters ``B`` [n, rows/n, rank], ``A`` [n, rank, columns/n]. ``config.blocks`` is n and ``config.rank`` the rank
    of a block, so that the weight has rank n * rank.
    """

    structure = "block_low_rank"
    op = BLOCK_LOW_RANK.compose
    ops = BLOCK_LOW_RANK
    main = ("B", "A")
    takes_blocks = True

    @classmethod
    @override
    def misfit_of(cls, shape: Sequence[int], config: SLConfig) -> str:
        rows, columns = shape
        blocks = cls.blocks_for(shape, config)
        if rows % blocks or columns % blocks:
            return f"has {rows} rows and {columns} columns, which blocks={blocks} does not divide"
        rank, side = cls.rank_of(shape, config), min(rows, columns) // blocks
        return f"has blocks={blocks} of smaller side {side}, which rank={rank} is above" if rank > side else ""

    @classmethod
    @override
    def blocks_for(cls, shape: Sequence[int], config: SLConfig) -> int:
        return config.blocks or BLOCKS

    @classmethod
    @override
    def rank_of(cls, shape: Sequence[int], config: SLConfig) -> int:
        blocks = cls.blocks_for(shape, config)
        return config.rank_for(*(max(1, size // blocks) for size in shape))

    @classmethod
    @override
    def part_shapes(cls, shape: Sequence[int], config: SLConfig) -> dict[str, tuple[int, ...]]:
        blocks, rank = cls.blocks_for(shape, config), cls.rank_of(shape, config)
        rows, columns = (size // blocks for size in shape)
        return {"B": (blocks, rows, rank), "A": (blocks, rank, columns)}

    @property
    @override
    def inputs(self) -> int:
        return self.shape[self.input_dim] // self.blocks

    @property
    @override
    def _matmul(self) -> Matmul:
        return replace(super()._matmul, blocks=self.blocks)

    @override
    def approximate(self, dense: Tensor) -> None:
        """Sets each block to the truncated SVD of the block of ``dense`` there; what lies beside them is lost."""
        rows, columns = (size // self.blocks for size in self.shape)
        each = torch.arange(self.blocks)
        blocks = dense.reshape(self.blocks, rows, self.blocks, columns)[each, :, each]
        B, A = low_rank_factors(blocks, self.rank, self.scale)
        self.set_parts({"B": B, "A": A})

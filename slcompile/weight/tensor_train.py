"""TensorTrainWeight: factors that are tensor trains of two cores each (LoRETTA, arXiv 2402.11417)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from slcompile.config import SLConfig
from slcompile.ops import TENSOR_TRAIN
from slcompile.weight.parts_weight import PartsWeight
from slcompile.weight.structure import register


def modes(size: int, rank: int) -> tuple[int, int]:
    """Returns the two sizes, whose product is ``size``, at which an outer and an inner core have fewest parameters."""
    outers = [outer for outer in range(1, size + 1) if size % outer == 0]
    outer = min(outers, key=lambda each: min(rank, each) * (each + size // each * rank))
    return outer, size // outer


@register
class TensorTrainWeight(PartsWeight):
    """A weight whose four-dimensional form is a train of cores, ``W = scale * G1 G2 G3 G4``, or a base and that.

    Rows are cut into n1 * n2 and columns into k1 * k2 so that there are fewest parameters. Parameters ``G1`` [n1, a],
    ``G2`` [a, n2, rank], ``G3`` [rank, k1, c], ``G4`` [c, k2], with a = min(rank, n1) and c = min(rank, k2): the ranks
    between the cores are ``config.rank``, the one in the middle is that of the weight.
    """

    structure = "tensor_train"
    op = TENSOR_TRAIN.compose
    ops = TENSOR_TRAIN
    main = ("G2", "G3")

    G1: Tensor
    G4: Tensor

    @classmethod
    @override
    def part_shapes(cls, shape: Sequence[int], config: SLConfig) -> dict[str, tuple[int, ...]]:
        rank = cls.rank_of(shape, config)
        (n1, n2), (k2, k1) = (modes(size, rank) for size in shape)
        a, c = min(rank, n1), min(rank, k2)
        return {"G1": (n1, a), "G2": (a, n2, rank), "G3": (rank, k1, c), "G4": (c, k2)}

    @override
    def draw_others(self) -> None:
        for core, terms in ((self.G1, self.G1.shape[1]), (self.G4, self.G4.shape[0])):
            bound = math.sqrt(3 / terms)  # of variance 1 / terms
            core.uniform_(-bound, bound)

    @torch.no_grad()
    @override
    def approximate(self, dense: Tensor) -> None:
        """Sets the cores by three truncated SVDs (TT-SVD), at most sqrt(3) times as far from ``dense`` as the best."""
        rest = dense.float()
        shapes = [self.get_parameter(name).shape for name in self.ops.parts]
        cores = []
        left = 1
        for *_, size, right in (shapes[0], shapes[1], shapes[2]):
            U, s, V = torch.linalg.svd(rest.reshape(left * size, -1), full_matrices=False)
            kept = min(right, len(s))
            cores.append(U[:, :kept].reshape(left, size, kept))
            rest = s[:kept, None] * V[:kept]
            left = kept
        G1, G2, G3 = cores
        root = self.scale**-0.5  # shared out, as the SVD's singular values are in the other structures
        norm = rest.norm().clamp_min(torch.finfo(rest.dtype).tiny).sqrt()
        self.set_parts({"G1": G1[0], "G2": G2 * root * norm, "G3": G3, "G4": rest / norm * root})

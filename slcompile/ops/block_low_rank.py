"""compose_blocks: W_NK = base + scale * diagonal(B_1 A_1, ..., B_n A_n) (MELoRA, arXiv 2402.17263).

B [n, N/n, R], A [n, R, K/n]: its rank is up to n * R, at the R * (N + K) parameters of one product of rank R.
"""

from __future__ import annotations

from torch import Tensor

from slcompile.ops.factored_ops import Factors, define


def factors(B: Tensor, A: Tensor) -> Factors:
    """Returns the blocks' factors, which are the parts."""
    return B, A


def spread(grad_B: Tensor, grad_A: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the parts' gradients."""
    return grad_B, grad_A


BLOCK_LOW_RANK = define("slcompile::compose_blocks", ("B", "A"), factors, spread)

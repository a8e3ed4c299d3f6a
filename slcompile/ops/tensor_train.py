"""compose_tensor_train: W as a tensor [n1, n2, k1, k2] as a train of four cores (LoRETTA, arXiv 2402.11417).

    W[(i1, i2), (j1, j2)] = base + scale * sum_a,b,c  G1[i1, a] G2[a, i2, b] G3[b, j1, c] G4[c, j2]

G1 [n1, a], G2 [a, n2, R], G3 [R, k1, c], G4 [c, k2]; N = n1 * n2, K = k1 * k2. The first two make B [N, R], the others
A [R, K], so that the rank is R.
"""

from __future__ import annotations

from torch import Tensor

from slcompile.ops.factored_ops import Factors, define


def factors(G1: Tensor, G2: Tensor, G3: Tensor, G4: Tensor) -> Factors:
    """Contracts the cores of the rows, and those of the columns."""
    return (G1 @ G2.flatten(1)).view(-1, G2.shape[-1]), (G3.flatten(0, 1) @ G4).view(len(G3), -1)


def spread(
    grad_B: Tensor, grad_A: Tensor, G1: Tensor, G2: Tensor, G3: Tensor, G4: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the cores' gradients."""
    rows, columns = grad_B.reshape(len(G1), -1), grad_A.reshape(-1, G4.shape[1])
    return (
        rows @ G2.flatten(1).mT,
        (G1.mT @ rows).view(G2.shape),
        (columns @ G4.mT).view(G3.shape),
        G3.flatten(0, 1).mT @ columns,
    )


TENSOR_TRAIN = define("slcompile::compose_tensor_train", ("G1", "G2", "G3", "G4"), factors, spread)

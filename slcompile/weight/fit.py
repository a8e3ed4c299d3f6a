"""The fit of ``B A + S`` to a trained weight, by what it does to the weight's inputs.

With W [outputs, inputs] and the second moment H = sum of x x^T over inputs x, what is lost is

    sum ||(W - B A - S) x||^2 = ||(W - B A - S) L||_F^2,    H = L L^T

Without inputs H is the identity. Two steps alternate, of which each is the best for the other's result:

    B A   is the truncated SVD of (W - S) L, times L^-1 (a whitened SVD, as in SVD-LLM, arXiv 2403.07378)
    S     are the least squares of (W - B A - S) L over its support, by conjugate gradients for all rows together

Where the support is to be chosen, each group of a row gets the entry that alone would lower the loss most: with the
residual R = W - B A, that of the largest (R H)^2 / diagonal(H). With a diagonal H this is ``|R| ||x||``, the measure of
Wanda (arXiv 2306.11695); with the identity, ``|R|``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slcompile.ops.support import group_widths, largest_offsets

ROUNDS = 6
"""Times that the two steps alternate; more lower the loss by less than a hundredth."""
DAMPING = 1e-3
"""Of the mean of H's diagonal, this share is added to it: few inputs span no space, and others will come."""
STEPS = 20
"""Of conjugate gradients."""


@torch.no_grad()
def fit(
    weight: Tensor, rank: int, where: int | Tensor, moment: Tensor | None = None, input_dim: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fits factors and values to a weight.

    Args:
        weight: [rows, columns], or a stack of such.
        rank: Of ``B @ A``.
        where: Groups of a row, in each of which one position is chosen; or the flat positions, ascending.
        moment: [inputs, inputs], or a stack of such. None, and a zero matrix, stand for the identity.
        input_dim: Dimension of the matrix that is multiplied with the inputs.

    Returns:
        B [..., rows, rank] and A [..., rank, columns], of equal norms; flat positions, int64, and the values there.
    """
    if weight.dim() == 2:
        fixed = where if isinstance(where, int) else _mask(weight, where)
        B, A, sparse, mask = _fit_matrix(weight, rank, fixed, moment, input_dim)
        positions = mask.flatten().nonzero().squeeze(1)
        return B, A, positions, sparse.flatten()[positions]
    size = weight[0].numel()
    parts = []
    for index, matrix in enumerate(weight):
        own = where if isinstance(where, int) else where[(where >= index * size) & (where < (index + 1) * size)]
        own = own if isinstance(own, int) else own - index * size
        parts.append(fit(matrix, rank, own, None if moment is None else moment[index], input_dim))
    B, A, positions, values = zip(*parts, strict=True)
    shifted = [each + index * size for index, each in enumerate(positions)]
    return torch.stack(B), torch.stack(A), torch.cat(shifted), torch.cat(values)


def whitening(moment: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns the damped second moment H of inputs, float32, and its Cholesky factor L; None for the identity.

    H is scaled to a mean diagonal of 1. Nothing that is fitted depends on that.
    """
    if moment is None or not bool(moment.diagonal().any()):
        return None, None
    H = moment.double() / moment.diagonal().double().mean()
    H.diagonal().add_(DAMPING)
    return H.float(), torch.linalg.cholesky(H).float()


def _fit_matrix(
    weight: Tensor, rank: int, where: int | Tensor, moment: Tensor | None, input_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns B, A, S and the mask of its support, of which the loss was the least of all rounds."""
    W = _oriented(weight.float(), input_dim)
    H, L = whitening(moment)
    sparse, least = torch.zeros_like(W), float("inf")
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for _ in range(ROUNDS):
        left, right = _low_rank(W - sparse, rank, L)
        rest = torch.addmm(W, left, right, alpha=-1)
        if isinstance(where, int):
            gains = rest.square() if H is None else (rest @ H).square() / H.diagonal()
            mask = _oriented(_largest(_oriented(gains, input_dim), where), input_dim)
        else:
            mask = _oriented(where, input_dim)
        sparse = _least_squares(rest, mask, H)
        lost = (rest - sparse) if L is None else (rest - sparse) @ L
        loss = float(lost.square().sum())
        if loss < least:
            least, best = loss, (left, right, sparse, mask)
    assert best is not None, "the weight is finite"
    left, right, sparse, mask = best
    left, right = _balanced(left, right)
    B, A = (left, right) if input_dim == 1 else (right.t(), left.t())
    return B, A, _oriented(sparse, input_dim), _oriented(mask, input_dim)


def _oriented(matrix: Tensor, input_dim: int) -> Tensor:
    """Turns a matrix as it is stored to [outputs, inputs], and back."""
    return matrix if input_dim == 1 else matrix.t()


def _mask(weight: Tensor, positions: Tensor) -> Tensor:
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    return mask.index_fill_(0, positions.long(), True).view(weight.shape)


def _largest(gains: Tensor, groups: int) -> Tensor:
    """Returns the mask of the largest entry in each group of each row."""
    starts, _ = group_widths(gains.shape[-1], groups, gains.device)
    columns = largest_offsets(gains, groups) + starts
    return torch.zeros_like(gains, dtype=torch.bool).scatter_(1, columns, True)


def _low_rank(matrix: Tensor, rank: int, L: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the best factors [outputs, rank], [rank, inputs] of a matrix, as it acts on inputs."""
    white = matrix if L is None else matrix @ L
    U, s, V = torch.svd_lowrank(white, q=min(rank + 8, *white.shape), niter=4)
    left, right = U[:, :rank] * s[:rank], V[:, :rank].t()
    return left, right if L is None else torch.linalg.solve_triangular(L, right, upper=False, left=False)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Returns factors of the same product that share its singular values equally."""
    (Q, R), (P, T) = torch.linalg.qr(left), torch.linalg.qr(right.t())
    U, s, V = torch.linalg.svd(R @ T.t())
    root = s.sqrt()
    return Q @ (U * root), root.unsqueeze(1) * (V @ P.t())


def _least_squares(rest: Tensor, mask: Tensor, H: Tensor | None) -> Tensor:
    """Returns S of the least ||(rest - S) L||_F over a support: S H = rest H there."""
    sparse = rest * mask
    if H is None:
        return sparse
    scale = 1 / H.diagonal()  # the preconditioner
    residual = ((rest - sparse) @ H) * mask
    direction = residual * scale
    size = (residual * direction).sum(1, keepdim=True)
    for _ in range(STEPS):
        image = (direction @ H) * mask
        step = size / (direction * image).sum(1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
        sparse = sparse + step * direction
        residual = residual - step * image
        preconditioned = residual * scale
        size, before = (residual * preconditioned).sum(1, keepdim=True), size
        direction = preconditioned + size / before.clamp_min(torch.finfo(size.dtype).tiny) * direction
    return sparse

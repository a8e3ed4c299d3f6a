"""The fit of ``B A + S`` to a trained weight, by what it does to the weight's inputs, and that to the model's outputs.

With W [outputs, inputs], the second moments H = sum of x x^T over inputs x and G = sum of g g^T over gradients g of
what W computes, the change of the model's outputs is about (K-FAC, arXiv 1503.05671)

    sum (g^T (W - B A - S) x)^2  ~  ||M^T (W - B A - S) L||_F^2,    H = L L^T,  G = M M^T

Without inputs H is the identity, without gradients G. Two steps alternate, each the best for the other's result:

    B A   is M^-T times the truncated SVD of M^T (W - S) L, times L^-1 (with L alone: SVD-LLM, arXiv 2403.07378)
    S     are the least squares of M^T (W - B A - S) L over its support, by conjugate gradients

Where the support is to be chosen, each group of a row gets the entry that alone would lower the loss most: with the
residual R = W - B A, that of the largest (G R H)^2 / (diagonal(G) diagonal(H)^T). With a diagonal H alone this is
``|R| ||x||``, the measure of Wanda (arXiv 2306.11695); without both, ``|R|``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slcompile.ops.support import group_widths, largest_offsets

ROUNDS = 6
"""Times that the two steps alternate; more lower the loss by less than a hundredth."""
DAMPING = 1e-3
"""Of the mean of H's diagonal, this share is added to it: few inputs span no space, and others will come."""
GRADIENT_DAMPING = 1e-2
"""Likewise of G's."""
STEPS = 20
"""Of conjugate gradients."""


@torch.no_grad()
def fit(
    weight: Tensor,
    rank: int,
    where: int | Tensor,
    inputs: Tensor | None = None,
    gradients: Tensor | None = None,
    input_dim: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fits factors and values to a weight.

    Args:
        weight: [rows, columns], or a stack of such.
        rank: Of ``B @ A``.
        where: Groups of a row, in each of which one position is chosen; or the flat positions, ascending.
        inputs, gradients: H [inputs, inputs] and G [outputs, outputs], or stacks of such. None, and a zero matrix,
            stand for the identity.
        input_dim: Dimension of the matrix that is multiplied with the inputs.

    Returns:
        B [..., rows, rank] and A [..., rank, columns], of equal norms; flat positions, int64, and the values there.
    """
    if weight.dim() == 2:
        fixed = where if isinstance(where, int) else _mask(weight, where)
        B, A, sparse, mask = _fit_matrix(weight, rank, fixed, inputs, gradients, input_dim)
        positions = mask.flatten().nonzero().squeeze(1)
        return B, A, positions, sparse.flatten()[positions]
    size = weight[0].numel()
    parts = []
    for index, matrix in enumerate(weight):
        own = where if isinstance(where, int) else where[(where >= index * size) & (where < (index + 1) * size)]
        own = own if isinstance(own, int) else own - index * size
        H, G = (None if each is None else each[index] for each in (inputs, gradients))
        parts.append(fit(matrix, rank, own, H, G, input_dim))
    left, right, places, there = (list(each) for each in zip(*parts, strict=True))
    shifted = [each + index * size for index, each in enumerate(places)]
    return torch.stack(left), torch.stack(right), torch.cat(shifted), torch.cat(there)


def damped(moment: Tensor | None, damping: float) -> tuple[Tensor | None, Tensor | None]:
    """Returns a damped second moment, float32, and its Cholesky factor; None for the identity.

    The moment is scaled to a mean diagonal of 1. Nothing that is fitted depends on that.
    """
    if moment is None or not bool(moment.diagonal().any()):
        return None, None
    scaled = moment.double() / moment.diagonal().double().mean()
    scaled.diagonal().add_(damping)
    return scaled.float(), torch.linalg.cholesky(scaled).float()


def acting(weight: Tensor, L: Tensor | None, M: Tensor | None) -> Tensor:
    """Returns ``M^T W L``, for W [outputs, inputs] and the Cholesky factors of H and G."""
    right = weight if L is None else weight @ L
    return right if M is None else M.t() @ right


def loss(weight: Tensor, inputs: Tensor | None, gradients: Tensor | None, input_dim: int = 1) -> Tensor:
    """Returns what is lost with a weight [rows, columns], or a stack of such; arguments as for ``fit``."""
    return torch.stack([each.square().sum() for each in _acting(weight, inputs, gradients, input_dim)]).sum()


def spectrum(weight: Tensor, inputs: Tensor | None, gradients: Tensor | None, input_dim: int = 1) -> Tensor:
    """Returns what is lost without each singular direction, descending; of a stack of matrices, of them together."""
    found = [torch.linalg.svdvals(each).square() for each in _acting(weight, inputs, gradients, input_dim)]
    return torch.stack(found).sum(0)


def _acting(weight: Tensor, inputs: Tensor | None, gradients: Tensor | None, input_dim: int) -> list[Tensor]:
    """Returns each matrix as it acts, of its size."""
    if weight.dim() > 2:
        both = ([None] * len(weight) if each is None else each for each in (inputs, gradients))
        each_of = zip(weight, *both, strict=True)
        return [one for matrix, H, G in each_of for one in _acting(matrix, H, G, input_dim)]
    size = 1.0
    for moment in (inputs, gradients):
        size *= 1.0 if moment is None else float(moment.diagonal().mean()) ** 0.5
    (_, L), (_, M) = damped(inputs, DAMPING), damped(gradients, GRADIENT_DAMPING)
    return [size * acting(_oriented(weight.detach().float(), input_dim), L, M)]


def _fit_matrix(
    weight: Tensor,
    rank: int,
    where: int | Tensor,
    inputs: Tensor | None,
    gradients: Tensor | None,
    input_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns B, A, S and the mask of its support, of which the loss was the least of all rounds."""
    W = _oriented(weight.float(), input_dim)
    (H, L), (G, M) = damped(inputs, DAMPING), damped(gradients, GRADIENT_DAMPING)
    sparse, least = torch.zeros_like(W), float("inf")
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for _ in range(ROUNDS):
        left, right = _low_rank(W - sparse, rank, L, M)
        rest = torch.addmm(W, left, right, alpha=-1)
        if isinstance(where, int):
            gains = _curved(rest, H, G).square() * _inverse_curvature(rest, H, G)
            mask = _oriented(_largest(_oriented(gains, input_dim), where), input_dim)
        else:
            mask = _oriented(where, input_dim)
        sparse = _least_squares(rest, mask, H, G)
        lost = float(acting(rest - sparse, L, M).square().sum())
        if lost < least:
            least, best = lost, (left, right, sparse, mask)
    assert best is not None, "the weight is finite"
    left, right, sparse, mask = best
    left, right = _balanced(left, right)
    B, A = (left, right) if input_dim == 1 else (right.t(), left.t())
    return B, A, _oriented(sparse, input_dim), _oriented(mask, input_dim)


def _curved(matrix: Tensor, H: Tensor | None, G: Tensor | None) -> Tensor:
    """Returns ``G R H``: half of the loss's gradient at a residual R."""
    right = matrix if H is None else matrix @ H
    return right if G is None else G @ right


def _inverse_curvature(matrix: Tensor, H: Tensor | None, G: Tensor | None) -> Tensor:
    """Returns for each entry one over what the loss grows by with its square."""
    found = torch.ones_like(matrix)
    if H is not None:
        found = found / H.diagonal()
    return found if G is None else found / G.diagonal().unsqueeze(1)


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


def _low_rank(matrix: Tensor, rank: int, L: Tensor | None, M: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the factors [outputs, rank], [rank, inputs] that are nearest to a matrix, as it acts."""
    white = acting(matrix, L, M)
    U, s, V = torch.svd_lowrank(white, q=min(rank + 8, *white.shape), niter=4)
    left, right = U[:, :rank] * s[:rank], V[:, :rank].t()
    if L is not None:
        right = torch.linalg.solve_triangular(L, right, upper=False, left=False)
    if M is not None:
        left = torch.linalg.solve_triangular(M.t(), left, upper=True)
    return left, right


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Returns factors of the same product that share its singular values equally."""
    (Q, R), (P, T) = torch.linalg.qr(left), torch.linalg.qr(right.t())
    U, s, V = torch.linalg.svd(R @ T.t())
    root = s.sqrt()
    return Q @ (U * root), root.unsqueeze(1) * (V @ P.t())


def _least_squares(rest: Tensor, mask: Tensor, H: Tensor | None, G: Tensor | None) -> Tensor:
    """Returns S of the least loss over a support, by conjugate gradients: there, ``G S H = G rest H``."""
    sparse = rest * mask
    if H is None and G is None:
        return sparse
    smallest = torch.finfo(rest.dtype).tiny
    together = (1,) if G is None else (0, 1)  # without G each row is a problem of its own
    scale = _inverse_curvature(rest, H, G)  # the preconditioner
    residual = _curved(rest - sparse, H, G) * mask
    direction = residual * scale
    size = (residual * direction).sum(together, keepdim=True)
    for _ in range(STEPS):
        image = _curved(direction, H, G) * mask
        step = size / (direction * image).sum(together, keepdim=True).clamp_min(smallest)
        sparse = sparse + step * direction
        residual = residual - step * image
        preconditioned = residual * scale
        size, before = (residual * preconditioned).sum(together, keepdim=True), size
        direction = preconditioned + size / before.clamp_min(smallest) * direction
    return sparse

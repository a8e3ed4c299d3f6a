"""What is done to the factors beside the optimizer's steps: restarts, and gradients preconditioned by the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slcompile import SLWeight


def sl_weights(model: nn.Module) -> Iterator[SLWeight]:
    """The factorized weights of a model."""
    return (each for each in model.modules() if isinstance(each, SLWeight))


@torch.no_grad()
def restart(model: nn.Module, optimizer: Optimizer) -> None:
    """Balances B and A of each weight and forgets their moments (arXiv 2505.22922); the weight stays what it is.

    With the singular values ``U diag(s) V^T`` of ``B @ A``, B becomes ``U diag(sqrt(s))`` and A ``diag(sqrt(s)) V^T``:
    by QR of both and the SVD of the [rank, rank] core, so that no matrix of the weight's size is made.
    """
    for weight in sl_weights(model):
        left, first = torch.linalg.qr(weight.B)
        right, second = torch.linalg.qr(weight.A.mT)
        U, s, V = torch.linalg.svd(first @ second.mT)
        weight.B.copy_(left @ U * s.sqrt())
        weight.A.copy_((right @ V.mT * s.sqrt()).mT)
        for factor in (weight.B, weight.A):
            optimizer.state.pop(factor, None)


@torch.no_grad()
def precondition(model: nn.Module, epsilon: float) -> None:
    """Multiplies the gradients of B and A by the inverse Gram matrix of the other factor (arXiv 2402.02347).

    ``G_B (A A^T + e I)^-1`` and ``(B^T B + e I)^-1 G_A``, where e is ``epsilon`` times the mean eigenvalue: a step is
    then nearly independent of how the product is split into factors.
    """
    for weight in sl_weights(model):
        assert weight.B.grad is not None
        assert weight.A.grad is not None
        grad_A = _solve(weight.B.mT @ weight.B, weight.A.grad, epsilon)
        weight.B.grad.copy_(_solve(weight.A @ weight.A.mT, weight.B.grad.mT, epsilon).mT)
        weight.A.grad.copy_(grad_A)


def _solve(gram: Tensor, gradient: Tensor, epsilon: float) -> Tensor:
    mean = gram.diagonal().mean()
    if mean == 0:
        return gradient  # of a factor that is zero; Adam does not mind how large a gradient is
    damped = gram + epsilon * mean * torch.eye(len(gram), device=gram.device)
    return torch.linalg.solve(damped / mean, gradient)

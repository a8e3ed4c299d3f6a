"""What the weights of a model are multiplied with once others, or they themselves, were replaced by approximations.

A weight behind approximations gets other inputs than it was fitted for. With x what it gets in the model as it was, and
y in the approximated one, the matrix that comes nearest to ``W x`` is the least squares solution

    sum |W x - V y|^2:    V = W D C^-1,    C = sum of y y^T,    D = sum of x y^T
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from slcompile.convert.moments import Reads, call, floating_leaves
from slcompile.models import arguments_for
from slcompile.torch_private import Watching

DAMPING = 1e-2
"""Of the mean of C's diagonal, this share is added to C, and to D: directions that hardly occur stay what they were."""


@dataclass
class Drift:
    """Sums over the inputs of one weight, before and after approximation, in pairs.

    Attributes:
        inputs: C, [inputs, inputs], float32; of a stack of matrices, a stack.
        crossed: D, likewise.
    """

    inputs: Tensor
    crossed: Tensor

    def corrected(self, weight: Tensor, input_dim: int) -> Tensor:
        """Returns V for a weight [rows, columns], or a stack of such, whose matmul contracts ``input_dim``."""
        W = (weight if input_dim == 1 else weight.mT).double()
        C, D = self.inputs.double(), self.crossed.double()
        eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
        size = DAMPING * C.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        size = size + (size == 0)  # a matrix that got no inputs stays what it was
        V = torch.linalg.solve(C + size * eye, W @ (D + size * eye), left=False).to(weight.dtype)
        return V if input_dim == 1 else V.mT


@torch.no_grad()
def drifts(
    model: nn.Module,
    weights: Iterable[tuple[nn.Parameter, int]],
    approximations: Mapping[nn.Parameter, Tensor],
    batches: Iterable[object],
) -> tuple[dict[int, Drift], float]:
    """Runs a model on batches, as it is and with approximated weights in turns.

    Args:
        model: In the mode in which it is to run; its weights are afterwards what they were.
        weights: Those to watch, each with the dimension that its matmuls contract.
        approximations: Of these and others, of a weight's shape.
        batches: As ``call`` takes them.

    Returns:
        By the id of the weight; missing is one that a convolution reads, or that is not multiplied in both runs with as
        many inputs, as where a router sends tokens elsewhere. And the squared error of the outputs, relative to them.
    """
    pairs = _Pairs(weights)
    error = whole = 0.0
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            batch = arguments_for(model, batch)
            with pairs.of_the_model_as_it_was():
                wanted = [each.clone() for each in floating_leaves(call(model, batch))]
            with replaced(approximations), pairs.of_the_approximated_model():
                given = floating_leaves(call(model, batch))
            for found, target in zip(given, wanted, strict=True):
                counts = target.isfinite()  # masks of infinities do not
                found, target = (each[counts].double() for each in (found, target))
                error += float((found - target).square().sum())
                whole += float(target.square().sum())
    return pairs.drifts(), error / max(whole, 1e-30)


@contextmanager
def replaced(weights: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Within, parameters hold other numbers."""
    before = {weight: weight.detach().clone() for weight in weights}
    _write(weights)
    try:
        yield
    finally:
        _write(before)


def _write(weights: Mapping[nn.Parameter, Tensor]) -> None:
    for weight, value in weights.items():
        with torch.inference_mode(weight.is_inference()), torch.no_grad():
            weight.copy_(value)


class _Pairs(Reads):
    """Pairs the inputs of two runs in the order in which they come."""

    def __init__(self, weights: Iterable[tuple[nn.Parameter, int]]) -> None:
        super().__init__(weights)
        self._found: dict[int, Drift] = {}
        self._unlike: set[int] = set()
        self._before: dict[int, list[tuple[int | None, Tensor, Tensor]]] = {}
        self._second = False

    @contextmanager
    def of_the_model_as_it_was(self) -> Iterator[None]:
        self._before, self._second = {}, False
        torch.clear_autocast_cache()  # in which casts of weights would not be seen
        with Watching(self.see):
            yield
        self.forget_copies()

    @contextmanager
    def of_the_approximated_model(self) -> Iterator[None]:
        self._second = True
        torch.clear_autocast_cache()  # in which are the weights that are replaced
        with Watching(self.see):
            yield
        self.forget_copies()
        self._unlike |= {key for key, left in self._before.items() if left}

    @override
    def _convolved(self, key: int, view: Tensor, x: Tensor, *settings: Sequence[int]) -> None:
        """Leaves a convolution: its patches are too many to be kept."""

    @override
    def take(self, key: int, matrix: int | None, x: Tensor, index: Tensor) -> None:
        if not self._second:
            self._before.setdefault(key, []).append((matrix, x.clone(), index))  # which may be written to
            return
        queue = self._before.get(key)
        matrix_before, x_before, index_before = queue.pop(0) if queue else (None, x[:0], index)
        if matrix_before != matrix or x_before.shape != x.shape or not torch.equal(index_before, index):
            self._unlike.add(key)
            return
        weight, input_dim = self._weights[key]
        if key not in self._found:
            inputs = weight.shape[-2:][input_dim]
            zeros = weight.new_zeros((*weight.shape[:-2], inputs, inputs), dtype=torch.float32)
            self._found[key] = Drift(zeros, zeros.clone())
        here = (index.unsqueeze(1), index)
        for total, left in ((self._found[key].inputs, x), (self._found[key].crossed, x_before)):
            (total if matrix is None else total[matrix]).index_put_(here, left.t() @ x, accumulate=True)

    def drifts(self) -> dict[int, Drift]:
        """What was found of the weights whose uses are alike in both runs."""
        return {key: each for key, each in self._found.items() if key not in self._unlike}

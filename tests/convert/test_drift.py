"""Inputs of weights before and after approximation: pairs, the least squares of them, and weights that stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slcompile.convert.drift import DAMPING, Drift, drifts, replaced


@pytest.mark.parametrize("input_dim", [0, 1])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_the_corrected_weight_is_the_damped_least_squares_solution(input_dim, stack):
    torch.manual_seed(0)
    x, y = torch.randn(*stack, 40, 7), torch.randn(*stack, 40, 7)
    W = torch.randn(*stack, 5, 7)
    drift = Drift(y.mT @ y, x.mT @ y)
    found = drift.corrected(W if input_dim == 1 else W.mT, input_dim)
    # Damping is as if each feature came alone once more, as large in both runs.
    size = (DAMPING * y.double().square().sum(-2).mean(-1)).sqrt()[..., None, None]
    more = size * torch.eye(7, dtype=torch.float64).expand(*stack, 7, 7)
    inputs, wanted = (torch.cat([each.double(), more], -2) for each in (y, x))
    expected = torch.linalg.lstsq(inputs, wanted @ W.double().mT).solution.mT
    torch.testing.assert_close(found if input_dim == 1 else found.mT, expected.float())


def test_a_matrix_without_inputs_stays():
    W = torch.randn(2, 5, 7)
    zeros = torch.zeros(2, 7, 7)
    torch.testing.assert_close(Drift(zeros, zeros).corrected(W, 1), W)


class Two(nn.Module):
    """The second weight reads what the first one made, which is written to afterwards; the third some rows of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False)
        self.routed = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        result = self.second(hidden)
        result[hidden[:, 0] > 0] += self.routed(hidden[hidden[:, 0] > 0])
        hidden.zero_()
        return result


def test_pairs_are_of_the_model_as_it_was_and_of_the_approximated_one():
    model, batches = Two(), [torch.randn(9, 6), torch.randn(5, 6)]
    before = {name: each.clone() for name, each in model.state_dict().items()}
    weights = [(model.first.weight, 1), (model.second.weight, 1), (model.routed.weight, 1)]
    approximation = -model.first.weight.detach()
    found, error = drifts(model, weights, {model.first.weight: approximation}, batches)
    x = torch.cat(batches)
    wanted, given = x @ before["first.weight"].T, x @ approximation.T
    first, second = (found[id(each)] for each in (model.first.weight, model.second.weight))
    torch.testing.assert_close(first.inputs, x.T @ x)
    torch.testing.assert_close(first.crossed, x.T @ x)
    torch.testing.assert_close(second.inputs, given.T @ given)
    torch.testing.assert_close(second.crossed, wanted.T @ given)
    assert id(model.routed.weight) not in found  # other rows came to it, and another number of them
    with torch.no_grad():
        target = torch.cat([model(each) for each in batches])
        with replaced({model.first.weight: approximation}):
            other = torch.cat([model(each) for each in batches])
    assert error == pytest.approx(float((other - target).square().sum() / target.square().sum()), rel=1e-5)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_convolutions_are_left():
    model = nn.Conv1d(3, 4, 2)
    found, error = drifts(model, [(model.weight, 1)], {model.weight: -model.weight.detach()}, [torch.randn(2, 3, 8)])
    assert not found
    assert error > 0


def test_weights_are_what_they_were_where_the_model_fails():
    model = Two()
    before = model.first.weight.detach().clone()
    zeros = torch.zeros_like(before)

    def fails_without_weights(x: Tensor) -> Tensor:
        if not model.first.weight.any():
            raise RuntimeError("no weights")
        return Two.forward(model, x)

    model.forward = fails_without_weights
    with pytest.raises(RuntimeError, match="no weights"):
        drifts(model, [(model.first.weight, 1)], {model.first.weight: zeros}, [torch.randn(3, 6)])
    assert torch.equal(model.first.weight, before)

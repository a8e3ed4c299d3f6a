"""Weights that are zero: they stay so at the start, and learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import slcompile


class Residual(nn.Module):
    """A sum of two branches that begin at zero; the last weight of one is stored [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.other = nn.Linear(64, 64), nn.Linear(64, 64), Conv1D(64, 64)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.other.weight)

    def forward(self, x):
        return x + self.last(torch.tanh(self.first(x))) + self.other(x)


@pytest.mark.parametrize("others_look_trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.1},
        {"density": 0.1, "support": "uniform"},
        *({"structure": each} for each in ("block_low_rank", "tensor_train", "cp")),
    ],
    ids=str,
)
def test_a_weight_that_is_zero_stays_zero_and_learns_in_all_its_parts(options, others_look_trained):
    """As the last layer of a residual branch: a random start would change the model, an SVD of it never learns."""
    model = Residual()
    if others_look_trained:
        model.first.weight.data.add_(torch.outer(torch.randn(64), torch.randn(64)))
    x = torch.randn(16, 64)
    before = model(x)
    config = slcompile.SLConfig(rank=4, **options)
    slcompile.factorize_(model, config, example_args=(x,))
    assert len(slcompile.factors(model)) == 3
    assert torch.equal(model(x), before)
    assert not model.last.weight.any()
    start = {name: each.detach().clone() for name, each in model.named_parameters() if "_sl." in name}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - x.roll(1, 0)).square().mean().backward()
        optimizer.step()
    same = [name for name, each in model.named_parameters() if name in start and torch.equal(each, start[name])]
    assert not same


def test_an_explicit_paper_start_replaces_zeros_too():
    model = nn.Sequential(nn.Linear(64, 64))
    nn.init.zeros_(model[0].weight)
    slcompile.factorize_(model, slcompile.SLConfig(rank=4, init="kaiming"))
    assert model[0].weight.any()

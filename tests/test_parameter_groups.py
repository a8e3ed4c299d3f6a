"""Parameter groups: the values of factorized weights have a rate of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slcompile
from slcompile.optim import parameter_groups


def model_of_one() -> nn.Module:
    return slcompile.factorize_(nn.Sequential(nn.Linear(64, 48)), slcompile.SLConfig(rank=4, seed=0))


def test_values_have_a_rate_of_their_own_and_decay_as_the_others():
    model = model_of_one()
    weight = model[0].weight_sl
    others, values = parameter_groups(model.parameters(), lr=1e-3, weight_decay=0.1)
    assert {id(p) for p in others["params"]} == {id(p) for p in (weight.B, weight.A, model[0].bias)}
    assert [id(p) for p in values["params"]] == [id(weight.values)]
    assert (others["lr"], others["weight_decay"]) == (1e-3, 0.1)
    assert (values["lr"], values["weight_decay"]) == (4e-3, 0.025)


def test_groups_keep_their_order_and_what_they_have():
    model = model_of_one()
    weight = model[0].weight_sl
    given = [{"params": model[0].bias, "lr": 1.0}, {"params": [weight.values, weight.B], "betas": (0.8, 0.9)}]
    bias, factors, values = parameter_groups(given, lr=1e-3, values_rate=2)
    assert (bias["params"], bias["lr"]) == ([model[0].bias], 1.0)
    assert factors == {"params": [weight.B], "lr": 1e-3, "weight_decay": 0.0, "betas": (0.8, 0.9)}
    assert (values["lr"], values["betas"]) == (2e-3, (0.8, 0.9))
    assert given[1] == {"params": [weight.values, weight.B], "betas": (0.8, 0.9)}


def test_a_step_moves_the_values_by_so_much_more():
    model = model_of_one()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model.parameters(), lr=1e-3))
    model(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    moved = {name: (p.detach() - before[name]).abs().max() for name, p in model.named_parameters()}
    torch.testing.assert_close(moved["0.weight_sl.values"], torch.tensor(4e-3), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved["0.weight_sl.B"], torch.tensor(1e-3), rtol=1e-3, atol=0)


@pytest.mark.slow
def test_what_has_no_values_and_a_rate_that_is_none_are_refused():
    with pytest.raises(ValueError, match="must be of a factorized model"):
        parameter_groups(nn.Linear(4, 4).parameters(), lr=1e-3)
    for rate in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="values_rate must be a finite number above 0"):
            parameter_groups(model_of_one().parameters(), lr=1e-3, values_rate=rate)

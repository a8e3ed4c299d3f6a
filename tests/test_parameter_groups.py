"""Parameter groups: the values of factorized weights have a rate of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slcompile
from slcompile.optim import parameter_groups
from tests.testing import process_group


def model_of_one() -> nn.Module:
    return slcompile.factorize_(nn.Sequential(nn.Linear(64, 48)), slcompile.SLConfig(rank=4, seed=0))


def test_values_have_a_rate_of_their_own_and_decay_as_the_others():
    model = model_of_one()
    weight = model[0].weight_sl
    others, values = parameter_groups(model.parameters(), lr=1e-3, values_rate=4, weight_decay=0.1)
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


def test_named_parameters_are_grouped_as_optimizers_take_them():
    model = model_of_one()
    groups = parameter_groups(model.named_parameters(), lr=1e-3, values_rate=4)
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["0.bias", "0.weight_sl.B", "0.weight_sl.A"],
        ["0.weight_sl.values"],
    ]
    assert [group["lr"] for group in torch.optim.AdamW(groups).param_groups] == [1e-3, 4e-3]


def test_a_step_moves_the_values_by_so_much_more():
    model = model_of_one()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model.parameters(), lr=1e-3, values_rate=4))
    model(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    moved = {name: (p.detach() - before[name]).abs().max() for name, p in model.named_parameters()}
    torch.testing.assert_close(moved["0.weight_sl.values"], torch.tensor(4e-3), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved["0.weight_sl.B"], torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_rates_that_a_scheduler_noted_are_multiplied_too():
    model = model_of_one()
    scheduled = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.optim.lr_scheduler.OneCycleLR(scheduled, max_lr=1e-2, total_steps=10)
    (noted,) = scheduled.param_groups
    others, values = parameter_groups(scheduled.param_groups, lr=1e-3, values_rate=2)
    for name in ("lr", "initial_lr", "max_lr", "min_lr"):
        assert others[name] == noted[name]
        assert values[name] == 2 * noted[name]
    again = torch.optim.AdamW([others, values])
    torch.optim.lr_scheduler.LambdaLR(again, lambda step: 1.0)
    assert again.param_groups[1]["lr"] == 2 * again.param_groups[0]["lr"]


def test_values_are_known_after_a_start_on_the_meta_device():
    with torch.device("meta"):
        model = model_of_one()
    model.to_empty(device="cpu")
    model[0].weight_sl.reset_parameters()
    _, values = parameter_groups(iter(model.parameters()), lr=1e-3, values_rate=4)
    assert [id(p) for p in values["params"]] == [id(model[0].weight_sl.values)]
    with pytest.raises(RuntimeError, match="Muon orthogonalises matrices"):
        torch.optim.Muon([model[0].weight_sl.values]).step()


@pytest.mark.parametrize("groups_first", [False, True])
def test_values_are_known_in_shards(groups_first, tmp_path):
    with process_group(tmp_path):
        model = model_of_one()
        torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        sharded = model[0].weight_sl.values
        if groups_first:
            _, values = parameter_groups([{"params": iter(model.parameters())}], lr=1e-3, values_rate=4)
            assert [id(p) for p in values["params"]] == [id(sharded)]
        with pytest.raises(RuntimeError, match="Muon orthogonalises matrices"):
            torch.optim.Muon([sharded]).step()


@pytest.mark.slow
def test_what_has_no_values_and_a_rate_that_is_none_are_refused():
    with pytest.raises(ValueError, match="must be of a factorized model"):
        parameter_groups(nn.Linear(4, 4).parameters(), lr=1e-3, values_rate=4)
    for rate in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="values_rate must be a finite number above 0"):
            parameter_groups(model_of_one().parameters(), lr=1e-3, values_rate=rate)


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        (lambda params: params, {"lr": "1e-3"}, "lr must be a finite number of at least 0, got '1e-3'"),
        (lambda params: params, {"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        (
            lambda params: [{"params": params, "lr": float("nan")}],
            {},
            "lr must be a finite number of at least 0, got nan",
        ),
        (lambda params: params, {"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0, got -0.1"),
        (lambda params: None, {}, "params_or_groups must be an ordered iterable of parameters, got NoneType"),
        (set, {}, "params_or_groups must be an ordered iterable of parameters, got set"),
        (lambda params: {"params": params}, {}, "params_or_groups must be an ordered iterable of parameters, got dict"),
        (lambda params: [{"params": set(params)}], {}, r"\[0\]\['params'\] must be an ordered iterable of .*, got set"),
        (lambda params: [{"lr": 1.0}], {}, r"\[0\]\['params'\] must be an ordered iterable of .*, got NoneType"),
        (lambda params: [{"params": params}, params[0]], {}, r"\[1\] must be a dict as the first is, got Parameter"),
    ],
)
def test_what_optimizers_do_not_take_is_refused_by_name(groups, options, message):
    params = list(model_of_one().parameters())
    with pytest.raises(ValueError, match=message):
        parameter_groups(groups(params), **{"lr": 1e-3, "values_rate": 4, **options})

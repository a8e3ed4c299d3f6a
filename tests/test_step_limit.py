"""The limit of a factor's step: what it shortens, to what, what it leaves alone, and what it refuses."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn

import slcompile


def make(lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    slcompile.factorize_(model, slcompile.SLConfig(rank=4, seed=0, init="kaiming"))
    return model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> dict[str, torch.Tensor]:
    """Takes one step; returns by how much each parameter moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def test_a_long_step_keeps_its_direction_and_has_the_length_that_is_allowed(caplog):
    free, limited = make(1.0), make(1.0)
    limit = slcompile.limit_steps(*limited, ratio=0.2)
    with caplog.at_level(logging.WARNING, "slcompile"):
        wanted, got = step(*free, seed=1), step(*limited, seed=1)
    norm_A = float(make(1.0)[0][0].weight_sl.A.detach().norm())
    start_B = math.sqrt(48 * 4 / (3 * 64))  # B is zero: the norm of a random start counts
    for name, norm in (("0.weight_sl.A", norm_A), ("0.weight_sl.B", start_B)):
        if not wanted[name].any():
            continue  # of A, while B is zero
        assert float(got[name].norm()) == pytest.approx(0.2 * norm, rel=1e-4)
        torch.testing.assert_close(got[name] / got[name].norm(), wanted[name] / wanted[name].norm())
    for name in ("0.bias", "0.weight_sl.values"):
        assert torch.equal(got[name], wanted[name])
    assert limit.limited == 1
    step(*limited, seed=2)
    assert limit.limited == 3
    messages = [record.getMessage() for record in caplog.records if "shortened" in record.getMessage()]
    assert len(messages) == 1
    assert "a step of 0.weight_sl.B was 14 of its norm" in messages[0]


def test_a_short_step_is_left_to_the_bit_and_a_removed_limit_does_nothing():
    free, limited = make(1e-3), make(1e-3)
    limit = slcompile.limit_steps(*limited)
    for seed in range(3):
        wanted, got = step(*free, seed=seed), step(*limited, seed=seed)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert limit.limited == 0
    limit.remove()
    for optimizer in (free[1], limited[1]):
        optimizer.param_groups[0]["lr"] = 1.0
    wanted, got = step(*free, seed=3), step(*limited, seed=3)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert limit.limited == 0


def test_it_may_be_set_before_the_first_step_converts_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    limit = slcompile.limit_steps(torch.compile(model, backend="sltrain", options={"rank": 4}), optimizer)
    slcompile.factorize_(model, slcompile.SLConfig(rank=4, seed=0))  # as the first step does
    step(model, optimizer, seed=1)
    assert limit.limited == 1


def test_a_step_that_raised_leaves_nothing_behind():
    model, optimizer = make(1e-3)
    limit = slcompile.limit_steps(model, optimizer)

    def failing() -> float:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(failing)
    A = model[0].weight_sl.A
    with torch.no_grad():
        A.mul_(5)
    A.grad, before = torch.zeros_like(A), A.detach().clone()
    optimizer.step()
    assert torch.equal(A, before)
    assert limit.limited == 0


def test_what_cannot_be_limited_is_refused():
    model, optimizer = make(1e-3)
    for ratio in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="ratio must be a finite number above 0"):
            slcompile.limit_steps(model, optimizer, ratio)
    for other in (None, model):
        with pytest.raises(ValueError, match=r"optimizer must be a torch\.optim\.Optimizer, got"):
            slcompile.limit_steps(model, other)
    for held in (make(1e-3)[0].parameters(), [model[0].bias, model[0].weight_sl.values]):  # a limit of nothing
        with pytest.raises(ValueError, match="optimizer must hold factors B and A of the model, got SGD with none"):
            slcompile.limit_steps(model, torch.optim.SGD(held, lr=0.1))
    model, _ = make(1e-3)
    per_layer = slcompile.optim.per_layer(torch.optim.AdamW, model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="optimizer got PerLayerAdamW, whose updates come before step"):
        slcompile.limit_steps(model, per_layer)


@pytest.mark.parametrize("scale", [math.inf, math.nan])
def test_a_step_that_is_no_number_is_told_once_and_left(scale, caplog):
    model, optimizer = make(1e-2)
    limit = slcompile.limit_steps(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        (model(torch.randn(16, 64)).square().mean() * scale).backward()
        with caplog.at_level(logging.WARNING, "slcompile"):
            optimizer.step()
    assert limit.limited == 0
    assert [each.message.split("weight_sl.")[1] for each in caplog.records if "is no number" in each.message] == [
        "B is no number and is not shortened: training has diverged"
    ]
    assert not bool(model[0].weight_sl.B.isfinite().all())


def test_the_wrapper_that_accelerate_puts_around_an_optimizer_is_looked_into():
    accelerate = pytest.importorskip("accelerate")
    model, optimizer = make(1.0)
    prepared = accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer)
    assert prepared is not optimizer
    limit = slcompile.limit_steps(model, prepared)
    step(model, prepared, seed=1)
    assert limit.limited == 1
    per_layer = slcompile.optim.per_layer(torch.optim.SGD, make(1.0)[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="PerLayerSGD, whose updates come before step"):
        slcompile.limit_steps(model, accelerate.Accelerator(cpu=True).prepare_optimizer(per_layer))

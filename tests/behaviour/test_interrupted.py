"""An exception at any point of a conversion or of a merge leaves a model and its optimizer as they were, or done."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import slcompile
import slcompile.convert.transaction
import slcompile.convert.weight_uses
import slcompile.factorize
from tests.testing import OPTIONS

pytestmark = pytest.mark.slow

CONFIG = slcompile.SLConfig(rank=2, density=0.1, min_dim=8)
NAMES = {"0.weight", "2.weight"}


def tiny() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))


class Interrupt(BaseException):
    pass


class Interrupted:
    """A function, with an exception out of its ``at``-th call: of a function of ours, or by one of ours."""

    def __init__(self, function: Callable[..., Any], at: int) -> None:
        self.function, self.left = function, at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sys.setprofile(self.profile)
        try:
            return self.function(*args, **kwargs)
        finally:
            sys.setprofile(None)

    def profile(self, frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call") and "slcompile" in frame.f_globals.get("__name__", ""):
            self.left -= 1
            if not self.left:
                raise Interrupt


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Everything that a conversion changes."""
    modules = [
        (name, type(each), sorted(vars(each)), list(each._modules), {key: id(p) for key, p in each._parameters.items()})
        for name, each in model.named_modules()
    ]
    hooks = [bool(p._post_accumulate_grad_hooks) for p in model.parameters()]
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    return modules, hooks, groups, list(model.state_dict())


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "per layer": lambda parameters: slcompile.optim.per_layer(torch.optim.SGD, parameters, lr=0.1),
}


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is found alive: all objects of the process are many, and those that matter here are few."""
    objects: list[Any] = []
    monkeypatch.setattr("gc.get_objects", lambda: list(objects))
    return objects


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_conversion_interrupted_anywhere_is_undone_or_done(make, alive, monkeypatch):
    convert, x = slcompile.convert.transaction.convert, torch.randn(4, 16)
    undone = 0
    for at in itertools.count(1):
        model = tiny()
        optimizer = make(model.parameters())
        before = state(model, optimizer)
        alive[:] = *model.modules(), optimizer
        converting = Interrupted(convert, at)
        monkeypatch.setattr(slcompile.factorize, "convert", converting)
        with contextlib.suppress(Interrupt):
            slcompile.factorize_(model, CONFIG)
        if state(model, optimizer) == before:
            undone += 1
            monkeypatch.setattr(slcompile.factorize, "convert", convert)
            slcompile.factorize_(model, CONFIG)
        assert set(slcompile.factors(model)) == NAMES
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
        model(x).sum().backward()
        optimizer.step()
        if converting.left > 0:
            break
    assert undone > 100


def test_a_merge_interrupted_anywhere_is_undone_or_done(alive):
    undone, x = 0, torch.randn(4, 16)
    for at in itertools.count(1):
        model = tiny()
        alive[:] = model.modules()
        slcompile.factorize_(model, CONFIG)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before, expected = state(model, optimizer), model(x)
        merging = Interrupted(slcompile.merge_, at)
        with contextlib.suppress(Interrupt):
            merging(model)
        if state(model, optimizer) == before:
            undone += 1
            assert torch.equal(model(x), expected)
            slcompile.merge_(model)
        assert [type(each) for each in model.modules()] == [type(each) for each in tiny().modules()]
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        if merging.left > 0:
            break
    assert undone > 30


@pytest.mark.parametrize("stage", ["lower_to_aten", "inductor", "kept_inputs", "no_tracing"])
def test_a_failure_of_the_compiler_leaves_the_model_dense(block, batch, stage, aten_kernels, monkeypatch):
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    compiled = torch.compile(block, backend="sltrain", options=OPTIONS)
    before = state(block, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(
            slcompile.convert.weight_uses, "_reads_are_plain", lambda *args: False
        )  # lower_to_aten is called then
        patch.setattr(slcompile.torch_private, stage, lambda *args: 1 / 0)
        with pytest.raises(Exception, match="division by zero"):
            compiled(batch[0])
    assert state(block, optimizer) == before
    torch._dynamo.reset()
    compiled(batch[0]).sum().backward()
    assert set(slcompile.factors(block)) == {"up.weight", "down.weight", "mix"}
    assert all(p.grad is not None for p in block.parameters())

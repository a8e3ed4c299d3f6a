"""An exception at any point of a conversion or of a merge leaves a model and its optimizer as they were, or done."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import slcompile
import slcompile.conversion
import slcompile.factorize

CONFIG = slcompile.SLConfig(rank=8, density=0.05, init="spectral")
OPTIONS = {"rank": 8, "density": 0.05}


class Interrupt(BaseException):
    pass


def interrupted(function: Callable[..., Any], at: int, within: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The function, with an exception out of its ``at``-th call: of a function of ours, or by one of ours."""

    def run(*args: Any, **kwargs: Any) -> Any:
        calls = 0

        def profile(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            if event in ("call", "c_call") and "slcompile" in frame.f_globals.get("__name__", ""):
                calls += 1
                if calls == at:
                    sys.setprofile(None)
                    raise Interrupt

        sys.setprofile(profile)
        try:
            return function(*args, **kwargs)
        finally:
            sys.setprofile(None)

    return run


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Everything that a conversion changes."""
    modules = [
        (name, type(each), sorted(vars(each)), list(each._modules), {key: id(p) for key, p in each._parameters.items()})
        for name, each in model.named_modules()
    ]
    hooks = [bool(p._post_accumulate_grad_hooks) for p in model.parameters()]
    return modules, hooks, [[id(p) for p in group["params"]] for group in optimizer.param_groups], list(model.state_dict())


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "per layer": lambda parameters: slcompile.optim.per_layer(torch.optim.SGD, parameters, lr=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_conversion_interrupted_anywhere_is_undone_or_done(block_class, make, monkeypatch):
    convert = slcompile.conversion.convert
    at = undone = 0
    is_interrupted = True
    while is_interrupted:
        at += 1
        model = block_class()
        optimizer = make(model.parameters())
        before = state(model, optimizer)
        # All objects of the process are many; those that matter here are few.
        monkeypatch.setattr("gc.get_objects", lambda model=model, held=optimizer: [*model.modules(), held])
        monkeypatch.setattr(slcompile.factorize, "convert", interrupted(convert, at))
        try:
            slcompile.factorize_(model, CONFIG)
            is_interrupted = False
        except Interrupt:
            pass
        if is_interrupted and state(model, optimizer) == before:
            undone += 1
            monkeypatch.setattr(slcompile.factorize, "convert", convert)
            slcompile.factorize_(model, CONFIG)
        assert set(slcompile.factors(model)) == {"up.weight", "down.weight"}
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
        monkeypatch.setattr("gc.get_objects", list)
        x = torch.randn(4, 64)
        model(x).sum().backward()
        optimizer.step()
    assert undone > 100


def test_a_merge_interrupted_anywhere_is_undone_or_done(block_class, batch):
    at = undone = 0
    is_interrupted = True
    while is_interrupted:
        at += 1
        model = slcompile.factorize_(block_class(), CONFIG)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before, expected = state(model, optimizer), model(batch[0])
        try:
            interrupted(slcompile.merge_, at)(model)
            is_interrupted = False
        except Interrupt:
            pass
        if is_interrupted and state(model, optimizer) == before:
            undone += 1
            assert torch.equal(model(batch[0]), expected)
            slcompile.merge_(model)
        assert [type(each) for each in model.modules()] == [type(each) for each in block_class().modules()]
        torch.testing.assert_close(model(batch[0]), expected, rtol=1e-5, atol=1e-6)
    assert undone > 50


@pytest.mark.parametrize("stage", ["lower_to_aten", "inductor", "kept_inputs", "no_tracing"])
def test_a_failure_of_the_compiler_leaves_the_model_dense(block, batch, stage, aten_kernels, monkeypatch):
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    before = state(block, optimizer)
    compiled = torch.compile(block, backend="sltrain", options=OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(slcompile.torch_private, stage, lambda *args: 1 / 0)
        with pytest.raises(Exception, match="division by zero"):
            compiled(batch[0])
    assert state(block, optimizer) == before
    torch._dynamo.reset()
    compiled(batch[0]).sum().backward()
    assert set(slcompile.factors(block)) == {"up.weight", "down.weight", "mix"}
    assert all(p.grad is not None for p in block.parameters())

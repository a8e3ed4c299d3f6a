"""What a process may have set in torch, a default dtype or inference mode: conversions are what they are without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import slcompile
from tests.testing import some_of

CONFIG = slcompile.SLConfig(rank=8, density=0.05, seed=3)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("base", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_default_dtype_changes_no_conversion(
    dtype: torch.dtype, base: str | None, default_dtype: torch.dtype
) -> None:
    config = CONFIG if base is None else slcompile.SLConfig(rank=8, density=0.05, seed=3, base=base)
    torch.set_default_dtype(torch.float32)
    x, expected, model = batch(dtype), slcompile.factorize_(net(dtype), config), net(dtype)
    torch.set_default_dtype(default_dtype)
    slcompile.factorize_(model, config)
    assert torch.equal(model(x), expected(x))
    assert {name: each.dtype for name, each in model.state_dict().items()} == {
        name: each.dtype for name, each in expected.state_dict().items()
    }


@pytest.mark.slow
def test_the_string_trains_under_a_default_dtype(default_dtype: torch.dtype, aten_kernels: None) -> None:
    torch.set_default_dtype(torch.float32)
    model, x = net(), batch()
    torch.set_default_dtype(default_dtype)
    compiled = torch.compile(model, backend="sltrain", options={"rank": 8, "density": 0.05, "init": "spectral"})
    compiled(x).square().mean().backward()
    assert len(slcompile.factors(model)) == 2
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("how", ["factorize_", "merge_", "rewrite"])
def test_what_is_converted_in_inference_mode_can_be_trained(how: str) -> None:
    model, x = net(), batch()
    if how == "merge_":
        slcompile.factorize_(model, CONFIG)
    traced = torch.fx.symbolic_trace(model) if how == "rewrite" else model
    with torch.inference_mode():
        slcompile.merge_(model) if how == "merge_" else getattr(slcompile, how)(traced, CONFIG)
    traced(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(slcompile.factors(model)) == (0 if how == "merge_" else 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", some_of([torch.no_grad, torch.inference_mode], [torch.inference_mode]), ids=["no_grad", "inference_mode"]
)
def test_estimates_and_checks_are_of_training_wherever_they_are_called(mode: type, aten_kernels: None) -> None:
    model, x, other = net(), batch(), net()
    expected = slcompile.estimate_memory(model, (x,), config=CONFIG)
    with mode():
        assert slcompile.estimate_memory(model, (x,), config=CONFIG) == expected
        assert slcompile.check(model, (x,), config=CONFIG).is_healthy
        found = slcompile.compress(other, [x, x], rank=8, density=0.05)
    assert found.by_outputs


def test_the_first_step_converts_with_inductors_cpp_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads what placeholders are said to be, as of a graph that was exported."""
    # C++ with its wrapper takes 15 s to compile.
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", lambda gm, inputs, **_: gm.forward)
    model, x = nn.Linear(64, 64), batch()
    options = {"rank": 8, "density": 0.05, "lowering": "composed", "inductor": {"cpp_wrapper": True}}
    result = torch.compile(model, backend="sltrain", options=options)(x)
    result.sum().backward()
    assert len(slcompile.factors(model)) == 1
    assert all(each.grad is not None for each in model.parameters())
    torch.testing.assert_close(result, model(x))

"""Compiled inference of a factorized model gives the numbers of eager mode, as training does."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import slcompile
from tests.sweep.architectures import ARCHITECTURES
from tests.testing import some_of

CONFIG = slcompile.SLConfig(rank=8, density=0.05, exclude=())


class GatedNorm(nn.Module):
    """A normalised sum of so many operands that Inductor writes it down, and a second product after it.

    Both products are read transposed where they are factored, before and after the reduction.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, *rows: Tensor) -> Tensor:
        hidden = self.up(x) + x + sum(rows)
        return hidden * hidden.square().mean(-1, keepdim=True).rsqrt() * self.gate(x)


def filled(model: nn.Module) -> nn.Module:
    """The model with factors that are not at their start, where B is zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_sl.B"):
                parameter.normal_(std=0.1)
    return model


def assert_no_further(found: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Asserts that a result is as far from float64's as eager mode's is: both are roundings of it."""
    error, eagers = (found - exact).norm(), (eager - exact).norm()
    assert found.dtype == eager.dtype
    assert error <= 2 * eagers + 2**-22 * exact.norm(), f"{error / exact.norm():.1e}, eager {eagers / exact.norm():.1e}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("support", "dtype", "sizes", "threads"),
    [
        pytest.param("stratified", "float32", (32,), 1, marks=pytest.mark.long),
        ("stratified", "float32", (40,), 2),
        ("uniform", "float32", (32, 40), 1),
        pytest.param("stratified", "bfloat16", (32, 40), 1, marks=pytest.mark.long),
        ("stratified", "autocast", (32,), 2),
    ],
)
def test_rows_of_a_tile_keep_their_own_numbers(support, dtype, sizes, threads):
    config = slcompile.SLConfig(rank=8, density=0.05, support=support)
    model = filled(slcompile.factorize_(GatedNorm(), config)).eval()
    if dtype == "bfloat16":
        model.bfloat16()
    wide = copy.deepcopy(model).double()
    dynamic = len(sizes) > 1
    run = torch.compile(model, backend="sltrain", options={"lowering": "factored"}, dynamic=dynamic)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens in sizes:
            rows = torch.randn(5, tokens, 64).to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
                found, eager = run(*rows), model(*rows)
            with torch.no_grad():
                assert_no_further(found, eager, wide(*rows.double()))
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lowering"),
    some_of([("gpt_oss", "auto"), ("gpt_oss", "composed"), ("deepseek_v3", "factored")], [("gpt_oss", "auto")]),
)
def test_a_mixture_of_experts_after_a_training_step(name, lowering):
    model = ARCHITECTURES[name].make()
    inputs = ARCHITECTURES[name].inputs(model)
    slcompile.factorize_(model, CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**inputs).loss.backward()
    optimizer.step()
    model.eval()
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")  # torch has no grouped matmul of float64
    run = torch.compile(model, backend="sltrain", options={"lowering": lowering})
    with torch.no_grad():
        found, eager, exact = (each(**inputs).logits for each in (run, model, wide))
    assert_no_further(found, eager, exact)


class Branches(nn.Module):
    """One branch is a product, which may lie transposed, the other one is none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cond(x.sum() > 0, self.linear, lambda x: x.sin(), (x,))
        return torch.softmax(y, -1) @ y.t()


class Region(nn.Module):
    """A region that is compiled once and called twice, the second time with its own result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        region = torch.compiler.nested_compile_region(lambda x: self.linear(x))
        y = region(region(x))
        return torch.softmax(y, -1) @ y.t()


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [Branches, Region])
def test_results_that_leave_a_subgraph_lie_as_they_were_traced(model_class):
    config = slcompile.SLConfig(rank=8, density=0.05)
    model = filled(slcompile.factorize_(model_class(), config)).eval()
    wide = copy.deepcopy(model).double()
    run = torch.compile(model, backend="sltrain", options={"lowering": "factored"})
    x = torch.randn(40, 64)
    with torch.no_grad():
        for shifted in (x - x.mean() + 0.1, x - x.mean() - 0.1):
            assert_no_further(run(shifted), model(shifted), wide(shifted.double()))


class Rotated(nn.Module):
    """Pairs of a product's columns as complex numbers, as rotary embeddings are written."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.up(x).unflatten(-1, (32, 2)))
        return torch.view_as_real(pairs * pairs.abs()).flatten(-2)


class Windows(Rotated):
    """Overlapping rows of a product, by the strides that it has in eager mode."""

    def forward(self, x: Tensor) -> Tensor:
        product = self.up(x)
        return product.as_strided((len(x) - 1, 96), (64, 1)) * product[1:, :1]


class Bits(Rotated):
    """The sign of a product's numbers, from the second of the halves that each is viewed as."""

    def forward(self, x: Tensor) -> Tensor:
        product = self.up(x)
        return product * (product.detach().view(torch.int16)[:, 1::2] < 0)


@pytest.mark.parametrize(
    ("support", "model_class"),
    some_of(
        itertools.product(("stratified", "vector"), (Rotated, Windows, Bits)),
        [("stratified", Rotated), ("stratified", Bits), ("vector", Windows)],
    ),
)
def test_ops_that_are_told_strides_read_a_result_as_it_was_traced(model_class, support):
    config = slcompile.SLConfig(rank=8, density=0.05, support=support)
    model = filled(slcompile.factorize_(model_class(), config))
    run = torch.compile(model, backend="sltrain", options={"lowering": "factored"})
    x = torch.randn(40, 64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found, eager = run(x), model(x)
            torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-5)
        if grad:
            (gradient,) = torch.autograd.grad(found.square().sum(), [model.up.weight_sl.A])
            (expected,) = torch.autograd.grad(eager.square().sum(), [model.up.weight_sl.A])
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def test_factors_and_values_of_one_shape_under_autocast():
    """Rank 8, and 8 non-zeros in each row of 64: B and the values are both [64, 8], and cast to bfloat16."""
    model = filled(slcompile.factorize_(nn.Sequential(nn.Linear(64, 64)), slcompile.SLConfig(rank=8, density=0.125)))
    wide = copy.deepcopy(model).double()
    run = torch.compile(model, backend="sltrain", options={"lowering": "factored"})
    x = torch.randn(32, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, eager = run(x), model(x)
    with torch.no_grad():
        assert_no_further(found, eager, wide(x.double()))

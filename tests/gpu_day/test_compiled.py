"""Compiled models on a GPU against float64 on the CPU; the check itself runs on the CPU, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu_day.compiled import CASES, Case, assert_near_float64
from tests.testing import LITE, some_of


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_compiled_step_is_near_float64(case: Case) -> None:
    assert_near_float64(case, "cuda")


SMALL = {"hidden": 64, "inner": 97, "dtype": torch.float32, "tokens": 12, "options": LITE}


@pytest.mark.slow
@pytest.mark.parametrize("lowering", some_of(["composed", "factored"], ["factored"]))
def test_the_same_on_a_cpu(lowering: str) -> None:
    assert_near_float64(Case(lowering, steps=2, **SMALL), "cpu")


def spoiled(compiled):
    """NaN in one gradient, as memory that nothing has written would bring it there."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return grad.index_fill(0, torch.tensor([0]), torch.nan)

    return lambda x: compiled(Spoil.apply(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("within", "message"),
    [
        (spoiled, "gradient of x"),
        (lambda compiled: lambda x: compiled(x) * 1.001, "output"),
        (lambda compiled: lambda x: compiled(x + 2e-7 * torch.rand_like(x)), "other bits"),
    ],
)
def test_what_is_wrong_is_seen(within, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_near_float64(Case("composed", steps=2, **SMALL), "cpu", within)


def test_every_way_to_run_is_among_the_cases() -> None:
    assert len({str(case) for case in CASES}) == len(CASES)
    for lowering in ("composed", "factored"):
        mine = [case for case in CASES if case.lowering == lowering]
        assert {case.support for case in mine} == {"stratified", "vector", "uniform"}
        assert {case.inner for case in mine if case.autocast} == {1365, 1408}
        settings = {key for case in mine for key in case.options.get("inductor", {})}
        assert settings == {"triton.cudagraphs", "max_autotune_gemm", "max_autotune_gemm_backends"}

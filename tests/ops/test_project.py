from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slcompile.ops import project
from tests.testing import drawn

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TERMS = 65
RANKS = (17, 5, 1)
SCALES = (0.75, -3.0, 1 / 3)


def make_operands(
    dtype: torch.dtype = torch.float64, tokens: int = 63, strided: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """x [tokens, TERMS] and factors [rank, TERMS]."""
    x, *factors = drawn([(tokens, TERMS), *((rank, TERMS) for rank in RANKS)], dtype)
    if not strided:
        return x, factors
    # x is every second column of a wider matrix, the factors are transposes, as B^T is.
    return torch.stack([x, x], -1)[..., 0], [each.t().contiguous().t() for each in factors]


def formula(x: Tensor, factors: list[Tensor]) -> Tensor:
    # One norm for all siblings: of a result with a handful of elements, rounding may be good or bad by chance.
    products = [(x @ factor.t()) * scale for factor, scale in zip(factors, SCALES, strict=True)]
    return torch.cat([each.double().flatten() for each in products])


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, strided: bool) -> None:
    torch.library.opcheck(project, (*make_operands(dtype, 5, strided), list(SCALES)))


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_within_the_references(dtype: torch.dtype, tokens: int, strided: bool) -> None:
    x, factors = make_operands(dtype, tokens, strided)
    found = project(x, factors, list(SCALES))
    assert [(tuple(each.shape), each.dtype) for each in found] == [((tokens, rank), dtype) for rank in RANKS]
    assert all(each.is_contiguous() for each in found)
    truth, eager = formula(x.double(), [each.double() for each in factors]), formula(x, factors)
    ours = torch.cat([each.double().flatten() for each in found])
    # Half a unit in the last place: what rounding the result once may cost. In float64 the truth is rounded itself.
    slack = torch.finfo(dtype).eps * float(truth.norm()) * (TERMS if dtype == torch.float64 else 0.5)
    assert float((ours - truth).norm()) <= float((eager - truth).norm()) + slack


def test_zero_tokens() -> None:
    found = project(*make_operands(torch.float32, tokens=0), list(SCALES))
    assert [tuple(each.shape) for each in found] == [(0, rank) for rank in RANKS]


def test_autocast_changes_nothing() -> None:
    operands = make_operands(torch.float32)
    expected = project(*operands, list(SCALES))
    with torch.autocast("cpu", torch.bfloat16):
        found = project(*operands, list(SCALES))
    assert all(each.dtype == torch.float32 for each in found)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("scales", [SCALES[:2], (*SCALES, 1.0)], ids=["too few", "too many"])
def test_each_factor_needs_a_scale(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="zip"):
        project(*make_operands(), list(scales))


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uninitialised_memory_does_not_leak(dtype: torch.dtype) -> None:
    assert bool(torch.empty(3).isnan().all())
    assert all(bool(each.isfinite().all()) for each in project(*make_operands(dtype), list(SCALES)))


def test_meta_tensors_give_shapes() -> None:
    x, factors = make_operands(torch.bfloat16)
    found = project(x.to("meta"), [each.to("meta") for each in factors], list(SCALES))
    assert [(tuple(each.shape), each.dtype, each.device.type) for each in found] == [
        ((63, rank), torch.bfloat16, "meta") for rank in RANKS
    ]

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slcompile.ops import compose_reference, values_grad
from slcompile.ops.values_grad import values_grad_aten
from tests.testing import SUPPORTS, VECTOR, drawn, support_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# tokens, rows, columns: nothing divides anything, and the smallest there is.
SHAPES = [(63, 33, 65), (1, 70, 17), (129, 1, 9), (5, 9, 1)]
DENSITY = 0.1


def make_operands(
    support: str,
    shape: tuple[int, int, int] = SHAPES[0],
    dtype: torch.dtype = torch.float64,
    values_dtype: torch.dtype | None = None,
    strided: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    tokens, rows, columns = shape
    left, right = drawn([(tokens, rows), (tokens, columns)], dtype)
    where, size = support_of(support, rows, columns, DENSITY, seed=5)
    # Its numbers may not be read.
    values = torch.full(size, float("nan"), dtype=values_dtype or dtype)
    if strided:
        left, right = left.t().contiguous().t(), torch.stack([right, right], -1)[..., 0]
        values = torch.stack([values, values], -1)[..., 0]
    return left, right, values, where, VECTOR[support]


def reference(left: Tensor, right: Tensor, values: Tensor, where: Tensor, vector: int) -> Tensor:
    """Autograd's gradient through the formula: the dense gradient of the weight, read at the support."""
    trained = torch.zeros_like(values).requires_grad_()
    B, A = values.new_zeros(left.shape[1], 1), values.new_zeros(1, right.shape[1])
    compose_reference(B, A, trained, where, 1.0, vector).backward((left.t() @ right).to(values.dtype))
    return trained.grad


@pytest.mark.slow
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("support", SUPPORTS)
def test_opcheck(support: str, dtype: torch.dtype, strided: bool) -> None:
    left, right, values, where, vector = make_operands(support, (5, 7, 9), dtype, strided=strided)
    torch.library.opcheck(values_grad, (left, right, torch.zeros_like(values), where, vector))


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("support", SUPPORTS)
def test_error_is_within_the_references(
    support: str, dtype: torch.dtype, shape: tuple[int, int, int], strided: bool
) -> None:
    left, right, values, where, vector = make_operands(support, shape, dtype, strided=strided)
    found = values_grad(left, right, values, where, vector)
    assert (found.shape, found.dtype, found.is_contiguous()) == (values.shape, dtype, True)
    assert torch.equal(found, values_grad_aten(left, right, values, where, vector))
    exact = reference(left.double(), right.double(), values.double(), where, vector)
    eager = reference(left, right, values, where, vector)
    # Half a unit in the last place: what rounding the result once may cost. In float64 the truth is rounded itself.
    slack = torch.finfo(dtype).eps * float(exact.norm()) * (shape[0] if dtype == torch.float64 else 0.5)
    assert float((found.double() - exact).norm()) <= float((eager.double() - exact).norm()) + slack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("support", SUPPORTS)
def test_dtype_is_that_of_values(support: str, dtype: torch.dtype) -> None:
    operands = make_operands(support, dtype=dtype, values_dtype=torch.float32)
    found = values_grad(*operands)
    assert found.dtype == torch.float32
    rounded = values_grad(*make_operands(support, dtype=dtype))
    assert torch.equal(found.to(dtype), rounded)
    if support != "vector":  # which sums in float32
        # The dot products are rounded to the activations' dtype, as autocast rounds them.
        assert torch.equal(found, rounded.float())


@pytest.mark.parametrize("support", SUPPORTS)
def test_no_tokens_give_zeros(support: str) -> None:
    left, right, values, where, vector = make_operands(support, (0, 33, 65), torch.float32)
    assert torch.equal(values_grad(left, right, values, where, vector), torch.zeros_like(values))


@pytest.mark.parametrize("support", SUPPORTS)
def test_autocast_changes_nothing(support: str) -> None:
    operands = make_operands(support, dtype=torch.float32)
    expected = values_grad(*operands)
    with torch.autocast("cpu", torch.bfloat16):
        found = values_grad(*operands)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("tokens", [0, 1, 63])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("support", SUPPORTS)
def test_uninitialised_memory_does_not_leak(support: str, dtype: torch.dtype, tokens: int) -> None:
    assert bool(torch.empty(3).isnan().all())
    assert bool(values_grad(*make_operands(support, (tokens, 33, 65), dtype)).isfinite().all())


def test_meta_tensors_give_shapes() -> None:
    operands = make_operands("stratified", dtype=torch.bfloat16, values_dtype=torch.float32)
    found = values_grad(*(each.to("meta") for each in operands[:4]))
    assert (found.shape, found.dtype, found.device.type) == (operands[2].shape, torch.float32, "meta")

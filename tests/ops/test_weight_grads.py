from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from slcompile.ops import compose_reference, weight_grads
from slcompile.ops.weight_grads import weight_grads_aten
from tests.testing import SUPPORTS, VECTOR, drawn, support_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# tokens, rows, columns, rank: nothing divides anything, and the smallest there is.
SHAPES = [(63, 33, 65, 17), (1, 70, 17, 5), (129, 1, 9, 1), (5, 9, 1, 1)]
DENSITY = 0.1
SCALE = 0.75


class Operands(NamedTuple):
    """The arguments of weight_grads."""

    left: Tensor
    right: Tensor
    B: Tensor
    A: Tensor
    values: Tensor
    support: Tensor
    scale: float
    vector: int


def make_operands(
    support: str,
    shape: tuple[int, int, int, int] = SHAPES[0],
    dtype: torch.dtype = torch.float64,
    parameters: torch.dtype | None = None,
    strided: bool = False,
) -> Operands:
    """Matrices of ``dtype``, factors and values of ``parameters``, the same unless given."""
    tokens, rows, columns, rank = shape
    where, size = support_of(support, rows, columns, DENSITY, seed=5)
    tensors = drawn([(tokens, rows), (tokens, columns), (rows, rank), (rank, columns), size], dtype)
    tensors[2:] = [each.to(parameters or dtype) for each in tensors[2:]]
    if strided:
        # Transposes of contiguous matrices, and every second element of wider ones.
        tensors = [each.t().contiguous().t() if index % 2 == 0 and each.dim() == 2 else
                   torch.stack([each, each], -1)[..., 0] for index, each in enumerate(tensors)]  # fmt: skip
    return Operands(*tensors, where, SCALE, VECTOR[support])


def reference(operands: Operands) -> list[Tensor]:
    """Autograd's gradients of B, A and values through the formula."""
    left, right, *parameters = operands[:5]
    trained = [each.detach().clone().requires_grad_() for each in parameters]
    compose_reference(*trained, *operands[5:]).backward((left.t() @ right).to(trained[0].dtype))
    return [each.grad for each in trained]


def doubled(operands: Operands) -> Operands:
    return Operands(*(each.double() for each in operands[:5]), *operands[5:])


@pytest.mark.slow
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("support", SUPPORTS)
def test_opcheck(support: str, dtype: torch.dtype, strided: bool) -> None:
    operands = make_operands(support, (5, 7, 9, 3), dtype, strided=strided)
    torch.library.opcheck(weight_grads, operands)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("parameters", [None, torch.float32], ids=["one dtype", "float32 parameters"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("support", SUPPORTS)
def test_error_is_within_the_references(
    support: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    parameters: torch.dtype | None,
    strided: bool,
) -> None:
    operands = make_operands(support, shape, dtype, parameters, strided)
    found = weight_grads(*operands)
    assert all(map(torch.equal, found, weight_grads_aten(*operands)))
    for ours, eager, exact, parameter in zip(
        found, reference(operands), reference(doubled(operands)), operands[2:5], strict=True
    ):
        assert (ours.shape, ours.dtype) == (parameter.shape, parameter.dtype)
        assert ours.is_contiguous()
        # Half a unit in the last place: what rounding the result once may cost. In float64 the truth is rounded itself.
        terms = sum(shape) if ours.dtype == torch.float64 else 0.5
        slack = max(torch.finfo(ours.dtype).eps, torch.finfo(dtype).eps) * float(exact.norm()) * terms
        assert float((ours.double() - exact).norm()) <= float((eager.double() - exact).norm()) + slack


@pytest.mark.parametrize("support", SUPPORTS)
def test_no_tokens_give_zeros(support: str) -> None:
    operands = make_operands(support, (0, 33, 65, 17), torch.float32)
    for found, parameter in zip(weight_grads(*operands), operands[2:5], strict=True):
        assert torch.equal(found, torch.zeros_like(parameter))


@pytest.mark.parametrize("support", SUPPORTS)
def test_autocast_changes_nothing(support: str) -> None:
    operands = make_operands(support, dtype=torch.float32)
    expected = weight_grads(*operands)
    with torch.autocast("cpu", torch.bfloat16):
        found = weight_grads(*operands)
    assert all(each.dtype == torch.float32 for each in found)
    assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("tokens", [0, 1, 63])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("support", SUPPORTS)
def test_uninitialised_memory_does_not_leak(support: str, dtype: torch.dtype, tokens: int) -> None:
    assert bool(torch.empty(3).isnan().all())
    found = weight_grads(*make_operands(support, (tokens, 33, 65, 17), dtype))
    assert all(bool(each.isfinite().all()) for each in found)


def test_meta_tensors_give_shapes() -> None:
    operands = make_operands("stratified", dtype=torch.bfloat16, parameters=torch.float32)
    found = weight_grads(*(each.to("meta") for each in operands[:6]), SCALE)
    assert [(each.shape, each.dtype, each.device.type) for each in found] == [
        (each.shape, torch.float32, "meta") for each in operands[2:5]
    ]

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from slcompile.ops import compose_reference, linear_factored
from slcompile.ops.linear_factored import linear_factored_aten
from tests.testing import SUPPORTS, VECTOR, drawn, support_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DENSITY = 0.1
SCALE = 0.75
TERMS = 65
# Outputs and rank of each sibling: nothing divides anything, and the smallest there is.
SIBLINGS = [(33, 17), (70, 5), (1, 1)]
TOKENS = 63

pytestmark = pytest.mark.parametrize("transposed", [False, True], ids=["x W^T", "x W"])


class Operands(NamedTuple):
    """The arguments of linear_factored but the last."""

    x: Tensor
    hiddens: list[Tensor]
    factors: list[Tensor]
    values: list[Tensor]
    supports: list[Tensor]
    biases: list[Tensor | None]

    def each(self, function: Any) -> Operands:
        """Function of every tensor of floating point."""

        def of(tensor: Any) -> Any:
            return function(tensor) if tensor is not None and tensor.is_floating_point() else tensor

        return Operands(of(self.x), *([of(tensor) for tensor in tensors] for tensors in self[1:]))


def make_operands(
    support: str, transposed: bool, dtype: torch.dtype = torch.float64, tokens: int = TOKENS, strided: bool = False
) -> Operands:
    """The second sibling alone has no bias."""
    (x,) = drawn([(tokens, TERMS)], dtype)
    operands = Operands(x, [], [], [], [], [])
    for index, (outputs, rank) in enumerate(SIBLINGS):
        rows, columns = (TERMS, outputs) if transposed else (outputs, TERMS)
        where, shape = support_of(support, rows, columns, DENSITY, seed=index)
        factor = (rank, outputs) if transposed else (outputs, rank)
        hidden, factor, values, bias = drawn([(tokens, rank), factor, shape, (outputs,)], dtype, seed=4 + index)
        operands.hiddens.append(hidden)
        operands.factors.append(factor)
        operands.values.append(values)
        operands.supports.append(where)
        operands.biases.append(None if index == 1 else bias)
    return operands.each(with_gaps) if strided else operands


def with_gaps(tensor: Tensor) -> Tensor:
    """The same numbers in a transposed matrix, and every second element of it."""
    return torch.stack([tensor.t(), tensor.t()], -1)[..., 0].t()


def dense(operands: Operands, transposed: bool, vector: int) -> list[Tensor]:
    """The formula with a dense S, in the operands' dtype."""
    results = []
    for hidden, factor, values, support, bias in zip(*operands[1:], strict=True):
        B, A = (values.new_zeros(TERMS, 1), factor[:1]) if transposed else (factor[:, :1], values.new_zeros(1, TERMS))
        S = compose_reference(B, A, values, support, 0.0, vector)
        y = hidden @ (factor if transposed else factor.t()) + operands.x @ (S if transposed else S.t())
        results.append(y if bias is None else y + bias)
    return results


def flat(tensors: list[Tensor]) -> Tensor:
    # One norm for all siblings: of a result with a handful of elements, rounding may be good or bad by chance.
    return torch.cat([each.double().flatten() for each in tensors])


@pytest.mark.slow
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("support", SUPPORTS)
def test_opcheck(support: str, dtype: torch.dtype, strided: bool, transposed: bool) -> None:
    torch.library.opcheck(
        linear_factored, (*make_operands(support, transposed, dtype, 5, strided), transposed, VECTOR[support])
    )


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("tokens", [1, 5, TOKENS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("support", SUPPORTS)
def test_error_is_within_the_references(
    support: str, dtype: torch.dtype, tokens: int, strided: bool, transposed: bool
) -> None:
    operands = make_operands(support, transposed, dtype, tokens, strided)
    assert operands.x.is_contiguous() != strided
    last = transposed, VECTOR[support]
    exact, eager = dense(operands.each(Tensor.double), *last), dense(operands, *last)
    found = linear_factored(*operands, transposed, VECTOR[support])
    assert [(each.shape, each.dtype) for each in found] == [((tokens, outputs), dtype) for outputs, _ in SIBLINGS]
    assert all(each.is_contiguous() for each in found)
    assert all(map(torch.equal, found, linear_factored_aten(*operands, *last)))
    truth = flat(exact)
    # Half a unit in the last place: what rounding the result once may cost. In float64 the truth is rounded itself.
    slack = torch.finfo(dtype).eps * float(truth.norm()) * (TERMS if dtype == torch.float64 else 0.5)
    assert float((flat(found) - truth).norm()) <= float((flat(eager) - truth).norm()) + slack


@pytest.mark.parametrize("support", SUPPORTS)
def test_equals_the_product_with_the_composed_weight(support: str, transposed: bool) -> None:
    operands = make_operands(support, transposed)
    others = [
        torch.randn(TERMS, rank).double() if transposed else torch.randn(rank, TERMS).double() for _, rank in SIBLINGS
    ]
    hiddens = [SCALE * operands.x @ (each if transposed else each.t()) for each in others]
    found = linear_factored(
        *operands._replace(hiddens=hiddens, biases=[None] * len(SIBLINGS)), transposed, VECTOR[support]
    )
    for y, other, factor, values, where in zip(
        found, others, operands.factors, operands.values, operands.supports, strict=True
    ):
        B, A = (other, factor) if transposed else (factor, other)
        W = compose_reference(B, A, values, where, SCALE, VECTOR[support])
        expected = operands.x @ (W if transposed else W.t())
        # Sums of at most TERMS * rank products in float64.
        assert float((y - expected).norm()) <= TERMS * 2**-52 * float(expected.norm())


@pytest.mark.parametrize("support", SUPPORTS)
def test_siblings_do_not_touch_each_other(support: str, transposed: bool) -> None:
    operands = make_operands(support, transposed, torch.float32)
    together = linear_factored(*operands, transposed, VECTOR[support])
    for index, result in enumerate(together):
        (alone,) = linear_factored(operands.x, *([each[index]] for each in operands[1:]), transposed, VECTOR[support])
        assert torch.equal(alone, result)


@pytest.mark.parametrize("support", SUPPORTS)
def test_zero_tokens(support: str, transposed: bool) -> None:
    found = linear_factored(*make_operands(support, transposed, torch.float32, tokens=0), transposed, VECTOR[support])
    assert [tuple(each.shape) for each in found] == [(0, outputs) for outputs, _ in SIBLINGS]


@pytest.mark.parametrize("tokens", [1, 5, TOKENS])
@pytest.mark.parametrize("support", SUPPORTS)
def test_autocast_changes_nothing_and_inputs_stay(support: str, tokens: int, transposed: bool) -> None:
    operands = make_operands(support, transposed, torch.float32, tokens)
    before = operands.each(Tensor.clone)
    expected = linear_factored(*operands, transposed, VECTOR[support])
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_factored(*operands, transposed, VECTOR[support])
    assert all(each.dtype == torch.float32 for each in found)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(operands.x, before.x)
    for tensors, copies in zip(operands[1:5], before[1:5], strict=True):
        assert all(map(torch.equal, tensors, copies))


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("tokens", [1, 5, TOKENS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("support", SUPPORTS)
def test_uninitialised_memory_does_not_leak(support: str, dtype: torch.dtype, tokens: int, transposed: bool) -> None:
    # With a density of 0.1 some columns of S, and with the uniform support some rows, are empty.
    assert bool(torch.empty(3).isnan().all())
    found = linear_factored(*make_operands(support, transposed, dtype, tokens), transposed, VECTOR[support])
    assert all(bool(each.isfinite().all()) for each in found)


def test_meta_tensors_give_shapes(transposed: bool) -> None:
    operands = make_operands("stratified", transposed, torch.bfloat16).each(lambda tensor: tensor.to("meta"))
    found = linear_factored(*operands, transposed)
    assert [(tuple(each.shape), each.dtype, each.device.type) for each in found] == [
        ((TOKENS, outputs), torch.bfloat16, "meta") for outputs, _ in SIBLINGS
    ]

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from slcompile.ops import WEIGHT_OPS, compose, compose_backward, compose_reference
from slcompile.ops.support import flat_positions
from tests.testing import SUPPORTS, drawn, support_of

# rows, columns, rank: nothing divides anything, and the smallest there is; then stacks of matrices.
SHAPES = [(7, 5, 3), (63, 65, 17), (33, 129, 8), (1, 9, 1), (9, 1, 1), (3, 21, 65, 17), (1, 7, 5, 3)]
STACK = (3, 4, 5, 2)
DENSITY = 0.1
SCALE = 0.75
LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


class Operands(NamedTuple):
    B: Tensor
    A: Tensor
    values: Tensor
    support: Tensor

    def to(self, dtype: torch.dtype) -> Operands:
        return Operands(self.B.to(dtype), self.A.to(dtype), self.values.to(dtype), self.support)

    def trained(self) -> Operands:
        return Operands(*(each.detach().clone().requires_grad_() for each in self[:3]), self.support)

    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self[:3]


def make_operands(
    support: str, shape: tuple[int, ...] = (7, 5, 3), dtype: torch.dtype = torch.float64, seed: int = 3
) -> Operands:
    *stack, rows, columns, rank = shape
    where, size = support_of(support, math.prod(stack) * rows, columns, DENSITY, seed)
    if stack and support == "stratified":
        size = (*stack, rows, size[1])
    return Operands(*drawn([(*stack, rows, rank), (*stack, rank, columns), size], dtype, seed), support=where)


def make_grad(operands: Operands, seed: int = 4) -> Tensor:
    shape = (*operands.B.shape[:-1], operands.A.shape[-1])
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(operands.B.dtype)


def assert_equal_to_rounding(found: Tensor, expected: Tensor, magnitude: Tensor, terms: int) -> None:
    """Both are sums of ``terms`` products, in any order, scaled and with one more added; ``magnitude`` is the sum of
    the terms' absolute values. Each of the two is within (terms + 2) * eps * magnitude of the exact sum."""
    bound = 2 * (terms + 2) * torch.finfo(expected.dtype).eps * magnitude
    assert found.shape == expected.shape
    assert bool(((found - expected).abs() <= bound).all())


def scattered(operands: Operands) -> Tensor:
    columns = operands.A.shape[-1]
    dense = operands.values.new_zeros(operands.B.shape[:-1].numel(), columns)
    for value, position in zip(
        operands.values.flatten(), flat_positions(operands.values, operands.support, columns).tolist(), strict=True
    ):
        dense[position // columns, position % columns] = value
    return dense.view(*operands.B.shape[:-1], columns)


def test_the_package_knows_compose_as_a_weight_op() -> None:
    assert torch.ops.slcompile.compose.default in WEIGHT_OPS


class TestOpcheck:
    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(7, 5, 3), STACK])
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_compose(self, support: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        operands = make_operands(support, shape, dtype).trained()
        torch.library.opcheck(compose, (*operands, SCALE))

    @pytest.mark.parametrize("support", SUPPORTS)
    def test_compose_with_a_dtype(self, support: str) -> None:
        operands = make_operands(support, dtype=torch.float32).trained()
        torch.library.opcheck(compose, (*operands, SCALE), {"dtype": torch.bfloat16})

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(7, 5, 3), STACK])
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_compose_backward(self, support: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        operands = make_operands(support, shape, dtype).trained()
        torch.library.opcheck(compose_backward, (make_grad(operands).requires_grad_(), *operands, SCALE))

    def test_transposed_operands(self) -> None:
        B, A, values, seed = make_operands("stratified", dtype=torch.float32)
        strided = [each.t().contiguous().t() for each in (B, A, values)]
        torch.library.opcheck(compose, (*strided, seed, SCALE))
        torch.library.opcheck(compose_backward, (make_grad(Operands(B, A, values, seed)).t().contiguous().t(),
                                                 *strided, seed, SCALE))  # fmt: skip


class TestForward:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_equals_the_formula(self, support: str, shape: tuple[int, ...]) -> None:
        operands = make_operands(support, shape)
        expected = SCALE * (operands.B @ operands.A) + scattered(operands)
        magnitude = SCALE * (operands.B.abs() @ operands.A.abs()) + scattered(operands).abs()
        assert_equal_to_rounding(compose(*operands, SCALE), expected, magnitude, terms=shape[-1])
        assert_equal_to_rounding(compose_reference(*operands, SCALE), expected, magnitude, terms=shape[-1])

    @pytest.mark.parametrize("support", SUPPORTS)
    def test_result_is_contiguous_whatever_the_operands_are(self, support: str) -> None:
        operands = make_operands(support, (63, 65, 17))
        strided = Operands(
            torch.stack([operands.B, operands.B], -1)[..., 0],
            operands.A.t().contiguous().t(),
            torch.stack([operands.values, operands.values], -1)[..., 0],
            operands.support,
        )
        assert not any(each.is_contiguous() for each in strided.parameters())
        found = compose(*strided, SCALE)
        magnitude = SCALE * (operands.B.abs() @ operands.A.abs()) + scattered(operands).abs()
        assert found.is_contiguous()
        assert_equal_to_rounding(found, compose(*operands, SCALE), magnitude, terms=17)

    @pytest.mark.parametrize("support", SUPPORTS)
    def test_zero_factor_leaves_the_values_as_they_are(self, support: str) -> None:
        operands = make_operands(support)
        operands.B.zero_()
        assert torch.equal(compose(*operands, SCALE), scattered(operands))

    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_dtype_is_that_of_the_factors_unless_given(self, support: str, dtype: torch.dtype) -> None:
        operands = make_operands(support, dtype=torch.float32)
        assert compose(*operands.to(dtype), SCALE).dtype == dtype
        found = compose(*operands, SCALE, dtype)
        assert torch.equal(found, compose(*operands, SCALE).to(dtype))

    def test_inputs_are_left_as_they_were(self) -> None:
        operands = make_operands("stratified")
        before = [each.clone() for each in operands]
        compose(*operands, SCALE)
        compose_backward(make_grad(operands), *operands, SCALE)
        assert all(map(torch.equal, operands, before))


class TestBackward:
    @pytest.mark.parametrize("shape", [(7, 5, 3), STACK])
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_gradcheck_and_gradgradcheck(self, support: str, shape: tuple[int, ...]) -> None:
        operands = make_operands(support, shape).trained()

        def function(B: Tensor, A: Tensor, values: Tensor) -> Tensor:
            return compose(B, A, values, operands.support, SCALE)

        assert torch.autograd.gradcheck(function, operands.parameters())
        assert torch.autograd.gradgradcheck(function, operands.parameters())

    @pytest.mark.parametrize("support", SUPPORTS)
    def test_gradcheck_of_the_backward_op(self, support: str) -> None:
        operands = make_operands(support).trained()

        def function(grad: Tensor, B: Tensor, A: Tensor, values: Tensor) -> tuple[Tensor, ...]:
            return compose_backward(grad, B, A, values, operands.support, SCALE)

        assert torch.autograd.gradcheck(function, (make_grad(operands).requires_grad_(), *operands.parameters()))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_gradients_are_their_formulas(self, support: str, shape: tuple[int, ...]) -> None:
        operands = make_operands(support, shape).trained()
        G = make_grad(operands)
        compose(*operands, SCALE).backward(G)
        B, A, values, where = (each.detach() for each in operands)
        *_, rows, columns, _ = shape
        assert_equal_to_rounding(operands.B.grad, SCALE * (G @ A.mT), SCALE * (G.abs() @ A.abs().mT), terms=columns)
        assert_equal_to_rounding(operands.A.grad, SCALE * (B.mT @ G), SCALE * (B.abs().mT @ G.abs()), terms=rows)
        picked = [G.flatten()[position] for position in flat_positions(values, where, columns).tolist()]
        assert torch.equal(operands.values.grad, torch.stack(picked).view(values.shape))

    @pytest.mark.parametrize("support", SUPPORTS)
    def test_gradients_of_strided_gradient_and_operands(self, support: str) -> None:
        operands = make_operands(support, (63, 65, 17))
        B, A, values, where = operands
        G = make_grad(operands)
        strided = compose_backward(G.t().contiguous().t(), B.t().contiguous().t(), A.t().contiguous().t(),
                                   torch.stack([values, values], -1)[..., 0], where, SCALE)  # fmt: skip
        grad_B, grad_A, grad_values = compose_backward(G, *operands, SCALE)
        assert_equal_to_rounding(strided[0], grad_B, SCALE * (G.abs() @ A.abs().T), terms=65)
        assert_equal_to_rounding(strided[1], grad_A, SCALE * (B.abs().T @ G.abs()), terms=63)
        assert torch.equal(strided[2], grad_values)

    def test_gradient_that_is_expanded(self) -> None:
        operands = make_operands("stratified").trained()
        compose(*operands, SCALE).sum().backward()  # the gradient of a sum has strides of zero
        assert torch.equal(operands.values.grad, torch.ones_like(operands.values))

    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_gradients_have_their_parameters_dtype(self, support: str, dtype: torch.dtype) -> None:
        operands = make_operands(support, dtype=torch.float32).trained()
        weight = compose(*operands, SCALE, dtype)
        grad = make_grad(operands).to(dtype)
        weight.backward(grad)
        found = [each.grad for each in operands.parameters()]
        assert all(each.dtype == torch.float32 for each in found)
        expected = compose_backward(grad.float(), *operands.trained(), SCALE)
        assert all(map(torch.equal, found, expected))

    def test_only_what_needs_a_gradient_gets_one(self) -> None:
        B, A, values, seed = make_operands("stratified")
        A.requires_grad_()
        compose(B, A, values, seed, SCALE).sum().backward()
        assert A.grad is not None
        assert B.grad is None
        assert values.grad is None


class TestPrecision:
    """No less precise than eager mode in the same dtype, both measured against float64."""

    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    @pytest.mark.parametrize("shape", [(63, 65, 17), (129, 257, 33), (3, 43, 257, 33)])
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_error_is_within_the_references(self, support: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        rounded = make_operands(support, shape).to(dtype)
        grad = make_grad(rounded)
        truth = run_both(compose_reference, rounded.to(torch.float64), grad.double())
        reference = run_both(compose_reference, rounded, grad)
        found = run_both(compose, rounded, grad)
        for exact, eager, ours in zip(truth, reference, found, strict=True):
            # Half a unit in the last place of the result: what rounding it once may cost.
            slack = torch.finfo(dtype).eps / 2 * float(exact.norm())
            assert float((ours - exact).norm()) <= float((eager - exact).norm()) + slack


def run_both(function, operands: Operands, grad: Tensor) -> list[Tensor]:
    """The weight and the gradients of B, A and values, in float64."""
    operands = operands.trained()
    weight = function(*operands, SCALE)
    weight.backward(grad)
    return [each.detach().double() for each in (weight, *(each.grad for each in operands.parameters()))]


class TestAutocast:
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_changes_neither_dtype_nor_values(self, support: str) -> None:
        operands = make_operands(support, (63, 65, 17), torch.float32)
        grad = make_grad(operands)
        expected = run_both(compose, operands, grad)
        with torch.autocast("cpu", torch.bfloat16):
            assert compose(*operands, SCALE).dtype == torch.float32
            assert compose(*operands, SCALE, torch.float16).dtype == torch.float16
            found = run_both(compose, operands, grad)
        assert all(map(torch.equal, found, expected))

    @pytest.mark.parametrize("backward_inside", [True, False])
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_gradients_through_a_matmul_in_low_precision(self, support: str, backward_inside: bool) -> None:
        operands = make_operands(support, (63, 65, 17), torch.float32)
        x = torch.randn(11, 65, generator=torch.Generator().manual_seed(0))
        grad = torch.randn(11, 63, generator=torch.Generator().manual_seed(1)).bfloat16()

        trained = operands.trained()
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.nn.functional.linear(x, compose(*trained, SCALE))
            if backward_inside:
                y.backward(grad)
        if not backward_inside:
            y.backward(grad)
        assert y.dtype == torch.bfloat16

        # Autocast by hand: the same matmuls on the same rounded operands, so nothing may differ.
        weight = compose(*operands, SCALE).bfloat16().requires_grad_()
        torch.nn.functional.linear(x.bfloat16(), weight).backward(grad)
        expected = compose_backward(weight.grad.float(), *operands, SCALE)
        for parameter, gradient in zip(trained.parameters(), expected, strict=True):
            assert parameter.grad.dtype == torch.float32
            assert torch.equal(parameter.grad, gradient)


class TestVector:
    """Blocks of rows that share their columns: the same as the uniform support whose index has their positions."""

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(7, 5, 3), STACK])
    def test_opcheck(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        operands = make_operands("stratified", shape, dtype).trained()
        torch.library.opcheck(compose, (*operands, SCALE, None, 4))
        torch.library.opcheck(compose_backward, (make_grad(operands).requires_grad_(), *operands, SCALE, 4))

    @pytest.mark.parametrize("vector", [1, 2, 8, 128])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_equals_the_uniform_support_of_its_positions(self, shape: tuple[int, ...], vector: int) -> None:
        operands = make_operands("stratified", shape, torch.float32)
        B, A, values, seed = operands
        index = flat_positions(values, seed, A.shape[-1], vector)
        other = Operands(B, A, values.flatten(), index)
        assert torch.equal(compose(*operands, SCALE, vector=vector), compose(*other, SCALE))
        assert torch.equal(compose(*operands, SCALE, torch.bfloat16, vector), compose(*other, SCALE, torch.bfloat16))
        assert torch.equal(compose_reference(*operands, SCALE, vector), compose_reference(*other, SCALE))
        G = make_grad(operands)
        found, expected = compose_backward(G, *operands, SCALE, vector), compose_backward(G, *other, SCALE)
        assert all(torch.equal(ours, theirs.view_as(ours)) for ours, theirs in zip(found, expected, strict=True))
        assert torch.equal(index, flat_positions(values, seed, A.shape[-1])) or vector > 1

    @pytest.mark.parametrize("shape", [(7, 5, 3), STACK])
    def test_gradcheck_and_gradgradcheck(self, shape: tuple[int, ...]) -> None:
        operands = make_operands("stratified", shape).trained()

        def function(B: Tensor, A: Tensor, values: Tensor) -> Tensor:
            return compose(B, A, values, operands.support, SCALE, vector=4)

        assert torch.autograd.gradcheck(function, operands.parameters())
        assert torch.autograd.gradgradcheck(function, operands.parameters())


class TestBase:
    """A weight that stays, which the rest is added to; without a sparse part, too."""

    @staticmethod
    def make(shape: tuple[int, ...], has_values: bool, dtype: torch.dtype = torch.float64) -> tuple[Operands, Tensor]:
        operands = make_operands("stratified", shape, dtype)
        if not has_values:
            operands = operands._replace(values=operands.values[..., :0].clone())
        return operands.trained(), make_grad(operands, seed=6)

    @pytest.mark.parametrize("has_values", [False, True])
    @pytest.mark.parametrize("shape", [(7, 5, 3), STACK])
    def test_opcheck(self, shape: tuple[int, ...], has_values: bool) -> None:
        operands, base = self.make(shape, has_values, torch.bfloat16)
        torch.library.opcheck(compose, (*operands, SCALE, None, 1, base))
        torch.library.opcheck(compose, (*operands, SCALE, torch.float32, 1, base.requires_grad_()))

    @pytest.mark.parametrize("has_values", [False, True])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_is_added_and_stays_where_nothing_is(self, shape: tuple[int, ...], has_values: bool) -> None:
        operands, base = self.make(shape, has_values)
        expected = base + SCALE * (operands.B @ operands.A) + (scattered(operands) if has_values else 0)
        torch.testing.assert_close(compose(*operands, SCALE, base=base), expected)
        torch.testing.assert_close(compose_reference(*operands, SCALE, base=base), expected)
        zeros = Operands(torch.zeros_like(operands.B), operands.A, torch.zeros_like(operands.values), operands.support)
        for dtype in (torch.float64, *LOW_PRECISION):
            assert torch.equal(compose(*zeros.to(dtype), SCALE, base=base.to(dtype)), base.to(dtype))

    @pytest.mark.slow
    @pytest.mark.parametrize("has_values", [False, True])
    @pytest.mark.parametrize("shape", [(7, 5, 3), STACK])
    def test_gradcheck_and_gradgradcheck(self, shape: tuple[int, ...], has_values: bool) -> None:
        operands, base = self.make(shape, has_values)

        def function(B: Tensor, A: Tensor, values: Tensor, base: Tensor) -> Tensor:
            return compose(B, A, values, operands.support, SCALE, base=base)

        trained = operands.parameters() if has_values else (*operands[:2], operands.values.detach())
        for each in (base, base.requires_grad_()):
            assert torch.autograd.gradcheck(function, (*trained, each))
            assert torch.autograd.gradgradcheck(function, (*trained, each))


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION])
@pytest.mark.parametrize("support", SUPPORTS)
def test_uninitialised_memory_does_not_leak(support: str, dtype: torch.dtype) -> None:
    assert bool(torch.empty(3).isnan().all())
    operands = make_operands(support, (63, 65, 17), dtype)
    assert all(bool(each.isfinite().all()) for each in run_both(compose, operands, make_grad(operands)))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("support", SUPPORTS)
def test_two_runs_are_bit_equal(support: str, dtype: torch.dtype) -> None:
    operands = make_operands(support, (129, 257, 33), dtype)
    grad = make_grad(operands)
    assert all(map(torch.equal, run_both(compose, operands, grad), run_both(compose, operands, grad)))


def test_meta_tensors_give_shapes() -> None:
    B, A, values, seed = (each.to("meta") for each in make_operands("stratified", dtype=torch.float32))
    weight = compose(B, A, values, seed, SCALE, torch.bfloat16)
    assert (weight.device.type, weight.shape, weight.dtype) == ("meta", (7, 5), torch.bfloat16)
    grads = compose_backward(weight, B, A, values, seed, SCALE)
    assert [each.shape for each in grads] == [B.shape, A.shape, values.shape]

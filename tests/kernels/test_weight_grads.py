"""weight_grads and values_grad on GPUs: in Triton's interpreter against float64, traced, on a GPU.

Run as a script, this file saves what the launchers return for CASES.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from slcompile.ops.support import flat_positions
from tests.kernels.harness import (
    DTYPES,
    SCALE,
    SUPPORTS,
    VECTOR,
    Random,
    assert_within_error,
    launches_in,
    moved,
    name_of,
    require_compiler,
)

pytest.importorskip("triton", reason="the kernels need triton")

# tokens, rows, columns, rank: nothing divides anything, more than a block on each axis, rows or columns aligned.
SHAPES = {
    "smallest": (1, 1, 1, 1),
    "odd": (19, 33, 65, 17),
    "blocks": (41, 131, 150, 9),
    "rows": (10, 40, 65, 9),
    "columns": (10, 33, 64, 9),
}


class Case(NamedTuple):
    shape: str
    support: str
    dtype: torch.dtype
    density: float = 0.1
    strided: bool = False
    parameters: torch.dtype | None = None
    index: torch.dtype = torch.int32
    seed: int = 3


CASES = list(
    dict.fromkeys(
        [Case(shape, support, dtype) for shape in SHAPES for support in SUPPORTS for dtype in DTYPES]
        # One non-zero a row, more groups than a program has, one in each column.
        + [Case("blocks", support, dtype, density) for support in SUPPORTS for dtype in (torch.float32, torch.bfloat16)
           for density in (1e-9, 0.03, 0.5, 1.0)]
        + [Case("blocks", support, dtype, strided=True) for support in SUPPORTS for dtype in DTYPES]
        + [Case("odd", support, torch.bfloat16, seed=seed) for support in SUPPORTS for seed in (0, 2**24 - 1)]
        + [Case("odd", "uniform", torch.bfloat16, index=torch.int64)]
        # Autocast: the matmul in low precision, the parameters in float32.
        + [Case("odd", support, dtype, parameters=torch.float32) for support in SUPPORTS
           for dtype in (torch.bfloat16, torch.float16)]
    )
)  # fmt: skip


def make_operands(case: Case) -> list[Tensor]:
    """left, right, B, A, values, support."""
    random = Random(5, case.strided)
    tokens, rows, columns, rank = SHAPES[case.shape]
    parameters = case.parameters or case.dtype
    values, support = random.sparse(case.support, case.seed, rows, columns, case.density, parameters)
    if case.support == "uniform":
        support = support.to(case.index)
    left, right = random(tokens, rows, dtype=case.dtype), random(tokens, columns, dtype=case.dtype)
    return [left, right, random(rows, rank, dtype=parameters), random(rank, columns, dtype=parameters), values, support]


def run(case: Case, operands: list[Tensor]) -> list[Tensor]:
    """The gradients of B, A and values, and the last by itself."""
    from slcompile.kernels.weight_grads import values_grad, weight_grads

    left, right, _, _, values, support = operands
    vector = VECTOR[case.support]
    return [*weight_grads(*operands, SCALE, vector), values_grad(left, right, values, support, vector)]


def run_experts(operands: list[Tensor]) -> list[Tensor]:
    """The gradients of B, A and values of one weight, and of a stack of it and of one whose B and G are negated."""
    from slcompile.kernels.weight_grads import compose_backward

    left, right, B, A, values, support = operands
    G = left.t() @ right
    single = compose_backward(G, B, A, values, support, SCALE)
    # The second expert's rows have a support of their own.
    stacked = compose_backward(
        torch.stack([G, -G]), torch.stack([B, -B]), torch.stack([A, A]), torch.stack([values, values]), support, SCALE
    )
    return [*single, *stacked]


def reference(case: Case, operands: list[Tensor]) -> list[Tensor]:
    """The same in plain torch, in the operands' dtype."""
    left, right, B, A, values, support = operands
    G = left.t() @ right
    positions = flat_positions(values, support, A.shape[1], VECTOR[case.support]).long()
    grad_values = G.flatten()[positions].view(values.shape)
    rounded = G.to(B.dtype)
    return [SCALE * (rounded @ A.t()), SCALE * (B.t() @ rounded), grad_values, grad_values]


def assert_within_the_references_error(case: Case, found: list[Tensor]) -> None:
    operands = make_operands(case)
    parameters = [*operands[2:5], operands[4]]
    expected = (reference(case, each) for each in (moved(operands, torch.float64), operands))
    for parameter, exact, eager, ours in zip(parameters, *expected, found, strict=True):
        assert ours.dtype == parameter.dtype
        assert ours.shape == exact.shape == parameter.shape
        assert ours.is_contiguous()
        assert_within_error(ours, eager, exact, case.dtype)
    assert torch.equal(found[2], found[3])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_interpreted_error_is_within_the_references(interpreted: dict[str, list[Tensor]], case: Case) -> None:
    assert_within_the_references_error(case, interpreted[name_of(case)])


# Of a single element, rounding may be good or bad by chance.
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "smallest"])
def test_gradients_of_stacks(interpreted: dict[str, list[Tensor]], shape: str) -> None:
    _, _, grad_values, *stacked = interpreted[f"experts-{shape}"]
    case = Case(shape, "stratified", torch.float32)
    operands = make_operands(case)
    left, right, _, A, values, support = operands
    exact, eager = reference(case, moved(operands, torch.float64)), reference(case, operands)
    # The second expert's G and B are negated: its gradient of A is that of the first.
    for found, index, sign in ((stacked[0], 0, -1), (stacked[1], 1, 1)):
        stacks = [torch.stack([each[index], sign * each[index]]) for each in (eager, exact)]
        assert_within_error(found, *stacks, torch.float32)
    assert torch.equal(stacked[2][0], grad_values)
    G = torch.cat([left.t() @ right, -(left.t() @ right)])
    positions = flat_positions(torch.cat([values, values]), support, A.shape[1])
    torch.testing.assert_close(stacked[2].flatten(), G.flatten()[positions])


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("support", SUPPORTS)
def test_one_kernel_is_launched(support: str, mode: str) -> None:
    require_compiler()
    case = Case("odd", support, torch.bfloat16)
    assert launches_in(lambda operands: run(case, operands), make_operands(case), mode) == ["read_kernel"] * 2


@pytest.mark.gpu
class TestOnCuda:
    @pytest.mark.parametrize("case", CASES, ids=name_of)
    def test_error_is_within_the_references(self, case: Case) -> None:
        found = run(case, moved(make_operands(case), torch.device("cuda")))
        assert_within_the_references_error(case, [each.cpu() for each in found])

    @pytest.mark.parametrize("support", SUPPORTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_two_runs_are_bit_equal(self, dtype: torch.dtype, support: str) -> None:
        case = Case("blocks", support, dtype)
        operands = moved(make_operands(case), torch.device("cuda"))
        assert all(map(torch.equal, run(case, operands), run(case, operands)))


if __name__ == "__main__":
    from tests.kernels.interpreter import asked, save_results

    save_results(
        lambda: (
            {name: run(case, make_operands(case)) for name, case in asked(CASES).items()}
            | {
                f"experts-{shape}": run_experts(make_operands(Case(shape, "stratified", torch.float32)))
                for shape in SHAPES
            }
        )
    )

"""compose on GPUs: in Triton's interpreter against float64, traced, on a GPU.

Run as a script, this file saves what the launcher returns for CASES.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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

# rows, columns, rank: nothing divides anything, more than a block on each axis, and rows that are aligned.
SHAPES = {"smallest": (1, 1, 1), "odd": (33, 65, 17), "blocks": (131, 150, 41), "aligned": (24, 64, 8)}


class Case(NamedTuple):
    shape: str
    support: str
    dtype: torch.dtype
    density: float = 0.1
    strided: bool = False
    experts: int = 0
    result: torch.dtype | None = None
    index: torch.dtype = torch.int32
    seed: int = 3


def expand(shape: str, support: str, dtype: torch.dtype, **fields: list[Any]) -> list[Case]:
    return [Case(shape, support, dtype, **{name: value}) for name, values in fields.items() for value in values]


CASES = list(
    dict.fromkeys(
        [Case(shape, support, dtype) for shape in SHAPES for support in SUPPORTS for dtype in DTYPES]
        # One non-zero a row, more groups than a program has, one in each column.
        + [case for support in SUPPORTS for dtype in (torch.float32, torch.bfloat16)
           for case in expand("blocks", support, dtype, density=[1e-9, 0.03, 0.5, 1.0], strided=[True],
                              experts=[1, 3])]
        + [case for support in SUPPORTS
           for case in expand("odd", support, torch.bfloat16, result=[torch.float32, torch.float16], experts=[2],
                              seed=[0, 2**24 - 1], index=[torch.int64])]
        # Autocast: the weight in low precision, the parameters in float32.
        + [Case("odd", support, torch.float32, result=torch.bfloat16) for support in SUPPORTS]
        + [Case("odd", support, torch.float16, strided=True, experts=2, result=torch.float32)
           for support in SUPPORTS]
    )
)  # fmt: skip


def make_operands(case: Case) -> list[Tensor]:
    """B, A, values, support."""
    random = Random(5, case.strided)
    rows, columns, rank = SHAPES[case.shape]
    experts = (case.experts,) if case.experts else ()
    values, support = random.sparse(
        case.support, case.seed, max(1, case.experts) * rows, columns, case.density, case.dtype
    )
    if case.support == "uniform":
        support = support.to(case.index)
    elif experts:
        values = values.unflatten(0, (case.experts, rows))
    return [
        random(*experts, rows, rank, dtype=case.dtype),
        random(*experts, rank, columns, dtype=case.dtype),
        values,
        support,
    ]


def run(case: Case, operands: list[Tensor]) -> list[Tensor]:
    """The composed weight, and what is left of it where B is zero: the values at the support."""
    from slcompile.kernels.compose import compose

    B, *others = operands
    return [compose(each, *others, SCALE, case.result, VECTOR[case.support]) for each in (B, torch.zeros_like(B))]


def reference(case: Case, operands: list[Tensor]) -> list[Tensor]:
    """The same in plain torch, in the operands' dtype."""
    B, A, values, support = operands
    if values.dim() > 1:
        values = values.flatten(end_dim=-2)
    low_rank = SCALE * (B @ A)
    positions = flat_positions(values, support, A.shape[-1], VECTOR[case.support]).long()
    sparse = values.new_zeros(low_rank.numel()).scatter(0, positions, values.flatten()).view(low_rank.shape)
    return [low_rank + sparse, sparse]


def assert_within_the_references_error(case: Case, found: list[Tensor]) -> None:
    operands = make_operands(case)
    (exact, _), (eager, sparse) = (reference(case, each) for each in (moved(operands, torch.float64), operands))
    weight, without_B = found
    dtype = case.result or case.dtype
    for result in found:
        assert result.dtype == dtype
        assert result.shape == exact.shape
        # Rows begin where the vendors' matmuls can load them fast.
        assert result.stride(-1) == 1
        assert result.stride(-2) * dtype.itemsize % 16 == 0
    assert_within_error(weight, eager.to(dtype), exact, dtype)
    assert torch.equal(without_B, sparse.to(dtype))
    assert int((without_B != 0).sum()) == operands[2].numel()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_interpreted_error_is_within_the_references(interpreted: dict[str, list[Tensor]], case: Case) -> None:
    assert_within_the_references_error(case, interpreted[name_of(case)])


@pytest.mark.parametrize("experts", [0, 2])
@pytest.mark.parametrize("shape", ["odd", "aligned"])  # with a gap after each row, and without
def test_a_base_and_no_sparse_part_need_no_kernel_of_ours(shape: str, experts: int) -> None:
    from slcompile.kernels.compose import compose
    from slcompile.kernels.weight_grads import compose_backward

    case = Case(shape, "stratified", torch.bfloat16, experts=experts)
    B, A, values, seed = make_operands(case)
    values = values[..., :0]
    random = Random(6)
    base = random(*B.shape[:-1], A.shape[-1], dtype=torch.bfloat16)
    found = compose(B, A, values, seed, SCALE, None, 1, base)
    exact = base.double() + SCALE * (B.double() @ A.double())
    assert_within_error(found, base + SCALE * (B @ A), exact, torch.bfloat16)
    assert found.stride(-2) * 2 % 16 == 0
    assert torch.equal(compose(torch.zeros_like(B), A, values, seed, SCALE, None, 1, base), base)
    grads = compose_backward(found, B, A, values, seed, SCALE)
    assert [each.shape for each in grads] == [B.shape, A.shape, values.shape]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("experts", [0, 2])
@pytest.mark.parametrize("support", SUPPORTS)
def test_one_kernel_is_launched(support: str, experts: int, mode: str) -> None:
    require_compiler()
    case = Case("odd", support, torch.bfloat16, experts=experts)
    assert launches_in(lambda operands: run(case, operands), make_operands(case), mode) == ["add_kernel"] * 2


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

    save_results(lambda: {name: run(case, make_operands(case)) for name, case in asked(CASES).items()})

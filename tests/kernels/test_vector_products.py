"""The vector support's kernels for many tokens: in Triton's interpreter against float64, compiled without a GPU, traced.

Run as a script, this file saves what the kernels return for CASES.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from slcompile.ops.support import block_columns, flat_positions, groups_per_row
from tests.kernels.harness import (
    PAPER,
    TARGETS,
    Random,
    assert_autotuning_spills_nothing,
    assert_within_error,
    empty,
    empty_sparse,
    launches_in,
    moved,
    name_of,
    require_compiler,
    usages,
    written_to,
)

triton = pytest.importorskip("triton", reason="the kernels need triton")


class Case(NamedTuple):
    tokens: int
    rows: int
    columns: int
    rank: int
    vector: int
    dtype: torch.dtype = torch.bfloat16
    density: float = 0.1
    bias: bool = False
    strided: bool = False


# Rows end within a block, more groups than a program reads at once, more tokens than a split has; nothing divides.
CASES = [
    *(Case(67, 2 * vector + 5, 71, 17, vector, dtype) for vector in (16, 32, 64) for dtype in (torch.bfloat16, torch.float32)),
    Case(33, 150, 149, 70, 16, torch.float16, 0.5, True, True),
    Case(130, 70, 333, 16, 32, torch.bfloat16, 0.4, True),
    Case(2100, 33, 35, 3, 16, torch.bfloat16, 0.1),
    Case(16, 128, 48, 16, 128, torch.bfloat16, 1.0),
    Case(1, 16, 1, 1, 16, torch.float32),
]  # fmt: skip


class Operands(NamedTuple):
    """x [T, K], grad [T, N], hidden and its gradient [T, R], B [N, R], A [R, K], values [N, G], the seed, bias [N]."""

    x: Tensor
    grad: Tensor
    hidden: Tensor
    grad_hidden: Tensor
    B: Tensor
    A: Tensor
    values: Tensor
    support: Tensor
    bias: Tensor | None


def make_operands(case: Case) -> Operands:
    drawn = Random(5, case.strided)

    def random(*shape: int) -> Tensor:
        return drawn(*shape, dtype=case.dtype)

    tokens, rows, columns, rank = case[:4]
    matrices = [random(tokens, columns), random(tokens, rows), random(tokens, rank), random(tokens, rank)]
    values, support = drawn.sparse("vector", 7, rows, columns, case.density, case.dtype)
    bias = random(rows) if case.bias else None
    return Operands(*matrices, random(rows, rank), random(rank, columns), values, support, bias)


def run(case: Case, operands: Operands, autotune: bool = False) -> list[Tensor]:
    """y, the input's gradient and the values' gradient by the kernels."""
    from slcompile.kernels.vector_products import linear_factored, values_grad

    x, grad, hidden, grad_hidden, B, A, values, support, bias = operands
    how: Any = {"vector": case.vector, "autotune": autotune}
    (y,) = linear_factored(x, [hidden], [B], [values], [support], [bias], False, **how)
    (grad_x,) = linear_factored(grad, [grad_hidden], [A], [values], [support], [None], True, **how)
    return [y, grad_x, values_grad(grad, x, values, support, **how)]


def reference(case: Case, operands: Operands) -> list[Tensor]:
    """The same in plain torch, in the operands' dtype."""
    x, grad, hidden, grad_hidden, B, A, values, support, bias = operands
    flat = flat_positions(values, support, case.columns, case.vector).long()
    S = values.new_zeros(case.rows * case.columns).scatter(0, flat, values.flatten()).view(case.rows, case.columns)
    y = hidden @ B.t() + x @ S.t()
    grad_values = (grad.t() @ x).flatten()[flat].view(values.shape)
    return [y if bias is None else y + bias, grad_hidden @ A + grad @ S, grad_values]


def assert_within_the_references_error(case: Case, operands: Operands, found: list[Tensor]) -> None:
    truth, eager = reference(case, Operands(*moved(operands, torch.float64))), reference(case, operands)
    for exact, expected, result in zip(truth, eager, found, strict=True):
        assert result.dtype == case.dtype
        assert result.shape == exact.shape
        assert_within_error(result, expected, exact, case.dtype)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_interpreted_error_is_within_the_references(interpreted: dict[str, list[Tensor]], case: Case) -> None:
    assert_within_the_references_error(case, make_operands(case), interpreted[name_of(case)])


if __name__ == "__main__":
    from tests.kernels.interpreter import save_results

    save_results(lambda: {name_of(case): run(case, make_operands(case)) for case in CASES})

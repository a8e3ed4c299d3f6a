"""The vector support's kernels for many tokens: interpreted, against float64; compiled without a GPU; traced.

Run as a script, this file saves what the kernels return for CASES.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from slcompile.ops.support import block_columns, flat_positions, groups_per_row
from tests.kernels.harness import (
    DTYPES,
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
    *(Case(67, 2 * vector + 5, 71, 17, vector, dtype) for vector in (16, 32, 64) for dtype in DTYPES[:2]),
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


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_interpreted_error_is_within_the_references(interpreted: dict[str, list[Tensor]], case: Case) -> None:
    assert_within_the_references_error(case, make_operands(case), interpreted[name_of(case)])


def launched(target: str, shapes: Any, vector: int, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    """The launches of a training step's three products, on meta tensors."""
    from slcompile.kernels.offline import recorded

    with recorded(target) as launches:
        for rows, columns, rank, density in shapes:
            matrices = [empty(TOKENS, columns, dtype=dtype), empty(TOKENS, rows, dtype=dtype)]
            matrices += [empty(TOKENS, rank, dtype=dtype)] * 2
            matrices += [empty(rows, rank, dtype=dtype), empty(rank, columns, dtype=dtype)]
            values, seed = empty_sparse("vector", rows, groups_per_row(columns, density), dtype)
            operands = Operands(*matrices, values, seed, None)
            run(Case(TOKENS, rows, columns, rank, vector, dtype), operands)
    return launches


TOKENS = 16384
KERNELS = [
    "vector_product_kernel",
    "vector_order_kernel",
    "vector_blocks_kernel",
    "vector_product_transposed_kernel",
    "vector_values_kernel",
    "sum_splits_kernel",
]
MULTIPLY = {KERNELS[0], *KERNELS[2:5]}


@pytest.mark.parametrize(
    ("vector", "dtype"), [(16, torch.bfloat16), (64, torch.bfloat16), (16, torch.float32)], ids=str
)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_at_the_papers_shapes_without_spills(target: str, vector: int, dtype: torch.dtype) -> None:
    require_compiler()
    shapes = [PAPER["1B_up"]] if vector == 16 else [PAPER["1B_up"], PAPER["1B_down"], PAPER["7B_down"]]
    for launch, usage in usages(launched(target, shapes, vector, dtype), target):
        if dtype == torch.bfloat16 or not target.startswith("gfx"):
            assert usage.has_mma == (launch.kernel.__name__ in MULTIPLY and dtype == torch.bfloat16)


def test_columns_are_gathered_side_by_side() -> None:
    """By asynchronous copies of 16 bytes, past the registers, for the matrix units of an H100; odd widths, too."""
    require_compiler()
    from slcompile.kernels.offline import compile_launch

    for shape in (PAPER["1B_up"], PAPER["1B_down"]):
        for launch in launched("sm_90", [shape], 64):
            if launch.kernel.__name__ in (KERNELS[0], KERNELS[4]):
                text = compile_launch(launch, "sm_90").asm["ptx"]
                assert "wgmma.mma_async" in text
                assert "cp.async.cg.shared.global" in text
                assert not re.search(r"ld\.global[.\w:]*\.b16", text)


@pytest.mark.parametrize("name", ["PRODUCT_64", "VALUES", "BLOCKS", "TRANSPOSED"])
def test_autotuning_tries_tiles_that_do_not_spill(name: str) -> None:
    require_compiler()
    from slcompile.kernels import vector_products

    assert_autotuning_spills_nothing(getattr(vector_products, name), launched("sm_90", [PAPER["7B_qkv"]], 64))


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    require_compiler()
    case = CASES[0]
    operands = make_operands(case)
    assert launches_in(lambda operands: run(case, operands), operands, mode) == KERNELS


@pytest.mark.usefixtures("target")
def test_only_results_are_written_to() -> None:
    """Of what it thinks is written to, torch.compile makes copies; a result that it overlooks is lost."""
    found = launched("sm_90", [(70, 65, 17, 0.1)], 16)
    assert [(each.kernel.__name__, written_to(each)) for each in found] == [
        (KERNELS[0], ["p_y"]),
        (KERNELS[1], ["p_begin", "p_order"]),
        (KERNELS[2], ["p_z"]),
        (KERNELS[3], ["p_y"]),
        (KERNELS[4], ["p_partial"]),
        (KERNELS[5], ["p_sum_0"]),
    ]


def test_the_order_is_that_of_columns(interpreted: dict[str, list[Tensor]]) -> None:
    """What each column adds up: rows of z, in the order of blocks."""
    order, begin, columns_of = interpreted["order"]
    for k in range(len(begin) - 1):
        rows = order[begin[k] : begin[k + 1]]
        wanted = (columns_of.flatten() == k).nonzero().flatten()
        assert torch.equal(rows.long(), wanted)


def run_order() -> list[Tensor]:
    """The inverse list of a support, and the columns of its blocks."""
    from slcompile.kernels.vector_products import inverse

    blocks = block_columns(torch.tensor([3]), 333, 50, 7, 16).int()
    return [*inverse(blocks, 50), blocks]


@pytest.mark.gpu
class TestOnCuda:
    @pytest.mark.parametrize("autotune", [False, True])
    @pytest.mark.parametrize("case", CASES, ids=name_of)
    def test_error_is_within_the_references(self, case: Case, autotune: bool) -> None:
        operands = Operands(*moved(make_operands(case), torch.device("cuda")))
        assert_within_the_references_error(case, operands, run(case, operands, autotune))

    @pytest.mark.parametrize("case", CASES, ids=name_of)
    def test_two_runs_are_bit_equal(self, case: Case) -> None:
        operands = Operands(*moved(make_operands(case), torch.device("cuda")))
        assert all(map(torch.equal, run(case, operands), run(case, operands)))


if __name__ == "__main__":
    from tests.kernels.interpreter import asked, save_results

    save_results(
        lambda: {name: run(case, make_operands(case)) for name, case in asked(CASES).items()} | {"order": run_order()}
    )

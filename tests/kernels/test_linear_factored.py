"""The factored matmul's kernels: in Triton's interpreter against float64, compiled without a GPU, traced, on a GPU.

Run as a script, this file saves what the kernels return for CASES.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from slcompile.config import SLConfig
from slcompile.ops.support import flat_positions, groups_per_row
from tests.kernels.harness import (
    DTYPES,
    PAPER,
    SCALE,
    TARGETS,
    VECTOR,
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

# terms of x, then outputs and rank of each sibling: nothing divides anything, the last passes a block on each axis.
SHAPES = {
    "smallest": (1, [(1, 1)]),
    "one": (65, [(33, 17)]),
    "two": (129, [(33, 17), (70, 5)]),
    "three": (31, [(5, 9), (70, 20), (16, 16)]),
    "four": (33, [(17, 3), (1, 1), (40, 33), (5, 18)]),
    "five": (40, [(17, 3), (9, 4), (33, 17), (20, 1), (35, 18)]),
    "long": (1030, [(70, 150)]),
}
TOKENS = (1, 3, 16, 17, 33, 64)


class Case(NamedTuple):
    tokens: int
    shape: str
    dtype: torch.dtype
    support: str
    transposed: bool = False
    density: float = 0.1
    bias: str = "some"
    strided: bool = False


class Operands(NamedTuple):
    """x [T, terms]; for each sibling first [R, terms], second [outputs, R] (transposed views if transposed), hidden
    [T, R], values and support of S [outputs, terms] or, transposed, [terms, outputs], bias [outputs] or None."""

    x: Tensor
    firsts: list[Tensor]
    seconds: list[Tensor]
    hiddens: list[Tensor]
    values: list[Tensor]
    supports: list[Tensor]
    biases: list[Tensor | None]


WAYS = [("stratified", False), ("vector", False), ("uniform", False), ("stratified", True), ("vector", True)]
CASES = list(
    dict.fromkeys(
        [Case(tokens, "two", torch.bfloat16, *way) for tokens in TOKENS for way in WAYS]
        + [Case(tokens, "two", dtype, *way) for tokens in (1, 17, 64) for dtype in DTYPES for way in WAYS]
        + [Case(65, "one", torch.bfloat16, *way) for way in WAYS]
        + [Case(16, shape, DTYPES[(index + number) % 2], *way)
           for index, shape in enumerate(SHAPES) for number, way in enumerate(WAYS)]
        + [Case(tokens, "one", torch.bfloat16, *way, density, bias, strided=True)
           for tokens, density, bias in [(1, 0.1, "all"), (5, 1e-9, "none"), (18, 1.0, "all"), (1, 1.0, "none")]
           for way in WAYS]
    )
)  # fmt: skip


# One token, a part of a tile, a whole one and more than one in every way; each shape in two ways, each dtype in all.
FIRST = [
    *(Case(tokens, "two", torch.bfloat16, *way) for tokens in (1, 17, 64) for way in WAYS),
    *(Case(17, "two", torch.float32, *way) for way in WAYS),
    *(Case(1, "two", torch.float16, *way) for way in WAYS),
    *(Case(65, "one", torch.bfloat16, *way) for way in WAYS),
    *(Case(16, shape, DTYPES[(index + number) % 2], *WAYS[number])
      for index, shape in enumerate(SHAPES) for number in (index % 5, (index + 2) % 5)),
    *(each for each in CASES if each.strided),
]  # fmt: skip


def make_operands(case: Case) -> Operands:
    drawn = Random(3, case.strided)

    def random(*shape: int) -> Tensor:
        return drawn(*shape, dtype=case.dtype)

    terms, siblings = SHAPES[case.shape]
    operands = Operands(random(case.tokens, terms), [], [], [], [], [], [])
    for index, (outputs, rank) in enumerate(siblings):
        rows, columns = (terms, outputs) if case.transposed else (outputs, terms)
        values, support = drawn.sparse(case.support, index, rows, columns, case.density, case.dtype)
        B, A = random(rows, rank), random(rank, columns)
        has_bias = case.bias == "all" or (case.bias == "some" and index % 2 == 1)
        per_sibling = (
            *((B.t(), A.t()) if case.transposed else (A, B)),
            random(case.tokens, rank),
            values,
            support,
            random(outputs) if has_bias else None,
        )
        for tensors, tensor in zip(operands[1:], per_sibling, strict=True):
            tensors.append(tensor)
    return operands


def run(case: Case, operands: Operands, autotune: bool = False) -> list[list[Tensor]]:
    """What the kernels return: the hiddens, and the results for given hiddens."""
    from slcompile.kernels.linear_factored import linear_factored
    from slcompile.kernels.project import project

    x, firsts, seconds, hiddens, values, supports, biases = operands
    factors = [each.t() for each in seconds] if case.transposed else seconds

    def complete(hiddens: Sequence[Tensor]) -> list[Tensor]:
        return linear_factored(
            x, hiddens, factors, values, supports, biases, case.transposed, VECTOR[case.support],
            autotune=autotune,
        )  # fmt: skip

    projected = project(x, firsts, scales_of(firsts), autotune=autotune)
    return [projected, complete(hiddens)]


def scales_of(factors: Sequence[Tensor]) -> list[float]:
    return [SCALE + index for index in range(len(factors))]


def reference(case: Case, operands: Operands) -> list[list[Tensor]]:
    """The same in plain torch, in the operands' dtype."""
    x, firsts, seconds, hiddens, values, supports, biases = operands
    projected = [scale * (x @ first.t()) for scale, first in zip(scales_of(firsts), firsts, strict=True)]

    def complete(hiddens: Sequence[Tensor]) -> list[Tensor]:
        results = []
        for hidden, second, value, support, bias in zip(hiddens, seconds, values, supports, biases, strict=True):
            outputs, terms = second.shape[0], x.shape[1]
            rows, columns = (terms, outputs) if case.transposed else (outputs, terms)
            S = value.new_zeros(rows * columns)
            S = S.scatter(
                0, flat_positions(value, support, columns, VECTOR[case.support]).long(), value.flatten()
            ).view(rows, columns)
            y = hidden @ second.t() + x @ (S if case.transposed else S.t())
            results.append(y if bias is None else y + bias)
        return results

    return [projected, complete(hiddens)]


def assert_within_the_references_error(case: Case, operands: Operands, found: list[list[Tensor]]) -> None:
    truth, eager = reference(case, Operands(*moved(operands, torch.float64))), reference(case, operands)
    for exacts, eagers, ours in zip(truth, eager, found, strict=True):
        for exact, result in zip(exacts, ours, strict=True):
            assert result.dtype == case.dtype
            assert result.shape == exact.shape
            assert result.is_contiguous()
        # One norm for all siblings: of a result with a handful of elements, rounding may be good or bad by chance.
        exact, expected, result = (torch.cat([each.flatten() for each in some]) for some in (exacts, eagers, ours))
        assert_within_error(result, expected, exact, case.dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=() if each in FIRST else pytest.mark.long) for each in CASES], ids=name_of
)
def test_interpreted_error_is_within_the_references(interpreted: dict[str, list[list[Tensor]]], case: Case) -> None:
    assert_within_the_references_error(case, make_operands(case), interpreted[name_of(case)])


SIBLINGS = {"qkv": 3, "up": 2, "down": 1}


def launched(target: str, shapes: Any, tokens: int, dtype: torch.dtype, siblings: int | None = None) -> list[Any]:
    """Projects, completes with either support, and does the same transposed, on meta tensors; the launches of it."""
    from slcompile.kernels.linear_factored import linear_factored
    from slcompile.kernels.offline import recorded
    from slcompile.kernels.project import project

    with recorded(target) as launches:
        for name, (rows, columns, rank, density) in shapes.items():
            count = siblings or SIBLINGS[name.split("_")[1]]
            x, grad = empty(tokens, columns, dtype=dtype), empty(tokens, rows, dtype=dtype)
            B, A, bias = empty(rows, rank, dtype=dtype), empty(rank, columns, dtype=dtype), empty(rows, dtype=dtype)
            groups = groups_per_row(columns, density)
            values, seed = empty_sparse("stratified", rows, groups, dtype)
            flat, index = empty_sparse("uniform", rows, groups, dtype)
            hidden = project(x, [A] * count, [SCALE] * count)
            linear_factored(x, hidden, [B] * count, [values] * count, [seed] * count)
            linear_factored(x, hidden, [B] * count, [flat] * count, [index] * count, [bias] * count)
            hidden = project(grad, [B.t()] * count, [SCALE] * count)
            linear_factored(grad, hidden, [A] * count, [values] * count, [seed] * count, transposed=True)
    return launches


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.bfloat16), (64, torch.bfloat16), (64, torch.float32)])
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_at_the_papers_shapes_without_spills(target: str, tokens: int, dtype: torch.dtype) -> None:
    require_compiler()
    shapes = PAPER if tokens == 64 and dtype == torch.bfloat16 else {"7B_up": PAPER["7B_up"]}
    found = list(usages(launched(target, shapes, tokens, dtype), target))
    assert len({launch.kernel.__name__ for launch, _ in found}) == 4
    for launch, usage in found:
        # There are no matrix instructions for float32 unless it may be rounded to TF32; AMD has some.
        multiplies = launch.kernel.__name__ != "sum_splits_kernel"
        if dtype == torch.bfloat16 or not target.startswith("gfx"):
            assert usage.has_mma == (multiplies and dtype == torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiles_where_rows_share_their_columns(target: str, tokens: int) -> None:
    require_compiler()
    from slcompile.kernels.linear_factored import linear_factored
    from slcompile.kernels.offline import recorded

    rows, columns, rank, density = PAPER["1B_up"]
    dtype, vector = torch.bfloat16, SLConfig.vector
    x, grad = empty(tokens, columns, dtype=dtype), empty(tokens, rows, dtype=dtype)
    B, A, hidden = empty(rows, rank, dtype=dtype), empty(rank, columns, dtype=dtype), empty(tokens, rank, dtype=dtype)
    values, seed = empty_sparse("stratified", rows, groups_per_row(columns, density), dtype)
    with recorded(target) as launches:
        linear_factored(x, [hidden] * 2, [B] * 2, [values] * 2, [seed] * 2, vector=vector)
        linear_factored(grad, [hidden] * 2, [A] * 2, [values] * 2, [seed] * 2, transposed=True, vector=vector)
    products = [launch for launch in launches if launch.kernel.__name__ != "sum_splits_kernel"]
    assert [launch.arguments["VECTOR"] for launch in products] == [vector, vector]
    assert [usage.has_mma for _, usage in usages(products, target)] == [True] * 2


@pytest.mark.parametrize("name", ["PROJECT", "PRODUCT", "TRANSPOSED"])
def test_autotuning_tries_tiles_that_do_not_spill(name: str) -> None:
    require_compiler()
    from slcompile.kernels import linear_factored, project

    tiled = getattr(project if name == "PROJECT" else linear_factored, name)
    shape = {"7B_qkv": PAPER["7B_qkv"]}
    assert_autotuning_spills_nothing(tiled, launched("sm_90", shape, 64, torch.bfloat16))


TRACED = [
    Case(19, "three", torch.bfloat16, "stratified"),
    Case(19, "five", torch.bfloat16, "uniform"),
    Case(1, "one", torch.float32, "stratified", transposed=True),
    Case(19, "three", torch.bfloat16, "vector", transposed=True),
]


class TestTracing:
    @pytest.mark.slow
    @pytest.mark.parametrize("autotune", [False, True])
    @pytest.mark.parametrize("mode", ["fake", "symbolic"])
    @pytest.mark.parametrize("case", TRACED, ids=name_of)
    def test_make_fx(self, case: Case, mode: str, autotune: bool) -> None:
        require_compiler()
        operands = make_operands(case)
        found = launches_in(lambda operands: run(case, operands, autotune), operands, mode)
        batches = triton.cdiv(len(operands.firsts), 4)
        projects = ["project_kernel", "sum_splits_kernel"]
        completes = (
            ["linear_factored_transposed_kernel", projects[1]] if case.transposed else ["linear_factored_kernel"]
        )
        assert found == projects * batches + completes * batches

    @pytest.mark.slow
    @pytest.mark.parametrize("siblings", [1, 2, 4])
    @pytest.mark.usefixtures("target")
    def test_only_results_are_written_to(self, siblings: int) -> None:
        """Of what it thinks is written to, torch.compile makes copies; of factors, that would cost all there is to
        gain, and a result that it overlooks would be lost."""
        launches = launched("sm_90", {"odd": (33, 65, 17, 0.1)}, 3, torch.bfloat16, siblings)
        assert len(launches) == 8
        for launch in launches:
            results = [name for name in launch.arguments if name.startswith(("p_y_", "p_sum_"))]
            results = [name for name in results if launch.arguments[name] is not None]
            assert written_to(launch) == (results or ["p_partial"])


def test_transposed_uniform_support_is_refused() -> None:
    from slcompile.kernels.linear_factored import linear_factored

    case = Case(3, "one", torch.float32, "uniform", transposed=True)
    x, _, seconds, hiddens, values, supports, _ = make_operands(case)
    with pytest.raises(NotImplementedError, match="uniform"):
        linear_factored(x, hiddens, [each.t() for each in seconds], values, supports, transposed=True)


def test_mixed_dtypes_are_refused() -> None:
    from slcompile.kernels.project import project

    with pytest.raises(AssertionError, match="one dtype"):
        project(torch.zeros(1, 2), [torch.zeros(3, 2, dtype=torch.bfloat16)], [1.0])


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
        for first, second in zip(run(case, operands), run(case, operands), strict=True):
            assert all(map(torch.equal, first, second))


if __name__ == "__main__":
    from tests.kernels.interpreter import asked, save_results

    save_results(lambda: {name: run(case, make_operands(case)) for name, case in asked(CASES).items()})

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from slcompile.ops import compose_reference, sparse_cpu
from slcompile.ops.sparse_cpu import entries, kept_bytes, sparse_addmm, sparse_dots, transposed_copy
from slcompile.ops.support import flat_positions, groups_per_row, uniform_index

SUPPORTS = ("stratified", "uniform")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# rows, columns: nothing divides anything, and the smallest there is.
SHAPES = [(33, 65), (70, 17), (1, 9), (9, 1)]
TOKENS = 63


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests' seeds may be alive."""
    monkeypatch.setattr(sparse_cpu, "_memory", type(sparse_cpu._memory)())


def make_sparse(
    support: str,
    shape: tuple[int, int] = SHAPES[0],
    dtype: torch.dtype = torch.float64,
    density: float = 0.1,
    seed: int = 5,
) -> tuple[Tensor, Tensor]:
    """Values and the support of S."""
    rows, columns = shape
    where = torch.tensor([seed]) if support == "stratified" else uniform_index(seed, rows, columns, density)
    size = (rows, groups_per_row(columns, density)) if support == "stratified" else tuple(where.shape)
    generator = torch.Generator().manual_seed(4)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype), where


def make_dense(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def scattered(values: Tensor, where: Tensor, shape: tuple[int, int]) -> Tensor:
    """S, dense."""
    return compose_reference(values.new_zeros(shape[0], 1), values.new_zeros(1, shape[1]), values, where, 0.0)


def addmm_operands(
    support: str, shape: tuple[int, int], transposed: bool, dtype: torch.dtype, density: float = 0.1, tokens: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, bool]:
    rows, columns = shape
    factor = make_dense(3, columns, dtype=dtype) if transposed else make_dense(rows, 3, dtype=dtype)
    dense = make_dense(rows if transposed else columns, tokens, dtype=dtype, seed=1)
    values, where = make_sparse(support, shape, dtype, density)
    return factor, make_dense(tokens, 3, dtype=dtype, seed=2), values, where, dense, transposed


class TestOps:
    @pytest.mark.slow
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("tokens", [5, TOKENS])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_opcheck_of_addmm(self, support: str, dtype: torch.dtype, tokens: int, transposed: bool) -> None:
        torch.library.opcheck(sparse_addmm, addmm_operands(support, (7, 9), transposed, dtype, tokens=tokens))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_opcheck_of_dots(self, support: str, dtype: torch.dtype) -> None:
        left, right = make_dense(7, 5, dtype=dtype), make_dense(9, 5, dtype=dtype)
        torch.library.opcheck(sparse_dots, (left, right, *make_sparse(support, (7, 9), dtype)))

    @pytest.mark.parametrize("tokens", [1, 5, TOKENS])
    @pytest.mark.parametrize("density", [0.1, 1.0])
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_addmm_is_its_formula(
        self, support: str, shape: tuple[int, int], transposed: bool, density: float, tokens: int
    ) -> None:
        operands = addmm_operands(support, shape, transposed, torch.float64, density, tokens)
        factor, hidden, values, where, dense, _ = operands
        S = scattered(values, where, shape)
        expected = (factor.t() if transposed else factor) @ hidden.t() + (S.t() if transposed else S) @ dense
        found = sparse_addmm(*operands)
        assert found.is_contiguous()
        # Sums of at most 70 + 3 products in float64.
        torch.testing.assert_close(found, expected, rtol=0, atol=73 * 2**-52 * float(expected.norm()))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_dots_are_the_products_entries(self, support: str, shape: tuple[int, int]) -> None:
        left, right = make_dense(shape[0], TOKENS), make_dense(shape[1], TOKENS, seed=1)
        values, where = make_sparse(support, shape)
        product = (left @ right.t()).flatten()
        expected = product[flat_positions(values, where, shape[1]).long()].view(values.shape)
        found = sparse_dots(left, right, values, where)
        torch.testing.assert_close(found, expected, rtol=0, atol=TOKENS * 2**-52 * float(product.norm()))

    @pytest.mark.parametrize("tokens", [1, 5, TOKENS])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_autocast_changes_nothing(self, transposed: bool, tokens: int) -> None:
        operands = addmm_operands("stratified", SHAPES[0], transposed, torch.float32, tokens=tokens)
        expected = sparse_addmm(*operands)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(sparse_addmm(*operands), expected)

    def test_a_transposed_copy_owns_its_memory(self) -> None:
        for matrix in (make_dense(5, 7), make_dense(7, 5).t(), make_dense(1, 7)):
            copy = transposed_copy(matrix)
            assert torch.equal(copy, matrix.t())
            assert copy.is_contiguous()
            assert copy.data_ptr() != matrix.data_ptr()


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("tokens", [1, 5, TOKENS])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_rows_and_columns_are_zeros(dtype: torch.dtype, transposed: bool, tokens: int) -> None:
    factor, hidden, _, _, dense, _ = addmm_operands("uniform", (70, 65), transposed, dtype, tokens=tokens)
    values, where = torch.ones(1, dtype=dtype), torch.tensor([65 * 3 + 2])  # one entry at row 3, column 2
    found = sparse_addmm(torch.zeros_like(factor), hidden, values, where, dense, transposed)
    expected = torch.zeros_like(found)
    expected[2 if transposed else 3] = dense[3 if transposed else 2]
    assert torch.equal(found, expected)


class TestEntries:
    @pytest.mark.parametrize("density", [1e-9, 0.1, 1.0])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("support", SUPPORTS)
    def test_agree_with_the_flat_positions(self, support: str, shape: tuple[int, int], density: float) -> None:
        values, where = make_sparse(support, shape, density=density)
        row, column = entries(values, where, *shape)
        assert row.dtype == column.dtype == torch.int32
        assert torch.equal(row.long() * shape[1] + column, flat_positions(values, where, shape[1]).long())
        assert bool((column < shape[1]).all())

    def test_of_a_weight_too_large_for_int32(self) -> None:
        columns = 2**31
        row, column = entries(torch.ones(2), torch.tensor([7, columns + 5]), 2, columns)
        assert row.dtype == column.dtype == torch.int64
        assert (row.tolist(), column.tolist()) == ([0, 1], [7, 5])


class TestKept:
    def test_made_once_for_a_seed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = []

        def counted(*args):
            made.append(args)
            return original(*args)

        original = sparse_cpu.stratified_columns
        monkeypatch.setattr(sparse_cpu, "stratified_columns", counted)
        values, seed = make_sparse("stratified", (33, 65))
        dense = make_dense(65, TOKENS)
        for _ in range(3):
            sparse_addmm(make_dense(33, 3), make_dense(TOKENS, 3), values, seed, dense, False)
            sparse_dots(make_dense(33, TOKENS), dense, values, seed)
        assert len(made) == 1
        size = kept_bytes()
        for _ in range(2):
            sparse_addmm(make_dense(3, 65), make_dense(TOKENS, 3), values, seed, make_dense(33, TOKENS), True)
        assert len(made) == 2
        # Two int32 for each entry by row and by column, and where each row and column begins.
        assert 8 * values.numel() <= size < kept_bytes() <= 16 * values.numel() + 4 * (33 + 65 + 2)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_a_seed_that_is_overwritten_gives_new_results(self, transposed: bool) -> None:
        factor, hidden, values, seed, dense, _ = addmm_operands("stratified", (33, 65), transposed, torch.float32)
        left, right = make_dense(33, TOKENS), make_dense(65, TOKENS)
        first = sparse_addmm(factor, hidden, values, seed, dense, transposed), sparse_dots(left, right, values, seed)
        size = kept_bytes()
        seed.fill_(6)
        found = sparse_addmm(factor, hidden, values, seed, dense, transposed), sparse_dots(left, right, values, seed)
        new = torch.tensor([6])
        expected = sparse_addmm(factor, hidden, values, new, dense, transposed), sparse_dots(left, right, values, new)
        assert all(map(torch.equal, found, expected))
        assert not any(map(torch.equal, found, first))
        del new
        assert kept_bytes() == size  # what was made from the old number is gone

    def test_freed_with_its_seed(self) -> None:
        values, seed = make_sparse("stratified")
        other = seed.clone()
        entries_of = [sparse_dots(make_dense(33, 5), make_dense(65, 5), values, each) for each in (seed, other)]
        assert torch.equal(*entries_of)
        size = kept_bytes()
        assert size > 0
        del seed
        assert kept_bytes() == size // 2
        del other
        assert kept_bytes() == 0

    def test_two_shapes_with_one_seed(self) -> None:
        seed = torch.tensor([5])
        for shape in [(33, 65), (65, 33), (33, 65), (33, 40)]:
            values, own = make_sparse("stratified", shape)
            left, right = make_dense(shape[0], 5), make_dense(shape[1], 5, seed=1)
            assert torch.equal(sparse_dots(left, right, values, seed), sparse_dots(left, right, values, own))

    def test_two_densities_with_one_seed(self) -> None:
        seed = torch.tensor([5])
        left, right = make_dense(33, 5), make_dense(65, 5, seed=1)
        for density in (0.1, 0.2, 0.1):
            values, own = make_sparse("stratified", density=density)
            assert torch.equal(sparse_dots(left, right, values, seed), sparse_dots(left, right, values, own))

    def test_positions_that_are_overwritten_without_being_counted_give_new_results(self) -> None:
        operands = addmm_operands("uniform", (33, 65), False, torch.float32)
        first = sparse_addmm(*operands)
        index, other = operands[3], uniform_index(99, 33, 65, len(operands[3]) / (33 * 65))
        version = index._version
        index.data.copy_(other)  # as torch.distributed.broadcast does
        assert index._version == version
        expected = sparse_addmm(*operands[:3], other.clone(), *operands[4:])
        assert torch.equal(sparse_addmm(*operands), expected)
        assert not torch.equal(first, expected)

    def test_threads_may_make_what_is_kept_at_once(self) -> None:
        values, seed = make_sparse("stratified", (33, 65))

        def ask(first: int) -> bool:
            makers = [lambda *args, n=n: (torch.full((1,), n),) for n in range(first, first + 300)]
            found = [int(sparse_cpu.kept(make, values, seed, 33, 65)[0]) for make in makers]
            return found == list(range(first, first + 300))

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(4) as pool:
                assert all(pool.map(ask, range(0, 1200, 300)))
        finally:
            sys.setswitchinterval(before)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_a_flat_index_that_is_overwritten_gives_new_results(self, transposed: bool) -> None:
        operands = addmm_operands("uniform", (33, 65), transposed, torch.float32)
        sparse_addmm(*operands)
        size = kept_bytes()
        assert size > 0
        other = uniform_index(99, 33, 65, len(operands[3]) / (33 * 65))
        assert len(other) == len(operands[3])
        expected = sparse_addmm(*operands[:3], other.clone(), *operands[4:])
        operands[3].copy_(other)
        assert torch.equal(sparse_addmm(*operands), expected)

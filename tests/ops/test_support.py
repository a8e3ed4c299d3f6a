from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slcompile.ops.support import (
    SEED_LIMIT,
    block_columns,
    draw_seed,
    flat_positions,
    groups_per_row,
    mix32,
    stratified_columns,
    uniform_count,
    uniform_dtype,
    uniform_index,
)

# The hash is fixed, so these statistics never change: five standard deviations say that it behaves like chance
# (one such test in 1.7 million would exceed them), not that a test may fail now and then.
SIGMAS = 5.0

any_size = settings(deadline=None, max_examples=60)
seeds = st.integers(0, SEED_LIMIT - 1)
densities = st.floats(0.001, 1.0)


def columns_of(seed: int, rows: int, columns: int, groups: int, first_row: int = 0) -> Tensor:
    return stratified_columns(torch.tensor([seed]), rows, columns, groups, first_row=first_row)


def reference_mix32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def reference_column(seed: int, row: int, group: int, columns: int, groups: int) -> int:
    """The formula of the module's docstring in Python's unbounded integers."""
    start, stop = group * columns // groups, (group + 1) * columns // groups
    h = reference_mix32((row * groups + group) % 2**32 ^ reference_mix32(seed))
    return start + (h * (stop - start) >> 32)


def z_score(found: float, expected: float, variance: float) -> float:
    return (found - expected) / math.sqrt(variance)


class TestMix32:
    # Pinned: whatever changes these moves every non-zero of every checkpoint.
    @pytest.mark.parametrize(
        ("x", "mixed"),
        [(0, 0), (1, 0x688990C0), (2, 0xD1132181), (0xDEADBEEF, 0xE628C683), (0xFFFFFFFF, 0x6768824A)],
    )
    def test_golden(self, x: int, mixed: int) -> None:
        assert int(mix32(torch.tensor(x))) == mixed == reference_mix32(x)

    def test_has_no_collision(self) -> None:
        x = torch.arange(0, 2**32, 65521)
        assert mix32(x).unique().numel() == x.numel()

    def test_each_input_bit_flips_each_output_bit_half_the_time(self) -> None:
        x = mix32(torch.arange(4096) * 0x9E3779B1 & 0xFFFFFFFF)
        bits = torch.arange(32)
        flips = mix32(x) ^ mix32(x ^ (1 << bits).unsqueeze(1))
        counts = (flips.unsqueeze(-1) >> bits & 1).sum(1)
        assert (counts - x.numel() / 2).abs().max() < SIGMAS * math.sqrt(x.numel() / 4)


class TestStratified:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ((7, 3, 20, 4, 0), [[1, 7, 12, 16], [1, 6, 10, 16], [4, 7, 12, 16]]),
            ((SEED_LIMIT - 1, 2, 101, 5, 10), [[3, 33, 40, 61, 89], [19, 26, 53, 62, 95]]),
            ((0, 2, 10, 3, 2**31), [[2, 3, 7], [0, 3, 8]]),
        ],
    )
    def test_golden(self, arguments: tuple[int, int, int, int, int], expected: list[list[int]]) -> None:
        assert columns_of(*arguments).tolist() == expected

    # The blocks have the columns of the rows 0 to 3 of the stratified support; the last block is shorter.
    def test_golden_of_blocks_of_rows(self) -> None:
        blocks = [[1, 7, 12, 16], [1, 6, 10, 16], [4, 7, 12, 16], [4, 6, 14, 16]]
        found = stratified_columns(torch.tensor([7]), 7, 20, 4, vector=2)
        assert found.tolist() == [blocks[row // 2] for row in range(7)]
        assert block_columns(torch.tensor([7]), 7, 20, 4, 2).tolist() == blocks

    @any_size
    @given(
        seeds, st.integers(1, 40), st.integers(1, 60), densities, st.sampled_from((1, 2, 16, 128)), st.integers(0, 70)
    )
    def test_rows_of_a_block_share_their_columns(
        self, seed: int, rows: int, columns: int, density: float, vector: int, first_row: int
    ) -> None:
        groups, where = groups_per_row(columns, density), torch.tensor([seed])
        found = stratified_columns(where, rows, columns, groups, first_row=first_row, vector=vector)
        of_blocks = columns_of(seed, (first_row + rows) // vector + 1, columns, groups)
        assert torch.equal(found, of_blocks[torch.arange(first_row, first_row + rows) // vector])
        whole = block_columns(where, rows, columns, groups, vector)
        assert torch.equal(whole, of_blocks[: -(-rows // vector)])

    @any_size
    @given(seeds, st.integers(1, 9), st.integers(1, 300), densities)
    def test_exactly_one_in_each_group_ascending(self, seed: int, rows: int, columns: int, density: float) -> None:
        groups = groups_per_row(columns, density)
        found = columns_of(seed, rows, columns, groups)
        bounds = [group * columns // groups for group in range(groups + 1)]
        assert found.shape == (rows, groups)
        assert found.dtype == torch.int64
        assert bool((found >= torch.tensor(bounds[:-1])).all())
        assert bool((found < torch.tensor(bounds[1:])).all())
        assert bool((found.diff(dim=1) > 0).all())

    @any_size
    @given(st.integers(1, 100_000), densities)
    def test_density_is_met_within_half_a_non_zero_a_row(self, columns: int, density: float) -> None:
        groups = groups_per_row(columns, density)
        assert 1 <= groups <= columns
        if density * columns >= 0.5:  # below, a row still has its one
            assert abs(groups - density * columns) <= 0.5

    @any_size
    @given(st.integers(1, 100_000), densities)
    def test_widths_differ_by_at_most_one(self, columns: int, density: float) -> None:
        groups = groups_per_row(columns, density)
        group = torch.arange(groups + 1)
        widths = (group * columns // groups).diff()
        assert int(widths.sum()) == columns
        assert int(widths.max() - widths.min()) <= 1
        assert int(widths.min()) >= 1

    @any_size
    @given(st.integers(1, 5_000), densities)
    def test_group_of_a_column(self, columns: int, density: float) -> None:
        groups = groups_per_row(columns, density)
        group, column = torch.arange(groups + 1), torch.arange(columns)
        start = group * columns // groups
        inverse = ((column + 1) * groups - 1) // columns
        assert torch.equal(inverse, torch.bucketize(column, start, right=True) - 1)

    @any_size
    @given(seeds, st.integers(1, 5), st.integers(1, 120), densities, st.integers(0, 2**40))
    def test_equals_the_formula_in_unbounded_integers(
        self, seed: int, rows: int, columns: int, density: float, first_row: int
    ) -> None:
        groups = groups_per_row(columns, density)
        expected = [
            [reference_column(seed, first_row + i, j, columns, groups) for j in range(groups)] for i in range(rows)
        ]
        assert columns_of(seed, rows, columns, groups, first_row).tolist() == expected

    @pytest.mark.parametrize("first_row", [2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62])
    @pytest.mark.parametrize(("columns", "groups"), [(11008, 330), (2**31 - 1, 7)])
    def test_equals_it_beyond_2_31_elements(self, first_row: int, columns: int, groups: int) -> None:
        found = columns_of(3, 2, columns, groups, first_row)
        for i, j in itertools.product(range(2), (0, 1, groups // 2, groups - 1)):
            assert int(found[i, j]) == reference_column(3, first_row + i, j, columns, groups)

    def test_counter_wraps_in_the_middle_of_a_row(self) -> None:
        columns, groups = 1000, 30
        row = 2**32 // groups  # 2**32 is no multiple of 30
        expected = [reference_column(5, row, j, columns, groups) for j in range(groups)]
        assert columns_of(5, 1, columns, groups, row).tolist() == [expected]

    def test_many_groups_and_columns(self) -> None:
        columns, groups = 2**31 - 1, 100_001  # group * columns passes 2**47
        found = columns_of(1, 1, columns, groups)[0]
        for j in (0, 1, 65_536, groups - 1):
            assert int(found[j]) == reference_column(1, 0, j, columns, groups)

    def test_a_shard_has_the_support_of_its_rows(self) -> None:
        whole = columns_of(11, 20, 37, 5)
        assert torch.equal(columns_of(11, 6, 37, 5, first_row=9), whole[9:15])

    @pytest.mark.parametrize("seed", [torch.tensor(9), torch.tensor([9]), torch.tensor([9], dtype=torch.int32)])
    def test_seed_may_be_any_tensor_of_one_integer(self, seed: Tensor) -> None:
        assert torch.equal(stratified_columns(seed, 4, 37, 5), columns_of(9, 4, 37, 5))

    def test_seed_is_not_changed(self) -> None:
        seed = torch.tensor([9])
        stratified_columns(seed, 4, 37, 5)
        assert int(seed) == 9

    def test_no_rows(self) -> None:
        assert columns_of(0, 0, 37, 5).shape == (0, 5)


class TestStratifiedLooksRandom:
    ROWS, COLUMNS, GROUPS = 512, 1000, 30  # widths 33 and 34

    def widths(self) -> Tensor:
        return (torch.arange(self.GROUPS + 1) * self.COLUMNS // self.GROUPS).diff().double()

    def overlap_of_one_pair(self) -> tuple[float, float]:
        """Mean and variance of the non-zeros that two independent supports share: a sum of Bernoulli(1 / width)."""
        chance = 1 / self.widths()
        return self.ROWS * float(chance.sum()), self.ROWS * float((chance * (1 - chance)).sum())

    @pytest.mark.parametrize("first_seed", [0, 12_345, SEED_LIMIT - 50])
    def test_nearby_seeds_overlap_as_much_as_chance_gives(self, first_seed: int) -> None:
        found = torch.stack([columns_of(first_seed + each, self.ROWS, self.COLUMNS, self.GROUPS) for each in range(50)])
        mean, variance = self.overlap_of_one_pair()
        overlaps = torch.tensor([int((a == b).sum()) for a, b in itertools.combinations(found, 2)], dtype=torch.float64)
        neighbours = (found[1:] == found[:-1]).sum((1, 2)).double()
        # Pairs of pairs are uncorrelated, as two supports coincide at 1 / width whatever the first of them is.
        for pooled in (overlaps, neighbours):
            assert abs(z_score(float(pooled.sum()), mean * len(pooled), variance * len(pooled))) < SIGMAS
        assert float((overlaps - mean).abs().max()) < SIGMAS * math.sqrt(variance)

    def test_distant_seeds_overlap_as_much_as_chance_gives(self) -> None:
        distant = [1 << bit for bit in range(24)] + [draw_seed(0, str(each)) for each in range(24)]
        found = [columns_of(seed, self.ROWS, self.COLUMNS, self.GROUPS) for seed in distant]
        mean, variance = self.overlap_of_one_pair()
        overlaps = torch.tensor([int((a == b).sum()) for a, b in itertools.combinations(found, 2)], dtype=torch.float64)
        assert float((overlaps - mean).abs().max()) < SIGMAS * math.sqrt(variance)

    @pytest.mark.parametrize("distance", [1, 2, 3, 4, 7, 8, 16, 32])
    def test_a_nearby_seed_is_not_the_same_support_with_groups_exchanged(self, distance: int) -> None:
        # seed xor counter alone would make h of (seed + 1, counter) that of (seed, counter ^ 1).
        width, count = 32, 2**14
        start = torch.arange(0, count * width, width)
        one, other = (columns_of(seed, 1, count * width, count)[0] - start for seed in (1000, 1000 ^ distance))
        exchanged = other[torch.arange(count) ^ distance]
        shifted = other.roll(distance)
        for changed in (exchanged, shifted):
            matches = int((one == changed).sum())
            assert abs(z_score(matches, count / width, count / width * (1 - 1 / width))) < SIGMAS

    @pytest.mark.parametrize("seed", [0, 1, SEED_LIMIT - 1])
    def test_columns_are_uniform_within_their_groups(self, seed: int) -> None:
        rows = 20_000
        counts = columns_of(seed, rows, self.COLUMNS, self.GROUPS).flatten().bincount(minlength=self.COLUMNS).double()
        widths = self.widths()
        expected = rows / widths.repeat_interleave(widths.long())
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        freedom = self.COLUMNS - self.GROUPS
        # A chi-square of k degrees of freedom has mean k and variance 2k.
        assert abs(z_score(chi_square, freedom, 2 * freedom)) < SIGMAS

    def test_neighbouring_rows_and_groups_are_independent(self) -> None:
        width, groups, rows = 32, 64, 2000
        offsets = columns_of(4, rows, groups * width, groups) % width
        for one, other in ((offsets[1:], offsets[:-1]), (offsets[:, 1:], offsets[:, :-1])):
            pairs = torch.bincount((one * width + other).flatten(), minlength=width**2).double()
            expected = one.numel() / width**2
            chi_square = float(((pairs - expected) ** 2 / expected).sum())
            freedom = width**2 - 1
            assert abs(z_score(chi_square, freedom, 2 * freedom)) < SIGMAS


class TestUniform:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ((7, 4, 10, 0.25), [2, 6, 7, 13, 15, 24, 26, 35, 36, 37]),
            ((SEED_LIMIT - 1, 5, 7, 0.2), [2, 15, 25, 26, 30, 32, 33]),
        ],
    )
    def test_golden(self, arguments: tuple[int, int, int, float], expected: list[int]) -> None:
        assert uniform_index(*arguments).tolist() == expected

    @any_size
    @given(seeds, st.integers(1, 60), st.integers(1, 60), densities)
    def test_sorted_without_repetition_and_of_the_exact_count(
        self, seed: int, rows: int, columns: int, density: float
    ) -> None:
        index = uniform_index(seed, rows, columns, density)
        assert index.dtype == torch.int32
        assert index.numel() == max(1, math.floor(density * (rows * columns)))
        assert bool((index.diff() > 0).all())
        assert int(index[0]) >= 0
        assert int(index[-1]) < rows * columns

    def test_equals_the_papers_permutation(self) -> None:
        generator = torch.Generator().manual_seed(42)
        expected = torch.randperm(33 * 65, generator=generator)[: int(0.05 * 33 * 65)].sort().values
        assert torch.equal(uniform_index(42, 33, 65, 0.05), expected.int())

    @pytest.mark.parametrize(
        ("shape", "density", "expected"),
        [
            ((10, 10), 0.03, 3),
            ((10, 10), 0.039, 3),
            ((3, 3), 0.01, 1),
            ((3, 3), 1.0, 9),
            ((4096, 11008), 0.05, 2254438),
        ],
    )
    def test_count_is_rounded_down_to_at_least_one(self, shape: tuple[int, int], density: float, expected: int) -> None:
        assert uniform_count(*shape, density) == expected

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [
            ((4096, 11008), torch.int32),
            ((2**31 - 1, 1), torch.int32),
            ((2**16, 2**15), torch.int64),
            ((2**20, 2**20), torch.int64),
        ],
    )
    def test_dtype_is_the_smallest_that_holds_every_position(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        assert uniform_dtype(*shape) == dtype
        largest = shape[0] * shape[1] - 1
        assert largest <= torch.iinfo(dtype).max

    def test_default_generator_is_left_where_it_was(self) -> None:
        before = torch.get_rng_state()
        uniform_index(0, 20, 20, 0.5)
        assert torch.equal(torch.get_rng_state(), before)

    def test_default_device_is_not_followed(self) -> None:
        expected = uniform_index(7, 4, 10, 0.25)
        with torch.device("meta"):
            found = uniform_index(7, 4, 10, 0.25)
        assert found.device.type == "cpu"
        assert torch.equal(found, expected)


class TestFlatPositions:
    def test_stratified_adds_the_rows(self) -> None:
        seed, values = torch.tensor([5]), torch.empty(7, 4)
        expected = columns_of(5, 7, 33, 4) + 33 * torch.arange(7).unsqueeze(1)
        found = flat_positions(values, seed, 33)
        assert torch.equal(found, expected.flatten())
        assert bool((found.diff() > 0).all())

    def test_uniform_is_the_index_itself(self) -> None:
        index = uniform_index(5, 7, 33, 0.1)
        assert flat_positions(torch.empty(index.shape), index, 33) is index

    def test_every_column_of_a_row(self) -> None:
        found = flat_positions(torch.empty(3, 5), torch.tensor([0]), 5)
        assert torch.equal(found, torch.arange(15))


class TestDrawSeed:
    # Pinned: a user's seed must mean the same support in every version.
    @pytest.mark.parametrize(
        ("seed", "name", "expected"),
        [
            (0, "a", 5431741),
            (0, "b", 13633890),
            (1, "a", 10888341),
            (2**63 - 1, "layers.0.q_proj.weight", 7305277),
        ],
    )
    def test_golden(self, seed: int, name: str, expected: int) -> None:
        assert draw_seed(seed, name) == expected

    def test_names_and_seeds_give_different_ones_below_the_limit(self) -> None:
        drawn = [draw_seed(seed, f"layers.{layer}.weight") for seed in range(10) for layer in range(100)]
        assert all(0 <= each < SEED_LIMIT for each in drawn)
        # A thousand draws of 2**24 collide 0.03 times on average.
        assert len(set(drawn)) == len(drawn)

    def test_none_draws_from_torchs_default_generator(self) -> None:
        torch.manual_seed(3)
        first = [draw_seed(None, "same") for _ in range(20)]
        torch.manual_seed(3)
        assert [draw_seed(None, "other") for _ in range(20)] == first
        assert len(set(first)) == 20
        assert all(0 <= each < SEED_LIMIT for each in first)

    @pytest.mark.parametrize("known_by", ["torchrun", "process group"])
    def test_none_is_as_0_among_several_processes(self, known_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if known_by == "torchrun":
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        else:
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
            monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        assert [draw_seed(None, "a"), draw_seed(None, "b")] == [draw_seed(0, "a"), draw_seed(0, "b")]

    def test_int_leaves_the_generator_where_it_was(self) -> None:
        before = torch.get_rng_state()
        draw_seed(3, "name")
        assert torch.equal(torch.get_rng_state(), before)

    def test_none_ignores_the_default_device(self) -> None:
        torch.manual_seed(3)
        expected = draw_seed(None, "")
        torch.manual_seed(3)
        with torch.device("meta"):
            assert draw_seed(None, "") == expected

    @pytest.mark.parametrize("seed", [0, 1, 2**23 + 1, SEED_LIMIT - 2, SEED_LIMIT - 1])
    def test_seeds_survive_a_round_trip_through_float32(self, seed: int) -> None:
        assert int(torch.tensor([seed]).float().long()) == seed

    def test_the_limit_is_as_large_as_float32_allows(self) -> None:
        assert int(torch.tensor([SEED_LIMIT + 1]).float().long()) != SEED_LIMIT + 1

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slcompile import cost, torch_private
from slcompile.cost import (
    DEVICE_CLASSES,
    DTYPES,
    GPU_CLASSES,
    DeviceClass,
    Matmul,
    Rates,
    aligned,
    crossover,
    device_class,
    devices,
    rates,
    store_rates,
    stored,
    why_no_kernels,
)
from slcompile.cost.matmul import FEW_TOKENS, vector_block

CPU = torch.device("cpu")
NAMES = tuple(DTYPES.values())
# 40 rows, 30 columns, rank 5, 60 non-zeros, and ten tokens below.
MATMUL = Matmul(40, 30, 5, 60, torch.float32)
TOKENS = 10
# Where nothing but operations counts, a dense product takes half its FLOPs in seconds and a sparse one a quarter; ten
# positions are computed in a second. Where nothing but bytes counts, one float32 is moved in a second.
BY_OPERATIONS = Rates({"float32": 2.0}, {"float32": 4.0}, memory=1e30, entries=10.0)
BY_BYTES = Rates({"float32": 1e30, "bfloat16": 1e30}, {"float32": 1e30, "bfloat16": 1e30}, memory=4.0)


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No rates are stored but those that a test stores."""
    monkeypatch.setenv("SLCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    stored._rates.cache_clear()
    yield tmp_path / "cache"
    stored._rates.cache_clear()


class TestFormulas:
    @pytest.mark.parametrize(
        ("name", "arguments", "operations", "floats"),
        [
            # B @ A is 40 * 30 * 5 multiply-adds of 200 + 150 numbers to 1200; 60 positions.
            ("compose", {}, 6000 + 6, 1550),
            # x W^T: 10 * 30 * 40, 300 + 1200 + 400, and one or half a composition.
            ("composed", {"tokens": TOKENS}, 12000 + 6006, 1900 + 1550),
            ("composed", {"tokens": TOKENS, "composes": 0.5}, 12000 + 3003, 1900 + 775),
            # Through the rank 10 * 5 * (30 + 40), 300 + 150 + 50 and 50 + 200 + 400; S 10 * 60 of 60 values.
            ("factored", {"tokens": TOKENS}, 3500 + 300, 1150 + 60),
            # G 40 * 30 * 10, and two projections as large as a composition.
            ("grads_composed", {"tokens": TOKENS}, 12000 + 2 * 6000 + 6, 1900 + 2 * 1550),
            # dB 40 * 5 * 10 and dA 5 * 30 * 10, 400 + 50 + 200 and 50 + 300 + 150; as much again for two hidden
            # matrices that are not at hand, half of it for one.
            ("grads_factored", {"tokens": TOKENS}, 2 * 3500 + 300, 2 * 1150 + 60),
            ("grads_factored", {"tokens": TOKENS, "hiddens": 1}, 1.5 * 3500 + 300, 1.5 * 1150 + 60),
            ("grads_factored", {"tokens": TOKENS, "hiddens": 0}, 3500 + 300, 1150 + 60),
        ],
    )
    def test_by_hand(self, name: str, arguments: dict[str, float], operations: float, floats: float) -> None:
        assert getattr(MATMUL, name)(**arguments, rates=BY_OPERATIONS) == pytest.approx(operations)
        assert getattr(MATMUL, name)(**arguments, rates=BY_BYTES) == pytest.approx(floats)
        half = dataclasses.replace(MATMUL, dtype=torch.bfloat16)
        assert getattr(half, name)(**arguments, rates=BY_BYTES) == pytest.approx(floats / 2)

    @pytest.mark.parametrize("name", ["factored", "grads_factored"])
    def test_a_sparse_product_copies_its_operands(self, name: str) -> None:
        copying = dataclasses.replace(BY_BYTES, transposes=3)
        added = getattr(MATMUL, name)(TOKENS, copying) - getattr(MATMUL, name)(TOKENS, BY_BYTES)
        assert added == pytest.approx(3 * 2 * TOKENS * (40 + 30))

    def test_the_larger_of_operations_and_bytes_counts_for_each_product(self) -> None:
        # Of x A^T and hidden B^T the first moves 500 numbers for 3000 operations, the second 650 for 4000.
        both = Rates({"float32": 3000 / 500}, {"float32": math.inf}, memory=4.0)
        assert MATMUL.factored(TOKENS, both) == pytest.approx(500 + 4000 / 6 + 60)

    def test_rows_that_share_their_columns_have_their_own_rate_and_copy_nothing(self) -> None:
        alone, shared = (cost.Matmul(64, 32, 1, 640, torch.float32, vector) for vector in (1, 16))
        rates = cost.Rates(
            {"float32": 1e30}, {"float32": 2.0}, 1e30, index_bytes=4, transposes=1, vector={"float32": 8.0}
        )
        assert alone.factored(10, rates) == pytest.approx(2 * 10 * 640 / 2.0)
        assert shared.factored(10, rates) == pytest.approx(2 * 10 * 640 / 8.0)
        slow = dataclasses.replace(rates, memory=1.0, vector={"float32": 1e30})
        assert shared._sparse(10, slow) == (10 * (64 + 32) + 640) * 4
        without = dataclasses.replace(rates, vector={})
        assert shared.factored(10, without) == alone.factored(10, without)

    def test_a_sparse_product_reads_positions(self) -> None:
        reading = dataclasses.replace(BY_BYTES, index_bytes=8)
        assert MATMUL.factored(TOKENS, reading) - MATMUL.factored(TOKENS, BY_BYTES) == pytest.approx(60 * 8 / 4)

    @pytest.mark.parametrize("name", ["factored", "grads_factored"])
    def test_rows_that_share_their_columns_have_a_rate_of_their_own(self, name: str) -> None:
        vector = dataclasses.replace(MATMUL, vector=16)
        by_operations = dataclasses.replace(BY_OPERATIONS, vector={"float32": 12.0})
        # 10 * 60 multiply-adds take a third of the time; where nothing is said of them, as long as others.
        saved = getattr(MATMUL, name)(TOKENS, by_operations) - getattr(vector, name)(TOKENS, by_operations)
        assert saved == pytest.approx(300 - 100)
        assert getattr(vector, name)(TOKENS, BY_OPERATIONS) == getattr(MATMUL, name)(TOKENS, BY_OPERATIONS)
        # x is read and y written in their own layouts, and no position is.
        reading = dataclasses.replace(BY_BYTES, vector={"float32": 1e30}, index_bytes=8, transposes=3)
        plain = getattr(MATMUL, name)(TOKENS, BY_BYTES)
        assert getattr(vector, name)(TOKENS, reading) - plain == pytest.approx(TOKENS * (40 + 30))


class TestKernels:
    """Of kernels: each launch takes a while, an entry a sector, x @ S is a dense product and so are gradients."""

    LAUNCH = dataclasses.replace(BY_BYTES, memory=1e30, launch=1.0, tiled=1.0)
    SECTORS = dataclasses.replace(BY_BYTES, sector=8, tiled=1.0)

    def test_launches(self) -> None:
        # A product and an addition; that and a product; both products and S; as many and its partial sums.
        assert MATMUL.compose(self.LAUNCH) == 2
        assert MATMUL.composed(TOKENS, self.LAUNCH) == 3
        assert MATMUL.factored(TOKENS, self.LAUNCH) == 3
        assert MATMUL.factored(TOKENS, self.LAUNCH, transposed=True) == 4
        # G, two projections and what is read; G, what is read and two products, for which two hidden ones are made.
        assert MATMUL.grads_composed(TOKENS, self.LAUNCH) == 4
        assert MATMUL.grads_factored(TOKENS, self.LAUNCH) == 6
        assert MATMUL.grads_factored(TOKENS, self.LAUNCH, hiddens=0) == 4

    def test_entries_move_sectors(self) -> None:
        # One float of values, a second each; of W or G read and written, or read, two floats each time.
        assert MATMUL.compose(self.SECTORS) == pytest.approx(1550 + 60 * (2 * 2 + 1))
        assert MATMUL.grads_composed(TOKENS, self.SECTORS) == pytest.approx(1900 + 2 * 1550 + 60 * (2 + 1))
        assert MATMUL.grads_factored(TOKENS, self.SECTORS, 0) == pytest.approx(1900 + 1150 + 60 * (2 + 1))

    def test_the_input_gradient_spreads_the_non_zeros_over_tiles(self) -> None:
        tiled = dataclasses.replace(BY_OPERATIONS, tiled=0.5)
        assert MATMUL.factored(TOKENS, tiled, transposed=True) == pytest.approx(3500 + 2 * 12000)
        # Partial sums of ten tokens and 30 columns, one for each 512 rows or part of them, written and read.
        tall = dataclasses.replace(MATMUL, rows=513)
        moved = [tall.factored(TOKENS, self.SECTORS, transposed=True), tall.factored(TOKENS, BY_BYTES)]
        assert moved[0] - moved[1] == pytest.approx(2 * 2 * 300 - 60)

    def test_products_through_the_rank_are_slower(self) -> None:
        narrow = dataclasses.replace(BY_OPERATIONS, narrow=0.5)
        assert MATMUL.compose(narrow) == pytest.approx(2 * 6000 + 6)
        assert MATMUL.grads_composed(TOKENS, narrow) == pytest.approx(12000 + 2 * 2 * 6000 + 6)

    H100 = next(each.rates for each in GPU_CLASSES if each.name == "sm_90")

    def test_kernels_that_gather_are_for_many_tokens_and_rows_of_a_block(self) -> None:
        """At 16k tokens factored is cheaper the more rows share their columns, and then cheaper than composed."""
        tokens, rows, columns, rank = 16384, 5504, 2048, 512
        matmuls = [Matmul(rows, columns, rank, rows * 61, torch.bfloat16, vector) for vector in (8, 16, 64)]
        for transposed in (False, True):
            few, some, most = (each.factored(tokens, self.H100, transposed, shared=2) for each in matmuls)
            assert most < some < few
            assert most < 0.8 * matmuls[2].composed(tokens, self.H100)
        few, some, most = (each.grads_factored(tokens, self.H100) for each in matmuls)
        assert most < some < few
        # For few tokens kernels are the same, however many rows share their columns.
        assert len({each.factored(FEW_TOKENS, self.H100, True) for each in matmuls}) == 1

    def test_readers_share_a_transposed_copy(self) -> None:
        matmul = Matmul(64, 32, 8, 64 * 4, torch.bfloat16, 16)
        copy = 2 * 1024 * 32 * 2 / self.H100.memory
        for cost_of in (matmul.factored, matmul.grads_factored):
            alone, both = (cost_of(1024, self.H100, shared=shared) for shared in (1, 2))
            assert alone - both == pytest.approx(copy / 2)
        assert len({matmul.factored(1024, self.H100, True, shared) for shared in (1, 2)}) == 1


class TestCrossover:
    @given(st.integers(0, 400), st.integers(0, 5), st.integers(0, 400), st.integers(0, 5), st.integers(2, 150))
    def test_is_the_switching_point(self, a: int, b: int, c: int, d: int, limit: int) -> None:
        def first(tokens: int) -> int:
            return a + b * tokens

        def second(tokens: int) -> int:
            return c + d * tokens

        lower = [first(tokens) < second(tokens) for tokens in range(1, limit)]
        switches = [index + 1 for index in range(1, len(lower)) if lower[index] != lower[index - 1]]
        assert crossover(first, second, limit) == (switches[0] if switches else None)
        later = [each for each in switches if each > limit // 2]
        assert crossover(first, second, limit, least=limit // 2) == (later[0] if later else None)

    @given(st.integers(2, 2**31 - 1))
    def test_however_far_away(self, where: int) -> None:
        # The second is lower below `where`.
        assert crossover(lambda tokens: where - 0.5, lambda tokens: tokens) == where

    @pytest.mark.parametrize("at", [0, 2**31])
    def test_none_where_one_is_always_lower(self, at: int) -> None:
        assert crossover(lambda tokens: at, lambda tokens: tokens) is None

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_of_real_costs(self, dtype: torch.dtype) -> None:
        """Composing costs the same however few tokens there are, so it is never cheaper for few only."""
        matmul = Matmul(4096, 1024, 128, 4096 * 31, dtype)
        at = cost.default_rates(CPU)
        limit = crossover(lambda tokens: matmul.composed(tokens, at), lambda tokens: matmul.factored(tokens, at))
        assert matmul.factored(1, at) < matmul.composed(1, at)
        if limit is not None:
            assert matmul.factored(limit - 1, at) <= matmul.composed(limit - 1, at)
            assert matmul.factored(limit, at) > matmul.composed(limit, at)


def measured(memory: float = 3.0) -> Rates:
    return Rates(dict.fromkeys(NAMES, 1.5), dict.fromkeys(NAMES, 2.5), memory, entries=7.0, transposes=2)


class TestRates:
    def test_defaults_of_a_cpu_grow_with_its_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        one = rates(CPU)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        three = rates(CPU)
        assert set(one.matmul) == set(one.sparse) == set(one.vector) == set(NAMES)
        assert three.matmul == {name: pytest.approx(3 * rate) for name, rate in one.matmul.items()}
        assert three.sparse == {name: pytest.approx(3 * rate) for name, rate in one.sparse.items()}
        assert three.vector == {name: pytest.approx(3 * rate) for name, rate in one.vector.items()}
        assert (three.memory, three.entries) == (pytest.approx(3 * one.memory), pytest.approx(3 * one.entries))

    @pytest.mark.parametrize("row", GPU_CLASSES, ids=lambda row: row.name)
    def test_defaults_of_gpus(self, row: DeviceClass, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stored, "device_class", lambda device: row)
        found = rates(torch.device("cuda"))
        assert found == row.rates
        assert set(found.matmul) == set(found.sparse) == set(NAMES)
        assert all(0 < rate < math.inf for rate in (*found.matmul.values(), *found.sparse.values(), found.memory))
        # Kernels compute positions in registers and read operands in any layout.
        assert (found.entries, found.transposes) == (math.inf, 0)
        assert not found.vector  # the kernels are the same, but for the hash
        # They are less than what the vendor states, and of its order.
        flops, bandwidth = row.peak
        assert 0.5 * flops < found.matmul["bfloat16"] < flops
        assert 0.5 * bandwidth < found.memory < bandwidth

    def test_of_meta_tensors_they_are_this_machines_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def name_of(device: torch.device | None) -> str:
            assert device is None or device.type == "cuda", "torch raises an error"
            return "a card"

        monkeypatch.setattr(stored, "device_class", lambda device: GPU_CLASSES[0])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", name_of)
        assert rates(torch.device("meta")) == rates(torch.device("cuda", 0)) == GPU_CLASSES[0].rates

    @pytest.mark.parametrize("entries", [7.0, math.inf])
    def test_stored_ones_are_read(self, cache_dir: Path, entries: float) -> None:
        defaults, kept = rates(CPU), dataclasses.replace(measured(), entries=entries)
        assert cost.stored_rates(CPU) is None
        path = store_rates(CPU, kept)
        assert path.parent == cache_dir
        assert list(cache_dir.iterdir()) == [path]  # and nothing of its writing is left
        assert cost.stored_rates(CPU) == path
        # Stored ones hold at once, and for the next process, which has nothing cached.
        assert rates(CPU) == kept
        stored._rates.cache_clear()
        assert rates(CPU) == kept
        assert cost.default_rates(CPU) == defaults

    def test_they_are_read_once_and_replaced_by_the_next(self, cache_dir: Path) -> None:
        path = store_rates(CPU, measured(3.0))
        assert rates(CPU).memory == 3.0
        text = path.read_text()
        # An edit while the process runs does not give it two kinds of choices.
        path.write_text(text.replace("3.0", "5.0"))
        assert rates(CPU).memory == 3.0
        assert store_rates(CPU, measured(4.0)) == path
        assert rates(CPU).memory == 4.0

    def test_they_are_those_of_one_number_of_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        threads = torch.get_num_threads()
        store_rates(CPU, measured())
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
        assert rates(CPU) == cost.default_rates(CPU)

    @pytest.mark.parametrize("text", ["", "{", "[1]", '{"speed": 1}', "{}"])
    def test_a_file_that_holds_none_is_named(self, text: str) -> None:
        path = store_rates(CPU, measured())
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no rates") as caught:
            rates(CPU)
        assert str(path) in str(caught.value)
        path.unlink()
        assert rates(CPU) == cost.default_rates(CPU)

    def test_without_a_folder_they_lie_in_the_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLCOMPILE_CACHE_DIR", "")
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        assert store_rates(CPU, measured()).parent == tmp_path / ".cache" / "slcompile"


class TestFingerprint:
    def test_changes_with_the_rates_and_with_nothing_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        default = cost.fingerprint()
        assert cost.fingerprint() == default
        path = store_rates(CPU, measured(3.0))
        kept = cost.fingerprint()
        stored._rates.cache_clear()
        assert cost.fingerprint() == kept
        store_rates(CPU, measured(4.0))
        other = cost.fingerprint()
        assert len({default, kept, other}) == 3
        path.unlink()
        stored._rates.cache_clear()
        assert cost.fingerprint() == default

    def test_a_gpu_counts_where_there_is_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = []

        def recorded(device: torch.device) -> Rates:
            found.append(device.type)
            return measured()

        monkeypatch.setattr(stored, "rates", recorded)
        for available in (False, True):
            monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
            cost.fingerprint()
        assert found == ["cpu", "cpu", "cuda"]


class TestDeviceClasses:
    def test_of_cpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for amx, name in ((False, "cpu"), (True, "cpu_amx")):
            monkeypatch.setattr(torch_private, "has_amx", lambda amx=amx: amx)
            assert device_class(CPU).name == name
            assert why_no_kernels(CPU)

    @pytest.mark.parametrize(
        ("capability", "name"),
        [((7, 5), "sm_80"), ((8, 0), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 0), "sm_80")],
    )
    def test_of_nvidia(self, capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert device_class(torch.device("cuda")).name == name

    def test_of_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "hip", None)
        names = {kind: device_class(torch.device(kind)).name for kind in ("cuda", "xpu", "mps")}
        assert names == {"cuda": "sm_80", "xpu": "sm_80", "mps": "other"}
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert device_class(torch.device("cuda")).name == "gfx942"

    @pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
    def test_of_meta_tensors(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        accelerator = None if kind == "cpu" else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: accelerator)
        assert device_class(torch.device("meta")) == device_class(torch.device(kind))

    def test_kernels_run_where_triton_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert why_no_kernels(torch.device("mps")) == "no kernel runs on mps, but ATen does"
        assert why_no_kernels(torch.device("cuda")) == ""
        monkeypatch.setattr(devices, "has_triton", lambda: False)
        assert why_no_kernels(torch.device("cuda")) == ""  # it is not there: what is asked for is an estimate
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        assert why_no_kernels(torch.device("cuda")) == "Triton is not installed"

    @pytest.mark.parametrize("row", GPU_CLASSES, ids=lambda row: row.name)
    def test_each_gpu_has_the_same_tiles(self, row: DeviceClass) -> None:
        first = GPU_CLASSES[0]
        assert row.tiles.keys() == row.tiles_32.keys() == first.tiles.keys()
        for name, tile in (*row.tiles.items(), *row.tiles_32.items()):
            assert tile.keys() == first.tiles[name].keys()
        blocks = [row.tiles[name]["BLOCK_N"] for name in ("vector_product", "vector_product_64")]
        assert blocks == [vector_block(vector) for vector in (32, 64)]  # which costs know

    def test_names_are_unique_and_the_last_row_takes_everything(self) -> None:
        assert len({row.name for row in DEVICE_CLASSES}) == len(DEVICE_CLASSES)
        assert DEVICE_CLASSES[-1].matches(torch.device("mps"))


def test_rows_are_aligned() -> None:
    assert [aligned(size, torch.bfloat16) for size in (8, 2048, 5461, 5464, 1)] == [8, 2048, 5504, 5464, 64]
    assert [aligned(size, torch.float32) for size in (4, 5461)] == [4, 5472]

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slcompile import cost, measure
from slcompile.cost import DTYPES, stored
from slcompile.measure import measure_rates
from slcompile.ops.support import stratified_columns
from slcompile.ops.vector_cpu import vector_addmm

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What is measured here is not kept for the machine."""
    monkeypatch.setenv("SLCOMPILE_CACHE_DIR", str(tmp_path))
    stored._rates.cache_clear()
    yield tmp_path
    stored._rates.cache_clear()


def test_rates_are_positive_and_stored(cache_dir: Path) -> None:
    found, path = measure_rates("cpu", seconds=0.001)
    assert set(found.matmul) == set(found.sparse) == set(found.vector) == set(DTYPES.values())
    for rate in (*found.matmul.values(), *found.sparse.values(), *found.vector.values(), found.memory, found.entries):
        assert 0 < rate < math.inf
    assert path.parent == cache_dir
    assert cost.rates(CPU) == found
    # It was measured, all of it, and not taken over.
    defaults = cost.default_rates(CPU)
    for name in DTYPES.values():
        assert found.matmul[name] != defaults.matmul[name]
        assert found.sparse[name] != defaults.sparse[name]
        assert found.vector[name] != defaults.vector[name]
    assert (found.memory, found.entries) != (defaults.memory, defaults.entries)
    assert found.transposes == defaults.transposes


def test_rates_are_what_was_done_by_the_time_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 tokens, a weight of 1024 x 1024 for the product and of 1024 x 512 with 16 non-zeros in a row for S.

    A quarter of each for float16.
    """
    asked = []

    def fastest(run: functools.partial[object], device: torch.device, seconds: float) -> float:
        asked.append((device, seconds))
        return {torch.mm: 2.0, stratified_columns: 0.5, vector_addmm: 4.0}.get(getattr(run, "func", None), 8.0)

    monkeypatch.setattr(measure, "_fastest", fastest)
    found, _ = measure_rates("cpu", seconds=3.0)
    product, sparse = 2 * 2048 * 1024 * 1024 / 2.0, 2 * 2048 * 1024 * 16 / 8.0
    assert found.matmul == {**dict.fromkeys(DTYPES.values(), product), "float16": product / 4**3}
    assert found.sparse == {**dict.fromkeys(DTYPES.values(), sparse), "float16": sparse / 4**3}
    assert found.vector == {name: 2 * rate for name, rate in found.sparse.items()}
    assert found.entries == 1024 * 16 / 0.5
    assert set(asked) == {(CPU, 3.0)}


def test_measuring_again_does_not_start_from_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(1, 1000))
    monkeypatch.setattr(measure, "_fastest", lambda run, **kwargs: 1 / next(seconds))
    cost.store_rates(CPU, cost.Rates({"float8": 1.0}, {"float8": 1.0}, 1.0, transposes=5))
    found, _ = measure_rates("cpu")
    assert set(found.matmul) == set(found.sparse) == set(found.vector) == set(DTYPES.values())
    assert found.transposes == cost.default_rates(CPU).transposes


def test_the_fastest_of_at_least_three_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ran = [0.0], []
    durations = iter([9.0, 3.0, 1.0, 2.0, 4.0, 5.0])  # the first one warms up

    def run() -> None:
        ran.append(1)
        clock[0] += next(durations)

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    assert measure._fastest(run, CPU, seconds=0.0) == 1.0
    assert len(ran) == 1 + 3
    durations = iter([9.0, 3.0, 2.0, 2.0, 4.0, 5.0])
    ran.clear()
    assert measure._fastest(run, CPU, seconds=10.0) == 2.0
    assert len(ran) == 1 + 4


class TestGpu:
    """What would be measured on a GPU, on tensors without memory and by given times."""

    def test_rates_are_what_was_done_by_the_time_it_took(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton", reason="the kernels need triton")
        (row,) = (each for each in cost.GPU_CLASSES if each.name == "sm_90")
        for module in (measure, stored):
            monkeypatch.setattr(module, "device_class", lambda device: row)
        monkeypatch.setattr(measure, "why_no_kernels", lambda device: "")

        def fastest(run: object, device: torch.device, seconds: float) -> float:
            if getattr(run, "func", None) is torch.mm:
                return 2.0 if len(run.args[0]) == 16384 else 0.5
            if getattr(run, "func", None) is None:  # the copy and a hundred launches
                return 4.0 if getattr(run, "__name__", "") == "clone" else 3.0
            if run.func.__module__.endswith("vector_products"):
                return {"tokens_side_by_side": 1.0, "linear_factored": 11.0, "values_grad": 3.0}[run.func.__name__]
            return 16.0 if run.keywords else 8.0

        monkeypatch.setattr(measure, "_fastest", fastest)
        found, _ = measure_rates("meta")
        product = 2 * 16384 * 8192 * 8192 / 2.0
        assert found.matmul == dict.fromkeys(DTYPES.values(), product)
        sparse = 2 * 64 * 8192 * 256 / 8.0
        assert found.sparse == {**dict.fromkeys(DTYPES.values(), sparse), "float64": row.rates.sparse["float64"]}
        assert found.tiled == 2 * 64 * 8192 * 4096 / 16.0 / product
        assert found.narrow == 2 * 8192 * 512 * 4096 / 0.5 / product
        assert found.launch == 3.0 / 100
        # A program of 64 rows multiplies the columns of four blocks for all of them.
        assert found.own == 2 * 16384 * 8192 * (512 + 4 * 128) / 10.0 / product
        assert found.gathers == 16384 * (8192 // 16) * 128 * 2 / 2.0
        assert found.memory == 2 * 4 * 2**28 / 4.0
        assert (found.sector, found.entries) == (row.rates.sector, row.rates.entries)

    @pytest.mark.gpu
    def test_they_are_positive(self) -> None:
        found, _ = measure_rates("cuda", seconds=0.01)
        single = (found.memory, found.tiled, found.narrow, found.own, found.gathers)
        for rate in (*found.matmul.values(), *found.sparse.values(), *single):
            assert 0 < rate < math.inf

    def test_a_device_without_kernels_is_refused(self) -> None:
        with pytest.raises(ValueError, match="must be one that kernels run on, or cpu, got mps"):
            measure_rates("mps")

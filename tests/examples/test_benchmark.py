from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

import slcompile
from tests.testing import example

pytestmark = pytest.mark.slow

FILE = Path(__file__).parents[2] / "examples" / "benchmark.py"
TINY = "--dtype=float32 --hidden=64 --intermediate=96 --layers=1 --vocab=64 --batch=2 --seq-len=16 --rank=8".split()


@pytest.fixture(scope="module")
def benchmark():
    return example("benchmark")


def rows_of(out: str) -> dict[str, list[float]]:
    """The tables that were printed: label of a row -> its numbers."""
    rows = [line.strip("│\n ").split("│") for line in out.splitlines() if line.startswith("│")]
    return {label.strip(): [float(number) for number in numbers] for label, *numbers in rows}


def test_every_part_that_runs_here_prints_medians_and_their_ratios(benchmark, capsys):
    benchmark.console.file = sys.stdout
    benchmark.main([*TINY, "--runs=3", "--lowering=factored", "--only", "train", "matmul"])
    out = capsys.readouterr().out
    assert f"{torch.get_num_threads()} threads, torch {torch.__version__}" in out
    rows = rows_of(out)
    dense, factored, eager, *ratios = rows["float32"]
    assert ratios == pytest.approx([factored / dense, eager / dense], abs=0.01, rel=0.01)
    assert {"float32 64x64, 1 tokens", "float32 96x64, 8192 tokens"} < rows.keys()


def test_the_sparse_part_beside_that_of_rows_that_share_their_columns(benchmark, capsys):
    benchmark.console.file = sys.stdout
    benchmark.main([*TINY, "--runs=3", "--only", "sparse"])
    stratified, short, long, *ratios = rows_of(capsys.readouterr().out)["float32"]
    assert ratios == pytest.approx([short / stratified, long / stratified], abs=0.01, rel=0.01)


def test_what_fresh_processes_measure(benchmark):
    args = benchmark.parse_args(TINY)
    found = benchmark.in_children(args, "float32", ("sltrain eager memory",), 1)
    # MB, of a model with some ten thousand parameters.
    assert 0.1 < found["sltrain eager memory"] < 10
    args.hidden = 32  # no heads of 64: the process fails, and says so
    with pytest.raises(SystemExit, match="the process that measured 'sltrain eager memory' failed"):
        benchmark.in_children(args, "float32", ("sltrain eager memory",), 1)


def test_peak_memory_is_that_of_what_is_alive_at_once(benchmark):
    def run() -> None:
        torch.empty(1000).fill_(1)
        kept = torch.empty(2000)
        torch.empty(3000)
        del kept

    assert 4 * 5000 <= benchmark.peak_above(run, "cpu") < 4 * 5100


def test_on_a_gpu_products_are_timed_as_they_are_compiled(benchmark, monkeypatch):
    """Called by themselves, the ops would run the CPU's algorithms there."""
    assert benchmark.products_of("cuda") is benchmark.compiled_products
    assert benchmark.products_of("cpu") is benchmark.eager_products
    factorized = slcompile.factorize_(
        torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False)), slcompile.SLConfig(rank=8, density=0.05)
    )
    dense = slcompile.merge_(copy.deepcopy(factorized))
    x = torch.randn(16, 64)
    eager = benchmark.eager_products(dense, factorized, x)
    benchmark.check(eager, "float32")
    lowerings = []
    compiler = torch.compile

    def recorded(*args, **kwargs):
        lowerings.append(kwargs.get("options", {}).get("lowering"))
        return compiler(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", recorded)
    monkeypatch.delattr(benchmark, "compose")
    monkeypatch.delattr(benchmark, "linear_factored")
    runs = benchmark.compiled_products(dense, factorized, x)
    assert lowerings == ["composed", "factored", None]
    assert runs.keys() == eager.keys()
    benchmark.check(runs, "float32")
    assert not any(run().requires_grad for run in runs.values())


def test_variants_take_turns(benchmark):
    order: list[str] = []
    times = benchmark.interleaved({name: lambda name=name: order.append(name) for name in "ab"}, 3, "cpu")
    assert "".join(order) == "aaabbb" + "ababab"
    assert times.keys() == {"a", "b"}


def test_a_variant_that_computes_something_else_is_not_timed(benchmark):
    x = torch.ones(3)
    benchmark.check({"dense": lambda: x, "other": lambda: x.clone()}, "float32")
    with pytest.raises(RuntimeError, match="other does not compute the product"):
        benchmark.check({"dense": lambda: x, "other": lambda: x * 1.01}, "float32")


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--runs 2", "--runs must be at least 3"), ("--hidden 100", "multiple of 64"), ("--only speed", "invalid choice")],
)
def test_bad_flags_are_refused_before_any_work(benchmark, flags, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_args(flags.split())
    assert message in capsys.readouterr().err

from __future__ import annotations

import copy
import sys
import types
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


def test_train_and_decode_are_reports_of_bench(benchmark, monkeypatch, capsys):
    calls = []

    def bench(model, *args, **kwargs):
        calls.append((model, kwargs))
        return slcompile.BenchReport("Net", "training", "CPU", {}, {}, 32, 3, {"dense": timing, "sltrain auto": timing})

    timing = slcompile.benchmark.Timing(0.25, (0.2, 0.3), 128.0, 4000, 1.0)
    monkeypatch.setattr(slcompile, "bench", bench)
    benchmark.console.file = sys.stdout
    benchmark.main([*TINY, "--runs=3", "--only", "train", "decode"])
    out = capsys.readouterr().out
    assert f"{torch.get_num_threads()} threads, torch {torch.__version__}" in out
    (llama, training), (stack, decoding) = calls
    assert (llama.config.hidden_size, training["config"].rank, training["runs"]) == (64, 8, 3)
    assert training["lowerings"] == ("auto", "composed", "eager")
    assert isinstance(stack, benchmark.Stack)
    assert (decoding["mode"], decoding["config"].rank) == ("inference", 512)


def test_the_products_are_timed_by_lowering_and_tokens(benchmark, capsys):
    benchmark.console.file = sys.stdout
    benchmark.main([*TINY, "--runs=3", "--only", "matmul"])
    rows = rows_of(capsys.readouterr().out)
    assert {"float32 64x64, 1 tokens", "float32 96x64, 8192 tokens"} < rows.keys()
    for dense, composed, factored, *ratios in rows.values():
        assert ratios == pytest.approx([composed / dense, factored / dense], abs=0.01, rel=0.01)


def test_the_sparse_part_beside_that_of_rows_that_share_their_columns(benchmark, capsys):
    benchmark.console.file = sys.stdout
    benchmark.main([*TINY, "--runs=3", "--only", "sparse"])
    stratified, short, long, *ratios = rows_of(capsys.readouterr().out)["float32"]
    assert ratios == pytest.approx([short / stratified, long / stratified], abs=0.01, rel=0.01)


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


def test_first_steps_are_each_of_a_process(benchmark, monkeypatch, capsys):
    asked = []

    class Process:
        def __init__(self, workers, mp_context):
            assert (workers, mp_context.get_start_method()) == (1, "spawn")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, args, dtype, start):
            assert function is benchmark.first_step
            asked.append(start)
            return types.SimpleNamespace(result=lambda: {"dense": 20.0, "factorized": 21.0, "string": 22.0}[start])

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", Process)
    benchmark.console.file = sys.stdout
    benchmark.main([*TINY, "--only", "first"])
    assert rows_of(capsys.readouterr().out)["float32"] == [20.0, 21.0, 22.0, 1.05, 1.1]
    assert asked == list(benchmark.STARTS)


@pytest.mark.long
@pytest.mark.parametrize("start", ["dense", "factorized", "string"])
def test_a_first_step_holds_what_the_string_compiles_in_the_second(benchmark, monkeypatch, start):
    taken = []
    seconds_of = benchmark.seconds_of
    monkeypatch.setattr(benchmark, "seconds_of", lambda *args: taken.append(seconds_of(*args)) or taken[-1])
    found = benchmark.first_step(benchmark.parse_args(TINY), "float32", start)
    first, second, third = taken
    assert found == first + max(0, second - third)
    assert first > second  # which compiles nothing, but by the string what was compiled under other names


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

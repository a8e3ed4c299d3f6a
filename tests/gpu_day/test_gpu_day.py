"""The day's logic, rehearsed on a CPU with small sizes: what is measured, kept, gone on with and shown."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import slcompile
from slcompile.benchmark import Timing
from slcompile.cost import stored
from tests.gpu_day import __main__ as gpu_day
from tests.gpu_day import kernels
from tests.gpu_day.page import page
from tests.gpu_day.parts import GPU_TESTS, ROOT, Part, Plan, outcomes
from tests.testing import example

pytest.importorskip("triton", reason="the day's kernels need triton")
CPU = torch.device("cpu")
SUPPORTS = ("stratified", "vector")


@pytest.fixture
def rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command with small sizes; its parts in this process, those which run tests not at all."""
    monkeypatch.setenv("SLCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    began: list[str] = []

    def here(part: Part, seconds: float) -> dict[str, Any]:
        began.append(part.name)
        if part.name.startswith("tests"):
            return {"status": "done", "result": {"passed": 3, "failed": 1, "skipped": 0, "failures": {"t::x": "a | b"}}}
        return {"status": "done", "result": json.loads(json.dumps(part.run()))}

    def run(*flags: str, runner: Any = here) -> tuple[int, list[str], dict[str, Any], str]:
        began.clear()
        stored._rates.cache_clear()
        code = gpu_day.main(["--tiny", "--device", "cpu", "--out", str(tmp_path / "day"), *flags], runner)
        stored._rates.cache_clear()
        written = json.loads((tmp_path / "day" / "results.json").read_text())
        return code, list(began), written, (tmp_path / "day" / "page.md").read_text()

    return run


@pytest.fixture
def quick_steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Steps are not compiled, nor estimated: ``bench`` and ``estimate_memory`` have their own tests; what they get."""
    asked: list[dict[str, Any]] = []

    def bench(model: torch.nn.Module, x: Any = (), **options: Any) -> slcompile.BenchReport:
        asked.append({"model": model, "x": x, **options})
        tokens = options["kwargs"]["input_ids"].numel() if "kwargs" in options else None
        names = ["dense", *(f"sltrain {each}" for each in options["lowerings"])]
        timings = {
            name: Timing(index, (index, index), tokens and tokens / index, 1000 * index, 1.0)
            for index, name in enumerate(names, 1)
        }
        return slcompile.BenchReport("Llama", "training", "CPU", {}, {}, tokens, options["runs"], timings)

    def estimate_memory(model: torch.nn.Module, *, config: slcompile.SLConfig, **options: Any) -> Any:
        asked.append({"estimated": config.lowering, **options})
        return types.SimpleNamespace(dense=types.SimpleNamespace(peak=1100), peak=2200)

    monkeypatch.setattr(slcompile, "bench", bench)
    monkeypatch.setattr(slcompile, "estimate_memory", estimate_memory)
    return asked


@pytest.mark.slow
def test_a_whole_day(rehearsal, quick_steps) -> None:
    code, began, written, text = rehearsal()
    assert code == 0
    assert began == written["planned"] == [part.name for part in Plan.tiny(CPU).parts()]
    assert all(each["status"] == "done" for each in written["parts"].values())
    assert [each["estimated"] for each in quick_steps if "estimated" in each] == [
        "composed", "factored", "auto", "auto", "factored"
    ]  # fmt: skip
    steps = [each for each in quick_steps if "kwargs" in each and "model" in each]
    assert [(each["config"].support, each["kwargs"]["labels"].shape) for each in steps] == [
        ("stratified", (1, 32)), ("vector", (1, 32)), ("vector", (1, 32))
    ]  # fmt: skip
    assert steps[0]["model"].config.intermediate_size == 97

    train = written["parts"]["train tiny, 32 tokens"]["result"]
    variants = [(each["variant"], each["support"]) for each in train]
    assert variants == [
        ("dense", ""), ("sltrain composed", "stratified"), ("sltrain factored", "stratified"),
        ("dense", ""), ("sltrain auto", "vector"),
        ("dense", ""), ("sltrain auto", "vector 64"), ("sltrain factored", "vector 64"),
    ]  # fmt: skip
    for each in train:
        assert each["tokens_per_second"] == pytest.approx(32 / each["seconds"])
        assert each["estimated_peak"] == 1.1 * each["peak"] or each["variant"] == "sltrain factored"
        assert each["of_dense"] == each["seconds"]
    decode = written["parts"]["decode tiny"]["result"]
    both = {(f"sltrain {lowering}", support) for lowering in ("factored", "composed") for support in SUPPORTS}
    assert {(each["variant"], each["support"]) for each in decode} == {("dense", "")} | both
    shapes = written["parts"]["kernels tiny"]["result"]
    assert set(shapes) == {"64x64", "97x64", "64x97"}
    for rows in shapes.values():
        assert all(each["us"] > 0 for each in rows)
        assert {each["what"] for each in rows if "vendor_us" in each} == {
            "add", "read", "project", "linear_factored", "linear_factored, transposed"
        }  # fmt: skip
    assert written["parts"]["rates"]["result"]["measured"]["memory"] > 0
    for heading in ("The machine", "Tests", "Train steps", "Decoding", "Kernels", "Rates of the cost model", "Parts"):
        assert f"\n## {heading}\n" in text
    assert "\n| tiny, 32 tokens | sltrain factored | stratified | " in text
    assert "- `t::x`: a | b" in text
    assert "Not run yet" not in text

    code, began, again, _ = rehearsal()
    assert (code, began, again) == (0, [], written)


PARTS = [
    Part(name, seconds, lambda name=name: {"made by": name})
    for name, seconds in (("machine", 15), ("long", 150), ("short", 20))
]


@pytest.fixture
def three_parts(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A day of three parts, and a clock that goes on only when told."""
    clock = [0.0]
    monkeypatch.setattr(gpu_day, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(gpu_day.Plan, "parts", lambda self: PARTS)
    return clock


def test_a_call_ends_and_the_next_one_goes_on(rehearsal, three_parts) -> None:
    limits: dict[str, float] = {}

    def runner(part: Part, seconds: float) -> dict[str, Any]:
        limits[part.name] = seconds
        three_parts[0] += part.seconds
        return {"status": "done", "result": {"value": part.name}}

    code, _, written, text = rehearsal("--minutes", "2", runner=runner)
    # 115 s: the long one does not fit, a shorter one does.
    assert (code, list(written["parts"]), limits) == (3, ["machine", "short"], {"machine": 45, "short": 60})
    assert "Not run yet: long." in text
    code, _, written, text = rehearsal("--minutes", "5", runner=runner)
    assert (code, list(written["parts"]), limits["long"]) == (0, ["machine", "short", "long"], 295)


def test_what_failed_is_run_again_when_asked_and_what_was_cut_off_always(rehearsal, three_parts) -> None:
    states = {"machine": "failed", "long": "unfinished", "short": "done"}
    ran: list[str] = []

    def runner(part: Part, seconds: float) -> dict[str, Any]:
        ran.append(part.name)
        return {"status": states[part.name], "error": "no\nluck", "result": {"value": part.name}}

    code, _, _, text = rehearsal(runner=runner)
    assert code == 3
    assert "| machine | failed | 0 | no luck |" in text
    rehearsal(runner=runner)
    assert ran == ["machine", "long", "short", "long"]
    rehearsal("--again", "--only", "mach", runner=runner)
    assert ran[4:] == ["machine"]


@pytest.mark.slow
def test_parts_run_in_processes_of_their_own(tmp_path, monkeypatch) -> None:
    args = gpu_day.parse_args(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    run = gpu_day.in_child(args)
    found = run(Plan.tiny(CPU).parts()[0], 60)
    assert found["status"] == "done"
    assert found["result"]["torch"] == torch.__version__
    wrong = run(Part("no such part", 1, dict), 60)
    assert wrong["status"] == "failed"
    assert "ValueError" in wrong["error"]
    machine = Plan.tiny(CPU).parts()[0]
    assert run(machine, 0.01)["status"] == "unfinished"
    assert run(Part("machine", 0, dict), 0.01) == {"status": "failed", "error": "it took more than 0 s"}


@pytest.mark.slow
def test_outcomes_of_tests_are_counted(tmp_path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'one is not two'\n"
        "def test_skipped(): pytest.skip('no')\n"
    )
    found = outcomes([str(tmp_path)], 1)
    assert {key: found[key] for key in ("passed", "failed", "skipped")} == {"passed": 1, "failed": 1, "skipped": 1}
    ((name, message),) = found["failures"].items()
    assert name.endswith("::test_wrong")
    assert "one is not two" in message
    with pytest.raises(RuntimeError, match="pytest wrote no report"):
        outcomes(["--no-such-flag"], 1)


def test_on_a_gpu_the_kernels_are_timed_with_their_roofline(monkeypatch) -> None:
    """What would be launched is recorded on tensors without memory, and takes 2 us."""
    from slcompile.kernels.offline import recorded

    table, launched = example("kernel_table"), []

    def seconds(run, device, spend) -> float:
        with recorded("sm_90") as launches:
            run()
        launched.extend(each.kernel.__name__ for each in launches)
        return 2e-6

    monkeypatch.setattr(kernels, "seconds", seconds)
    monkeypatch.setattr(kernels.torch, "device", lambda name: types.SimpleNamespace(type="cuda"))
    monkeypatch.setattr(kernels, "device_class", lambda device: types.SimpleNamespace(name="sm_90"))
    monkeypatch.setattr(kernels.torch, "randn", lambda shape, device: torch.empty(shape, device="meta"))
    monkeypatch.setattr(
        kernels.torch, "ones", lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device="meta")
    )
    rows = kernels.kernel_rows("cuda", table.SIZES["1B"], (5461, 2048), 8192)
    ours = [each for each in rows if "vendor_us" in each]
    # Three numbers of tokens, both supports; the projection knows none, and entries know no tokens.
    assert len(ours) == 3 * (1 + 2 + 2) + 2 * 2
    add = next(each for each in ours if each["what"] == "add")
    assert add["roofline_us"] == pytest.approx(1e6 * 5461 * 61 * 33 * 2 / 3.35e12)
    assert set(launched) == {
        "add_kernel", "read_kernel", "project_kernel", "sum_splits_kernel", "linear_factored_kernel",
        "linear_factored_transposed_kernel",
    }  # fmt: skip


def test_every_file_with_gpu_tests_is_a_part() -> None:
    marked = {file for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu\n" in file.read_text()}
    run = {ROOT / "tests" / "kernels" / f"{name}.py" for name in GPU_TESTS} | {ROOT / "tests/gpu_day/test_compiled.py"}
    assert marked - run == {ROOT / "tests" / "test_measure.py"}  # measured by the part "rates"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "0"], "--minutes must be positive"),
        (["--resume", "missing.json"], "--resume must be a results.json"),
        (["--device", "gpu"], "--device got 'gpu'"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "--device got 'cuda'")]),
    ],
)
def test_bad_flags_are_refused_before_any_work(flags, message, capsys) -> None:
    with pytest.raises(SystemExit):
        gpu_day.parse_args(flags if "--device" in flags else ["--device", "cpu", *flags])
    assert message in capsys.readouterr().err


def test_an_empty_page_says_what_is_missing() -> None:
    empty = page({"planned": ["a", "b"], "parts": {}})
    assert "Not run yet: a, b." in empty
    assert "`python -m tests.gpu_day`" in empty

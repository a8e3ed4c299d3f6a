"""``bench``: what it measures is what it says, and a bad argument is refused before anything is timed."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import slcompile
from slcompile import benchmark
from slcompile.benchmark import interleaved, peak_above
from slcompile.cli import main
from tests.testing import LITE, Plain

CONFIG = slcompile.SLConfig(rank=4, density=0.05, seed=3)


class Text(Plain):
    """Reads tokens [batch, length]; returns a loss beside what it is of."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        logits = super().forward(self.embedding(input_ids))
        return {"logits": logits, "loss": (logits - 1).square().mean()}


@pytest.mark.slow
def test_a_report_of_a_training_step() -> None:
    model = Text()
    before, ids = copy.deepcopy(model.state_dict()), torch.randint(50, (4, 16))
    report = slcompile.bench(model, ids, config=CONFIG, lowerings=("factored", "eager"), runs=3, **LITE)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not slcompile.factors(model)
    assert all(each.grad is None for each in model.parameters())
    assert (report.model, report.mode, report.tokens, report.runs) == ("Text", "training", 64, 3)
    assert list(report.variants) == ["dense", "sltrain factored", "sltrain eager"]
    for each in report.variants.values():
        assert 0 < each.quartiles[0] <= each.seconds <= each.quartiles[1]
        assert each.tokens_per_second == pytest.approx(64 / each.seconds)
    assert report.variants["sltrain eager"].compile_seconds == 0 < report.variants["dense"].compile_seconds
    assert json.loads(json.dumps(report.to_dict()))["variants"]["dense"]["peak"] == report.variants["dense"].peak
    head, _, *lines = str(report).partition("\n\n")[2].splitlines()
    assert head.split()[:2] == ["step", "(ms)"]
    ratio = report.variants["sltrain factored"].seconds / report.variants["dense"].seconds
    cells = [f"{1e3 * report.variants['sltrain factored'].seconds:.4g}", f"{ratio:.2f}"]
    assert lines[0].split()[:4] == ["sltrain", "factored", *cells]


def test_peak_memory_holds_parameters_moments_and_the_step() -> None:
    model, x = Plain(), torch.randn(8, 64)
    report = slcompile.bench(model, x, config=CONFIG, lowerings=("eager",), runs=3, **LITE)
    dense, ours = report.variants.values()
    weights = sum(each.nbytes for each in model.parameters())
    # Parameters and both moments, and then the gradients; activations are small.
    assert 4 * weights < dense.peak < 4.5 * weights
    assert ours.peak < dense.peak
    assert report.tokens is None
    assert dense.tokens_per_second is None
    assert "  -  " in str(report)


def test_inference_has_no_gradients_and_no_optimizer() -> None:
    seen: set[tuple[bool, bool]] = set()

    class Watched(Plain):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                seen.add((torch.is_grad_enabled(), self.training))
            return super().forward(x)

    model = slcompile.factorize_(Watched(), CONFIG)
    x = torch.randn(1, 64)
    report = slcompile.bench(model, (x,), lowerings=["eager"], mode="inference", runs=3, **LITE)
    assert seen == {(False, False)}
    assert model.training
    assert len(slcompile.factors(model)) == 2  # the dense variant is a merged copy
    dense, ours = (each.peak for each in report.variants.values())
    assert sum(each.nbytes for each in Plain().parameters()) < dense
    assert sum(each.nbytes for each in model.parameters()) < ours < dense


def test_the_loss_that_is_differentiated() -> None:
    model = Text()
    outputs = model(torch.randint(50, (2, 3)))
    assert benchmark._default_loss(outputs) == outputs["loss"]
    logits = outputs["logits"]
    assert benchmark._default_loss((logits, logits)) == 2 * logits.square().mean()
    with pytest.raises(ValueError, match="returns no floating-point tensor that depends on a parameter; give loss"):
        benchmark._default_loss(logits.detach())


def test_tokens_are_those_of_the_ids() -> None:
    ids, labels, image = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 5)
    assert benchmark._tokens_of(((image, ids[:, :3]), {})) == 6
    assert benchmark._tokens_of(((), {"attention_mask": ids[:1], "input_ids": ids})) == 10
    assert benchmark._tokens_of(((image, labels), {})) is None


def test_variants_take_turns() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleaved(runs, 3, "cpu")
    assert "".join(order) == "aaabbb" + "ababab"
    assert [len(each) for each in times.values()] == [3, 3]
    slow = interleaved({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, 3, "cpu", warmup=1)
    assert min(slow["slow"]) >= 0.02 > max(slow["fast"])


def test_peak_memory_is_that_of_what_is_alive_at_once() -> None:
    def run() -> None:
        torch.empty(1000).fill_(1)
        kept = torch.empty(2000)
        torch.empty(3000)
        del kept

    assert 4 * 5000 <= peak_above(run, "cpu") < 4 * 5100


def nothing_runs(*_: object, **__: object) -> None:
    pytest.fail("something was run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lowerings": ["compsed"]}, "lowerings got 'compsed', did you mean 'composed'"),
        ({"lowerings": "composed"}, "lowerings must be a sequence of names, got 'composed'"),
        ({"lowerings": []}, "lowerings must be a sequence of names"),
        ({"mode": "train"}, "mode got 'train', did you mean 'training'"),
        ({"runs": 2}, "runs must be an int of at least 3, got 2"),
        ({"runs": 3.5}, "runs must be an int of at least 3, got 3.5"),
        ({"config": {"rank": 3}}, "config must be"),
        ({"config": slcompile.SLConfig(dryrun=True)}, "config must not have dryrun=True"),
        ({"config": slcompile.SLConfig(min_dim=1000)}, "model has no eligible weight"),
        ({"inductor": {"max_autotun": True}}, "inductor has an unknown setting 'max_autotun', did you mean"),
        ({"model": Plain().to("meta")}, "is on the meta device and holds no numbers"),
        ({"model": torch.relu}, "model must be a torch.nn.Module"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_run(change, message, monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "seconds_of", nothing_runs)
    monkeypatch.setattr(benchmark, "_compile_something", nothing_runs)
    model = change.pop("model", None) or Plain()
    with pytest.raises(ValueError, match=message):
        slcompile.bench(model, torch.randn(2, 64), **{"runs": 3, **change})


@pytest.fixture
def factory(tmp_path, monkeypatch) -> str:
    """Name of a module in the current directory; another one for each test, since modules are imported once."""
    name = f"bench_{tmp_path.name.replace('-', '_')}"
    text = "import torch\nfrom torch import nn\ndef make():\n    return nn.Linear(64, 96), (torch.randn(8, 64),)\n"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}:make"


@pytest.fixture
def reports(monkeypatch) -> list[dict[str, object]]:
    """What the command asks ``bench`` for; a report is returned at once."""
    calls: list[dict[str, object]] = []
    timing = benchmark.Timing(0.25, (0.2, 0.3), None, 4_000_000, 1.5)

    def bench(model: nn.Module, inputs: object, kwargs: object, **options: object) -> slcompile.BenchReport:
        calls.append(options)
        return slcompile.BenchReport("Linear", "training", "CPU", {}, {}, None, 3, {"dense": timing, "sltrain": timing})

    monkeypatch.setattr("slcompile.cli.bench.bench", bench)
    return calls


def test_the_command(factory, reports, tmp_path, capsys) -> None:
    flags = ["--config", "rank=8", "--inductor", "max_autotune=True", "--lowerings", "auto", "eager"]
    assert main(["bench", factory, *flags, "--runs", "3", "--device", "cpu", "--json", "out.json"]) == 0
    (options,) = reports
    assert (options["config"].rank, options["inductor"], options["runs"]) == (8, {"max_autotune": True}, 3)
    assert (options["lowerings"], options["mode"]) == (["auto", "eager"], "training")
    printed = capsys.readouterr().out
    for cell in ("Linear: a training step, 3 runs of each", "dense", "sltrain", "250", "4.0", "1.5"):
        assert cell in printed
    assert json.loads((tmp_path / "out.json").read_text())["variants"]["sltrain"]["peak"] == 4_000_000


def test_without_rich_the_cells_are_the_same(factory, reports, capsys, monkeypatch) -> None:
    def cells() -> list[list[str]]:
        assert main(["bench", factory]) == 0
        printed = capsys.readouterr().out.splitlines()
        return [line.replace("│", " ").split() for line in printed if "dense " in line or "sltrain " in line]

    drawn = cells()
    monkeypatch.setitem(sys.modules, "rich.console", None)
    written = cells()
    assert (
        drawn[-2:]
        == written[-2:]
        == [[name, "250", "1.00", "-", "4.0", "1.00", "1.5"] for name in ("dense", "sltrain")]
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runs", "2"], "--runs must be at least 3, got 2"),
        (["--config", "rnk=3"], "unknown option 'rnk', did you mean 'rank'?"),
        (["--config", "inductor={'max_autotune': True}"], "Inductor's settings are none"),
        (["--inductor", "max_autotune"], "--inductor takes KEY=VALUE, got 'max_autotune'"),
        (["--device", "gpu"], "--device got 'gpu': "),
        (["--json", "missing/out.json"], "does not exist"),
    ],
)
def test_the_command_refuses_before_the_factory_is_called(factory, flags, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr("slcompile.cli.bench.from_factory", nothing_runs)
    assert main(["bench", factory, *flags]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("slcompile: ")
    assert message in err


def test_what_the_models_code_raises_is_one_line(factory, monkeypatch, capsys) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such batch")

    monkeypatch.setattr("slcompile.cli.bench.bench", broken)
    assert main(["bench", factory]) == 2
    assert f"measuring {factory} failed with RuntimeError: no such batch" in capsys.readouterr().err


@pytest.mark.slow
def test_a_second_report_compiles_again_and_draws_no_random_number() -> None:
    model, x = Plain(), torch.randn(2, 64)
    state = torch.get_rng_state()
    for _ in range(2):
        report = slcompile.bench(model, x, config=slcompile.SLConfig(rank=4), mode="inference", runs=3, **LITE)
        assert all(each.compile_seconds > 0.1 for each in report.variants.values()), report
    assert torch.equal(torch.get_rng_state(), state)


def test_each_first_run_finds_nothing_compiled(monkeypatch) -> None:
    """Else the second variant would be told the time in which its code is found, not that in which it is made."""
    entered: list[bool] = []
    plain: Callable[[], object] = benchmark.torch_private.fresh_cache

    def fresh_cache() -> object:
        entered.append(True)
        return plain()

    monkeypatch.setattr(benchmark.torch_private, "fresh_cache", fresh_cache)
    slcompile.bench(Plain(), torch.randn(2, 64), config=CONFIG, lowerings=("eager",), mode="inference", runs=3, **LITE)
    assert len(entered) == 1 + 2

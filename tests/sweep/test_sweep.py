"""A dozen architectures of the table, and that the table notices what is wrong."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slcompile
from slcompile.config import LOWERINGS
from slcompile.passes import Decision
from tests.sweep import __main__ as sweep
from tests.sweep import measure as measuring
from tests.sweep.architectures import ARCHITECTURES, CONFIG, Architecture
from tests.sweep.cases import CASES
from tests.sweep.compare import Comparison, Run, WithoutUs, Yardstick, compare, compare_run, runs_of, same_steps
from tests.sweep.measure import Row, check_report, compare_gradients, measure
from tests.sweep.running import exact_model
from tests.sweep.table import HEADER

pytestmark = pytest.mark.slow

QUICK = {
    **dict.fromkeys("qwen3 gpt2 mixtral bert albert convnext".split(), LOWERINGS),
    **dict.fromkeys("t5 whisper clip dit mamba vit".split(), ("auto",)),
}
COMPARED = ["llama", "vit", "nn.GRUCell", "mixtral", "t5"]
COMPILED = ["resnet"]
LONG = {"qwen3", "gpt2", "mixtral", "t5", "resnet", "albert", "convnext", "whisper", "clip", "mamba", "vit"}


def marked(names):
    return [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in names]


def test_the_table_is_as_wide_as_it_says():
    families = [each.family for each in CASES.values()]
    assert len(ARCHITECTURES) == 121
    assert families.count("vision") >= 12
    assert families.count("module") >= 15
    assert {CASES[name].family for name in [*QUICK, *COMPARED]} == set(families) - {"series"}


@pytest.mark.parametrize("name", marked(QUICK))
def test_it_is_found_replaced_trained_and_merged(name):
    row = measure(name, lowerings=QUICK[name], export=False)
    assert row.failures == []
    assert row.replaced > 0
    assert tuple(row.gradients) == QUICK[name]


@pytest.mark.parametrize("name", marked(COMPARED))
def test_it_infers_and_trains_under_autocast(name):
    found = compare(name, code=False)
    assert found.failures == []
    assert found.details == []
    assert len(found.runs) == 3 + (name in ("llama", "mixtral", "t5"))
    assert all(0 < share <= 1 for share in found.runs.values())


@pytest.mark.parametrize("name", marked(COMPILED))
def test_it_trains_in_compiled_kernels_too(name):
    assert measure(name, True, ("auto",), export=False).failures == []


def test_the_runs_go_round():
    """Each architecture meets each lowering in inference; all of them together meet everything."""
    turns = [runs_of(turn) for turn in range(96)]
    for runs in turns:
        assert {run.lowering for run in runs if run.mode == "inference"} == set(LOWERINGS)
        assert {run.dtype for run in runs} == {"float32", "bfloat16"}
    together = {(run.mode, run.lowering, run.dtype) for runs in turns for run in runs}
    assert len(together) == 3 * 2 * 2 + 3  # generate runs in float32
    assert {(run.mode, run.lowering) for runs in turns for run in runs if run.code} == {
        (mode, lowering) for mode in ("training", "inference") for lowering in LOWERINGS
    }


class Linear(nn.Module):
    """A model of 64 x 64 with the outputs of a model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.linear(x).tanh()}


class Made(Architecture):
    def make(self) -> nn.Module:
        if self.model_class == "abort":
            os._exit(3)
        if self.model_class == "raise":
            raise RuntimeError("cannot be built\nas one can see here")
        return Linear()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The table of three: one works, one raises, one ends its process."""
    for name in list(CASES):
        monkeypatch.delitem(CASES, name)
    for name in ("raise", "abort", "linear"):
        inputs = {"x": torch.randn(8, 64)}
        monkeypatch.setitem(CASES, name, Made("decoder", name, lambda model, inputs=inputs: inputs, {}))


def test_one_failure_does_not_stop_the_table(made, capsys, tmp_path):
    results, document = tmp_path / "rows.jsonl", tmp_path / "sweep.md"
    settings = ["--results", str(results), "--lowering", "auto", "--no-onnx", "--no-code"]
    assert sweep.main(settings) == 1
    rows = {(row["name"], row["part"]): row for row in map(json.loads, results.read_text().splitlines())}
    assert len(rows) == 6
    for part in ("training", "inference"):
        assert rows["raise", part]["failures"] == ["RuntimeError: cannot be built"]
        assert rows["abort", part]["failures"] == ["the process ended with 3"]
        assert rows["linear", part]["failures"] == []
    assert rows["linear", "training"]["replaced"] == rows["linear", "training"]["matmuls"] == 1
    assert "3 architectures, 2 failed: raise, abort" in capsys.readouterr().out
    # What failed is measured again, what did not is not.
    document.write_text("# Title\n\n```bash\ncommand\n```\n\nText.\n\n```\nan older table\n```\n")
    assert sweep.main(["--results", str(results), "--table", str(document), "linear"]) == 0
    assert len(results.read_text().splitlines()) == 6
    head, table = document.read_text().split("Text.\n\n```\n")
    assert head.startswith("# Title")
    assert table.startswith(HEADER)
    assert "FAILED: RuntimeError: cannot be built" in table
    assert "training: 3 on " in table
    assert "an older table" not in table


def test_nothing_new_begins_when_the_time_is_over(made, capsys, tmp_path):
    assert sweep.main(["--results", str(tmp_path / "rows.jsonl"), "--minutes", "0"]) == 0
    assert not (tmp_path / "rows.jsonl").exists()
    assert "0 architectures" in capsys.readouterr().out


def yardstick_of(model: nn.Module) -> Yardstick:
    slcompile.factorize_(model, CONFIG)
    return Yardstick(model, Made("vision", "linear", lambda model: {}, {}), {"x": torch.randn(8, 64)})


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_run_that_is_off_fails(mode, monkeypatch):
    module = importlib.import_module("slcompile.ops.linear_factored")
    right = module.linear_factored_aten
    monkeypatch.setattr(module, "linear_factored_aten", lambda *args: [each * 1.0001 for each in right(*args)])
    found = Comparison("linear", "decoder")
    yardstick = yardstick_of(Linear())
    for lowering in ("composed", "factored"):
        compare_run(found, yardstick, Run(mode, lowering))
    assert {run: share > 1 for run, share in found.runs.items()} == {
        f"{mode}, composed, float32": False,
        f"{mode}, factored, float32": True,
    }
    assert all(each.startswith(f"{mode}, factored, float32, ") for each in found.failures)
    assert any("output logits is off by" in each for each in found.failures)


def test_what_is_wrong_of_the_dense_model_too_is_told_apart(monkeypatch):
    compiled = Yardstick.compiled

    def wrong(self: Yardstick, run: Run, dense: bool = False) -> Any:
        return {
            batch: {name: each * 1.0001 for name, each in numbers.items()}
            for batch, numbers in compiled(self, run, dense).items()
        }

    monkeypatch.setattr(Yardstick, "compiled", wrong)
    found = Comparison("linear", "decoder")
    compare_run(found, yardstick_of(Linear()), Run("inference", "auto"))
    assert found.failures == []
    assert "output logits is off by" in found.details[0]
    assert "torch alone is as far off" in found.details[0]


class BatchNorm(Linear):
    """Divides by the spread of the rows."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        rows = super().forward(x)["logits"]
        return {"logits": (rows - rows.mean(0)) / rows.var(0).add(1e-12).sqrt()}


def test_what_rounded_inputs_change_by_its_norm_is_no_failure(monkeypatch):
    case = Made("vision", "linear", lambda model: {}, {})
    for spread, excused in ((1e-4, True), (1.0, False)):
        x = torch.randn(1, 64) + spread * torch.randn(4, 64)
        found = Comparison("linear", "vision")
        run = Run("training", "auto", "bfloat16")
        yardstick = Yardstick(BatchNorm(), case, {"x": x})
        numbers = {
            batch: {name: 1e12 * each for name, each in exact.items()} for batch, exact in yardstick.exact(run).items()
        }
        monkeypatch.setattr(Yardstick, "compiled", lambda *args, numbers=numbers, **options: numbers)
        monkeypatch.setattr(WithoutUs, "excuses", lambda *args: False)
        compare_run(found, yardstick, run)
        assert any("gradient of linear.weight is off" in each for each in found.details) == excused
        assert any("gradient of linear.weight is off" in each for each in found.failures) != excused
        assert all("float64's moves by 0.5 of its norm" in each for each in found.details)


class MaskedTwice(nn.Module):
    """In one dtype, adds the least number to itself: minus infinity in a whole row, and NaN after the softmax."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.dtype = nn.Linear(64, 64), dtype

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.linear(x)
        mask = torch.full_like(scores, torch.finfo(scores.dtype).min)
        return {"logits": (mask + mask if scores.dtype == self.dtype else scores).softmax(-1)}


def test_where_float64_gives_no_number_a_row_says_so_and_float32_is_the_yardstick():
    x = {"x": torch.randn(4, 64)}
    exact, note = exact_model(MaskedTwice(torch.float64), x)
    assert exact.linear.weight.dtype == torch.float32
    assert note == "compared with float32, not float64: logits has NaN"
    exact, note = exact_model(MaskedTwice(torch.float32), x)
    assert exact.linear.weight.dtype == torch.float64
    assert note == ""


def test_texts_that_went_apart_are_compared_up_to_there():
    tokens = torch.arange(12).view(2, 6)
    logits = {f"logits of step {step}": torch.zeros(2, 3) for step in range(4)}
    assert same_steps({"tokens": tokens, **logits}, {"tokens": tokens, **logits}) == logits.keys()
    other = tokens.clone()
    other[1, 4] = 99  # of the four new ones the third
    until = {f"logits of step {step}" for step in range(3)}
    assert same_steps({"tokens": tokens, **logits}, {"tokens": other, **logits}) == until


def test_names_are_checked(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["lama"])
    assert "unknown architecture 'lama', did you mean 'llama'?" in capsys.readouterr().err


def row_of(**attributes: Any) -> Row:
    return dataclasses.replace(Row("linear", "decoder"), **attributes)


def test_a_gradient_that_is_off_fails():
    exact = {"w": torch.randn(64, dtype=torch.double)}
    eager = {"w": exact["w"].float().double()}
    for got, failures in (
        (eager["w"], []),
        (eager["w"] * (1 + 1e-5), ["auto: the gradient of w is off by 1.0e-05"]),
        (eager["w"] * 0, ["auto: the gradient of w is zero", "auto: the gradient of w is off by 1.0e+00"]),
        (eager["w"] * float("nan"), ["auto: the gradient of w is off by nan"]),
    ):
        row = row_of()
        compare_gradients(row, "auto", {"w": got}, eager, exact)
        assert [each.split(",")[0] for each in row.failures] == failures
    row = row_of()
    compare_gradients(row, "auto", {}, eager, exact)
    assert row.failures == ["auto: ['w'] have a gradient in one of eager and compiled"]


@pytest.mark.parametrize(
    ("decision", "failure"),
    [
        (Decision("linear.weight", shape=(64, 64), matmuls=1), None),
        (Decision("linear.weight", "excluded", "", (64, 64), 1), "stays dense as excluded, which it is not"),
        (Decision("linear.weight", "too_small", "", (64, 64), 1), "stays dense as too_small, which it is not"),
        (Decision("linear.weight", "tied", "", (64, 64), 1), "stays dense as tied, which it is not"),
        (Decision("linear.weight", "no_matmul", "", (64, 64), 0), "matmuls read linear.weight, which the report"),
    ],
)
def test_a_weight_that_was_missed_or_left_for_a_wrong_reason_fails(decision, failure):
    model = Linear()
    read = measuring.parameters_that_matmuls_read(model, {"x": torch.randn(4, 64)})
    assert [names for names, _ in read] == [["linear.weight"]]
    report = slcompile.PassReport("parameterize_weights")
    report.add(decision, not decision.reason)
    row = row_of()
    check_report(row, report, read, dict(model.named_modules()), CONFIG)
    assert len(row.failures) == (failure is not None)
    assert failure is None or failure in row.failures[0]

"""A dozen architectures of the table, and that the table notices what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slcompile
from slcompile.passes import Decision
from tests.sweep import __main__ as sweep
from tests.sweep import measure as measuring
from tests.sweep.architectures import ARCHITECTURES, Architecture
from tests.sweep.measure import ATEN, CPP, LOWERINGS, Row, check_report, compare_gradients, measure

pytestmark = pytest.mark.slow

QUICK = {
    **dict.fromkeys("qwen3 gpt2 mixtral mamba bert albert vit convnext".split(), LOWERINGS),
    **dict.fromkeys("t5 whisper clip".split(), ("auto",)),
}
COMPILED = ["resnet"]


def test_the_table_is_as_wide_as_it_says():
    families = [each.family for each in ARCHITECTURES.values()]
    assert len(families) - families.count("vision") >= 45
    assert families.count("vision") >= 12
    assert {ARCHITECTURES[name].family for name in QUICK} == set(families) - {"series"}


@pytest.mark.parametrize("name", QUICK)
def test_it_is_found_replaced_trained_and_merged(name):
    row = measure(name, ATEN, QUICK[name], export=False)
    assert row.failures == []
    assert row.replaced > 0
    assert tuple(row.gradients) == QUICK[name]


@pytest.mark.parametrize("name", COMPILED)
def test_it_trains_in_compiled_kernels_too(name):
    assert measure(name, CPP, ("auto",), export=False).failures == []


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
    for name in list(ARCHITECTURES):
        monkeypatch.delitem(ARCHITECTURES, name)
    for name in ("raise", "abort", "linear"):
        inputs = {"x": torch.randn(8, 64)}
        monkeypatch.setitem(ARCHITECTURES, name, Made("decoder", name, lambda model, inputs=inputs: inputs, {}))


def test_one_failure_does_not_stop_the_table(made, capsys, tmp_path):
    results = tmp_path / "rows.jsonl"
    assert sweep.main(["--results", str(results), "--lowering", "auto", "--no-onnx"]) == 1
    rows = {row["name"]: row for row in map(json.loads, results.read_text().splitlines())}
    assert rows["raise"]["failures"] == ["RuntimeError: cannot be built"]
    assert rows["abort"]["failures"] == ["the process ended with 3"]
    assert rows["linear"]["failures"] == []
    assert rows["linear"]["replaced"] == rows["linear"]["matmuls"] == 1
    assert "3 architectures, 2 failed: raise, abort" in capsys.readouterr().out
    # What failed is measured again, what did not is not.
    assert sweep.main(["--results", str(results), "linear"]) == 0
    assert len(results.read_text().splitlines()) == 3


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
    check_report(row, report, read, dict(model.named_modules()))
    assert len(row.failures) == (failure is not None)
    assert failure is None or failure in row.failures[0]

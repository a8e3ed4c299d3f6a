"""``check`` on healthy models, and on defects that are planted in every pass, op and weight that a CPU run meets."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slcompile
from slcompile.cli import main
from slcompile.health import CheckReport, Distance, share_of_budget
from slcompile.passes.lower_ops import _aten
from tests.testing import some_of

WIDTH = 64
CONFIG = slcompile.SLConfig(rank=8, density=0.1, seed=3, support="stratified")


class Net(nn.Module):
    """Square weights, so that nothing about shapes gives a defect away: siblings, a bias, a Conv1D-style product."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.q(x)) * torch.sigmoid(self.k(x))) @ self.mix


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batch() -> tuple[Tensor]:
    return (torch.randn(32, WIDTH),)


@pytest.mark.slow
def test_a_healthy_model_is_left_as_it_is(net, batch, aten_kernels):
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    report = slcompile.check(net, batch, config=CONFIG)
    assert report.is_healthy, str(report)
    assert set(report.weights) == {"q.weight", "k.weight", "out.weight", "mix"}
    runs = {each.run for each in report.worst}
    assert {"training, factored", "inference, composed", "inference, merged", "training, converting"} <= runs
    assert all(0 < each.share <= 1 for each in report.worst)
    assert slcompile.factors(net) == {}
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)


def test_the_json_has_no_infinity():
    missing = Distance("training, auto", "gradient of w, which is missing", 1.0, math.inf)
    report = CheckReport(
        "Net", {}, {}, ("w",), (missing,), (missing, dataclasses.replace(missing, relative=math.nan)), {}
    )
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [(each["relative"], each["share"]) for each in written["wrong"]] == [(1.0, None), (None, None)]


def test_a_model_without_numbers_is_refused(net, batch):
    with pytest.raises(ValueError, match="is on the meta device and holds no numbers"):
        slcompile.check(net.to("meta"), batch, config=CONFIG)


@pytest.mark.slow
def test_a_factorized_model_is_checked_as_it_stands(net, batch, aten_kernels):
    slcompile.factorize_(net, CONFIG, example_args=batch)
    report = slcompile.check(net, batch)
    assert report.is_healthy, str(report)
    assert not any("converting" in each.run for each in report.worst)


def test_infinities_in_the_same_places_have_no_distance():
    exact = torch.tensor([1.0, 2.0, -torch.inf], dtype=torch.double)
    eager = exact.float()
    assert share_of_budget(eager * (1 + 1e-7), eager, exact)[1] < 1
    for wrong in (torch.tensor([1.0, 2.1, -torch.inf]), torch.tensor([1.0, 2.0, 3.0]), -eager):
        assert not share_of_budget(wrong, eager, exact)[1] <= 1
    low = torch.tensor([1.0, 2.01, -torch.inf])
    assert share_of_budget(low, eager, exact)[1] > 1 > share_of_budget(low, eager, exact, torch.bfloat16)[1]


def scaled(function: Callable[..., Any], by: float = 1.01) -> Callable[..., Any]:
    """A function whose (first) result is off by a factor."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return result * by if isinstance(result, Tensor) else type(result)([result[0] * by, *result[1:]])

    return wrong


def moved(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Positions of which the first two are exchanged."""

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        positions = function(*args, **kwargs).clone()
        flat = positions.view(-1)
        flat[:2] = flat[:2].flip(0)
        return positions

    return wrong


def reversed_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is kept of a support, with its entries in the wrong order."""

    def wrong(*args: Any) -> Any:
        bounds, entry, rest = function(*args)
        return bounds, entry.flip(0), rest

    return wrong


def siblings_exchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda insert, before, x, hiddens: function(insert, before, x, hiddens)[::-1]


def without(position: int, value: Any = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function that is given something else for one of its arguments."""

    def plant(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(*args: Any, **kwargs: Any) -> Any:
            given = list(args)
            given[position] = value if value is not None else [None] * len(given[position])
            return function(*given, **kwargs)

        return wrong

    return plant


def swapped_trunk(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(node: Any) -> Any:
        source, swapped, exclusive = function(node)
        return source, not swapped, exclusive

    return wrong


def editing(edit: Callable[[torch.fx.Graph], None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A pass after which the graph is edited."""

    def plant(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(gm: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            report = function(gm, *args, **kwargs)
            edit(gm.graph)
            gm.recompile()
            return report

        wrong.__name__ = function.__name__
        return wrong

    return plant


def scale_compose(graph: torch.fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=torch.ops.slcompile.compose.default):
        node.args = (*node.args[:4], node.args[4] * 1.01, *node.args[5:])


def exchange_factors(graph: torch.fx.Graph) -> None:
    """The last two composed weights read each other's values."""
    nodes = graph.find_nodes(op="call_function", target=torch.ops.slcompile.compose.default)[-2:]
    if len(nodes) == 2:
        first, second = nodes
        one, other = first.args[2], second.args[2]
        first.args = (*first.args[:2], other, *first.args[3:])
        second.args = (*second.args[:2], one, *second.args[3:])


def another_scale_in_graphs(original):
    """Of the first training step, whose graph gets factors, and not of the module that the model gets."""

    def arguments(self, operands):
        in_graph = isinstance(operands[0], torch.fx.Node)
        return (*operands[:4], 1.0, *original(self, operands)[5:]) if in_graph else original(self, operands)

    return arguments


PASSES = "slcompile.passes."
PLANTED: dict[str, tuple[str, str, Callable[[Callable[..., Any]], Callable[..., Any]], str]] = {
    # name: module, attribute, what is done to it, a run that must be wrong
    "compose: product": ("slcompile.ops.compose", "_scaled_product", scaled, "training, eager"),
    "weight_grads": ("slcompile.ops.weight_grads", "weight_grads_aten", scaled, "training, composed"),
    "values_grad": ("slcompile.ops.values_grad", "values_grad_aten", scaled, "training, factored"),
    "values_grad: rows": ("slcompile.ops.values_grad", "sparse_dots", scaled, "training, factored"),
    "linear_factored: result": (
        "slcompile.ops.linear_factored",
        "linear_factored_aten",
        scaled,
        "inference, factored",
    ),
    "linear_factored: bias": (
        "slcompile.ops.linear_factored",
        "linear_factored_aten",
        without(5),
        "inference, factored",
    ),
    "sparse: rows": ("slcompile.ops.sparse_cpu", "_by_row", reversed_order, "inference, factored"),
    "sparse: columns": ("slcompile.ops.sparse_cpu", "_by_column", reversed_order, "training, factored"),
    "sparse: support": ("slcompile.ops.sparse_cpu", "stratified_columns", moved, "inference, factored"),
    "parameterize_weights: scale": (
        "slcompile.captured",
        "parameterize_weights",
        editing(scale_compose),
        "training, converting",
    ),
    "parameterize_weights: operands": (
        "slcompile.captured",
        "parameterize_weights",
        editing(exchange_factors),
        "training, converting",
    ),
    "fuse_weight_grads": (PASSES + "fuse_weight_grads", "trunk", swapped_trunk, "training, composed"),
    "choose_lowering: hidden": (PASSES + "choose_lowering", "_hidden", scaled, "inference, factored"),
    "choose_lowering: gradients": (PASSES + "choose_lowering", "_product", scaled, "training, factored"),
    "choose_lowering: side": (PASSES + "choose_lowering", "trunk", swapped_trunk, "inference, factored"),
    "group_projections: order": (PASSES + "group_projections", "_projected", siblings_exchanged, "inference, factored"),
    "merged_wide": ("slcompile.weight.structure.FactorizedWeight", "merged_wide", scaled, "inference, merged"),
    "mend: another start": (
        "slcompile.weight.sl_weight.SLWeight",
        "arguments",
        another_scale_in_graphs,
        "training, converting",
    ),
    "recompute_weights": ("slcompile.passes", "recompute_weights", editing(scale_compose), "training, composed"),
    "save_low_rank": ("slcompile.passes", "save_low_rank", editing(exchange_factors), "training, composed"),
    "vector: result": ("slcompile.ops.linear_factored", "vector_addmm", scaled, "inference, factored"),
    "vector: gradients": ("slcompile.ops.values_grad", "vector_dots", scaled, "training, factored"),
}


def owner_of(name: str) -> ModuleType | type:
    """A module, or a class in one; the function of a pass has its module's name and hides it."""
    module, _, attribute = name.rpartition(".")
    if attribute[0].isupper():
        return getattr(importlib.import_module(module), attribute)
    importlib.import_module(name)
    return sys.modules[name]


# Of the kinds of run, merging is seen by the command line's test.
SOME = {"parameterize_weights: scale", "weight_grads"}


@pytest.mark.slow
@pytest.mark.parametrize("planted", some_of(PLANTED, SOME))
def test_a_planted_defect_is_found(planted, net, batch, aten_kernels, monkeypatch):
    where, attribute, plant, run = PLANTED[planted]
    owner = owner_of(where)
    monkeypatch.setattr(owner, attribute, plant(getattr(owner, attribute)))
    config = dataclasses.replace(CONFIG, support="vector" if planted.startswith("vector") else CONFIG.support)
    report = slcompile.check(net, batch, config=config)
    assert run in report.blame, str(report)
    assert run in str(report)
    print(report)


@pytest.mark.long
def test_a_defect_of_lower_ops_is_blamed_on_it(net, batch, monkeypatch):
    """In generated code: the pass is told apart from the others by leaving it out."""
    module = owner_of("slcompile.passes.lower_ops")
    monkeypatch.setattr(module, "linear_factored_aten", scaled(module.linear_factored_aten))
    _aten.cache_clear()
    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            report = slcompile.check(net, batch, config=CONFIG)
    finally:
        _aten.cache_clear()
    assert "the pass lower_ops is to blame" in report.blame["inference, factored"], str(report)
    assert "training, composed" not in report.blame


@pytest.mark.slow
def test_the_command_line(tmp_path, monkeypatch, capsys, aten_kernels):
    (tmp_path / "my_checked_models.py").write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    layers = torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)\n"
        "    return torch.nn.Sequential(*layers), (torch.randn(8, 64),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["check", "my_checked_models:make", "--config", "rank=8", "--json", "check.json"]) == 0
    assert "healthy; 2 factorized weights" in capsys.readouterr().out
    assert json.loads((tmp_path / "check.json").read_text())["wrong"] == []
    monkeypatch.setattr(
        slcompile.weight.structure.FactorizedWeight, "merged_wide", scaled(slcompile.SLWeight.merged_wide)
    )
    assert main(["check", "my_checked_models:make", "--config", "rank=8"]) == 1
    assert "inference, merged: the merged weights are not what" in capsys.readouterr().out
    assert main(["check", "my_checked_models:nothing"]) == 2


@pytest.mark.slow
def test_parts_that_are_compiled_by_themselves_convert_afterwards(batch, aten_kernels):
    """Eager runs of copies, in two dtypes, would fill Dynamo's caches of what all of them share: their forward."""
    torch.manual_seed(0)
    options = {"rank": 8, "density": 0.1, "init": "kaiming"}
    model = nn.Sequential(*(torch.compile(Net(), backend="sltrain", options=options) for _ in range(2)))
    assert slcompile.check(model, batch, config=CONFIG).is_healthy
    model(*batch).square().mean().backward()
    assert len(slcompile.factors(model)) == 8


def test_nan_of_the_model_itself_is_no_wrong_number_of_a_pass(net, batch):
    with pytest.raises(ValueError, match=r"model gives NaN in eager mode for this batch, in output"):
        slcompile.check(net, (batch[0] * float("nan"),), config=CONFIG)


@pytest.mark.slow
def test_a_batch_is_given_the_models_dtype(net, batch, aten_kernels):
    assert slcompile.check(net.bfloat16(), batch, config=CONFIG).is_healthy


@pytest.mark.slow
def test_random_numbers_of_the_model_are_no_wrong_numbers(batch, aten_kernels):
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).eval()
    before = copy.deepcopy(model.state_dict())
    report = slcompile.check(model, batch, config=CONFIG)
    assert report.is_healthy, str(report)
    assert not any("converting" in each.run for each in report.worst)  # conversion draws before the model does
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(each.training for each in model.modules())
    assert "training, converting" in {each.run for each in slcompile.check(model[1:], batch, config=CONFIG).worst}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("mse", "loss must be a function of what the model returns, or None, got 'mse'"),
        (lambda outputs: 1.0, "loss must return a scalar that depends on a parameter, got 1.0"),
        (lambda outputs: outputs, r"loss must return a scalar that depends on a parameter, got tensor\("),
        (
            lambda outputs: outputs.detach().sum(),
            r"loss must return a scalar that depends on a parameter, got tensor\(",
        ),
    ],
)
def test_a_loss_that_is_no_number_to_differentiate_is_refused(net, batch, loss, message):
    with pytest.raises(ValueError, match=message):
        slcompile.check(net, batch, config=CONFIG, loss=loss)

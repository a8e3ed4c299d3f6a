from __future__ import annotations

from textwrap import dedent

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from slcompile.config import SLConfig
from slcompile.passes import Decision, merge_weights, parameterize_weights
from slcompile.weight.placing import put_in_place, take_out
from slcompile.weight.sl_weight import SLWeight
from tests.testing import text_of


class Projection(nn.Module):
    """Not in torch.nn, so symbolic_trace sees into it and reads the weight as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = Projection()
        self.head = Projection()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x).relu(), self.head(x)


def factorized() -> fx.GraphModule:
    """A graph whose two weights are composed, of SLWeights that stand in their places."""
    torch.manual_seed(0)
    gm = fx.symbolic_trace(Net())
    table = {}
    for owner in ("fc", "head"):
        weight = SLWeight((8, 6), SLConfig(rank=2, alpha=1.0, density=0.4))
        for parameter in weight.parameters():
            nn.init.normal_(parameter)
        put_in_place(gm.get_submodule(owner), "weight", weight)
        table[f"{owner}_weight"] = (f"{owner}.weight", weight)
    parameterize_weights(gm, table)
    return gm


def make_dense(gm: fx.GraphModule, *owners: str) -> None:
    for owner in owners:
        module = gm.get_submodule(owner)
        take_out(module, "weight", nn.Parameter(module.weight_sl().detach()))


def test_graph() -> None:
    gm = factorized()
    make_dense(gm, "fc", "head")
    report = merge_weights(gm)
    gm.graph.lint()
    assert text_of(gm) == dedent("""\
        graph():
            %x = placeholder[target=x]
            %fc_weight_1 = get_attr[target=fc.weight]
            %linear = call_function[target=torch._C._nn.linear](args = (%x, %fc_weight_1), kwargs = {})
            %relu = call_method[target=relu](args = (%linear,), kwargs = {})
            %head_weight_1 = get_attr[target=head.weight]
            %linear_1 = call_function[target=torch._C._nn.linear](args = (%x, %head_weight_1), kwargs = {})
            return (relu, linear_1)""")
    assert report.replaced == [Decision("fc.weight"), Decision("head.weight")]
    assert report.left == []


def test_is_the_inverse_of_parameterize_weights() -> None:
    def calls(gm: fx.GraphModule) -> list[tuple[str, object]]:
        return [(node.op, node.target) for node in gm.graph.nodes]

    before = calls(fx.symbolic_trace(Net()))
    gm = factorized()
    assert calls(gm) != before
    make_dense(gm, "fc", "head")
    merge_weights(gm)
    assert calls(gm) == before


def test_numbers_are_the_same() -> None:
    gm, x = factorized(), torch.randn(5, 6)
    expected = gm(x)
    make_dense(gm, "fc", "head")
    merge_weights(gm)
    assert all(map(torch.equal, gm(x), expected))


def test_weight_that_is_still_factorized_is_left() -> None:
    gm, x = factorized(), torch.randn(5, 6)
    expected = gm(x)
    make_dense(gm, "head")
    report = merge_weights(gm)
    assert report.replaced == [Decision("head.weight")]
    assert [(each.name, each.reason) for each in report.left] == [("compose_default", "still_factorized")]
    assert report.left[0].detail
    assert all(map(torch.equal, gm(x), expected))


@pytest.mark.parametrize("owner", ["", "fc."])
def test_graph_whose_factors_are_inputs_is_left(owner: str) -> None:
    graph = fx.Graph()
    factors = [graph.placeholder(f"{owner}weight_sl.{name}".replace(".", "_")) for name in ("B", "A", "values", "seed")]
    graph.output(graph.call_function(torch.ops.slcompile.compose.default, (*factors, 0.5)))
    gm = fx.GraphModule(Net(), graph)
    before = text_of(gm)
    report = merge_weights(gm)
    assert [each.reason for each in report.left] == ["still_factorized"]
    assert report.replaced == []
    assert text_of(gm) == before


def test_weight_of_the_graph_module_itself() -> None:
    root = nn.Module()
    root.weight_sl = SLWeight((8, 6), SLConfig(rank=2))
    graph = fx.Graph()
    factors = [graph.get_attr(f"weight_sl.{name}") for name in ("B", "A", "values", "seed")]
    graph.output(graph.call_function(torch.ops.slcompile.compose.default, (*factors, 0.5)))
    gm = fx.GraphModule(root, graph)
    gm.weight = nn.Parameter(torch.randn(8, 6))
    assert merge_weights(gm).replaced == [Decision("weight")]
    assert gm() is gm.weight


def test_factor_that_something_else_reads_stays() -> None:
    gm = factorized()
    output = gm.graph.output_node()
    B = next(node for node in gm.graph.nodes if node.target == "fc.weight_sl.B")
    output.args = ((*output.args[0], B),)
    factors = gm.fc.weight_sl
    make_dense(gm, "fc", "head")
    gm.fc.weight_sl = factors
    report = merge_weights(gm)
    assert report.replaced == [Decision("fc.weight"), Decision("head.weight")]
    assert [node.target for node in gm.graph.nodes if "_sl" in str(node.target)] == ["fc.weight_sl.B"]
    assert gm(torch.randn(5, 6))[-1] is factors.B


def test_twice_changes_nothing() -> None:
    gm = factorized()
    make_dense(gm, "fc", "head")
    merge_weights(gm)
    once = text_of(gm)
    report = merge_weights(gm)
    assert (report.replaced, report.left) == ([], [])
    assert text_of(gm) == once


def test_graph_without_weight_ops_is_left_alone() -> None:
    gm = fx.symbolic_trace(Net())
    before = text_of(gm)
    report = merge_weights(gm)
    assert (report.replaced, report.left) == ([], [])
    assert text_of(gm) == before

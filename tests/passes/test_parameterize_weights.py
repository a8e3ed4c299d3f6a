from __future__ import annotations

from textwrap import dedent

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from slcompile.config import SLConfig
from slcompile.passes import parameterize_weights, run
from slcompile.passes.graph import Decision
from slcompile.weight.placing import put_in_place
from slcompile.weight.sl_weight import SLWeight
from tests.testing import text_of


def make_weight(support: str = "stratified", rows: int = 8, columns: int = 6) -> SLWeight:
    weight = SLWeight(
        (rows, columns), SLConfig(rank=2, alpha=1.0, density=0.4, support=support, seed=0), name="fc.weight"
    )
    torch.manual_seed(0)
    for parameter in weight.parameters():
        nn.init.normal_(parameter)
    return weight


class Projection(nn.Module):
    """Not in torch.nn, so symbolic_trace sees into it and reads the weight as an attribute."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Net(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.fc = Projection(weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x).relu(), self.fc.weight


def read_twice(gm: fx.GraphModule) -> None:
    """Returns the weight by another get_attr than the one that the matmul reads."""
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        output.args = ((output.args[0][0], gm.graph.get_attr("fc.weight")),)
    gm.recompile()


class TestPlaceholders:
    """Graphs whose weights are inputs, as Dynamo's are."""

    @staticmethod
    def traced(weight: SLWeight) -> fx.GraphModule:
        def function(x: Tensor, W: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return F.linear(x, W, bias), W * 2

        return make_fx(function)(torch.randn(5, 6), weight().detach(), torch.randn(8))

    def test_graph(self) -> None:
        weight = make_weight()
        gm = self.traced(weight)
        report = parameterize_weights(gm, {"w_1": ("fc.weight", weight)})
        assert text_of(gm) == dedent("""\
            graph():
                %x_1 = placeholder[target=x_1]
                %w_1_sl_b = placeholder[target=w_1_sl_B]
                %w_1_sl_a = placeholder[target=w_1_sl_A]
                %w_1_sl_values = placeholder[target=w_1_sl_values]
                %w_1_sl_seed = placeholder[target=w_1_sl_seed]
                %bias_1 = placeholder[target=bias_1]
                %compose_default = call_function[target=torch.ops.slcompile.compose.default](args = (%w_1_sl_b, %w_1_sl_a, %w_1_sl_values, %w_1_sl_seed, 0.5), kwargs = {})
                %t = call_function[target=torch.ops.aten.t.default](args = (%compose_default,), kwargs = {})
                %addmm = call_function[target=torch.ops.aten.addmm.default](args = (%bias_1, %x_1, %t), kwargs = {})
                %mul = call_function[target=torch.ops.aten.mul.Tensor](args = (%compose_default, 2), kwargs = {})
                return (addmm, mul)""")  # noqa: E501  # a graph's lines are as long as they are
        assert report.replaced == [Decision("fc.weight", shape=(8, 6))]
        assert report.left == []

    @pytest.mark.parametrize("support", ["stratified", "vector", "uniform"])
    def test_numbers_are_the_same(self, support: str) -> None:
        weight = make_weight(support)
        gm = self.traced(weight)
        x, bias = torch.randn(5, 6), torch.randn(8)
        expected = gm(x, weight().detach(), bias)
        parameterize_weights(gm, {"w_1": ("fc.weight", weight)})
        found = gm(x, *weight.operands().values(), bias)
        assert all(map(torch.equal, found, expected))

    def test_uniform_support_takes_the_index(self) -> None:
        weight = make_weight("uniform")
        gm = self.traced(weight)
        parameterize_weights(gm, {"w_1": ("fc.weight", weight)})
        inputs = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
        assert inputs == ["x_1", "w_1_sl_B", "w_1_sl_A", "w_1_sl_values", "w_1_sl_index", "bias_1"]

    def test_operands_and_result_have_their_values_in_meta(self) -> None:
        weight = make_weight()
        gm = self.traced(weight)
        dense = next(node for node in gm.graph.nodes if node.name == "w_1").meta["val"]
        parameterize_weights(gm, {"w_1": ("fc.weight", weight)})
        nodes = {node.name: node for node in gm.graph.nodes}
        for name, tensor in weight.operands().items():
            assert nodes[f"w_1_sl_{name.lower()}"].meta["val"] is tensor
        assert nodes["compose_default"].meta["val"] is dense

    def test_several_weights(self) -> None:
        one, other = make_weight(), make_weight(rows=4, columns=8)
        x, U, W = torch.randn(5, 6), one().detach(), other().detach()
        gm = make_fx(lambda x, U, W: F.linear(F.linear(x, U), W))(x, U, W)
        expected = gm(x, U, W)
        report = parameterize_weights(gm, {"u_1": ("one", one), "w_1": ("other", other)})
        gm.graph.lint()
        assert [each.name for each in report.replaced] == ["one", "other"]
        assert torch.equal(gm(x, *one.operands().values(), *other.operands().values()), expected)

    def test_gradients_reach_the_factors(self) -> None:
        weight = make_weight()
        gm = self.traced(weight)
        parameterize_weights(gm, {"w_1": ("fc.weight", weight)})
        x, bias = torch.randn(5, 6), torch.randn(8)
        found = torch.autograd.grad(gm(x, *weight.operands().values(), bias)[0].sum(), list(weight.parameters()))
        expected = torch.autograd.grad(F.linear(x, weight(), bias).sum(), list(weight.parameters()))
        assert all(map(torch.equal, found, expected))


class TestAttributes:
    """Graphs that read their weights from the module, as symbolic_trace's and torch.export's do."""

    @staticmethod
    def traced(weight: SLWeight) -> fx.GraphModule:
        return fx.symbolic_trace(Net(weight().detach()))

    def parameterized(self, weight: SLWeight) -> fx.GraphModule:
        gm = self.traced(weight)
        put_in_place(gm.fc, "weight", weight)
        names = [node.name for node in gm.graph.nodes if node.target == "fc.weight"]
        run([lambda each: parameterize_weights(each, dict.fromkeys(names, ("fc.weight", weight)))], gm)
        return gm

    def test_graph(self) -> None:
        assert text_of(self.parameterized(make_weight())) == dedent("""\
            graph():
                %x = placeholder[target=x]
                %fc_weight_sl_b = get_attr[target=fc.weight_sl.B]
                %fc_weight_sl_a = get_attr[target=fc.weight_sl.A]
                %fc_weight_sl_values = get_attr[target=fc.weight_sl.values]
                %fc_weight_sl_seed = get_attr[target=fc.weight_sl.seed]
                %compose_default = call_function[target=torch.ops.slcompile.compose.default](args = (%fc_weight_sl_b, %fc_weight_sl_a, %fc_weight_sl_values, %fc_weight_sl_seed, 0.5), kwargs = {})
                %linear = call_function[target=torch._C._nn.linear](args = (%x, %compose_default), kwargs = {})
                %relu = call_method[target=relu](args = (%linear,), kwargs = {})
                return (relu, compose_default)""")  # noqa: E501  # a graph's lines are as long as they are

    def test_every_node_that_reads_the_weight_is_replaced(self) -> None:
        weight, x = make_weight(), torch.randn(5, 6)
        gm = self.traced(weight)
        read_twice(gm)
        expected = gm(x)
        put_in_place(gm.fc, "weight", weight)
        names = [node.name for node in gm.graph.nodes if node.target == "fc.weight"]
        report = parameterize_weights(gm, dict.fromkeys(names, ("fc.weight", weight)))
        assert len(names) == len(report.replaced) == 2
        assert all(map(torch.equal, gm(x), expected))

    @pytest.mark.parametrize("support", ["stratified", "vector", "uniform"])
    def test_numbers_are_the_same(self, support: str) -> None:
        weight, x = make_weight(support), torch.randn(5, 6)
        expected = self.traced(weight)(x)
        assert all(map(torch.equal, self.parameterized(weight)(x), expected))

    def test_the_dense_weight_is_read_no_more(self) -> None:
        gm = self.parameterized(make_weight())
        assert [name for name, _ in gm.named_parameters()] == [
            "fc.weight_sl.B",
            "fc.weight_sl.A",
            "fc.weight_sl.values",
        ]
        assert "fc.weight" not in [node.target for node in gm.graph.nodes]


@pytest.mark.parametrize("weights", [{}, {"no_such_node": "fc.weight"}])
def test_nodes_that_are_not_named_are_left_alone(weights: dict[str, str]) -> None:
    weight = make_weight()
    gm = TestPlaceholders.traced(weight)
    before = text_of(gm)
    report = parameterize_weights(gm, {node: (name, weight) for node, name in weights.items()})
    assert (report.replaced, report.left) == ([], [])
    assert text_of(gm) == before


def test_twice_changes_nothing() -> None:
    weight = make_weight()
    table = {"w_1": ("fc.weight", weight)}
    gm = TestPlaceholders.traced(weight)
    parameterize_weights(gm, table)
    once = text_of(gm)
    assert parameterize_weights(gm, table).replaced == []
    assert text_of(gm) == once


def test_a_weight_module_whose_op_no_pass_knows_is_refused() -> None:
    weight = make_weight()
    weight.op = torch.ops.aten.mm.default  # type: ignore[misc]  # the error is what is tested
    with pytest.raises(AssertionError, match="aten"):
        parameterize_weights(TestPlaceholders.traced(weight), {"w_1": ("fc.weight", weight)})

"""After its conversion a model is traced again, and what the conversion compiled is found again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import slcompile
from slcompile import torch_private
from slcompile.captured import CapturedGraph
from tests.testing import LITE, some_of


class Net(nn.Module):
    """Two weights of one input, a third, biases, a norm, and a buffer that is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = nn.LayerNorm(48), nn.Linear(48, 64), nn.Linear(48, 64, bias=False)
        self.down = nn.Linear(64, 48)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        y = self.norm(x)
        return x + self.down(torch.sigmoid(self.gate(y)) * self.up(y))


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output, and the gradient of each parameter."""
    y = run(x)
    model.zero_grad()
    (y - x.roll(1, 1)).square().mean().backward()
    return [y.detach(), *(each.grad.clone() for each in model.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("lowering", some_of(["composed", "factored"], ["factored"]))
def test_the_second_trace_is_not_compiled_again(lowering):
    options = {"rank": 8, "density": 0.1, "min_dim": 16, "lowering": lowering, "inductor": LITE["inductor"]}
    model = Net()
    compiled = torch.compile(model, backend="sltrain", options=options)
    with torch_private.fresh_cache():
        counters.clear()
        gradients(model, compiled, torch.randn(16, 48))
        assert len(slcompile.factors(model)) == 3
        assert counters["aot_autograd"]["autograd_cache_hit"] == 0
        for x in torch.randn(2, 16, 48):  # factors that the first trace did not see
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) / 10)
            torch.testing.assert_close(gradients(model, compiled, x), gradients(model, model, x), rtol=1e-4, atol=1e-5)
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1
        assert counters["inductor"]["fxgraph_cache_miss"] == 2  # forward and backward, once
    assert model.steps == 5


def test_a_recognizable_graph_computes_the_same_and_says_where_its_nodes_come_from(monkeypatch):
    """Nothing of what Dynamo said of a node is lost, but its name."""
    seen = []

    def inductor(gm, inputs, settings):
        seen.append((gm, list(inputs)))
        return gm.forward

    monkeypatch.setattr(torch_private, "inductor", inductor)
    graphs = []
    parameterize = CapturedGraph.parameterize

    def noted(self, *args, **kwargs):
        made = parameterize(self, *args, **kwargs)
        graphs.append(made[0])
        return made

    monkeypatch.setattr(CapturedGraph, "parameterize", noted)
    model = slcompile.factorize_(Net(), slcompile.SLConfig(rank=8, density=0.1, min_dim=16))
    x = torch.randn(4, 48)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="sltrain")(x), expected)
    ((gm, inputs),), (before,) = seen, graphs
    metas = [node.meta for node in before.graph.nodes if not torch_private.is_query(node)]
    assert [node.meta for node in gm.graph.nodes] == metas
    assert len({node.name for node in gm.graph.nodes}) == len(metas)
    fakes = [isinstance(each, torch._subclasses.FakeTensor) for each in inputs]
    assert sum(fakes) == 3 * 4  # B, A, values and seed of each weight; the others as they are
    for placeholder, each, fake in zip(gm.graph.find_nodes(op="placeholder"), inputs, fakes, strict=True):
        assert (each is placeholder.meta["example_value"]) == fake


def test_a_factor_whose_memory_the_forward_changes_is_read_again():
    """Of parameters that are views of one flat tensor, as some optimizers make them."""

    class Decaying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(48, 64)
            slcompile.factorize_(self, slcompile.SLConfig(rank=8, density=0.1, min_dim=16))
            factors = [self.up.weight_sl.A, self.up.weight_sl.values]
            self.register_buffer("flat", nn.utils.parameters_to_vector(factors).detach())
            nn.utils.vector_to_parameters(self.flat, factors)

        def forward(self, x: Tensor) -> Tensor:
            before = self.up(x)
            self.flat.mul_(0.5)
            return before + self.up(x)

    model, x = Decaying(), torch.randn(4, 48)
    flat = model.flat.clone()
    with torch.no_grad():
        expected = model(x)
        model.flat.copy_(flat)
        torch.testing.assert_close(torch.compile(model, backend="sltrain")(x), expected)

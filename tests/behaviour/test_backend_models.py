"""Which model a graph converts: names, patterns, roots and refusals are those of the model that runs it."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from torch import Tensor, nn

import slcompile
import slcompile.captured
from tests.testing import OPTIONS

pytestmark = pytest.mark.usefixtures("aten_kernels")


def is_converted(model: nn.Module) -> bool:
    return bool(slcompile.factors(model))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(x))


class Layers(nn.Module):
    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.slow
def test_equal_blocks_compiled_one_by_one_with_fullgraph_share_a_graph(counting):
    model = Layers(12)
    for layer in model.layers:
        layer.compile(backend=counting, fullgraph=True, options={**OPTIONS, "seed": 1})
    x = torch.randn(16, 64, requires_grad=True)
    for _ in range(2):
        model(x).sum().backward()
    assert counting.calls == 2
    factors = slcompile.factors(model)
    assert sorted(factors) == sorted(f"layers.{index}.linear.weight" for index in range(12))
    assert len({each.seed for each in factors.values()}) == 12  # a seed comes from the name in the whole model


@pytest.mark.slow
def test_names_and_patterns_are_those_of_each_layer_not_of_the_first_one_compiled(counting):
    model = Layers()
    for layer in model.layers:
        layer.compile(backend=counting, fullgraph=True, options={**OPTIONS, "exclude": ("layers.1.*",)})
    model(torch.randn(8, 64)).sum().backward()
    assert set(slcompile.factors(model)) == {f"layers.{index}.linear.weight" for index in (0, 2, 3)}


@pytest.mark.slow
def test_an_explicit_model_and_an_equal_one_do_not_disturb_each_other(counting):
    explicit, other = Layers(), Layers()
    slcompile.factorize_(explicit, slcompile.SLConfig(rank=4, include=("layers.0.*",)))
    for model in (explicit, other):
        for layer in model.layers:
            layer.compile(backend=counting, options=OPTIONS)
        model(torch.randn(8, 64)).sum().backward()
    assert set(slcompile.factors(explicit)) == {"layers.0.linear.weight"}
    assert len(slcompile.factors(other)) == 4


class Routed(nn.Module):
    """Two routers that share a graph, and a layer; each in a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(64, 4)), nn.Sequential(nn.Linear(64, 4))
        self.layer = Layer()

    def forward(self, x: Tensor) -> Tensor:
        for router in (self.first, self.second):
            gates = self.route(router, x)
        torch._dynamo.graph_break()
        return self.layer(x) * gates.sum()

    def route(self, router: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return router(x)


@pytest.mark.slow
def test_what_a_graph_leaves_is_reported_of_every_module_that_runs_it(caplog):
    model = Routed()
    with caplog.at_level(logging.WARNING, "slcompile"):
        torch.compile(model, backend="sltrain", options=OPTIONS)(torch.randn(8, 64)).sum().backward()
    assert set(slcompile.factors(model)) == {"layer.linear.weight"}
    left = {each.name: each.reason for each in slcompile.last_report().left}
    assert left == {"first.0.weight": "too_small", "second.0.weight": "too_small"}
    # A graph without anything to convert is not the whole model.
    assert not [record for record in caplog.records if "no weight of" in record.getMessage()]


@pytest.mark.slow
def test_layers_that_torch_compile_wrapped_one_by_one_keep_their_names():
    model = Layers()
    options = {**OPTIONS, "seed": 1, "include": ("layers.*",)}
    for index, layer in enumerate(model.layers):
        model.layers[index] = torch.compile(layer, backend="sltrain", options=options)
    model(torch.randn(8, 64)).sum().backward()
    factors = slcompile.factors(model)
    assert sorted(factors) == [f"layers.{index}.linear.weight" for index in range(4)]
    assert len({each.seed for each in factors.values()}) == 4
    assert set(slcompile.merged_state_dict(model)) == set(Layers().state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("helper_first", [True, False])
def test_names_do_not_depend_on_other_containers_of_the_same_layers(helper_first):
    layers = [Layer() for _ in range(4)]
    model = Layers(0)
    helper = nn.ModuleList(layers) if helper_first else None
    model.layers.extend(layers)
    helper = helper or nn.ModuleList(layers)
    model.register_parameter("own", nn.Parameter(torch.zeros(3)))
    compiled = torch.compile(model, backend="sltrain", options={**OPTIONS, "include": ("layers.*",)})
    compiled(torch.randn(8, 64)).sum().backward()
    assert len(slcompile.factors(model)) == 4
    del helper  # alive until here, as another container of the layers


@pytest.mark.slow
def test_a_rank_that_fits_some_weights_is_no_error_in_a_graph_that_holds_only_others(batch, counting):
    model = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 512), nn.Linear(512, 64))
    compiled = torch.compile(model, backend=counting, options={"rank": 128})
    for _ in range(2):
        compiled(batch[0]).sum().backward()
    assert set(slcompile.factors(model)) == {"1.weight"}
    assert counting.calls == 2


def test_weights_read_without_gradients_inside_the_graph_stay_dense(batch):
    class Distilled(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            with torch.no_grad():
                target = self.teacher(x)
            return self.student(x) - target

    model = Distilled()
    torch.compile(model, backend="sltrain", options=OPTIONS)(batch[0]).sum().backward()
    assert set(slcompile.factors(model)) == {"student.weight"}
    assert [(each.name, each.reason) for each in slcompile.last_report().left] == [("teacher.weight", "no_grad")]


@pytest.mark.slow
def test_what_was_learned_anywhere_in_the_model_decides_for_all_of_it():
    model = Layers()
    with torch.no_grad():
        model.layers[2].linear.weight += torch.randn(64, 2) @ torch.randn(2, 64)
    dense = [layer.linear.weight.detach().clone() for layer in model.layers]
    for layer in model.layers:
        layer.compile(backend="sltrain", options={"rank": 16})
    model(torch.randn(8, 64)).sum().backward()
    for layer, before in zip(model.layers, dense, strict=True):
        # 16 of 64 singular directions of a random matrix hold more than a third of its squares.
        assert (layer.linear.weight - before).norm() < 0.8 * before.norm()


def test_a_refusal_comes_before_the_first_of_several_graphs_converts():
    model = Layers()
    with torch.no_grad():
        model.layers[2].linear.weight[0, 0] = float("nan")
    for layer in model.layers:
        layer.compile(backend="sltrain", options=OPTIONS)
    with pytest.raises(ValueError, match=r"layers\.2\.linear\.weight contains NaN or Inf"):
        model(torch.randn(8, 64))
    assert not is_converted(model)


@pytest.mark.slow
def test_a_list_of_parameters_made_before_is_warned_about(block, batch, caplog):
    stale = list(block.parameters())
    compiled = torch.compile(block, backend="sltrain", options=OPTIONS)
    with caplog.at_level(logging.WARNING, "slcompile"):
        for _ in range(3):
            compiled(batch[0]).sum().backward()
    assert "3 converted dense weights (65,536 bytes) are still held" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 2
    del stale  # alive until here: it is what was warned about


def test_two_threads_that_take_the_first_step_at_once_convert_once(block, batch):
    compiled = torch.compile(block, backend="sltrain", options=OPTIONS)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    barrier, errors = threading.Barrier(2), []

    def step():
        try:
            barrier.wait()
            compiled(batch[0]).sum().backward()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=step) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in block.parameters()]
    assert all(p.grad is not None for p in block.parameters())


@pytest.mark.slow
def test_merging_and_training_on_is_announced_as_a_conversion(block, batch, caplog):
    compiled = torch.compile(block, backend="sltrain", options=OPTIONS)
    compiled(batch[0]).sum().backward()
    block.zero_grad()
    slcompile.merge_(block)
    with caplog.at_level(logging.WARNING, "slcompile"):
        compiled(batch[0])
    assert any("factorized 3 weights of Block" in record.getMessage() for record in caplog.records)


def test_the_cache_key_covers_the_passes():
    files = slcompile.captured.hashed_files()
    assert {"recompute_weights.py", "backend.py", "compose.py"} <= {file.name for file in files}

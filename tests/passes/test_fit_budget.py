"""A memory budget: the least that is computed again, in a graph small enough to try everything; and with real steps."""

from __future__ import annotations

import copy
import itertools
import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomPartitionerFn

import slcompile
from slcompile.memory import graphs
from slcompile.memory.many import estimate_many
from slcompile.memory.sharding import Layout
from slcompile.passes import fit_budget
from slcompile.passes.fit_budget import _tags
from slcompile.passes.liveness import Plan
from slcompile.passes.partition import BudgetedPartitioner
from slcompile.passes.recomputable import find_recomputable
from tests.passes.saved import Net
from tests.testing import some_of

OPTIONS = {"rank": 4, "density": 0.1, "min_dim": 8, "lowering": "factored", "seed": 0, "init": "kaiming"}
HELD = 1000


class Tried(BudgetedPartitioner):
    """Tries every set of what can be computed again, and then what is chosen for every budget at which that changes."""

    def __call__(self, gm: Any, joint_inputs: Any, **settings: Any) -> Any:
        step = self.trial(gm, joint_inputs, settings)
        found = find_recomputable(gm.graph, step({}).saved, torch.device("cpu"))
        self.found = found
        sets = itertools.chain.from_iterable(itertools.combinations(found, size) for size in range(len(found) + 1))
        steps = {frozenset(chosen): step(_tags(chosen)) for chosen in sets}
        self.peaks = {chosen: each.peak for chosen, each in steps.items()}
        by_tags = {frozenset(_tags(chosen).items()): each for chosen, each in steps.items()}
        self.chosen = {}
        for budget in sorted({each + change for each in self.peaks.values() for change in (-1, 0)}):
            report = fit_budget(gm, budget, lambda tags: by_tags[frozenset(tags.items())], torch.device("cpu"))
            nodes = {each.node for each in report.replaced}
            chosen = frozenset(each for each in found if min(each.nodes).name in nodes)
            assert len(chosen) == len(report.replaced)
            for node in gm.graph.nodes:
                node.meta.pop("recompute", None)
            self.chosen[budget] = chosen, report
        return super().__call__(gm, joint_inputs, **settings)


class Headed(nn.Module):
    """A gated MLP and a loss with many classes, where the peak is."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = Net(), nn.Linear(48, 700, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.logsumexp(self.head(self.net(x)), -1).sum()


def tried(model: nn.Module, **options: Any) -> Tried:
    config = slcompile.SLConfig(**OPTIONS, memory_budget=1, **options)
    slcompile.factorize_(model, config)
    partitioner = Tried(config, HELD, Plan("cpu"))
    graphs.capture(model, ((torch.randn(37, 48),), {}), None, "cpu", config, partitioner)
    return partitioner


@pytest.fixture(scope="module")
def net() -> Tried:
    return tried(Net())


@pytest.fixture(scope="module")
def headed() -> Tried:
    return tried(Headed(), exclude=("head*",))


@pytest.mark.slow
def test_a_gated_mlp_has_each_kind(net):
    kinds = [each.kind for each in net.found]
    assert sorted(kinds) == ["hidden matrix"] * 3 + ["input"] * 2 + ["results"]
    rates = [each.freed / each.seconds for each in net.found]
    assert rates == sorted(rates, reverse=True)
    everything = [node for each in net.found for node in each.nodes]
    assert len(everything) == len(set(everything))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["net", "headed"])
def test_what_is_chosen_fits_where_anything_does_and_nothing_less_would(name, request):
    tried = request.getfixturevalue(name)
    for budget, (chosen, report) in tried.chosen.items():
        fitting = [each for each, peak in tried.peaks.items() if peak <= budget]
        assert report.peak == tried.peaks[chosen]
        assert report.without == tried.peaks[frozenset()]
        assert (report.missing == 0) == bool(fitting), budget
        assert not [each for each in fitting if each < chosen]
        if not fitting:
            assert report.peak == min(tried.peaks.values())
            assert report.missing == report.peak - budget > 0


@pytest.mark.slow
def test_no_other_choice_takes_less_time_by_more_than_a_part(headed):
    for budget, (chosen, report) in headed.chosen.items():
        fitting = [each for each, peak in headed.peaks.items() if peak <= budget]
        if fitting and chosen:
            least = min(sum(part.seconds for part in each) for each in fitting)
            assert report.seconds_again < least + min(part.seconds for part in chosen), budget


@pytest.mark.slow
@pytest.mark.parametrize("name", ["net", "headed"])
def test_a_larger_budget_takes_no_more_time(name, request):
    chosen = request.getfixturevalue(name).chosen
    seconds = [report.seconds_again for _, (_, report) in sorted(chosen.items()) if not report.missing]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] == 0 < seconds[0]


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="sltrain", options={**OPTIONS, **options})


@pytest.mark.parametrize(
    ("options", "fits"),
    some_of(
        [({"save": "auto"}, []), ({"memory_budget": "129kB"}, [True]), ({"memory_budget": 1}, [False])],
        [({"memory_budget": "129kB"}, [True]), ({"memory_budget": 1}, [False])],
    ),
)
def test_the_same_numbers(options, fits, caplog):
    torch.manual_seed(0)
    model = slcompile.factorize_(Net(), slcompile.SLConfig(**OPTIONS))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(37, 48, requires_grad=True)
    with caplog.at_level(logging.INFO, "slcompile"):
        y = compiled(model, **options)(x)
        found = [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]
    wide, x_wide = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
    y = wide(x_wide)
    expected = [y, *torch.autograd.grad(y.square().sum(), [x_wide, *wide.parameters()])]
    for ours, exact in zip(found, expected, strict=True):
        assert float((ours - exact).norm()) <= 2**-20 * float(exact.norm())
    said = [each.getMessage() for each in caplog.records if each.getMessage().startswith("slcompile: memory budget")]
    assert ["it fits" in each for each in said] == fits
    warned = [each.getMessage() for each in caplog.records if "does not fit" in each.getMessage()]
    assert len(warned) == fits.count(False)
    assert all(re.search(r"does not fit memory_budget: [\d,]{6,} bytes are missing", each) for each in warned)


def test_several_graphs_are_warned_of_once(caplog):
    model = slcompile.factorize_(Net(), slcompile.SLConfig(**OPTIONS))
    run = compiled(model.up, memory_budget="1GB")
    for _ in range(2):
        run(torch.randn(37, 48)).sum().backward()
    (warning,) = [each.getMessage() for each in caplog.records if "as if the model were one graph" in each.getMessage()]
    assert "4 of its 12 parameters" in warning


def test_kept_weights_are_computed_again_where_they_do_not_fit():
    kept = {}
    for budget in (1, None):
        config = slcompile.SLConfig(
            **{**OPTIONS, "lowering": "composed"}, keep_weights=True, memory_budget=budget, exclude=("head*",)
        )
        model = slcompile.factorize_(Headed(), config)
        partitioner = None if budget is None else BudgetedPartitioner(config, HELD, Plan("cpu"))
        made = graphs.capture(model, ((torch.randn(37, 48),), {}), None, "cpu", config, partitioner)
        shapes = [tuple(each.meta["val"].shape) for each in made.backward.find_nodes(op="placeholder")]
        kept[budget] = shapes.count((48, 96))  # of down; what gate and up multiply needs no gradient
        if partitioner is not None:
            (report,) = partitioner.reports
            assert [each.reason for each in report.replaced].count("weight") == 1
    assert kept == {1: 0, None: 1}


def test_explain_lists_what_is_computed_again():
    config = slcompile.SLConfig(**OPTIONS, memory_budget=1, exclude=("head*",))
    model = slcompile.factorize_(Headed(), config)
    found = slcompile.explain(model, (torch.randn(37, 48),), config=config)
    (row,) = [each for each in found.passes if each.name == "fit_budget"]
    assert row.replaced == len(row.recomputed.splitlines()) == 6
    assert "results of " in row.recomputed
    assert "net.gate" in row.recomputed
    assert not [each.recomputed for each in found.passes if each is not row and each.recomputed]
    shown = str(found).partition("Computed again in the backward pass\n")[2]
    assert "hidden matrix of " in shown


def test_estimates_refuse_a_budget_for_layers_that_are_compiled_by_themselves():
    config = slcompile.SLConfig(memory_budget="1GB")
    with pytest.raises(ValueError, match="memory_budget=1000000000 needs the model in one graph"):
        slcompile.estimate_memory(Headed(), (torch.randn(37, 48),), config=config, compiled="layers")
    with pytest.raises(ValueError, match="memory_budget=1000000000 is for one GPU"):
        estimate_many(Headed(), (torch.randn(37, 48),), layouts=[Layout(2)], config=config)


def test_a_partitioner_of_the_users_own_is_refused():
    class Own(CustomPartitionerFn):
        def __call__(self, gm: Any, joint_inputs: Any, **settings: Any) -> Any:
            raise AssertionError

        def uuid(self) -> str:
            return ""

    options = {"memory_budget": "1GB", "inductor": {"custom_partitioner_fn": Own()}}
    model = Net()
    with pytest.raises(Exception, match=r"memory_budget .* custom_partitioner_fn"):
        compiled(model, **options)(torch.randn(37, 48)).sum().backward()
    assert not slcompile.factors(model)

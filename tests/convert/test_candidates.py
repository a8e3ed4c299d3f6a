from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

import slcompile
from slcompile.convert.candidates import gather, gather_layers
from slcompile.passes.find_matmuls import WeightUse
from slcompile.weight.owners import LiveObjects
from tests.testing import CONFIG


class Tied(nn.Module):
    """Two names for one weight, a frozen one, a small one, and a list of which no module knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.frozen = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.small = nn.Linear(64, 4)


def read(*weights: nn.Parameter, **how) -> list[tuple[nn.Parameter, WeightUse]]:
    return [(weight, WeightUse(["mm"], **how)) for weight in weights]


def decisions(found) -> list[tuple[str, str]]:
    return [(each.name, each.decision.reason) for each in found.weights]


def test_each_weight_has_its_owners_name_and_decision_in_the_order_in_which_they_were_given():
    model, listed = Tied(), nn.Parameter(torch.zeros(64, 64))
    uses = read(model.small.weight, model.first.weight, listed, model.frozen.weight)
    found = gather(uses, CONFIG, LiveObjects.find())
    assert decisions(found) == [
        ("small.weight", "too_small"),
        ("first.weight", ""),
        ("?", "not_owned"),
        ("frozen.weight", "frozen"),
    ]
    (chosen,) = found.chosen
    assert chosen.weight is model.first.weight
    assert chosen.is_chosen
    assert {id(module) for module, _ in chosen.owners} == {id(model.first), id(model.second)}
    assert {name for _, name in chosen.owners} == {"weight"}
    report = found.report()
    assert report.pass_name == "weights"
    assert [each.name for each in report.replaced] == ["first.weight"]
    assert [each.name for each in report.left] == ["small.weight", "?", "frozen.weight"]


def test_the_input_dimension_is_that_of_the_use():
    model = Tied()
    for dim in (0, 1):
        (candidate,) = gather(read(model.first.weight, input_dim=dim), CONFIG, LiveObjects.find()).weights
        assert candidate.input_dim == dim


def test_patterns_see_every_name_of_a_tied_weight():
    model = Tied()
    for exclude, reason in (("second.*", "excluded"), ("third.*", "")):
        config = slcompile.SLConfig(rank=8, exclude=exclude)
        assert decisions(gather(read(model.first.weight), config, LiveObjects.find())) == [("first.weight", reason)]


def test_names_begin_in_the_outermost_module_or_in_the_one_that_is_given():
    model = Tied()
    outer = nn.ModuleDict({"inner": model})
    live = LiveObjects.find()
    assert decisions(gather(read(model.first.weight), CONFIG, live)) == [("inner.first.weight", "")]
    assert decisions(gather(read(model.first.weight), CONFIG, live, model=model)) == [("first.weight", "")]
    del outer


def test_what_an_explicit_conversion_left_stays_dense_unless_it_is_asked_for_again():
    model = Tied()
    slcompile.factorize_(model, slcompile.SLConfig(rank=8, include="first.*"))
    model.frozen.requires_grad_(True)
    live = LiveObjects.find()
    found = gather(read(model.frozen.weight), CONFIG, live)
    assert decisions(found) == [("frozen.weight", "explicit")]
    assert found.weights[0].decision.detail == "left by an explicit factorize_ of the model"
    assert decisions(gather(read(model.frozen.weight), CONFIG, live, model=model)) == [("frozen.weight", "")]


def test_a_graph_modules_own_weight_is_converted_only_when_the_graph_is_rewritten(block):
    gm = fx.symbolic_trace(block)
    live = LiveObjects.find()
    weights = read(gm.mix, gm.up.weight)
    (mix, up) = gather(weights, CONFIG, live, model=gm).weights
    assert (mix.name, mix.decision.reason) == ("mix", "graph_module")
    assert "slcompile.rewrite" in mix.decision.detail
    assert up.is_chosen
    found = gather(weights, CONFIG, live, model=gm, rewriting=True)
    assert [each.name for each in found.chosen] == ["mix", "up.weight"]
    # The traced model holds the same parameter; what is rewritten is the graph's.
    assert [[id(module) for module, _ in each.owners] for each in found.weights] == [[id(gm)], [id(gm.up)]]


@pytest.mark.parametrize("training", [True, False])
def test_the_linear_weights_that_will_come_are_those_in_training(training):
    model = Tied().train(training)
    found = gather_layers(model, CONFIG, LiveObjects.find())
    expected = [("first.weight", ""), ("frozen.weight", "frozen"), ("small.weight", "too_small")]
    assert decisions(found) == (expected if training else [])


def test_a_weight_of_a_module_that_was_copied_with_its_table_is_refused():
    model = nn.Sequential(nn.Linear(64, 64))
    shallow = copy.copy(model[0])
    with pytest.raises(ValueError, match=r"^0\.weight cannot be factorized: two modules have one table of parameters"):
        slcompile.factorize_(model, CONFIG)
    assert shallow.weight is model[0].weight
    assert type(model[0]) is type(shallow) is nn.Linear

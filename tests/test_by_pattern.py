"""Rank, density and alpha by patterns on names, through everything that reads them."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slcompile
from slcompile.cli.sources import sl_config
from slcompile.config import SLConfig
from tests.testing import some_of

RANK: dict[str, Any] = {"layers.1.*": 3, "*down*": 5, "layers.0.up.*": 0.125}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = nn.ModuleList(Layer() for _ in range(3)), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


EXPECTED = {
    "layers.0.up.weight": 8,
    "layers.0.down.weight": 5,
    "layers.1.up.weight": 3,
    "layers.1.down.weight": 3,
    "layers.2.down.weight": 5,
}
UNMATCHED = ["last.weight", "layers.2.up.weight"]


def ranks(model: nn.Module) -> dict[str, int]:
    return {name: each.A.shape[0] for name, each in slcompile.factors(model).items()}


def unmatched() -> list[str]:
    report = slcompile.last_report()
    assert report is not None
    return sorted(each.name for each in report.left if each.reason == "unmatched")


def test_factorize_takes_the_first_pattern_that_matches():
    model = slcompile.factorize_(Net(), SLConfig(rank=RANK))
    assert ranks(model) == EXPECTED
    assert unmatched() == UNMATCHED


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
@pytest.mark.parametrize("by_layer", some_of([False, True], [True]))
def test_the_string_does_also_where_layers_share_a_graph(by_layer, assert_eager):
    model = Net()
    compiled: Any = model
    options = {"rank": RANK, "density": {"*down*": 0.1, "*": 0.05}, "alpha": {"layers.0.*": 7, "*": "auto"}}
    if by_layer:
        for layer in model.layers:
            layer.compile(backend="sltrain", fullgraph=True, options=options)
    else:
        compiled = torch.compile(model, backend="sltrain", options=options)
    x = torch.randn(8, 64)
    compiled(x).sum().backward()
    assert ranks(model) == EXPECTED
    factors = slcompile.factors(model)
    assert {name: each.values.shape[1] for name, each in factors.items()} == {
        name: 6 if "down" in name else 3 for name in EXPECTED
    }
    for name, each in factors.items():
        expected = 7 / EXPECTED[name] if "layers.0" in name else SLConfig().scale_for(EXPECTED[name], 64)
        assert each.scale == expected, name
    assert "layers.2.up.weight" in unmatched()
    assert_eager(compiled, model, [x])


@pytest.mark.slow
def test_explain_shows_what_each_gets_and_estimates_count_it():
    config = SLConfig(rank=RANK)
    found = slcompile.explain(Net(), (torch.randn(8, 64),), config=config)
    assert {row.name: row.rank for row in found.matmuls if row.decision == "replaced"} == EXPECTED
    assert sorted(row.name for row in found.matmuls if row.reason == "unmatched") == UNMATCHED
    assert json.loads(json.dumps(found.to_dict()))["config"]["rank"] == RANK
    report = slcompile.estimate_memory(Net(), (torch.randn(8, 64),), config=config, device="cpu")
    trained = sum(each.numel() for each in slcompile.factorize_(Net(), config).parameters())
    assert report.sltrain.parameter_count == trained


def test_a_graph_of_torch_fx():
    gm = torch.fx.symbolic_trace(Net())
    slcompile.rewrite(gm, SLConfig(rank=RANK))
    assert ranks(gm) == EXPECTED


def test_a_frozen_base_with_a_sparse_part_here_and_not_there():
    model = Net()
    config = SLConfig(rank=4, base="frozen", density={"layers.0.*": 0.05, "*": 0})
    slcompile.factorize_(model, config)
    assert {name for name, each in slcompile.factors(model).items() if each.values.numel()} == {
        "layers.0.up.weight",
        "layers.0.down.weight",
    }


def test_what_saves_nothing_is_decided_for_each():
    model = slcompile.factorize_(Net(), SLConfig(rank={"last*": 40, "*": 4}))
    report = slcompile.last_report()
    assert report is not None
    assert [(each.name, each.reason) for each in report.left] == [("last.weight", "no_saving")]
    assert set(ranks(model).values()) == {4}


def test_a_state_dict_meets_a_model_with_the_same_patterns():
    one, other = (slcompile.factorize_(Net(), SLConfig(rank=RANK)) for _ in range(2))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    x = torch.randn(2, 64)
    assert torch.equal(other(x), one(x))


def test_options_come_back_from_json_and_from_the_command_line():
    config = SLConfig(rank=RANK, density={"*": 0.1})
    stored = json.loads(json.dumps({"rank": config.rank, "density": config.density}))
    assert SLConfig(**stored) == config
    assert sl_config([f"rank={json.dumps(RANK)}", 'density={"*": 0.1}']) == config


@pytest.mark.slow
@pytest.mark.parametrize("field", ["rank", "density", "alpha"])
def test_a_pattern_that_matches_nothing_is_refused(field):
    config = SLConfig(**{field: {"layres.*": 1, "*": 1}})
    message = rf"{field} pattern 'layres\.\*' matches no parameter of the model, did you mean 'layers"
    model = Net()
    with pytest.raises(ValueError, match=message):
        slcompile.factorize_(model, config)
    with pytest.raises(Exception, match=message):
        torch.compile(model, backend="sltrain", options={field: {"layres.*": 1, "*": 1}})(torch.randn(2, 64))
    assert not slcompile.factors(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": {}}, r"^rank must be an int >= 1.*, or a mapping of patterns to such values, got \{\}"),
        ({"rank": {"*": 0}}, r"^rank\['\*'\] must be an int >= 1, or a fraction"),
        ({"rank": {"": 4}}, "^rank pattern must be a non-empty string, got ''"),
        ({"rank": {1: 4}}, "^rank pattern must be a non-empty string, got 1"),
        ({"density": {"*": 2}}, r"^density\['\*'\] must be a number in \(0, 1\]"),
        ({"density": {"*": 0}}, r"^density\['\*'\] must be a number in \(0, 1\]"),
        ({"alpha": {"*": "Auto"}}, r"^alpha\['\*'\] must be a number > 0 and at most 1e9, or 'auto', got 'Auto'"),
    ],
)
def test_values_are_checked_as_plain_ones_are(options, message):
    with pytest.raises(ValueError, match=message):
        SLConfig(**options)


def test_the_options_do_not_change_with_the_mapping_they_were_given():
    given = {"*": 4}
    config = SLConfig(rank=given)
    given["*"] = 8
    assert config.rank == {"*": 4}

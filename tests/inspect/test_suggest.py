"""Ranks for a budget: spent, by what each weight loses, and usable as they are."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slcompile
from slcompile.cli import main
from slcompile.config import SLConfig
from slcompile.weight.sl_weight import SLWeight


def matrix(singular_values: Tensor, rows: int, columns: int) -> Tensor:
    """Of these singular values, between random directions."""
    count = len(singular_values)
    left, right = (torch.linalg.qr(torch.randn(size, count)).Q for size in (rows, columns))
    return left * singular_values @ right.t()


class Net(nn.Module):
    """A weight that one direction makes up, one with a slow spectrum, and one that is excluded."""

    def __init__(self) -> None:
        super().__init__()
        self.steep, self.flat, self.embed = nn.Linear(64, 48), nn.Linear(48, 64), nn.Linear(64, 64)
        with torch.no_grad():
            self.steep.weight.copy_(matrix(0.5 ** torch.arange(48.0), 48, 64))
            self.flat.weight.copy_(matrix(1 / (1 + torch.arange(48.0)), 64, 48))

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.flat(self.steep(x)))


def test_ranks_go_where_they_help_and_the_budget_is_spent():
    model, config = Net(), SLConfig(density=0.02)
    found = slcompile.suggest(model, 0.4, config)
    assert list(found.weights) == ["steep.weight", "flat.weight"]
    assert found.rank["steep.weight"] < found.rank["flat.weight"]
    direction = 64 + 48
    assert 0.4 - direction / (2 * 64 * 48) < found.share <= 0.4
    for name, each in found.weights.items():
        own = SLConfig(density=0.02, rank=each.rank)
        assert each.parameters == SLWeight.size(each.shape, own)
        values = torch.linalg.svdvals(model.get_parameter(name))
        assert each.error == pytest.approx((values[each.rank :].norm() / values.norm()).item(), abs=1e-5)
    slcompile.factorize_(model, SLConfig(density=0.02, rank=found.rank))
    assert {name: each.A.shape[0] for name, each in slcompile.factors(model).items()} == found.rank


def test_no_other_ranks_of_this_budget_lose_less():
    model, config = Net(), SLConfig(density=0.02)
    found = slcompile.suggest(model, 0.3, config)
    energies = {
        name: torch.linalg.svdvals(model.get_parameter(name)).double().square()
        for name in ("steep.weight", "flat.weight")
    }

    def loss(ranks: tuple[int, int]) -> float:
        return sum((each[rank:].sum() / each.sum()).item() for each, rank in zip(energies.values(), ranks, strict=True))

    total = sum(found.rank.values())  # both weights have directions of the same size
    others = [(first, total - first) for first in range(1, total)]
    assert loss(tuple(found.rank.values())) <= min(map(loss, others)) + 1e-6


def test_weights_of_the_graph_and_stacks_are_found():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 64, 48))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.up)

    found = slcompile.suggest(Experts(), 0.5, SLConfig(density=0.02), example_args=(torch.randn(3, 8, 64),))
    assert found.weights["up"].shape == (3, 64, 48)
    assert found.weights["up"].parameters <= 0.5 * 3 * 64 * 48
    with pytest.raises(ValueError, match="no product with a parameter was found"):
        slcompile.suggest(Experts(), 0.5)


def test_no_rank_saves_nothing_however_large_the_budget():
    found = slcompile.suggest(Net(), 0.999, SLConfig(density=0.02))
    assert all(each.parameters < math.prod(each.shape) for each in found.weights.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (0, {}, r"budget must be a number in \(0, 1\), got 0"),
        (1.0, {}, r"budget must be a number in \(0, 1\), got 1\.0"),
        (True, {}, r"budget must be a number in \(0, 1\), got True"),
        (0.05, {"density": 0.1}, r"budget=0\.05 cannot be met: rank 1 and density=0\.1 take 0\.1"),
        (0.5, {"structure": "tensor_train"}, r"singular values, which say .* got structure='tensor_train'"),
        (0.5, {"include": "layres*"}, r"include pattern 'layres\*' matches no parameter"),
    ],
)
def test_what_cannot_be_is_refused(budget, options, message):
    with pytest.raises(ValueError, match=message):
        slcompile.suggest(Net(), budget, SLConfig(**options))
    with pytest.raises(ValueError, match="meta device, which have no spectrum"), torch.device("meta"):
        slcompile.suggest(nn.Sequential(nn.Linear(64, 64)), 0.5)


def test_the_command_writes_what_the_option_takes(tmp_path, monkeypatch, capsys):
    name = f"suggested_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "def model():\n    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48)), (torch.randn(2, 64),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["suggest", f"{name}:model", "--budget", "0.5", "--config", "density=0.02", "--json", "rank.json"]
    assert main(command) == 0
    assert "of the parameters of 2 weights, 50.0% asked for" in capsys.readouterr().out
    ranks: dict[str, Any] = json.loads((tmp_path / "rank.json").read_text())
    assert SLConfig(rank=ranks).rank == ranks
    assert set(ranks) == {"0.weight", "1.weight"}
    assert main([*command[:3], "0.001"]) == 2
    assert "budget=0.001 cannot be met" in capsys.readouterr().err


def test_a_weight_that_holds_no_numbers_is_named():
    model = Net()
    with torch.no_grad():
        next(each for each in model.parameters() if each.dim() == 2)[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"\S+ holds NaN or Inf"):
        slcompile.suggest(model, 0.5)


def test_a_factorized_model_is_told_from_one_without_weights():
    model = slcompile.factorize_(Net())
    with pytest.raises(ValueError, match="model is factorized already; call slcompile"):
        slcompile.suggest(model, 0.5)
    with pytest.raises(ValueError, match="model is factorized already; call slcompile"):
        slcompile.factorize_(model)

"""The rows of an explanation: matmuls that run in another dtype, and the time of the lowering that is taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slcompile import SLConfig, explain
from slcompile.inspect import text
from slcompile.inspect.rows import MatmulRow


def rows_of(tokens: int = 8, rank: int = 8, **options) -> tuple[MatmulRow, ...]:
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Tanh(), nn.Linear(128, 64, bias=False))
    return explain(model, torch.randn(tokens, 64), config=SLConfig(rank=rank, density=0.05, **options)).matmuls


def test_matmuls_under_autocast_are_those_without_it():
    plain = rows_of(lowering="composed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = rows_of(lowering="composed")
    assert [(row.name, row.decision, row.tokens, row.node, row.bytes, row.flops) for row in cast] == [
        (row.name, row.decision, row.tokens, row.node, row.bytes, row.flops) for row in plain
    ]
    assert [(row.decision, row.flops.before) for row in cast] == [
        ("replaced", 2 * 2 * 8 * 64 * 128),  # x needs no gradient
        ("replaced", 3 * 2 * 8 * 64 * 128),
    ]


@pytest.mark.parametrize("lowering", ["composed", "factored"])
def test_the_time_is_that_of_the_lowering_that_is_taken(lowering):
    for row in rows_of(lowering=lowering):
        assert row.lowering == lowering
        assert text.predicted(row) == f"{1e3 * row.costs[lowering]:.2f} ms"
        assert row.costs["factored"] < row.costs["composed"]


def test_a_mixed_lowering_takes_less_than_either():
    found = [row for rank in (8, 16) for row in rows_of(tokens=128, rank=rank)]
    for row in found:
        assert set(row.costs) == {"composed", "factored"} | ({"mixed"} if row.lowering == "mixed" else set())
        assert row.costs[row.lowering] == min(row.costs.values())

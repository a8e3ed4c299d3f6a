"""What a training step finds allocated, by the optimizer that holds the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from slcompile.config import SLConfig
from slcompile.convert.held import held_bytes
from slcompile.weight import SLWeight

MODEL = 4 * (64 * 96 + 96) + 4 * 96 * 32
"""Bytes of the model's parameters, the last matrix of which is not trained."""
TRAINED = 4 * (64 * 96 + 96)


def model() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32, bias=False))
    layers[1].weight.requires_grad_(False)
    return layers


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1), 0),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), 1),
        (lambda parameters: torch.optim.AdamW(parameters), 2),
        (lambda parameters: torch.optim.RMSprop(parameters), 2),  # one: more than it will take, and not less
        (None, 2),
    ],
    ids=["sgd", "momentum", "adamw", "rmsprop", "none"],
)
def test_states_to_come_are_counted_for_what_is_trained(make: Callable[[Any], Any] | None, copies: int) -> None:
    layers = model()
    optimizers = [] if make is None else [make(layers.parameters())]
    assert held_bytes([layers], optimizers, {}) == MODEL + copies * TRAINED


def test_states_that_are_there_are_counted_as_they_are() -> None:
    layers = model()
    optimizer = torch.optim.RMSprop(layers.parameters())
    layers(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    assert held_bytes([layers], [optimizer], {}) == MODEL + TRAINED


def test_a_weight_that_is_replaced_counts_as_its_factors() -> None:
    layers = model()
    weight = SLWeight((96, 64), SLConfig(rank=8, density=0.0625), name="0.weight", device="meta")
    parts = [each.nbytes for each in weight.parameters()]
    expected = MODEL - 4 * 64 * 96 + 3 * sum(parts) + sum(each.nbytes for each in weight.buffers()) + 2 * 4 * 96
    assert held_bytes([layers], [], {id(layers[0].weight): weight}) == expected

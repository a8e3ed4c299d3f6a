from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from slcompile import SLConfig, factorize_, torch_private
from slcompile.convert import weight_uses as capture


class Plain(nn.Module):
    """Reads each weight in one of the ways that the captured graph shows already."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.tied = nn.Embedding(9, 32), nn.Embedding(9, 32)
        self.linear, self.twice = nn.Linear(32, 48), nn.Linear(48, 48)
        self.right, self.added, self.left = (nn.Parameter(torch.randn(48, 48)) for _ in range(3))

    def forward(self, ids):
        x = self.twice(self.twice(self.linear(self.table(ids) + self.tied(ids))))
        x = torch.addmm(x.new_zeros(48), torch.mm(x @ self.right, self.right), self.added)
        return functional.linear((self.left @ x.t()).t()[:, :32], self.tied.weight)


class Sliced(nn.Module):
    """Reads slices of a weight, which only ATen shows as what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(96, 32))

    def forward(self, x):
        first, second = self.packed.chunk(2)
        return x @ first.t() + x @ second.t()


def uses(model, x, monkeypatch, is_traced: bool):
    """What each weight of a model's graph is used for; whether the graph is traced to ATen for it."""
    found: dict = {}
    lower = torch_private.lower_to_aten

    def collect(gm, inputs):
        traced = []
        monkeypatch.setattr(torch_private, "lower_to_aten", lambda *args: traced.append(lower(*args)) or traced[0])
        found.update(capture.weight_uses(gm, inputs))
        assert bool(traced) == is_traced
        return gm.forward

    torch.compile(model, backend=collect)(x)
    return found


def test_plain_reads_are_found_without_a_second_trace(monkeypatch):
    model, ids = Plain(), torch.randint(9, (16,))
    plain = uses(model, ids, monkeypatch, is_traced=False)
    torch._dynamo.reset()
    monkeypatch.setattr(capture, "_PLAIN", set())
    traced = uses(model, ids, monkeypatch, is_traced=True)
    assert len(plain) == 7

    def told(use):
        return len(use.matmuls), use.others, use.input_dim, use.composed, use.without_grad

    assert {index: told(use) for index, use in plain.items()} == {index: told(use) for index, use in traced.items()}


def test_slices_are_seen_in_aten(monkeypatch):
    (use,) = uses(Sliced(), torch.randn(8, 32), monkeypatch, is_traced=True).values()
    assert (use.matmuls, use.others, use.input_dim) == (["mm", "mm"], [], 1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_factors_are_no_dense_weights(monkeypatch, dynamic):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    factorize_(model, SLConfig(rank=8))
    x = torch.randn(32, 64)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    (use,) = uses(model, x, monkeypatch, is_traced=False).values()
    assert len(use.matmuls) == 1

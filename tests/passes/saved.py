"""What a compiled step saves for its backward pass, and what the passes that decide it report."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import slcompile
from slcompile.memory import graphs
from slcompile.passes import save_low_rank

OPTIONS = {"rank": 4, "density": 0.1, "min_dim": 8, "lowering": "factored", "seed": 0, "init": "kaiming"}


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Net(nn.Module):
    """A gated MLP beside a residual stream."""

    def __init__(self, inner: int = 96) -> None:
        super().__init__()
        self.norm = Norm()
        self.gate, self.up, self.down = nn.Linear(48, inner), nn.Linear(48, inner), nn.Linear(inner, 48)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))


def compiled_reports(
    model: nn.Module, x: Tensor, save: str, monkeypatch: pytest.MonkeyPatch, of: Callable = save_low_rank
) -> tuple[list, list]:
    """Shapes of what the forward graph makes for the backward one, and the reports of a pass."""
    reports = []

    @functools.wraps(of)
    def watched(gm: fx.GraphModule, **kwargs: object) -> object:
        reports.append(of(gm, **kwargs))
        return reports[-1]

    monkeypatch.setattr(sys.modules["slcompile.passes"], of.__name__, watched)
    config = slcompile.SLConfig(**OPTIONS, save=save)
    slcompile.factorize_(model, config)
    found = graphs.capture(model, ((x,), {}), None, "cpu", config)
    _, *made = list(found.forward.nodes)[-1].args[0]
    shapes = [tuple(each.meta["val"].shape) for each in made if each.op != "placeholder"]
    return shapes, reports

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slcompile.backend import sltrain


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fresh_torch() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """Two linear layers, a bare weight and a head that is too small: 64 -> 96 -> 64 -> 5."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        self.mix = nn.Parameter(torch.randn(64, 64) / 8)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.relu(self.up(x))) @ self.mix))


class CheckpointedBlock(Block):
    """The same, its first two layers in a region whose activations are recomputed."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda inner: self.down(torch.relu(self.up(inner))), x, use_reentrant=False)
        return self.head(torch.tanh(hidden @ self.mix))


@pytest.fixture
def block() -> Block:
    return Block()


@pytest.fixture
def block_class() -> type[Block]:
    return Block


@pytest.fixture
def checkpointed_block() -> CheckpointedBlock:
    return CheckpointedBlock()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Inputs [32, 64] and class labels [32]."""
    return torch.randn(32, 64), torch.randint(0, 5, (32,))


class CountingBackend:
    """``sltrain``, counting how often Dynamo calls it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
        self.calls += 1
        return sltrain(gm, example_inputs, **kwargs)


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton driver that is not there, of which torch asks what kind of GPU it has: kernels can be traced."""
    triton = pytest.importorskip("triton", reason="the kernels need triton")
    from slcompile.kernels.build import TARGETS

    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: there is nothing to trace in this process")
    driver = SimpleNamespace(get_current_target=lambda: TARGETS["sm_90"])
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


@pytest.fixture
def counting() -> CountingBackend:
    return CountingBackend()

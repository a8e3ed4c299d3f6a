from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slcompile.backend import sltrain
from slcompile.convert.ledger import ledger
from tests.testing import aten_kernels


def pytest_configure() -> None:
    # Of pytest-xdist's workers each has its share of the cores: threads that wait for one are slower than none.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_finish() -> None:
    # What the imports made stays, and is not looked through again by each collection and each conversion.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # its keywords hold the names of folders, too
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if report.skipped and "browser" in item.keywords and os.environ.get("CI") in ("1", "true"):
        # CI installs a browser: where it failed to, these tests would be skipped in every run and nobody would notice.
        report.outcome = "failed"
        report.longrepr = (
            f"a browser test was skipped, and CI={os.environ['CI']}: {call.excinfo and call.excinfo.value}"
        )
    return report


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    ledger.reset()


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


@pytest.fixture(name="aten_kernels")
def aten_kernels_fixture() -> Iterator[None]:
    """ATen executes the graphs that our joint passes leave; see ``tests.testing.aten_kernels``."""
    with aten_kernels():
        yield


def measure(run: Callable[..., Any], model: nn.Module, args: Sequence[Tensor]) -> dict[str, Tensor]:
    """The outputs of a run, and the gradients of a fixed random sum of them for every input and parameter."""
    torch.manual_seed(0)
    args = [each.detach().clone().requires_grad_(each.is_floating_point()) for each in args]
    outputs = run(*args)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    model.zero_grad()
    random = torch.Generator().manual_seed(0)
    outputs = [torch.view_as_real(each) if each.is_complex() else each for each in outputs]
    torch.stack(
        [(each * torch.randn(each.shape, generator=random, dtype=torch.float64)).sum() for each in outputs]
    ).sum().backward()
    found = {f"output {index}": each.detach() for index, each in enumerate(outputs)}
    found |= {f"gradient of input {index}": each.grad for index, each in enumerate(args) if each.grad is not None}
    found |= {f"gradient of {name}": each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


def assert_eager(
    run: Callable[..., Any], model: nn.Module, args: Sequence[Tensor], eps: float = 2**-20, reference: Any = None
) -> None:
    """Asserts that a compiled run is as exact as eager mode: the same outputs, and gradients of the same tensors.

    Each may be further from what float64 gives than eager's is by ``eps`` of its norm, because sums are associated and
    rounded elsewhere: by default four times float32's unit in the last place for numbers near 1.

    Args:
        run: The compiled model; if it converts, what it is compared with is the converted model.
        model: Runs in eager mode.
        args: Inputs.
        reference: What eager mode calls in the place of the model.
    """
    buffers = {name: each.clone() for name, each in model.named_buffers()}
    ours = measure(run, model, args)

    def restored(model: nn.Module) -> nn.Module:
        for name, each in model.named_buffers():
            if name in buffers:
                each.copy_(buffers[name])
        return model

    eager = measure(reference or restored(model), model, args)
    double = restored(copy.deepcopy(model).double())
    exact = measure(double, double, [each.double() if each.is_floating_point() else each for each in args])
    assert ours.keys() == eager.keys() == exact.keys()
    for name, truth in exact.items():
        assert ours[name].dtype == eager[name].dtype
        error, allowed = (ours[name] - truth).norm(), (eager[name] - truth).norm() + eps * truth.norm()
        assert error <= allowed, f"{name}: {error:.3g} from float64, eager {(eager[name] - truth).norm():.3g}"


@pytest.fixture(name="assert_eager")
def assert_eager_fixture() -> Callable[..., None]:
    return assert_eager


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton driver that is not there, of which torch asks what kind of GPU it has: kernels can be traced."""
    triton = pytest.importorskip("triton", reason="the kernels need triton")
    from slcompile.kernels.offline import TARGETS

    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: there is nothing to trace in this process")
    driver = SimpleNamespace(get_current_target=lambda: TARGETS["sm_90"])
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


@pytest.fixture
def counting() -> CountingBackend:
    return CountingBackend()

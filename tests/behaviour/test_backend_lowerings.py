"""What the backend computes, whatever the lowering and the shape: the numbers of eager mode, in few graphs."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slcompile
from tests.testing import OPTIONS, SUPPORTS, some_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("support", "dtype"),
    some_of(
        itertools.product(SUPPORTS, ("float32", "autocast")),
        [("stratified", "float32"), ("stratified", "autocast"), ("vector", "autocast"), ("uniform", "float32")],
    ),
)
def test_every_backend_gives_the_loss_and_gradients_of_eager(checkpointed_block, batch, support, dtype, monkeypatch):
    autocast = dtype == "autocast"
    torch.compile(torch.relu, backend="eager")(batch[0])  # Dynamo lists torch's functions once, this one among them
    monkeypatch.setattr(torch, "relu", torch.tanh)  # at a kink, another rounding is another gradient
    model = checkpointed_block
    slcompile.factorize_(model, slcompile.SLConfig(rank=8, density=0.05, alpha=16.0, support=support))
    with torch.no_grad():
        for weight in model.modules():
            if isinstance(weight, slcompile.SLWeight):
                weight.B.normal_(std=0.1)
    results = {}
    # Of another support, other backends see other ops of torch's alone.
    for backend in ("eager", "aot_eager", "inductor", "sltrain") if support == "stratified" else ("eager", "sltrain"):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(compiled(batch[0]), batch[1])
        loss.backward()
        results[backend] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        model.zero_grad()
    double = copy.deepcopy(model).double()
    F.cross_entropy(double(batch[0].double()), batch[1]).backward()
    truth = [F.cross_entropy(double(batch[0].double()), batch[1]).detach(), *(p.grad for p in double.parameters())]
    # Half an ulp of a result's norm above eager's own error: each backend rounds elsewhere.
    eps = 2**-9 if autocast else 2**-22
    for backend, result in results.items():
        for got, eager, exact in zip(result, results["eager"], truth, strict=True):
            assert (got - exact).norm() <= (eager - exact).norm() + eps * exact.norm(), backend


@pytest.mark.parametrize(
    ("lowering", "calls"),
    [
        pytest.param("composed", 2, marks=pytest.mark.long),  # before and after the conversion
        ("factored", 2),
        ("auto", 3),  # and one more on the other side of the limit at which factored and composed cost the same
    ],
)
def test_dynamic_shapes_do_not_recompile_per_size(block, counting, lowering, calls):
    compiled = torch.compile(block, backend=counting, options={**OPTIONS, "lowering": lowering}, dynamic=True)
    for size in (8, 9, 17, 31, 100, 1000):
        x = torch.randn(size, 64)
        actual = compiled(x)
        actual.square().sum().backward()
        if size > 8:  # the first call converts
            expected = block(x)
            torch.testing.assert_close(actual, expected)
            gradients = {name: each.grad.clone() for name, each in block.named_parameters()}
            block.zero_grad()
            expected.square().sum().backward()
            for name, each in block.named_parameters():
                torch.testing.assert_close(gradients[name], each.grad, rtol=1e-4, atol=1e-4)
        block.zero_grad()
    assert counting.calls == calls


@pytest.mark.parametrize(
    ("lowering", "support"),
    some_of(
        itertools.product(("composed", "factored", "auto"), SUPPORTS),
        [("composed", "uniform"), ("factored", "stratified"), ("factored", "vector"), ("auto", "stratified")],
    ),
)
def test_every_lowering_trains_as_eager_does(block, batch, lowering, support):
    config = {**OPTIONS, "support": support}
    slcompile.factorize_(block, slcompile.SLConfig(**config, init="spectral"))  # no factor starts at zero
    eager = copy.deepcopy(block)
    compiled = torch.compile(block, backend="sltrain", options={**config, "lowering": lowering})
    for model, run in ((block, compiled), (eager, eager)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            F.cross_entropy(run(batch[0]), batch[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(block.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("options", "composes"),
    [
        ({"lowering": "composed"}, (2, 2)),
        ({"lowering": "composed", "keep_weights": True}, (2, 0)),
        ({"lowering": "factored"}, (0, 0)),
        ({"lowering": "factored", "keep_weights": True}, (0, 0)),
    ],
)
def test_weights_are_composed_again_kept_or_never_composed(block, options, composes):
    slcompile.factorize_(block, slcompile.SLConfig(**OPTIONS))
    compiled = torch.compile(block, backend="sltrain", options={**OPTIONS, **options})
    x = torch.randn(32, 64, requires_grad=True)
    compiled(x).sum().backward()
    with torch.profiler.profile() as forward:
        loss = compiled(x).sum()
    with torch.profiler.profile() as backward:
        loss.backward()
    events = [profile.key_averages() for profile in (forward, backward)]
    assert composes == tuple(sum(e.count for e in each if e.key == "slcompile::compose") for each in events)


class Embedded(nn.Module):
    """Three factored products of a normed embedding: their transposed gradients are fused with its scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.norm = nn.RMSNorm(64)
        self.up = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        hidden = self.norm(x)
        return x + sum(torch.tanh(up(hidden)) for up in self.up)


@pytest.mark.parametrize("tokens", some_of((16, 64, 100, 1024), [100]))
def test_the_gradient_of_an_embedding_under_factored_products(tokens):
    model = slcompile.factorize_(Embedded(), slcompile.SLConfig(**OPTIONS))
    compiled = torch.compile(model, backend="sltrain", options={**OPTIONS, "lowering": "factored"})
    ids = torch.randint(0, 96, (2, tokens // 2))
    gradients = []
    for run in (compiled, model):
        run(ids).square().mean().backward()
        gradients.append(model.embed.weight.grad.clone())
        model.zero_grad()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)

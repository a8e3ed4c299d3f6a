"""GaLoreAdamW against galore-torch, AdamW, and itself from a checkpoint."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slcompile
from slcompile.optim import GaLoreAdamW, per_layer

OPTIONS: dict[str, Any] = {"lr": 1e-2, "rank": 8, "update_every": 10, "eps": 1e-12}
CLONES = {"deepcopy": copy.deepcopy, "pickle": lambda both: pickle.loads(pickle.dumps(both))}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 48)
        self.up = nn.Linear(48, 64)
        self.small = nn.Linear(64, 8, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.small(torch.tanh(self.up(self.embed(ids))))


def gradients(model: nn.Module, step: int) -> None:
    """Sets gradients whose leading singular vectors stay apart, and turn slowly."""
    generator = torch.Generator().manual_seed(7)
    for each in model.parameters():
        if each.dim() == 2:
            left, right = (torch.randn(size, 12, generator=generator) for size in each.shape)
            moved = torch.randn(each.shape, generator=torch.Generator().manual_seed(step))
            each.grad = (left * 1.5 ** -torch.arange(12.0)) @ right.t() + 0.02 * moved
        else:
            each.grad = torch.randn(each.shape, generator=generator)


def stepped(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> None:
    for step in steps:
        gradients(model, step)
        optimizer.step()


def assert_equal(model: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for (name, found), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.fixture
def model() -> nn.Module:
    return Model()


def test_it_steps_as_galore_torch_does(model):
    baseline = pytest.importorskip("galore_torch", exc_type=ImportError)
    other = copy.deepcopy(model)
    large = [each for each in other.parameters() if each.dim() == 2 and min(each.shape) > 8]
    rest = [each for each in other.parameters() if each.dim() != 2 or min(each.shape) <= 8]
    groups = [{"params": large, "rank": 8, "update_proj_gap": 10, "scale": 0.25, "proj_type": "std"}, {"params": rest}]
    stepped(GaLoreAdamW(model.parameters(), **OPTIONS, weight_decay=0), model, range(25))
    stepped(baseline.GaLoreAdamW(groups, lr=1e-2, eps=1e-12, no_deprecation_warning=True), other, range(25))
    assert_equal(model, other, rtol=1e-3, atol=1e-5)


def test_what_is_not_projected_is_stepped_by_adamw(model):
    other = copy.deepcopy(model)
    stepped(GaLoreAdamW(model.parameters(), **{**OPTIONS, "rank": None}), model, range(5))
    stepped(torch.optim.AdamW(other.parameters(), lr=1e-2, eps=1e-12), other, range(5))
    assert_equal(model, other, rtol=0, atol=0)


def test_moments_are_as_small_as_the_rank(model):
    optimizer = GaLoreAdamW(model.parameters(), **OPTIONS)
    stepped(optimizer, model, range(1))
    shapes = {
        name: {key: tuple(value.shape) for key, value in optimizer.state[each].items() if key != "step"}
        for name, each in model.named_parameters()
    }
    assert shapes["embed.weight"] == {"projection": (48, 8), "exp_avg": (96, 8), "exp_avg_sq": (96, 8)}
    assert shapes["up.weight"] == {"projection": (48, 8), "exp_avg": (64, 8), "exp_avg_sq": (64, 8)}
    assert shapes["small.weight"] == {"exp_avg": (8, 64), "exp_avg_sq": (8, 64)}
    assert all(each.grad is not None for each in model.parameters())


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_bit(model):
    other = copy.deepcopy(model)
    stepped(GaLoreAdamW(model.parameters(), **OPTIONS, energy=0.99), model, range(25))
    first = GaLoreAdamW(other.parameters(), **OPTIONS, energy=0.99)
    stepped(first, other, range(13))
    resumed = GaLoreAdamW(other.parameters(), lr=1.0)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    stepped(resumed, other, range(13, 25))
    assert_equal(model, other, rtol=0, atol=0)


def test_the_rank_follows_the_gradient_and_moments_are_carried():
    weight = nn.Parameter(torch.randn(64, 32))
    optimizer = GaLoreAdamW([weight], lr=1e-2, rank=16, update_every=1, energy=0.999)
    vectors = torch.linalg.qr(torch.randn(32, 6)).Q
    weight.grad = torch.randn(64, 6) @ vectors.t()
    optimizer.step()
    state = optimizer.state[weight]
    assert state["projection"].shape == (32, 6)
    before = state["exp_avg"] @ state["projection"].t()
    weight.grad = torch.randn(64, 6) @ vectors.t() + 1e-3 * torch.randn(64, 32)
    optimizer.step()
    assert state["projection"].shape[1] in (6, 7)
    # What the first moment stood for is what it was, faded, and the new gradient.
    expected = 0.9 * before + 0.1 * weight.grad
    # A tenth of the noise lies beside the vectors and is lost; by it, they turn by about a thousandth.
    torch.testing.assert_close(state["exp_avg"] @ state["projection"].t(), expected, rtol=0, atol=5e-4)
    weight.grad = torch.outer(torch.randn(64), vectors[:, 0])
    optimizer.step()
    assert state["projection"].shape == (32, 1)


@pytest.mark.parametrize("clone", CLONES)
def test_a_copy_goes_on_as_the_original_does(model, clone):
    slcompile.factorize_(model, slcompile.SLConfig(rank=16, seed=0, include=["up.weight"]))
    optimizer = GaLoreAdamW(model.parameters(), **OPTIONS)
    stepped(optimizer, model, range(2))
    other, copied = CLONES[clone]((model, optimizer))
    alone = copy.deepcopy(optimizer)  # no module owns its parameters
    for each, stepping in ((model, optimizer), (other, copied)):
        stepped(stepping, each, range(2, 12))
    assert_equal(other, model, rtol=0, atol=0)
    copied.add_param_group({"params": [nn.Parameter(torch.randn(4, 4))]})
    assert copied.param_groups[1]["update_every"] == 10
    for parameter in alone.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    alone.step()
    projected = [p.shape for p in alone.param_groups[0]["params"] if "projection" in alone.state[p]]
    assert projected == [(96, 48)]


@pytest.mark.slow
def test_per_layer_updates_are_the_same(model):
    other, ids = copy.deepcopy(model), torch.arange(40).view(2, 20)
    plain = GaLoreAdamW(model.parameters(), **OPTIONS)
    inside = per_layer(GaLoreAdamW, other.parameters(), **OPTIONS)
    for _ in range(12):
        for each, optimizer in ((model, plain), (other, inside)):
            each(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(model, other, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
def test_factors_are_stepped_plainly_and_dense_weights_are_projected(model):
    optimizer = GaLoreAdamW(model.parameters(), **OPTIONS)
    compiled = torch.compile(model, backend="sltrain", options={"rank": 12, "density": 0.1})
    ids = torch.randint(0, 96, (4, 16))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(compiled(ids).flatten(0, 1), ids.flatten() % 8)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert set(slcompile.factors(model)) == {"up.weight"}
    assert "projection" in optimizer.state[model.embed.weight]
    factors = [model.up.weight_sl.B, model.up.weight_sl.A, model.up.weight_sl.values]
    assert all("projection" not in optimizer.state[each] and optimizer.state[each] for each in factors)
    with pytest.raises(ValueError, match="rank=4 is set for a group that holds factors"):
        GaLoreAdamW([{"params": model.parameters(), "rank": 4}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an int >= 1 or None, got 0"),
        ({"update_every": 1.5}, "update_every must be an int >= 1, got 1.5"),
        ({"scale": 0}, "scale must be a finite number above 0, got 0"),
        ({"scale": "a"}, "scale must be a finite number above 0, got 'a'"),
        ({"energy": 2}, r"energy must be a number in \(0, 1\] or None, got 2"),
        ({"amsgrad": True}, "amsgrad must be False for GaLoreAdamW, got True"),
        ({"maximize": True}, "maximize must be False for GaLoreAdamW, got True"),
    ],
)
def test_bad_options_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW(model.parameters(), **options)
    optimizer = GaLoreAdamW([model.up.bias])
    with pytest.raises(ValueError, match=message):  # a group that maximizes was minimized
        optimizer.add_param_group({"params": [model.up.weight], **options})
    assert len(optimizer.param_groups) == 1


def test_a_step_within_autocast_is_the_same(model):
    other = copy.deepcopy(model)
    for each, enabled in ((model, False), (other, True)):
        optimizer = GaLoreAdamW(each.parameters(), **OPTIONS, energy=0.9)
        for step in range(12):
            gradients(each, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_sparse_gradient_is_refused_before_anything_is_stepped():
    embed, head = nn.Embedding(96, 48, sparse=True), nn.Linear(48, 64)
    optimizer = GaLoreAdamW([*head.parameters(), *embed.parameters()], lr=1e-2, rank=8)
    before = copy.deepcopy(head.state_dict())
    head(embed(torch.arange(6))).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of a parameter of shape \(96, 48\) is sparse"):
        optimizer.step()
    assert all(torch.equal(each, before[name]) for name, each in head.state_dict().items())
    assert not optimizer.state


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_refused_before_anything_is_stepped(model, number):
    optimizer = GaLoreAdamW(model.parameters(), **OPTIONS)
    for due in range(0, 20, 10):
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        gradients(model, due)
        model.up.weight.grad[3, 4] = number
        with pytest.raises(ValueError, match=r"gradient of a parameter of shape \(64, 48\) has NaN or Inf"):
            optimizer.step()
        torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
        stepped(optimizer, model, range(due, due + 10))


def test_a_compiled_step_is_the_same(model):
    other = copy.deepcopy(model)
    plain, compiled = (GaLoreAdamW(each.parameters(), **OPTIONS) for each in (model, other))
    step = torch.compile(compiled.step, backend="eager")
    for count in range(12):
        stepped(plain, model, range(count, count + 1))
        gradients(other, count)
        step()
    assert_equal(model, other, rtol=0, atol=0)


def test_the_state_of_adamw_is_refused(model):
    plain, optimizer = torch.optim.AdamW(model.parameters()), GaLoreAdamW(model.parameters(), **OPTIONS)
    stepped(plain, model, range(1))
    with pytest.raises(ValueError, match="state must be that of a GaLoreAdamW, got groups without rank, update_every"):
        optimizer.load_state_dict(plain.state_dict())
    assert not optimizer.state
    stepped(optimizer, model, range(1, 3))


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_skips_infinities_and_takes_its_scale_away(model, fused):
    plain, ids = copy.deepcopy(model), torch.arange(40).view(2, 20)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled, unscaled = (GaLoreAdamW(each.parameters(), fused=fused, **OPTIONS) for each in (model, plain))
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale(model(ids).square().sum() * factor).backward()
        scaler.step(scaled)
        scaler.update()
        scaled.zero_grad()
        if factor == 1.0:
            plain(ids).square().sum().backward()
            unscaled.step()
            unscaled.zero_grad()
    assert scaler.get_scale() == 2.0**9
    assert_equal(model, plain, rtol=0, atol=1e-6)

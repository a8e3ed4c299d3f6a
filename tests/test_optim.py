"""Per-layer updates: the plain optimizer's numbers, groups and state; each gradient freed in the backward pass."""

from __future__ import annotations

import copy
import gc
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR

import slcompile
from slcompile.benchmark import peak_above
from slcompile.optim import PerLayer, per_layer
from tests.testing import CONFIG, OPTIONS, process_group

MAKERS = {
    "sgd-momentum": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "adamw-fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "adamw-amsgrad-foreach": (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True, "foreach": True}),
    "nadam": (torch.optim.NAdam, {"lr": 1e-2}),
}


def groups_of(model: nn.Module) -> list[dict]:
    """Decayed matrices at a rate of their own, and the rest."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1, "lr": 2e-2},
        {"params": [p for p in model.parameters() if p.dim() <= 1]},
    ]


def train(model, forward, optimizer, batch, steps: int = 4, scheduler=None) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(forward(batch[0]), batch[1])
        loss.backward()
        if isinstance(optimizer, PerLayer):
            assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("maker", "kind"),
    [(maker, kind) for maker in MAKERS for kind in ("dense", "factorized")]
    + [pytest.param(each, "adopted", marks=() if each == "adamw" else pytest.mark.long) for each in MAKERS],
)
def test_the_trajectory_is_bit_equal_to_the_plain_optimizers(block_class, batch, maker, kind, aten_kernels):
    """With two groups, a schedule of the rate, and weights that the first step turns into factors ("adopted")."""
    cls, kwargs = MAKERS[maker]
    done = []
    for make in (cls, lambda params, **kw: per_layer(cls, params, **kw)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = block_class()
        forward = model
        if kind == "factorized":
            slcompile.factorize_(model, CONFIG)
        if kind == "adopted":
            forward = torch.compile(model, backend="sltrain", options=OPTIONS)
        optimizer = make(groups_of(model), **kwargs)
        scheduler = OneCycleLR(optimizer, max_lr=[2e-2, 1e-2], total_steps=8, cycle_momentum=False)
        losses = train(model, forward, optimizer, batch, scheduler=scheduler)
        done.append((losses, model, optimizer))
    (losses, model, plain), (per_layer_losses, per_layer_model, optimizer) = done
    assert per_layer_losses == losses
    assert losses[-1] < losses[0]
    assert bool(slcompile.factors(model)) == (kind != "dense")
    assert_same_state(model, per_layer_model)
    assert isinstance(optimizer, cls)
    ours, theirs = optimizer.state_dict(), plain.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)


@pytest.mark.slow
def test_the_first_gradients_of_adopted_factors_are_applied(block, batch, aten_kernels):
    optimizer = per_layer(torch.optim.SGD, block.parameters(), lr=0.1)
    dense = [p for p in block.parameters() if p.shape in {(96, 64), (64, 96), (64, 64)}]
    compiled = torch.compile(block, backend="sltrain", options=OPTIONS)
    loss = F.cross_entropy(compiled(batch[0]), batch[1])
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    gradients = torch.autograd.grad(F.cross_entropy(block(batch[0]), batch[1]), list(block.parameters()))
    loss.backward()
    for (name, p), gradient in zip(block.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(p, before[name] - 0.1 * gradient, rtol=1e-5, atol=1e-6, msg=name)
    optimizer.step()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in block.parameters()]
    assert len(dense) == 3
    assert not any(p._post_accumulate_grad_hooks for p in dense), "the dense weights keep their hooks"


@pytest.mark.slow
@pytest.mark.parametrize("ours_first", [True, False], ids=["per layer to plain", "plain to per layer"])
def test_state_dicts_go_to_and_from_the_plain_class(block_class, batch, ours_first):
    def start(ours: bool):
        torch.manual_seed(0)
        model = slcompile.factorize_(block_class(), CONFIG)
        make = (lambda p, **kw: per_layer(torch.optim.AdamW, p, **kw)) if ours else torch.optim.AdamW
        return model, make(groups_of(model), lr=1e-2)

    reference, optimizer = start(False)
    train(reference, reference, optimizer, batch, 6)
    model, first = start(ours_first)
    train(model, model, first, batch, 3)
    state = copy.deepcopy(first.state_dict())
    resumed, second = start(not ours_first)
    resumed.load_state_dict(model.state_dict())
    second.load_state_dict(state)
    train(resumed, resumed, second, batch, 3)
    assert_same_state(reference, resumed)


class Layer(nn.Module):
    """A layer that Dynamo traces when it is compiled in place, as it does not with torch's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


@pytest.mark.slow
def test_layers_that_are_adopted_one_after_another(batch):
    """Each layer's first run converts it, in the forward pass of one step."""
    done = []
    for make in (torch.optim.AdamW, lambda params, **kw: per_layer(torch.optim.AdamW, params, **kw)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(*(Layer(64) for _ in range(3)), nn.Linear(64, 5))
        for layer in list(model)[:3]:
            layer.compile(backend="sltrain", options=OPTIONS)
        optimizer = make(model.parameters(), lr=1e-2)
        losses = train(model, model, optimizer, batch, 3)
        assert len(slcompile.factors(model)) == 3
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
        done.append((losses, model))
    assert done[0][0] == done[1][0]
    assert_same_state(done[0][1], done[1][1])


@pytest.mark.slow
def test_gradients_are_never_all_there_at_once(batch):
    """In eager mode, and compiled layer by layer, each layer's gradients are gone before the next one's come."""
    alive: list[int] = []
    layers = nn.Sequential(*(Layer(64) for _ in range(6)))
    slcompile.factorize_(layers, CONFIG)
    parameters = list(layers.parameters())
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in parameters))
        )
    optimizer = per_layer(torch.optim.AdamW, parameters)
    for compiled in (False, True):
        if compiled:
            for layer in layers:
                layer.compile(backend="sltrain", options=OPTIONS)
        alive.clear()
        layers(batch[0]).square().mean().backward()
        optimizer.step()
        assert alive == [1] * len(parameters)


@pytest.mark.slow
def test_peak_memory_has_one_layers_gradients_instead_of_all(batch):
    layers_count, width = 8, 256
    peaks, gradients = {}, 0
    for make in (torch.optim.AdamW, lambda p: per_layer(torch.optim.AdamW, p)):
        torch.manual_seed(0)
        model = nn.Sequential(*(Layer(width) for _ in range(layers_count)))
        slcompile.factorize_(model, slcompile.SLConfig(rank=64, density=0.05))
        for layer in model:
            layer.compile(backend="sltrain", options={"lowering": "composed"})
        optimizer = make(model.parameters())
        x = torch.randn(4, width)

        def step(model=model, optimizer=optimizer, x=x):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        step()
        peaks[type(optimizer)] = peak_above(step, "cpu")
        gradients = sum(p.nbytes for p in model.parameters())
    plain, ours = peaks.values()
    print(f"gradients {gradients:,} B; peak above the state: plain {plain:,} B, per layer {ours:,} B")
    assert plain >= gradients
    assert plain - ours >= 0.6 * gradients * (layers_count - 1) / layers_count


def test_clipping_is_per_parameter(block, batch):
    slcompile.factorize_(block, CONFIG)
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    gradients = torch.autograd.grad(F.cross_entropy(block(batch[0]), batch[1]), list(block.parameters()))
    limit = float(torch.stack([each.norm() for each in gradients]).median())
    optimizer = per_layer(torch.optim.SGD, block.parameters(), lr=1.0, max_grad_norm=limit)
    F.cross_entropy(block(batch[0]), batch[1]).backward()
    optimizer.step()
    clipped = 0
    for (name, p), gradient in zip(block.named_parameters(), gradients, strict=True):
        expected = gradient * (limit / (gradient.norm() + 1e-6)).clamp(max=1)
        clipped += bool(gradient.norm() > limit)
        torch.testing.assert_close(before[name] - p.detach(), expected, rtol=1e-4, atol=1e-6, msg=name)
    assert 0 < clipped < len(gradients)


def test_step_hooks_run_once_a_step(block, batch):
    torch.optim.AdamW(block.parameters())  # torch puts hooks around a class's step when it is first instantiated
    optimizer = per_layer(torch.optim.AdamW, block.parameters())
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(block, block, optimizer, batch, 2)
    assert calls == ["pre", "post"] * 2


def test_parameters_come_and_thaw(block, batch):
    block.head.requires_grad_(False)
    optimizer = per_layer(torch.optim.SGD, [block.up.weight, *block.head.parameters()], lr=0.1)
    optimizer.add_param_group({"params": [block.mix], "lr": 0.5})
    head, mix = block.head.weight.detach().clone(), block.mix.detach().clone()
    block.up.bias.requires_grad_(False)
    block.down.weight.requires_grad_(False)
    train(block, block, optimizer, batch, 1)
    assert torch.equal(block.head.weight, head)
    assert not torch.equal(block.mix, mix)
    block.head.requires_grad_(True)
    F.cross_entropy(block(batch[0]), batch[1]).backward()
    assert block.head.weight.grad is not None
    optimizer.step()  # updates it once; from here on the backward pass does
    assert not torch.equal(block.head.weight, head)
    train(block, block, optimizer, batch, 1)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_accumulated_gradients_update_as_plain_ones_do(block_class, batch, compiled, aten_kernels):
    """Three passes a step, of which one leaves a parameter out; then a step of fewer passes, as at an epoch's end."""
    done = []
    for make in (torch.optim.AdamW, lambda params, **kw: per_layer(torch.optim.AdamW, params, accumulate=3, **kw)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = slcompile.factorize_(block_class(), CONFIG)
        forward = torch.compile(model, backend="sltrain", options=OPTIONS) if compiled else model
        optimizer = make(groups_of(model), lr=1e-2)
        for passes in (3, 3, 2):
            for number in range(passes):
                rows = slice(number * 4, number * 4 + 4)
                model.head.bias.requires_grad_(number != 1)
                (F.cross_entropy(forward(batch[0][rows]), batch[1][rows]) / passes).backward()
            if isinstance(optimizer, PerLayer):
                left = {name for name, p in model.named_parameters() if p.grad is not None}
                everything = {name for name, _ in model.named_parameters()}
                assert left == ({"head.bias"} if passes == 3 else everything)
            optimizer.step()
            optimizer.zero_grad()
        done.append((model, optimizer))
    assert_same_state(done[0][0], done[1][0])
    ours, theirs = (optimizer.state_dict()["state"] for _, optimizer in done)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_zero_grad_discards_what_is_being_accumulated(block, batch):
    optimizer = per_layer(torch.optim.SGD, block.parameters(), lr=0.1, accumulate=2)
    before = copy.deepcopy(block.state_dict())
    F.cross_entropy(block(batch[0]), batch[1]).backward()
    optimizer.zero_grad()
    F.cross_entropy(block(batch[0]), batch[1]).backward()
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])
    F.cross_entropy(block(batch[0]), batch[1]).backward()
    assert not any(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_a_disabled_grad_scaler_changes_nothing(block, batch):
    other = copy.deepcopy(block)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer, plain = (per_layer(torch.optim.AdamW, model.parameters()) for model in (block, other))
    before = copy.deepcopy(block.state_dict())
    for _ in range(2):
        scaler.scale(F.cross_entropy(block(batch[0]), batch[1])).backward()
        scaler.step(optimizer)
        scaler.update()
        F.cross_entropy(other(batch[0]), batch[1]).backward()
        plain.step()
    assert_same_state(block, other)
    assert not any(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@pytest.mark.slow
def test_a_group_of_one_process_updates_as_plain(block_class, batch, tmp_path):
    """DDP made before and after the optimizer; ``tests/stacks/test_updates.py`` has two processes."""
    with process_group(tmp_path):
        done = []
        for kind in ("plain", "before", "after"):
            torch.manual_seed(0)
            model = slcompile.factorize_(block_class(), CONFIG)
            wrapped = DistributedDataParallel(model) if kind != "after" else None
            make = torch.optim.AdamW if kind == "plain" else lambda p, **kw: per_layer(torch.optim.AdamW, p, **kw)
            optimizer = make(model.parameters(), lr=1e-2)
            wrapped = wrapped or DistributedDataParallel(model)
            done.append((train(model, wrapped, optimizer, batch), model))
        for losses, model in done[1:]:
            assert losses == done[0][0]
            assert_same_state(model, done[0][1])


class Failing(torch.autograd.Function):
    """The identity, whose backward pass fails once where ``fails`` is set."""

    fails = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if Failing.fails:
            Failing.fails = False
            raise MemoryError
        return gradient


def test_training_goes_on_after_a_pass_that_failed(block, batch):
    optimizer = per_layer(torch.optim.SGD, block.parameters(), lr=0.1)
    block.up.register_forward_hook(lambda module, args, output: Failing.apply(output))
    Failing.fails = True
    with pytest.raises(MemoryError):
        F.cross_entropy(block(batch[0]), batch[1]).backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"call step\(\) after so many backward passes, and after one that failed"):
        F.cross_entropy(block(batch[0]), batch[1]).backward()
    optimizer.zero_grad()
    optimizer.step()
    other = copy.deepcopy(block)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    for model, each in ((block, optimizer), (other, plain)):
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        each.step()
    assert_same_state(block, other)


@pytest.mark.slow
def test_an_optimizer_that_is_gone_updates_nothing(block, batch):
    optimizer = per_layer(torch.optim.SGD, block.parameters(), lr=0.1)
    del optimizer
    gc.collect()
    before = copy.deepcopy(block.state_dict())
    F.cross_entropy(block(batch[0]), batch[1]).backward()
    assert all(p.grad is not None for p in block.parameters())
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])
    block.zero_grad()
    successor = per_layer(torch.optim.SGD, block.parameters(), lr=0.1)
    train(block, block, successor, batch, 1)


class SlowSGD(torch.optim.SGD):
    """Other threads run while it steps, as they do while a device is waited for."""

    def step(self, closure=None):
        time.sleep(0.02)
        super().step(closure)
        time.sleep(0.02)


def test_threads_that_run_backward_at_once_update_each_their_own():
    """Autograd has a thread for each device, so that the hooks of a model on several devices are called at once."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    expected = copy.deepcopy(layers)
    x = torch.randn(5, 3)
    optimizer = per_layer(SlowSGD, layers.parameters(), lr=0.1)
    plain = torch.optim.SGD(expected.parameters(), lr=0.1)
    barrier, errors = threading.Barrier(len(layers)), []

    def backward(layer: nn.Module) -> None:
        try:
            loss = layer(x).square().sum()
            barrier.wait()
            loss.backward()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=backward, args=(layer,)) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    optimizer.step()
    assert not errors
    sum(layer(x).square().sum() for layer in expected).backward()
    plain.step()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in layers.parameters()]
    assert_same_state(layers, expected)

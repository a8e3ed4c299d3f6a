"""BlockAdamW: what it chooses, what it holds, and that all of it is AdamW."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from slcompile.optim import BlockAdamW, per_layer

CLONES = {"deepcopy": copy.deepcopy, "pickle": lambda both: pickle.loads(pickle.dumps(both))}


@pytest.fixture
def model() -> nn.Module:
    """Four matrices of 32 x 32, and biases."""
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))


def gradients(model: nn.Module, largest: int) -> None:
    """Sets gradients of norm 1, of one matrix 10."""
    generator = torch.Generator().manual_seed(largest)
    for index, each in enumerate(model):
        for parameter in each.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient / gradient.norm() * (10 if index == largest else 1)


def moved(model: nn.Module, before: nn.Module) -> list[bool]:
    return [not torch.equal(now.weight, then.weight) for now, then in zip(model, before, strict=True)]


def test_the_largest_gradient_is_stepped_and_its_moments_alone_are_held(model):
    optimizer, before = BlockAdamW(model.parameters(), share=0.25, update_every=3), copy.deepcopy(model)
    for _ in range(3):
        gradients(model, 2)
        optimizer.step()
    assert moved(model, before) == [False, False, True, False]
    held = [each for each in model.parameters() if optimizer.state.get(each)]
    assert [id(each) for each in held] == [id(p) for p in model.parameters() if p.dim() == 1 or p is model[2].weight]
    assert all(each.grad is not None for each in model.parameters())
    before = copy.deepcopy(model)
    gradients(model, 0)
    optimizer.step()
    assert moved(model, before) == [True, False, False, False]
    assert not optimizer.state.get(model[2].weight)


def test_what_was_chosen_often_gives_way(model):
    optimizer = BlockAdamW(model.parameters(), share=0.25, update_every=1)
    stepped = []
    for _ in range(14):
        before = copy.deepcopy(model)
        gradients(model, 1)
        optimizer.step()
        stepped.append(moved(model, before).index(True))
    assert stepped[:9] == [1] * 9  # ten times the norm of the others
    assert set(stepped[10:]) - {1}


def test_all_of_them_at_once_are_adamw(model):
    other = copy.deepcopy(model)
    optimizers = BlockAdamW(model.parameters(), share=1, lr=1e-2), torch.optim.AdamW(other.parameters(), lr=1e-2)
    for step in range(6):
        for each, optimizer in zip((model, other), optimizers, strict=True):
            gradients(each, step % 4)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_resumed_run_is_the_same_to_the_bit(model):
    other = copy.deepcopy(model)
    whole = BlockAdamW(model.parameters(), share=0.5, update_every=2)
    first = BlockAdamW(other.parameters(), share=0.5, update_every=2)
    for step in range(5):
        gradients(model, step % 4)
        whole.step()
        gradients(other, step % 4)
        first.step()
    resumed = BlockAdamW(other.parameters(), share=0.5, update_every=2)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(5, 12):
        for each, optimizer in ((model, whole), (other, resumed)):
            gradients(each, step % 4)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_run_goes_on_from_a_distributed_state_to_the_bit(model):
    other, options = copy.deepcopy(model), StateDictOptions(strict=False)  # what rests has no state
    first, resumed = (BlockAdamW(each.parameters(), share=0.5, update_every=2) for each in (model, other))
    for step in range(3):
        gradients(model, step)
        first.step()
    other.load_state_dict(model.state_dict())
    states = copy.deepcopy(get_optimizer_state_dict(model, first, options=options))
    set_optimizer_state_dict(other, resumed, states, options=options)
    for step in range(3, 8):
        for each, optimizer in ((model, first), (other, resumed)):
            gradients(each, step % 4)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_matrix_without_a_gradient_is_chosen_where_there_is_room(model):
    idle = model[3].weight
    for share, is_stepped in ((1.0, True), (0.75, False)):
        optimizer, before = BlockAdamW(model.parameters(), share=share), copy.deepcopy(model)
        gradients(model, 2)
        idle.grad = None
        optimizer.step()
        gradients(model, 2)  # it is used from the second step on
        optimizer.step()
        assert moved(model, before) == [True, True, True, is_stepped]


def test_the_choice_waits_for_a_gradient(model):
    optimizer, before = BlockAdamW(model.parameters(), share=0.25), copy.deepcopy(model)
    optimizer.step()
    for each in model:
        each.bias.grad = torch.ones(32)
    optimizer.step()
    assert not torch.equal(model[0].bias, before[0].bias)
    assert moved(model, before) == [False] * 4
    gradients(model, 1)
    optimizer.step()
    assert moved(model, before) == [False, True, False, False]


@pytest.mark.parametrize("clone", CLONES)
def test_a_copy_goes_on_as_the_original_does(model, clone):
    optimizer = BlockAdamW(model.parameters(), share=0.5, update_every=2)
    gradients(model, 0)
    optimizer.step()
    other, copied = CLONES[clone]((model, optimizer))
    for step in range(1, 6):
        for each, stepping in ((model, optimizer), (other, copied)):
            gradients(each, step % 4)
            stepping.step()
    assert (copied.share, copied.update_every) == (0.5, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
def test_weights_that_become_factors_are_chosen_among(model):
    optimizer = BlockAdamW(model.parameters(), lr=1e-2, share=0.3, update_every=5)
    compiled = torch.compile(model, backend="sltrain", options={"rank": 4, "density": 0.1})
    x = torch.randn(16, 32)
    losses = []
    for _ in range(40):
        loss = (compiled(x) - x.roll(1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    matrices = [each for each in model.parameters() if each.dim() == 2]
    held = sum(each.numel() for each in matrices if optimizer.state.get(each))
    assert 0 < held <= 0.3 * sum(each.numel() for each in matrices)


def test_per_layer_updates_are_refused(model):
    optimizer = per_layer(BlockAdamW, model.parameters())
    with pytest.raises(ValueError, match="BlockAdamW cannot be used per layer"):
        model(torch.randn(3, 32)).sum().backward()
    del optimizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0}, r"share must be a number in \(0, 1\], got 0"),
        ({"share": "a"}, r"share must be a number in \(0, 1\], got 'a'"),
        ({"update_every": 0}, "update_every must be an int >= 1"),
    ],
)
def test_bad_options_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        BlockAdamW(model.parameters(), **options)


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_keeps_infinities_from_the_choice(model, fused):
    optimizer = BlockAdamW(model.parameters(), share=0.25, update_every=1, fused=fused)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=2.0), copy.deepcopy(model)
    scaler.scale(torch.zeros((), requires_grad=True))  # which makes the scale
    gradients(model, 2)
    model[1].weight.grad.fill_(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert moved(model, before) == [False] * 4
    gradients(model, 2)
    scaler.step(optimizer)
    assert moved(model, before) == [False, False, True, False]
    assert optimizer.param_groups[0]["block_step"] == 1
    assert optimizer.param_groups[0]["times_chosen"] == [0, 0, 0, 0, 1, 0, 0, 0]


def test_frozen_matrices_do_not_count(model):
    model[0].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    optimizer, before = BlockAdamW(model.parameters(), share=0.5), copy.deepcopy(model)
    gradients(model, 3)
    model[0].weight.grad = model[1].weight.grad = None
    optimizer.step()
    assert moved(model, before) == [False, False, False, True]  # half of two

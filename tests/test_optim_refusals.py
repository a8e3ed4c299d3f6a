"""What per-layer updates refuse: what would step twice, not at all, or for all parameters together."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.utils.checkpoint import checkpoint

import slcompile
from slcompile.optim import per_layer
from tests.testing import CONFIG


@pytest.mark.parametrize("accumulate", [1, 2])
def test_more_passes_than_agreed_are_refused(block, batch, accumulate):
    optimizer = per_layer(torch.optim.SGD, block.parameters(), lr=0.1, accumulate=accumulate)
    for _ in range(accumulate):
        (F.cross_entropy(block(batch[0]), batch[1]) / 2).backward()
    message = rf"got more gradients of a parameter .* than accumulate={accumulate}: call step\(\) after so many"
    with pytest.raises(RuntimeError, match=message):
        (F.cross_entropy(block(batch[0]), batch[1]) / 2).backward()
    with pytest.raises(RuntimeError, match="that no backward pass brought"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    for _ in range(accumulate):
        F.cross_entropy(block(batch[0]), batch[1]).backward()
    assert all(p.grad is None for p in block.parameters())


def test_a_parameter_shared_by_reentrant_checkpoints_is_refused(batch):
    layer = nn.Linear(64, 64)
    optimizer = per_layer(torch.optim.SGD, layer.parameters(), lr=0.1)
    hidden = checkpoint(layer, batch[0].clone().requires_grad_(), use_reentrant=True)
    output = checkpoint(layer, hidden, use_reentrant=True)
    with pytest.raises(RuntimeError, match="Several reentrant"):
        output.sum().backward()
    del optimizer  # alive until here, since its hooks are what refuses


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_is_refused(block, batch, unscale):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = per_layer(torch.optim.AdamW, block.parameters())
    scaler.scale(F.cross_entropy(block(batch[0]), batch[1])).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="cannot be used with GradScaler"):
        scaler.step(optimizer)


@pytest.mark.slow
def test_wrappers_that_do_not_tell_are_refused(block, batch):
    wrapped = nn.DataParallel(block)
    with pytest.raises(ValueError, match=r"cannot update \w+ of \w+ inside DataParallel: it does not say when"):
        per_layer(torch.optim.AdamW, wrapped.parameters())
    del wrapped
    gc.collect()
    optimizer = per_layer(torch.optim.AdamW, block.parameters())
    wrapped = nn.DataParallel(block)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match="inside DataParallel"):
        F.cross_entropy(wrapped(batch[0]), batch[1]).backward()
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])
    assert optimizer.state == {}


class GroupCounter(torch.optim.SGD):
    """Counts its steps in the group, as optimizers do that estimate something over all parameters."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_an_optimizer_that_writes_its_groups_is_refused(block, batch):
    optimizer = per_layer(GroupCounter, block.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"GroupCounter cannot be used per layer: its step\(\) writes k of a group"):
        F.cross_entropy(block(batch[0]), batch[1]).backward()
    assert "k" not in optimizer.param_groups[0]


class StepCounter(torch.optim.SGD):
    """Keeps how often it was called, as the attribute of one optimizer for all parameters."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        return super().step(closure)


def test_an_optimizer_that_counts_its_steps_is_refused(block, batch):
    """For n parameters it would count n steps in each."""
    optimizer = per_layer(StepCounter, block.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"its step\(\) writes its attribute calls, for all its parameters together"):
        F.cross_entropy(block(batch[0]), batch[1]).backward()
    assert optimizer.calls == 1


def test_bad_arguments_are_refused_and_leave_no_hook(block, batch):
    parameters = list(block.parameters())
    with pytest.raises(ValueError, match=r"optimizer_cls must be a subclass of torch\.optim\.Optimizer, got 'adamw'"):
        per_layer("adamw", parameters)
    with pytest.raises(ValueError, match="optimizer_cls got LBFGS, which needs a closure"):
        per_layer(torch.optim.LBFGS, parameters)
    for bad in (0, -1, 1.0, True, "2"):
        with pytest.raises(ValueError, match="accumulate must be an int >= 1, got"):
            per_layer(torch.optim.SGD, parameters, lr=0.1, accumulate=bad)
    for bad in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="max_grad_norm must be a finite number above 0 or None, got"):
            per_layer(torch.optim.SGD, parameters, lr=0.1, max_grad_norm=bad)
    F.cross_entropy(block(batch[0]), batch[1]).backward()
    with pytest.raises(ValueError, match="already has a gradient"):
        per_layer(torch.optim.SGD, parameters, lr=0.1)
    assert not any(p._post_accumulate_grad_hooks for p in parameters)
    block.zero_grad()
    optimizer = per_layer(torch.optim.SGD, parameters[:-1], lr=0.1)
    with pytest.raises(ValueError, match="already updated by another PerLayerSGD"):
        per_layer(torch.optim.AdamW, parameters[:1])
    with pytest.raises(ValueError, match="which is per layer already"):
        per_layer(type(optimizer), parameters[-1:])
    parameters[-1].grad = torch.zeros_like(parameters[-1])
    with pytest.raises(ValueError, match="already has a gradient"):
        optimizer.add_param_group({"params": parameters[-1:]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="closure must be None"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(optimizer)


def test_matrix_only_optimizers_and_stale_parameters_are_refused_at_once(block):
    stale = [block.up.weight]
    slcompile.factorize_(block, CONFIG)
    with pytest.raises(RuntimeError, match="Muon orthogonalises matrices"):
        per_layer(torch.optim.Muon, [p for p in block.parameters() if p.dim() == 2])
    with pytest.raises(RuntimeError, match=r"up\.weight was converted to factors"):
        per_layer(torch.optim.SGD, stale, lr=0.1)


def test_weights_that_torch_steps_in_the_backward_pass_are_refused_at_conversion(block):
    """By hooks on the nodes that accumulate their gradients, which those of factors would not have."""
    _apply_optimizer_in_backward(torch.optim.SGD, [block.up.weight], {"lr": 0.1})
    with pytest.raises(ValueError, match=r"up\.weight is stepped in the backward pass by torch's .* or take slcompile"):
        slcompile.factorize_(block, CONFIG)
    assert not slcompile.factors(block)


def test_other_hooks_on_a_weight_are_still_refused_at_conversion(block):
    optimizer = per_layer(torch.optim.SGD, block.parameters(), lr=0.1)
    handle = block.up.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match=r"up\.weight carries a post-accumulate-grad hook"):
        slcompile.factorize_(block, CONFIG)
    handle.remove()
    slcompile.factorize_(block, CONFIG)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in block.parameters()]

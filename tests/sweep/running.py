"""How the sweep runs a model: settings of Inductor, a loss of everything that a model returns, its gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import slcompile
from slcompile.health import composed_by_formula
from slcompile.torch_private import map_leaves

CPP = {"fallback_random": True}
"""What a user gets, but for random numbers, which are eager's."""


def leaves(outputs: Any, name: str = "") -> dict[str, Tensor]:
    """The floating-point tensors that a model returns, by their place."""
    if isinstance(outputs, Tensor):
        return {name: outputs} if outputs.is_floating_point() else {}
    if isinstance(outputs, Mapping):
        parts = list(outputs.items())
    elif isinstance(outputs, (tuple, list)):
        parts = list(enumerate(outputs))
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, each in parts:
        found |= leaves(each, f"{name}.{key}" if name else str(key))
    return found


def loss_from(outputs: Mapping[str, Tensor]) -> Tensor:
    """A model's own loss, if it has one, and how far each of its other outputs is from 1: all of them count."""
    parts = [
        each if name == "loss" else (each - 1).square().mean() for name, each in outputs.items() if each.requires_grad
    ]
    return torch.stack([each.reshape(()) for each in parts]).sum()


def loss_of(function: Callable[..., Any], inputs: Mapping[str, Any]) -> Tensor:
    """The loss of a run on random numbers that are always the same."""
    torch.manual_seed(7)
    return loss_from(leaves(function(**inputs)))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.grad.double() for name, each in model.named_parameters() if each.grad is not None}


def inputs_of(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs with floating-point ones in float64, where the model is."""
    if all(each.dtype != torch.float64 for each in model.parameters()):
        return inputs

    def widen(each: Any) -> Any:
        return each.double() if isinstance(each, Tensor) and each.is_floating_point() else each

    return map_leaves(widen, dict(inputs))


def exact_model(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """A copy that says what is right: in float64, weights composed by their formula, without the op that torch has not.

    In float32, and then with a note that says why, where float64 gives NaN or an error of the dense model as well:
    ProphetNet adds two masks, each the least number, and XGLM fills a mask in float32 with it.
    """
    dense = slcompile.merge_(copy.deepcopy(model)) if slcompile.factors(model) else model
    trouble = trouble_in_float64(dense, inputs)
    exact = composed_by_formula(copy.deepcopy(model))
    return (exact, f"compared with float32, not float64: {trouble}") if trouble else (_widened(exact), "")


def trouble_in_float64(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """What a model gives in float64 instead of numbers; empty where it gives numbers."""
    wide = _widened(copy.deepcopy(model))
    try:
        with torch.no_grad():
            outputs = leaves(wide(**inputs_of(wide, inputs)))
    except RuntimeError as error:
        return first_line(error)
    return ", ".join(f"{name} has NaN" for name, each in outputs.items() if bool(each.isnan().any()))


def _widened(model: nn.Module) -> nn.Module:
    wide = model.double()
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")
    return wide


@torch.no_grad()
def fill_factors(model: nn.Module) -> None:
    """Leaves the start of training, where B is zero and so is the gradient of A."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("_sl.B"):
            parameter.normal_(std=0.05)


def detach_states(model: nn.Module) -> None:
    """Some models keep what they computed as attributes, which cannot be copied while they have a history."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())


def first_line(error: BaseException) -> str:
    """The first line that says something of what an error comes from."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [each for each in str(error).splitlines() if each.strip() and not each.endswith("raised:")]
    return f"{type(error).__name__}: {(lines or [''])[0]}"[:200]

"""Marks on parameters that an optimizer may not step, and the one global hook that refuses to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from slcompile.weight.owners import LiveObjects
from slcompile.weight.structure import FactorizedWeight

_RETIRED, _SUCCESSOR, _VALUES = "_slcompile_retired", "_slcompile_successor", "_slcompile_values"
_looked_up: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameters of matrix-only optimizers -> True
_hook: Any = None


def retire(parameter: nn.Parameter, why: str, successor: nn.Module | None = None) -> None:
    """Marks a parameter that no module holds any more; ``successor`` is what took its place."""
    _watch()
    setattr(parameter, _RETIRED, why)
    setattr(parameter, _SUCCESSOR, successor)


def successor_of(parameter: torch.Tensor) -> Any:
    """Returns what took a retired dense weight's place; None for any other tensor."""
    return getattr(parameter, _SUCCESSOR, None)


def retired_for(parameter: torch.Tensor) -> str:
    """Returns why a parameter no longer trains; empty where it does."""
    return getattr(parameter, _RETIRED, "")


def mark_values(parameter: torch.Tensor) -> None:
    """Marks a weight's ``values``, which have the shape of a matrix and are none: not for matrix-only optimizers."""
    _watch()
    setattr(parameter, _VALUES, True)


def is_values(parameter: torch.Tensor) -> bool:
    """Returns whether a parameter is a weight's ``values``."""
    return getattr(parameter, _VALUES, False)


def mark_values_among(parameters: Iterable[torch.Tensor]) -> None:
    """Marks those that are a weight's ``values``: FSDP2's ``fully_shard`` put them in the place of marked ones."""
    parameters = list(parameters)
    owners = LiveObjects.find().owners(parameters)
    for each in parameters:
        weights = [module for module, _ in owners[id(each)] if isinstance(module, FactorizedWeight)]
        if any(each is values for weight in weights for values in weight.parts()["values"]):
            mark_values(each)


def is_matrix_only(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer treats each parameter as a matrix (Muon, and those that are named after it)."""
    return "Muon" in type(optimizer).__name__


MATRIX_ONLY = (
    "{} orthogonalises matrices and would do so to `values`, which is not one; give it the factors B and A after "
    "slcompile.factorize_, and `values` to another optimizer"
)


def _watch() -> None:
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_refuse)


def _refuse(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():  # Dynamo cannot trace a look into a parameter's attributes
        require_steppable(optimizer)


def require_steppable(optimizer: Optimizer) -> None:
    """Raises RuntimeError where an optimizer holds a parameter that it may not step."""
    kind = type(optimizer).__name__
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if is_matrix_only(optimizer) and not all(each in _looked_up for each in parameters):
        mark_values_among(parameters)
        for parameter in parameters:
            _looked_up[parameter] = True
    for parameter in parameters:
        marks = vars(parameter)
        if _RETIRED in marks:
            raise RuntimeError(
                f"{kind} holds a parameter that no longer trains: {marks[_RETIRED]}. Make the optimizer again from "
                "model.parameters()"
            )
        if _VALUES in marks and is_matrix_only(optimizer):
            raise RuntimeError(MATRIX_ONLY.format(kind))

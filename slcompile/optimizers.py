"""Optimizers that hold dense weights when those are converted: mended at once, or refused before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from slcompile.weight import SUFFIX, SLWeight

_RETIRED = "_slcompile_retired"
_hook: Any = None


class ParameterOrder:
    """The order of some models' ``parameters()``, by which a mended optimizer's state dict stays loadable."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self.roots = roots
        self.before = self.now()

    def now(self) -> dict[int, int]:
        """id of a parameter -> its position."""
        return {id(p): index for index, p in enumerate(p for root in self.roots for p in root.parameters())}


def require_mendable(optimizers: Iterable[Optimizer], replaced: Mapping[int, str]) -> None:
    """Raises ValueError for an optimizer that holds one of these dense weights and cannot be mended.

    Args:
        optimizers: All live ones.
        replaced: id of each dense weight that is to be converted -> its name.
    """
    for optimizer in optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in replaced]
        if not held:
            continue
        kind = type(optimizer).__name__
        for parameter in held:
            if optimizer.state.get(parameter):
                raise ValueError(
                    f"{kind} already has state for the dense weight {replaced[id(parameter)]}, which conversion would "
                    "lose; make a new optimizer, or convert before its first step"
                )
        if "Muon" in kind:
            raise ValueError(
                f"{kind} orthogonalises matrices and would do so to `values`, which is not one; give it the factors B "
                "and A after slcompile.factorize_, and `values` to another optimizer"
            )
        lists = [id(group["params"]) for group in optimizer.param_groups]
        for attribute, value in vars(optimizer).items():
            is_copy = isinstance(value, (list, tuple)) and id(value) not in lists
            if is_copy and any(id(each) in replaced for each in value):
                raise ValueError(
                    f"{kind} cannot be mended: it keeps dense weights in its attribute {attribute!r}; call "
                    "slcompile.factorize_(model) before making it"
                )


def mend(optimizers: Iterable[Optimizer], weights: Mapping[int, SLWeight], order: ParameterOrder) -> None:
    """Puts B, A and values in the place of each dense weight, in the groups that hold it.

    Lists are edited in place. A group that was in the order of ``parameters()`` is so afterwards.

    Args:
        optimizers: All live ones.
        weights: id of each dense weight -> what took its place.
        order: Of the models, from before the swap.
    """
    after = order.now()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            old, old_names = group["params"], group.get("param_names")
            if not any(id(p) in weights for p in old):
                continue
            new: list[tuple[nn.Parameter, str]] = []
            for parameter, name in zip(old, old_names or [""] * len(old), strict=True):
                if id(parameter) in weights:
                    factors = weights[id(parameter)].named_parameters()
                    new += [(factor, f"{name}{SUFFIX}.{suffix}") for suffix, factor in factors]
                else:
                    new.append((parameter, name))
            positions = [order.before.get(id(p), -1) for p in old]
            if -1 not in positions and positions == sorted(positions):
                new.sort(key=lambda item: after[id(item[0])])
            old[:] = [parameter for parameter, _ in new]
            if old_names is not None:
                old_names[:] = [name for _, name in new]


def retire(parameter: nn.Parameter, name: str, why: str) -> None:
    """Marks a parameter that no module holds any more: an optimizer that still holds it refuses to step."""
    global _hook
    setattr(parameter, _RETIRED, f"{name} was {why}")
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_refuse_retired)


def _refuse_retired(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return  # Dynamo cannot trace a look into a parameter's attributes
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if _RETIRED in vars(parameter):
                raise RuntimeError(
                    f"{type(optimizer).__name__} holds a parameter that no longer trains: {vars(parameter)[_RETIRED]}. "
                    "Make the optimizer again from model.parameters()"
                )

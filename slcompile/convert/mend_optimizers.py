"""Optimizers that hold dense weights when those are converted: mended at once, or refused before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from slcompile.names import SUFFIX
from slcompile.optim import PerLayer
from slcompile.weight.marks import MATRIX_ONLY, is_matrix_only


def positions(roots: Sequence[nn.Module]) -> dict[int, int]:
    """Returns the position of each parameter in the ``parameters()`` of some models, by its id."""
    return {id(p): index for index, p in enumerate(p for root in roots for p in root.parameters())}


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
                    "lose; call slcompile.factorize_(model) first and make the optimizer after it"
                )
        if is_matrix_only(optimizer):
            raise ValueError(MATRIX_ONLY.format(kind))
        for group in optimizer.param_groups:
            if len(group.get("param_names", group["params"])) != len(group["params"]):
                raise ValueError(f"{kind} cannot be mended: a group has not as many param_names as params")
        seen = {id(optimizer.param_groups), id(optimizer.state)}
        seen |= {id(each) for group in optimizer.param_groups for each in (group, group["params"])}
        for attribute, value in vars(optimizer).items():
            if _holds(value, replaced, seen):
                raise ValueError(
                    f"{kind} cannot be mended: it keeps dense weights in its attribute {attribute!r}; call "
                    "slcompile.factorize_(model) before making it"
                )


def _holds(value: Any, replaced: Mapping[int, str], seen: set[int]) -> bool:
    """Returns whether a collection has a dense weight in it, however deep, but for those whose ids were seen."""
    if not isinstance(value, (dict, list, tuple, set)) or id(value) in seen:
        return False
    seen.add(id(value))
    inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return any(id(each) in replaced or _holds(each, replaced, seen) for each in inside)


def mend(
    optimizers: Iterable[Optimizer],
    weights: Mapping[int, nn.Module],
    before: Mapping[int, int],
    after: Mapping[int, int],
) -> None:
    """Puts the trained parts of a weight in the place of the dense one, in the groups that hold it.

    Lists are edited in place, all or none. A group that was in the order of ``parameters()`` is so afterwards, so that
    the optimizer's state dict fits an optimizer made of the converted model. Per-layer optimizers hook the new ones.

    Args:
        optimizers: All live ones.
        weights: id of each dense weight -> what took its place.
        before, after: ``positions`` of the models before and after the swap.
    """
    edits: list[tuple[list, list]] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            old, old_names = group["params"], group.get("param_names")
            if not any(id(p) in weights for p in old):
                continue
            new: list[tuple[nn.Parameter, str]] = []
            for parameter, name in zip(old, old_names or [""] * len(old), strict=True):
                if id(parameter) in weights:
                    parts = weights[id(parameter)].named_parameters()
                    new += [(part, f"{name}{SUFFIX}.{suffix}") for suffix, part in parts if part.requires_grad]
                else:
                    new.append((parameter, name))
            places = [before.get(id(p), -1) for p in old]
            if -1 not in places and places == sorted(places):
                new.sort(key=lambda item: after[id(item[0])])
            edits.append((old, [parameter for parameter, _ in new]))
            if old_names is not None:
                edits.append((old_names, [name for _, name in new]))
    old_contents = [(target, list(target)) for target, _ in edits]
    per_layer = [optimizer for optimizer in optimizers if isinstance(optimizer, PerLayer)]
    try:
        for target, content in edits:
            target[:] = content
        for optimizer in per_layer:
            optimizer.watch()
    except BaseException:
        for target, content in old_contents:
            target[:] = content
        for optimizer in per_layer:
            optimizer.watch()
        raise

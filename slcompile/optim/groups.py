"""Groups of parameters by the rates at which they learn."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor

from slcompile.config import require_number
from slcompile.weight.marks import is_values, mark_values_among

RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""What a group holds that is a learning rate: its own, and what torch's schedulers write beside it."""


def parameter_groups(
    params_or_groups: Iterable[Any], *, lr: float, values_rate: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups parameters for an optimizer so that the sparse parts' values have a rate of their own beside B's and A's.

    S has so few entries that at the factors' rate it hardly moves: an optimizer that moves each entry by about its
    rate moves a dense weight by ``lr * sqrt(rows * columns)`` in the Frobenius norm and S by ``sqrt(density)`` times
    that. Decoupled weight decay, which goes with the rate, is divided by ``values_rate`` and so stays what it was.
    ``docs/quality.md`` has what four times the rate brought, which is why there is no default: something in short runs,
    next to nothing in longer ones, and harm where embeddings do not have a faster rate, too.

    A scheduler that is given one rate for all groups, as OneCycleLR's and CyclicLR's ``max_lr``, makes them equal
    again: give it a list, ``[group["lr"] for group in groups]``.

    Args:
        params_or_groups: As optimizers take them, of a model that is factorized already: parameters, or dicts with
            "params" and what a group has. Groups keep their order; each with values is followed by one of its values,
            in which the rates that a scheduler noted (``initial_lr`` and the like) are multiplied, too.
        lr: Learning rate of the groups that have none.
        values_rate: Learning rate of values relative to their group's.
        weight_decay: Of the groups that have none.

    Returns:
        Groups that all have "lr" and "weight_decay".

    Raises:
        ValueError: ``values_rate`` is not a positive number; ``lr`` or ``weight_decay``, of a group its own, is none of
            at least 0; ``params_or_groups`` is not what optimizers take; or no parameter is the values of a factorized
            weight.
    """
    require_number("values_rate", values_rate)
    _require_listed("params_or_groups", params_or_groups)
    given = list(params_or_groups)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    for index, group in enumerate(groups):
        if not isinstance(group, dict):
            raise ValueError(f"params_or_groups[{index}] must be a dict as the first is, got {type(group).__name__}")
        _require_listed(f"params_or_groups[{index}]['params']", group.get("params"))
        _require_rate("lr", group.get("lr", lr))
        _require_rate("weight_decay", group.get("weight_decay", weight_decay))
    parameters = [_listed(group["params"]) for group in groups]
    mark_values_among(_parameter(each) for params in parameters for each in params)
    split: list[dict[str, Any]] = []
    for group, params in zip(groups, parameters, strict=True):
        slow: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, **group}
        fast = {name: slow[name] * values_rate for name in RATES if name in slow}
        fast["weight_decay"] = slow["weight_decay"] / values_rate
        values = [each for each in params if is_values(_parameter(each))]
        others = [each for each in params if not is_values(_parameter(each))]
        if others:
            split.append({**slow, "params": others})
        if values:
            split.append({**slow, **fast, "params": values})
    if not any(is_values(_parameter(each)) for group in split for each in group["params"]):
        raise ValueError(
            "params_or_groups must be of a factorized model, got none with values: factorize the model before"
        )
    return split


def _require_listed(name: str, params: Any) -> None:
    """Raises ValueError for what optimizers do not take, such as a set, which has no order."""
    if not isinstance(params, Iterable) or isinstance(params, (set, dict)):
        raise ValueError(f"{name} must be an ordered iterable of parameters, got {type(params).__name__}")


def _require_rate(name: str, rate: Any) -> None:
    """Raises ValueError for no number of at least 0; a tensor may be one, which is not read from its device."""
    if not isinstance(rate, Tensor) and not (isinstance(rate, Real) and 0 <= float(rate) < math.inf):
        raise ValueError(f"{name} must be a finite number of at least 0, got {rate!r:.200}")


def _listed(params: Any) -> list[Any]:
    """Returns parameters, or pairs of a name and a parameter, which optimizers take as well."""
    return [params] if isinstance(params, Tensor) else list(params)


def _parameter(listed: Any) -> Tensor:
    return listed[1] if isinstance(listed, tuple) else listed

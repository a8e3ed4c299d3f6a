"""Groups of parameters by the rates at which they learn."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from slcompile.weight.marks import is_values


def parameter_groups(
    params_or_groups: Iterable[Any], *, lr: float, weight_decay: float = 0.0, values_rate: float = 4.0
) -> list[dict[str, Any]]:
    """Groups parameters for an optimizer so that the sparse parts' values learn faster than the factors B and A.

    S has so few entries that at the factors' rate it hardly moves: an optimizer that moves each entry by about its
    rate moves a dense weight by ``lr * sqrt(rows * columns)`` in the Frobenius norm and S by ``sqrt(density)`` times
    that. Decoupled weight decay, which goes with the rate, is divided by ``values_rate`` and so stays what it was.
    ``docs/quality.md`` has what it brought.

    Args:
        params_or_groups: As optimizers take them, of a model that is factorized already: parameters, or dicts with
            "params" and what a group has. Groups keep their order; each with values is followed by one of its values.
        lr, weight_decay: Of the groups that have none.
        values_rate: Learning rate of values relative to their group's.

    Returns:
        Groups that all have "lr" and "weight_decay".

    Raises:
        ValueError: ``values_rate`` is not a positive number, or no parameter is the values of a factorized weight.
    """
    if not 0 < values_rate < math.inf:
        raise ValueError(f"values_rate must be a finite number above 0, got {values_rate!r}")
    given = list(params_or_groups)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    split: list[dict[str, Any]] = []
    for group in groups:
        slow: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, **group}
        fast = {"lr": slow["lr"] * values_rate, "weight_decay": slow["weight_decay"] / values_rate}
        parameters = [slow["params"]] if isinstance(slow["params"], Tensor) else list(slow["params"])
        values = [each for each in parameters if is_values(each)]
        others = [each for each in parameters if not is_values(each)]
        if others:
            split.append({**slow, "params": others})
        if values:
            split.append({**slow, **fast, "params": values})
    if not any(is_values(each) for group in split for each in group["params"]):
        raise ValueError(
            "params_or_groups must be of a factorized model, got none with values: factorize the model before"
        )
    return split

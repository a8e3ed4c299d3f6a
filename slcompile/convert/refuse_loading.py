"""A state dict of factors that meets a dense model, or dense weights a factorized one: refused, strict or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from slcompile import torch_private
from slcompile.names import SUFFIX
from slcompile.weight.structure import FactorizedWeight

_PART = f"{SUFFIX}."
"""What follows the dense weight's name in the key of each part of a factorized weight."""


def watch_loading() -> None:
    """Makes every ``load_state_dict`` of this process call ``require_same_form`` first.

    Trainers load non-strictly: what fits nowhere is left out with a warning at most, and training goes on from weights
    that nobody chose.
    """
    torch_private.before_load_state_dict(require_same_form)


def require_same_form(model: nn.Module, state: Any) -> None:
    """Raises RuntimeError, as loading does, where a weight is factorized in the state dict or in the model only."""
    if not isinstance(state, Mapping):
        return  # load_state_dict says so itself
    factorized = {key.rpartition(_PART)[0] for key in state if _PART in key}
    if factorized:
        dense = [name for name, _ in model.named_parameters(remove_duplicate=False) if name in factorized]
        if dense:
            raise RuntimeError(
                f"the state dict holds the factors of {_listed(dense)}, dense in this {type(model).__name__}: call "
                "slcompile.factorize_(model, config) before loading, with the config of the training"
            )
    weights = [
        name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, FactorizedWeight)
    ]
    dense = [name for each in weights if (name := each.removesuffix(SUFFIX)) in state]
    if dense:
        raise RuntimeError(
            f"the state dict holds dense weights for {_listed(dense)}, factorized in this {type(model).__name__}: load "
            'it before the model is factorized (init="spectral" approximates it), or call slcompile.merge_(model) first'
        )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

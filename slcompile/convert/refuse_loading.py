"""What a model must not load, strict or not: factors into a dense model, dense weights or broken parts into factors."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from slcompile import torch_private
from slcompile.names import SUFFIX, qualified
from slcompile.weight.structure import SCALE, FactorizedWeight

_PART = f"{SUFFIX}."
"""What follows the dense weight's name in the key of each part of a factorized weight."""


def watch_loading() -> None:
    """Makes every ``load_state_dict`` of this process call ``require_same_form`` and ``require_parts_fit`` first.

    Trainers load non-strictly: what fits nowhere is left out with a warning at most, and training goes on from weights
    that nobody chose. And torch loads what fits before it says what does not.
    """

    def check(model: nn.Module, state: Any, strict: bool, assign: bool) -> None:
        if isinstance(state, Mapping):  # load_state_dict says so itself
            require_same_form(model, state)
            require_parts_fit(model, state, strict, assign)

    torch_private.before_load_state_dict(check)


def require_same_form(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raises RuntimeError, as loading does, where a weight is factorized in the state dict or in the model only."""
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


def require_parts_fit(model: nn.Module, state: Mapping[str, Any], strict: bool, assign: bool = False) -> None:
    """Raises RuntimeError, as loading does, where a factorized model would refuse a part of the state dict.

    Torch refuses when it has loaded the rest; here the model stays as it is. Refused besides: numbers of another kind
    (a float for a position), positions that are not ascending or not inside the weight, parts that a weight does not
    have (a base), and another scale, where the state dict tells it. Sharded models are left to torch. So are missing
    and unexpected keys where a module loads itself in a way of its own.
    """
    weights = {name: each for name, each in model.named_modules() if isinstance(each, FactorizedWeight)}
    own = dict(_saved(model)) if weights else {}
    if not weights or any(type(each.data) is not Tensor for each in own.values()):
        return
    given = {name: state[name] for name in own if name in state}
    errors = [error for name, each in given.items() for error in _misfits(name, own[name], each, assign)]
    if not errors:
        parts = {f"{name}." if name else "": weight for name, weight in weights.items()}
        errors += [error for prefix, weight in parts.items() if (error := weight.misfit(state, prefix))]
        errors += _of_other_options(parts, state, () if strict else own)
    if strict and all(map(_loads_as_torch_does, model.modules())):
        errors += [f"{name} is missing" for name in own if name not in state]
        errors += [f"{name} is unexpected" for name in state if name not in own]
    if errors:
        more = f"\n\tand {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
        listed = "".join(f"\n\t{error:.500}" for error in errors[:SHOWN])
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(model).__name__}; nothing was loaded:{listed}{more}"
        )


SHOWN = 10
"""Errors of a state dict that are said."""


def _of_other_options(
    weights: Mapping[str, FactorizedWeight], state: Mapping[str, Any], own: Collection[str]
) -> Iterator[str]:
    """Yields why parts are those of weights that were factorized with other options.

    Args:
        weights: By what the names of their parts begin with.
        state: The state dict.
        own: Names that the model has; empty where loading says itself what is unexpected.
    """
    metadata = getattr(state, "_metadata", None) or {}
    held: dict[str, list[str]] = {}
    for key in state:
        held.setdefault(key[: key.rfind(".") + 1], []).append(key)
    for prefix, weight in weights.items():
        if keys := held.get(prefix):
            strange = [key for key in keys if own and key not in own]
            yield from (f"{key} is no part of {weight}: it was factorized with other options" for key in strange)
            scale = metadata.get(prefix[:-1], {}).get(SCALE, weight.scale)
            if not math.isclose(scale, weight.scale):
                yield (
                    f"{prefix[:-1]} has a scale (alpha / rank) of {weight.scale:g}, in the state dict {scale:g}: "
                    "factorize with the alpha of the training"
                )


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters and buffers that a state dict holds, by name; a state dict itself would be gathered."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, each in (*module._parameters.items(), *module._buffers.items()):
            if each is not None and name not in module._non_persistent_buffers_set:
                yield qualified(path, name), each


def _misfits(name: str, own: Tensor, given: Any, assign: bool) -> Iterator[str]:
    """Yields why an entry cannot be loaded into a parameter or buffer."""
    if is_lazy(own):
        return  # it takes any shape
    if not isinstance(given, Tensor):
        yield f"{name} must be a tensor, got {type(given).__name__}"
    elif given.shape != own.shape and not (own.dim() == 0 and tuple(given.shape) == (1,)):
        yield f"{name} must have shape {tuple(own.shape)}, got {tuple(given.shape)}"
    elif _kind(given) != _kind(own) or given.layout != own.layout:
        yield f"{name} must be {own.dtype}, got {given.dtype}, {given.layout}"
    elif given.is_meta and not (own.is_meta or assign):
        yield f"{name} has no numbers to copy: it is on the meta device"


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype is torch.bool


def _loads_as_torch_does(module: nn.Module) -> bool:
    """Says whether a module takes its entries by their names, and all of them."""
    kind = type(module)
    plain = kind._load_from_state_dict is nn.Module._load_from_state_dict
    plain &= kind.get_extra_state is nn.Module.get_extra_state
    hooks = module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks  # which may forgive what is missing
    return (plain or isinstance(module, FactorizedWeight)) and not hooks


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

"""Factors that several weights share: CP factors among layers and matrices, as in LoRTA (arXiv 2410.04060)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slcompile.models import unwrapped
from slcompile.weight.marks import retire
from slcompile.weight.structure import SHARES_WITH, FactorizedWeight, weights_by_name


def share_factors(model: nn.Module) -> nn.Module:
    """Lets all weights of equal shape share the factors of ``structure="cp"``, and have coefficients of their own.

    Of L weights [rows, columns] with H heads, ``W_l[(h, i), j] = base_l + scale * sum_r C_l[h, r] B[i, r] A[r, j]``:
    B [rows/H, rank] and A [rank, columns] are one parameter each, held by every weight, and C_l [H, rank] is its own.
    That is the CP decomposition of LoRTA, with layers, matrices and heads in one dimension of the tensor.

    What the model computes stays the same, so it is to be called while the added part is zero, as it is at the start
    beside a frozen base, or where the factors are equal already. Make the optimizer afterwards: it then holds each
    factor once. The weights stay shared in copies, pickles, state dicts, checkpoints (``load_factorized``) and when the
    model is moved, but not where a parameter gets another object: ``to_empty``, ``load_state_dict(assign=True)``, and
    ``fully_shard`` of single layers.

    Args:
        model: Factorized; changed in place.

    Returns:
        The model.

    Raises:
        ValueError: No two weights are alike, factors are different and in use, or they have no memory or are sharded.
            Nothing has changed then.
    """
    model = unwrapped(model)
    named = weights_by_name(model)
    alike: dict[Any, list[str]] = {}
    for name, weight in named.items():
        if type(weight).sharable:
            alike.setdefault(_kind(weight), []).append(name)
    groups = [names for names in alike.values() if len(names) > 1]
    if not groups:
        raise ValueError(
            "model has no two weights that can share factors: those of structure='cp' can, of equal shape, rank, "
            "blocks, scale, dtype and device"
        )
    for names in groups:
        _require_same_after(names, [named[name] for name in names])
    for first, *others in groups:
        for name in others:
            for part in _tie(named[name], named[first]):
                retire(part, f"{name} shares the factors of {first} since share_factors")
    return model


def sharing(model: nn.Module) -> dict[str, str]:
    """Returns the dense name of each weight that shares factors -> that of the first one that has them."""
    firsts: dict[tuple[int, ...], str] = {}
    found = {}
    for name, weight in weights_by_name(model).items():
        if type(weight).sharable:
            first = firsts.setdefault(tuple(id(each) for each in _parts(weight)), name)
            if first != name:
                found[name] = first
    return found


def share_again(weights: Mapping[str, FactorizedWeight], shares: Mapping[str, Any]) -> None:
    """Lets weights, by their dense names, share factors as ``sharing`` said of another model.

    Raises:
        ValueError: What is shared with is no weight, or two weights cannot share.
    """
    for name, first in shares.items():
        own, other = weights[name], weights.get(first) if isinstance(first, str) else None
        if other is None or not type(own).sharable or not type(other).sharable or _kind(own) != _kind(other):
            raise ValueError(f"{name:.200} cannot share factors with {first!r:.200}")
    for name, first in shares.items():
        _tie(weights[name], weights[first])


def _parts(weight: FactorizedWeight) -> list[nn.Parameter]:
    return [weight.get_parameter(part) for part in type(weight).sharable]


def _kind(weight: FactorizedWeight) -> Any:
    """Returns what is equal for weights that can share factors."""
    shapes = tuple((name, tuple(each.shape)) for name, each in weight.named_parameters() if name != "base")
    part = _parts(weight)[0]
    return type(weight), weight.shape, weight.input_dim, weight.op_args(), shapes, part.dtype, part.device


def _tie(weight: FactorizedWeight, first: FactorizedWeight) -> list[nn.Parameter]:
    """Gives a weight the other one's factors; returns those that it had."""
    before = _parts(weight)
    for name, part in zip(type(weight).sharable, _parts(first), strict=True):
        setattr(weight, name, part)
    vars(weight)[SHARES_WITH] = first  # for check_support; no submodule
    vars(weight)["_tied_weights_keys"] = dict.fromkeys(type(weight).sharable, "")  # transformers then writes them once
    return [old for old, new in zip(before, _parts(first), strict=True) if old is not new]


def _require_same_after(names: Sequence[str], weights: Sequence[FactorizedWeight]) -> None:
    for name, weight in zip(names, weights, strict=True):
        for part in _parts(weight):
            if part.is_meta or type(part.data) is not Tensor:
                held = "on the meta device" if part.is_meta else f"a {type(part.data).__name__}"
                raise ValueError(f"the factors of {name} are {held}: share them before they are sharded, with memory")
    columns = list(zip(*map(_parts, weights), strict=True))  # one part of all weights
    is_zero = any(not any(bool(each.any()) for each in column) for column in columns)
    if not is_zero and not all(torch.equal(each, column[0]) for column in columns for each in column):
        raise ValueError(
            f"the factors of {names[0]} and {names[1]} differ, so that sharing them would change what the model "
            "computes: call share_factors before training, on a model that was factorized with base='frozen'"
        )

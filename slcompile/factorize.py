"""A model's weights as factors, and back: ``factorize_``, ``merge_``, ``factors``, ``merged_state_dict``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from slcompile import torch_private
from slcompile.capture import captured_uses
from slcompile.config import SLConfig
from slcompile.conversion import EXPLICIT, choose, convert, forget, linear_modules, lock
from slcompile.eligibility import require_possible_rank
from slcompile.owners import LiveObjects, plain_name
from slcompile.passes import merge_weights, run
from slcompile.passes.find_matmuls import WeightUse, is_weight
from slcompile.step_hook import retire
from slcompile.weight import SUFFIX, Factors, SLWeight, dense_names, restore, sl_names, snapshot, take_out


def factorize_(
    model: nn.Module,
    config: SLConfig | None = None,
    *,
    example_args: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Factorizes a model's weights in place, ``W = scale * B @ A + S`` (SLTrain, arXiv 2406.02214).

    Without example arguments the weights are those of ``nn.Linear`` and transformers' ``Conv1D`` modules; with them
    the model is run once under Dynamo, and every parameter that a matmul of the captured graphs reads is found. A
    model that was factorized explicitly is left as it is by ``backend="sltrain"``.

    Args:
        model: Changed in place, in any mode. Live optimizers that hold its dense weights are mended.
        config: Defaults to ``SLConfig()``.
        example_args, example_kwargs: What ``model`` is called with to capture its graph.

    Returns:
        The model.

    Raises:
        ValueError: Nothing is eligible, a pattern or the rank fits nothing, a weight holds NaN or Inf or carries
            hooks or a parametrization, a module cannot be converted, an optimizer cannot be mended. The model is
            then as it was.
    """
    config = checked_config(config)
    model = unwrapped(model)
    config.require_patterns_match(dense_names(model))
    if example_args is None and example_kwargs is None:
        uses = _uses_by_module_type(model, config)
    else:
        uses = captured_uses(model, tuple(example_args or ()), dict(example_kwargs or {}))
    with lock:
        live = LiveObjects.find()
        owners = live.owners(weight for weight, _ in uses)
        names = live.names(model)
        candidates, report = choose(
            [(names.get(id(weight), []), weight, owners[id(weight)], use) for weight, use in uses], config
        )
        if not candidates:
            require_possible_rank([each.shape for each in report.skipped if each.reason == "no_saving"], config)
            reasons = sorted({each.reason for each in report.skipped})
            raise ValueError(f"model has no eligible weight; its {len(uses)} weights stay dense: {', '.join(reasons)}")
        convert(candidates, config, live, report)
        object.__setattr__(model, EXPLICIT, config)
    return model


def merge_(model: nn.Module) -> nn.Module:
    """Turns every factorized weight of a model back into a dense parameter, in place; returns the model.

    Outputs stay the same to rounding. Classes, attributes and keys are those of the model before its conversion.
    One dense weight is made at a time. Optimizers that hold the factors refuse to step afterwards. A compiled function
    of the model stays what it is: in a next training step, ``backend="sltrain"`` converts again.

    Raises:
        RuntimeError: A seed buffer was overwritten, or the factors are sharded; the model is then as it was.
    """
    model = unwrapped(model)
    places = [(module, name, getattr(module, name + SUFFIX)) for module in model.modules() for name in sl_names(module)]
    for _, _, weight in places:
        weight.check_support()
        weight.check_whole()
    merged: dict[int, nn.Parameter] = {}
    before = snapshot(module for module, _, _ in places)
    try:
        for module, name, weight in places:
            if id(weight) not in merged:
                trained = any(each.requires_grad for each in weight.parameters())
                merged[id(weight)] = nn.Parameter(weight.merged(), requires_grad=trained)
            take_out(module, name, merged[id(weight)])
    except BaseException:
        restore(before)
        raise
    for _, name, weight in places:
        for suffix, parameter in weight.named_parameters():
            retire(parameter, f"{name}{SUFFIX}.{suffix} was merged into a dense weight by merge_")
    for module in model.modules():
        vars(module).pop(EXPLICIT, None)
        if isinstance(module, fx.GraphModule):
            run([merge_weights], module)
    forget(model)
    return model


def factors(model: nn.Module) -> dict[str, Factors]:
    """Name of each factorized weight, as it was when dense -> its factors (detached, sharing memory)."""
    return {name: weight.factors() for name, weight in _named_weights(unwrapped(model))}


def merged_state_dict(model: nn.Module) -> Mapping[str, Tensor]:
    """A state dict with dense tensors under the original names; each is composed when it is read, and not kept.

    Reading it item by item needs the memory of one dense weight. ``load_state_dict(..., strict=True)`` of a freshly
    built dense model and ``torch.save`` take it too, and hold all of it while they run.
    """
    model = unwrapped(model)
    state = model.state_dict()
    entries: dict[str, Tensor | SLWeight] = {}
    weights = {name + SUFFIX + ".": (name, weight) for name, weight in _named_weights(model)}
    for key, value in state.items():
        key = plain_name(key)
        prefix = key[: key.rfind(".") + 1]
        if prefix in weights:
            name, weight = weights[prefix]
            entries.setdefault(name, weight)
        else:
            entries[key] = value
    return _MergedStateDict(entries, getattr(state, "_metadata", None))


class _MergedStateDict(Mapping[str, Tensor]):
    def __init__(self, entries: dict[str, Tensor | SLWeight], metadata: Any) -> None:
        self._entries, self._metadata = entries, metadata

    def __getitem__(self, key: str) -> Tensor:
        value = self._entries[key]
        return value.merged() if isinstance(value, SLWeight) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self):
        return OrderedDict, (), None, None, iter(self.items())  # torch.save writes an ordinary state dict


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where torch.compile's wrapper is given."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return torch_private.without_wrappers(model)


def checked_config(config: SLConfig | None) -> SLConfig:
    """The config, the default one for None."""
    if config is not None and not isinstance(config, SLConfig):
        raise ValueError(f"config must be an SLConfig, got {type(config).__name__}")
    return config if config is not None else SLConfig()


def _uses_by_module_type(model: nn.Module, config: SLConfig) -> list[tuple[nn.Parameter, WeightUse]]:
    for path, module in model.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule) and is_weight(getattr(module, "weight", None))
        name = plain_name(f"{path}.weight".lstrip("."))
        if scripted and config.includes(name):
            raise ValueError(f"{name} is of a scripted module and cannot be factorized; exclude it, or script later")
    uses: dict[int, tuple[nn.Parameter, WeightUse]] = {}
    for path, module, input_dim in linear_modules(model):
        weight = module._parameters.get("weight")
        if weight is None:
            name = f"{path}.weight".lstrip(".")
            if nn.utils.parametrize.is_parametrized(module, "weight") and config.includes(name):
                raise ValueError(f"{name} carries a parametrization; remove it, or exclude the weight")
            continue  # already factorized, or not a parameter
        uses.setdefault(id(weight), (weight, WeightUse(input_dim=input_dim)))[1].matmuls.append("linear")
    return list(uses.values())


def _named_weights(model: nn.Module) -> Iterator[tuple[str, SLWeight]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for name in sl_names(module):
            yield plain_name(f"{path}.{name}".lstrip(".")), getattr(module, name + SUFFIX)

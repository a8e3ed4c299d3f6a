"""A model's weights as factors, and back: ``factorize_``, ``merge_``, ``factors``, ``merged_state_dict``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from slcompile.config import SLConfig, checked_config
from slcompile.convert.candidates import gather
from slcompile.convert.ledger import EXPLICIT, Ledger, ledger
from slcompile.convert.refuse_loading import watch_loading
from slcompile.convert.transaction import convert
from slcompile.convert.weight_uses import unread_layers, uses_of
from slcompile.models import bare, forget_factors, unwrapped
from slcompile.names import SUFFIX, plain_name, qualified
from slcompile.passes import merge_weights, run
from slcompile.passes.find_matmuls import WeightUse
from slcompile.weight.marks import retire
from slcompile.weight.owners import LiveObjects
from slcompile.weight.placing import dense_names, restore, sl_names, snapshot, take_out
from slcompile.weight.structure import FactorizedWeight

watch_loading()  # now: a dense model may be given a checkpoint of factors before anything is converted


def factorize_(
    model: nn.Module,
    config: SLConfig | None = None,
    *,
    example_args: Sequence[Any] | Tensor | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Factorizes a model's weights in place, ``W = scale * B @ A + S`` (SLTrain, arXiv 2406.02214).

    Without example arguments the weights are those of ``nn.Linear``, transformers' ``Conv1D`` and ``nn.Conv1d``,
    ``Conv2d`` and ``Conv3d`` modules without groups; with them the model is run once under Dynamo, and every parameter
    that a matmul or a convolution of the captured graphs reads is found. A model that was factorized explicitly is
    left as it is by ``backend="sltrain"``.

    Args:
        model: Changed in place, in any mode. Live optimizers that hold its dense weights are mended.
        config: Defaults to ``SLConfig()``. What it says of compilation (``lowering``, ``save``, ...) holds where the
            options of ``torch.compile`` say nothing else.
        example_args, example_kwargs: What ``model`` is called with to capture its graph.

    Returns:
        The model.

    Raises:
        ValueError: Nothing is eligible, a pattern or the rank fits nothing, a weight holds NaN or Inf or carries
            hooks or a parametrization, a module cannot be converted, an optimizer cannot be mended, or ``config`` has
            ``dryrun=True``. The model is then as it was.
    """
    config = checked_config(config)
    if config.dryrun:
        raise ValueError("config must not have dryrun=True, which replaces nothing: call slcompile.explain")
    return factorize_model(model, config, example_args, example_kwargs, ledger)


@torch.inference_mode(False)  # parameters that are made in it cannot be trained
def factorize_model(
    model: nn.Module,
    config: SLConfig,
    example_args: Sequence[Any] | Tensor | None,
    example_kwargs: Mapping[str, Any] | None,
    ledger: Ledger,
) -> nn.Module:
    """Does what ``factorize_`` does, and notes it in a ledger: the process's, or an estimate's own."""
    model = unwrapped(model)
    config.require_patterns_match(dense_names(model))
    uses = uses_of(model, config, example_args, example_kwargs)
    if example_args is not None or example_kwargs is not None:
        ledger.warn_of_unread(unread_layers(model, config, uses))
    return factorize_uses(model, config, uses, ledger)


def factorize_uses(
    model: nn.Module,
    config: SLConfig,
    uses: Sequence[tuple[nn.Parameter, WeightUse]],
    ledger: Ledger,
    made: Mapping[int, FactorizedWeight] | None = None,
) -> nn.Module:
    """Factorizes the weights of which is known how the model uses them; returns the model.

    ``made`` are weight modules that were made and filled before, by the id of the dense weight.
    """
    with ledger.lock:
        live = LiveObjects.find()
        found = gather(uses, config, live, model=model)
        found.require_some(model, config)
        convert(found.chosen, config, live, found.report(), ledger, made)
        ledger.note_explicit(model, config)
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
    _merge_places(_places(model))
    for module in model.modules():
        vars(module).pop(EXPLICIT, None)
        forget_factors(vars(module).get("config"))
        if isinstance(module, fx.GraphModule):
            run([merge_weights], module)
    ledger.forget(model)
    return model


def merge_some(model: nn.Module, names: Collection[str]) -> None:
    """Merges the factorized weights of these names, and leaves the others; errors as ``merge_``."""
    wanted = {id(weight) for name, weight in named_weights(model) if name in names}
    _merge_places([place for place in _places(model) if id(place[2]) in wanted])


def _places(model: nn.Module) -> list[tuple[nn.Module, str, FactorizedWeight]]:
    """Returns every module that has a factorized weight, the weight's name there, and the weight."""
    return [(module, name, getattr(module, name + SUFFIX)) for module in model.modules() for name in sl_names(module)]


@torch.inference_mode(False)
def _merge_places(places: Sequence[tuple[nn.Module, str, FactorizedWeight]]) -> None:
    for _, _, weight in places:
        weight.check_support()
        weight.check_whole()
    merged: dict[int, nn.Parameter] = {}
    before = snapshot(module for module, _, _ in places)
    try:
        for module, name, weight in places:
            if id(weight) not in merged:
                trained = any(parameter.requires_grad for parameter in weight.parameters())
                merged[id(weight)] = nn.Parameter(weight.merged(), requires_grad=trained)
            take_out(module, name, merged[id(weight)])
    except BaseException:
        restore(before)
        raise
    gone = {id(weight) for _, _, weight in places}
    owners = LiveObjects.find().owners([each for _, _, weight in places for each in weight.parameters()])
    for _, name, weight in places:
        for suffix, parameter in weight.named_parameters():
            if all(id(owner) in gone for owner, _ in owners[id(parameter)]):  # else others share it, and train on
                retire(parameter, f"{name}{SUFFIX}.{suffix} was merged into a dense weight by merge_")


def factors(model: nn.Module) -> dict[str, Any]:
    """Returns the factors of each factorized weight, by its name when it was dense; detached, sharing memory.

    They are ``Factors``; of a structure other than SLTrain's, the operands of its op by name.

    Raises:
        RuntimeError: A seed buffer was overwritten.
    """
    return {name: weight.factors() for name, weight in named_weights(bare(model))}


def merged_state_dict(model: nn.Module) -> Mapping[str, Tensor]:
    """Returns a state dict with dense tensors under the original names; each is composed when it is read, and not kept.

    Reading it item by item needs the memory of one dense weight. ``load_state_dict(..., strict=True)`` of a freshly
    built dense model and ``torch.save`` take it too, and hold all of it while they run.
    """
    model = bare(model)
    state = model.state_dict()
    entries: dict[str, Tensor | FactorizedWeight] = {}
    weights = {name + SUFFIX + ".": (name, weight) for name, weight in named_weights(model)}
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
    def __init__(self, entries: dict[str, Tensor | FactorizedWeight], metadata: Any) -> None:
        self._entries, self._metadata = entries, metadata

    def __getitem__(self, key: str) -> Tensor:
        value = self._entries[key]
        return value.merged() if isinstance(value, FactorizedWeight) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())  # torch.save writes an ordinary state dict


def named_weights(model: nn.Module) -> Iterator[tuple[str, FactorizedWeight]]:
    """Yields each factorized weight by its dense name; one that several modules hold, by each of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name in sl_names(module):
            yield plain_name(qualified(path, name)), getattr(module, name + SUFFIX)

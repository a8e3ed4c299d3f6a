"""The transaction that turns dense weights into factors: everything is checked and made first, or nothing changes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch

from slcompile import torch_private
from slcompile.config import SLConfig
from slcompile.convert.candidates import Candidate, gather_layers
from slcompile.convert.ledger import Ledger
from slcompile.convert.mend_optimizers import mend, positions, require_mendable
from slcompile.names import SUFFIX
from slcompile.optim.in_backward import Update
from slcompile.passes import PassReport
from slcompile.weight.marks import retire
from slcompile.weight.owners import LiveObjects, wrapper_of
from slcompile.weight.placing import class_with, put_in_place, restore, sl_names, snapshot
from slcompile.weight.start import looks_trained
from slcompile.weight.structure import FactorizedWeight, structure_of

log = logging.getLogger("slcompile")


def convert(
    candidates: Sequence[Candidate],
    config: SLConfig,
    live: LiveObjects,
    report: PassReport,
    ledger: Ledger,
    made: Mapping[int, FactorizedWeight] | None = None,
) -> list[FactorizedWeight]:
    """Converts weights in one transaction; the caller holds the ledger's lock.

    Args:
        candidates: What is converted.
        config: The options.
        live: The objects of the process, found after the lock was taken.
        report: What the graph, or the call, replaces and leaves; it is noted in the ledger.
        ledger: The process's, or an estimate's own.
        made: Weight modules that were made and filled before, by the id of the dense weight.

    Returns:
        The weight module of each candidate, in order.

    Raises:
        ValueError: A weight, its module or an optimizer does not allow it; nothing is changed then.
    """
    roots = live.roots(candidate.weight for candidate in candidates)
    record = ledger.record(roots)
    # On the first conversion of a model, check its remaining linear weights as well, so that we refuse before anything
    # changed.
    coming = [] if record.begun else [each for root in roots for each in gather_layers(root, config, live).chosen]
    checked = list({id(candidate.weight): candidate for candidate in [*coming, *candidates]}.values())
    for candidate in checked:
        _require_convertible(candidate, live)
    require_mendable(live.optimizers, {id(candidate.weight): candidate.name for candidate in checked})
    init = config.init
    if config.base is not None:
        init = "kaiming"
    elif init == "auto":
        init = record.auto_init = record.auto_init or _init_of(checked)
    made = made or {}
    for candidate in candidates if init == "kaiming" and config.support == "largest" else ():
        if not candidate.weight.is_meta:
            raise ValueError(
                f"support='largest' puts the non-zeros where the approximation of a trained weight is worst, and no "
                f"weight looks trained ({candidate.name}, ...): take another support, or init='spectral'"
            )
    weights = [
        made.get(id(candidate.weight))
        or structure_of(candidate.config).from_dense(
            candidate.weight.detach(),
            candidate.config,
            init,
            name=candidate.name,
            input_dim=candidate.input_dim,
            convolved=candidate.use.convolved,
        )
        for candidate in candidates
    ]
    ledger.configs.update((candidate.weight, candidate.config) for candidate in candidates)
    _swap(candidates, weights, live, roots)
    for candidate, weight in zip(candidates, weights, strict=True):
        retire(candidate.weight, f"{candidate.name} was converted to factors", weight)
    if config.base is not None:
        _warn_if_untrained(weights, live, roots)
    pairs = [(candidate.weight, weight) for candidate, weight in zip(candidates, weights, strict=True)]
    ledger.note_conversion(record, roots, pairs, config.base or init, report)
    return weights


def _warn_if_untrained(
    weights: Iterable[FactorizedWeight], live: LiveObjects, roots: Sequence[torch.nn.Module]
) -> None:
    """Says so where optimizers train some of a model and none of what was added to its frozen weights."""
    parts = {id(part) for weight in weights for part in weight.parameters() if part.requires_grad}
    own = {id(parameter) for root in roots for parameter in root.parameters()}
    held = [
        (type(optimizer).__name__, {id(p) for group in optimizer.param_groups for p in group["params"]})
        for optimizer in live.optimizers
    ]
    some = [kind for kind, each in held if each & own]
    if some and not any(each & parts for _, each in held):
        log.warning(
            "slcompile: %s trains parameters of %s and none of the factors that were added to its weights, which were "
            "frozen when it was made: they stay zero. Call slcompile.factorize_(model, config) before making it",
            " and ".join(some),
            type(roots[0]).__name__,
        )


def _init_of(checked: Sequence[Candidate]) -> str:
    """Returns what ``init="auto"`` comes to for a model with these weights."""
    dense = (candidate.matrix for candidate in checked)
    return "spectral" if any(not weight.is_meta and looks_trained(weight) for weight in dense) else "kaiming"


def _swap(
    candidates: Sequence[Candidate],
    weights: Sequence[FactorizedWeight],
    live: LiveObjects,
    roots: Sequence[torch.nn.Module],
) -> None:
    """Puts the weights in place and mends the optimizers; on any exception all is as it was."""
    before = positions(roots)
    modules = snapshot(module for candidate in candidates for module, _ in candidate.owners)
    try:
        for candidate, weight in zip(candidates, weights, strict=True):
            for module, name in candidate.owners:
                put_in_place(module, name, weight)
        made = {id(candidate.weight): weight for candidate, weight in zip(candidates, weights, strict=True)}
        mend(live.optimizers, made, before, positions(roots))
    except BaseException:
        restore(modules)
        raise


def _require_convertible(candidate: Candidate, live: LiveObjects) -> None:
    name, weight = candidate.name, candidate.weight
    tables = {id(module): module._parameters for module, _ in candidate.owners}
    if len({id(table) for table in tables.values()}) < len(tables):
        raise ValueError(
            f"{name} cannot be factorized: two modules have one table of parameters, as after copy.copy, of which only "
            "one could be converted; copy modules with copy.deepcopy"
        )
    for module, attribute in candidate.owners:
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{name} cannot be factorized: its owner is a scripted module; exclude it")
        if module._parameters.get(attribute) is not weight:
            raise ValueError(f"{name} is no longer the parameter that its owner {kind} holds")
        if hasattr(module, attribute + SUFFIX):
            raise ValueError(
                f"{name} cannot be factorized: its owner {kind} already has an attribute {attribute}{SUFFIX}"
            )
        try:
            class_with(module, tuple(sorted({*sl_names(module), attribute})))
        except TypeError as error:
            raise ValueError(f"{name} cannot be factorized: its class {kind} cannot be subclassed ({error})") from error
        wrapper = wrapper_of(live.ancestors(module), weight)
        if wrapper is not None:
            raise ValueError(
                f"{name} is already held by {wrapper}; factorize the model first (slcompile.factorize_), then wrap it"
            )
    others = [each for each in torch_private.post_accumulate_hooks(weight) if not isinstance(each, Update)]
    if weight._backward_hooks or others:  # mend moves each Update to the factors
        hook = "a gradient hook (register_hook)" if weight._backward_hooks else "a post-accumulate-grad hook"
        raise ValueError(f"{name} carries {hook}, which would be lost; register it after conversion, on the factors")
    if torch_private.is_stepped_in_backward(weight):
        raise ValueError(
            f"{name} is stepped in the backward pass by torch's _apply_optimizer_in_backward, which would not step its "
            "factors: convert first, or take slcompile.optim.per_layer"
        )
    if not weight.is_meta and not bool(torch.isfinite(weight.detach()).all()):
        raise ValueError(f"{name} contains NaN or Inf")
    if weight.grad is not None and bool(weight.grad.count_nonzero()):
        raise ValueError(f"{name} has a gradient that conversion would lose; call zero_grad() before")

"""The transaction that turns dense weights into factors: everything is checked and made first, or nothing changes."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from slcompile.config import SLConfig
from slcompile.eligibility import decide
from slcompile.init import looks_trained, spectral_factors
from slcompile.load_hook import watch_loading
from slcompile.optim import Update
from slcompile.optimizers import mend, positions, require_mendable
from slcompile.owners import LiveObjects, hooks_of, plain_name, wrapper_of
from slcompile.passes import Decision, PassReport
from slcompile.passes.find_matmuls import WeightUse
from slcompile.step_hook import retire
from slcompile.weight import SUFFIX, SLWeight, base_class, class_with, put_in_place, restore, sl_names, snapshot

log = logging.getLogger("slcompile")

watch_loading()  # now: a dense model may be given a checkpoint of factors before anything is converted

EXPLICIT = "_slcompile_config"
"""Attribute of a model on which ``factorize_`` was called: the backend then converts nothing more below it."""

lock = threading.RLock()
"""Held from choosing what to convert until it is converted."""


@dataclass
class Candidate:
    """A dense weight that is to be converted.

    Attributes:
        name: Fully qualified name.
        weight: The dense parameter, [rows, columns] or [experts, rows, columns].
        owners: Every (module, attribute) that holds it.
        input_dim: Dimension of the matrix that its matmul contracts.
    """

    name: str
    weight: nn.Parameter
    owners: list[tuple[nn.Module, str]]
    input_dim: int


@dataclass
class _ModelState:
    """What is decided once for a whole model, however many graphs it is captured in."""

    begun: bool = False  # whether weights of it were converted
    init: str | None = None  # what init="auto" came to, once it was asked
    report: PassReport = field(default_factory=lambda: PassReport("parameterize_weights"))


_states: weakref.WeakKeyDictionary[nn.Module, _ModelState] = weakref.WeakKeyDictionary()
_dry_runs: weakref.WeakKeyDictionary[nn.Module, PassReport] = weakref.WeakKeyDictionary()
_converted: list[weakref.ref[nn.Parameter]] = []
_newest: PassReport | None = None


def last_report() -> PassReport | None:
    """What the conversion of the newest model replaced and left, with a reason for each; None before the first."""
    return _newest


def choose(
    weights: Iterable[tuple[Sequence[str], nn.Parameter, list[tuple[nn.Module, str]], WeightUse]],
    config: SLConfig,
    *,
    rewriting: bool = False,
) -> tuple[list[Candidate], PassReport]:
    """Splits weights (names, parameter, owners, use) into those to convert and those left, with reasons.

    A weight that a GraphModule owns is converted by ``rewrite`` alone, which edits the graph that reads it.
    """
    candidates, report = [], PassReport("parameterize_weights")
    for names, weight, owners, use in weights:
        decision = decide(names, weight, use, config, [owner for owner, _ in owners])
        if not decision.reason and not rewriting and any(isinstance(owner, fx.GraphModule) for owner, _ in owners):
            detail = "a GraphModule owns it and reads it itself; use slcompile.rewrite"
            decision = Decision(decision.name, "graph_module", detail, decision.shape, decision.matmuls)
        (report.skipped if decision.reason else report.rewritten).append(decision)
        if not decision.reason:
            candidates.append(Candidate(decision.name, weight, owners, use.input_dim))
    return candidates, report


def convert(candidates: Sequence[Candidate], config: SLConfig, live: LiveObjects, report: PassReport) -> list[SLWeight]:
    """Converts weights in one transaction; the caller holds ``lock``.

    Returns:
        The weight module of each candidate, in order.

    Raises:
        ValueError: A weight, its module or an optimizer does not allow it; nothing is changed then.
    """
    global _newest
    roots = live.roots(each.weight for each in candidates)
    state = next((_states[root] for root in roots if root in _states), None)
    state = state or _ModelState()
    is_first = not state.begun
    # With the first weights of a model, also those that will come: a refusal must not come half-way.
    coming = [each for root in roots if is_first for each in _linear_candidates(root, config, live)]
    checked = list({id(each.weight): each for each in [*coming, *candidates]}.values())
    for each in checked:
        _require_convertible(each, live)
    require_mendable(live.optimizers, {id(each.weight): each.name for each in checked})
    if config.init == "auto" and state.init is None:
        trained = any(not each.weight.is_meta and looks_trained(each.weight.detach()) for each in checked)
        state.init = "spectral" if trained else "kaiming"
    init = state.init if config.init == "auto" else config.init
    assert init is not None
    weights = [_make_weight(each, config, init) for each in candidates]
    before = positions(roots)
    modules = snapshot(module for each in candidates for module, _ in each.owners)
    try:
        for each, weight in zip(candidates, weights, strict=True):
            for module, name in each.owners:
                put_in_place(module, name, weight)
        made = {id(each.weight): weight for each, weight in zip(candidates, weights, strict=True)}
        mend(live.optimizers, made, before, positions(roots))
    except BaseException:
        restore(modules)
        raise
    for each, weight in zip(candidates, weights, strict=True):
        retire(each.weight, f"{each.name} was converted to sparse-plus-low-rank factors", weight)
        _converted.append(weakref.ref(each.weight))
    state.begun = True
    _newest = state.report
    _add(state, roots, report)
    _announce(logging.WARNING if is_first else logging.INFO, roots, candidates, weights, init, state.report)
    return weights


def note_left(roots: Sequence[nn.Module], report: PassReport) -> None:
    """Keeps what a graph without anything to convert leaves dense, for the report of its model."""
    if roots:
        _add(next((_states[root] for root in roots if root in _states), None) or _ModelState(), roots, report)


def names_left(root: nn.Module) -> set[str]:
    """Names of the weights that the graphs captured of a model so far leave dense."""
    return {each.name for each in _states[root].report.skipped} if root in _states else set()


def _add(state: _ModelState, roots: Sequence[nn.Module], report: PassReport) -> None:
    state.report.rewritten += report.rewritten
    kept = {each.name: each for each in [*state.report.skipped, *report.skipped]}
    state.report.skipped = [kept[name] for name in kept if name not in {each.name for each in state.report.rewritten}]
    _states.update(dict.fromkeys(roots, state))


def announce_dry_run(roots: Sequence[nn.Module], report: PassReport) -> None:
    """Reports what a conversion would do, for all graphs of a model that were captured so far; changes nothing."""
    global _newest
    if not roots:
        return
    known = next((_dry_runs[root] for root in roots if root in _dry_runs), None) or PassReport(report.pass_name)
    for kept, new in ((known.rewritten, report.rewritten), (known.skipped, report.skipped)):
        kept += [each for each in new if each.name not in {other.name for other in kept}]
    _dry_runs.update(dict.fromkeys(roots, known))
    _newest = known
    kinds = ", ".join(sorted({base_class(root).__name__ for root in roots}))
    log.warning("slcompile: dry run, nothing of %s is changed. %s", kinds, known)


def forget(model: nn.Module) -> None:
    """Lets the next conversion of a model, or of what contains it or is part of it, be a first one again."""
    inside = set(model.modules())
    for root in list(_states):
        if root in inside or not inside.isdisjoint(root.modules()):
            del _states[root]


def warn_of_held_weights() -> None:
    """Warns once of converted dense weights that something still holds, such as a list made before conversion."""
    if any(reference() is not None for reference in _converted):
        gc.collect()
    held = [parameter for parameter in (reference() for reference in _converted) if parameter is not None]
    _converted.clear()
    if held:
        log.warning(
            "slcompile: %d converted dense weights (%s bytes) are still held by something that is no module and no "
            "optimizer, such as a list of parameters made before: they take memory, and clipping or averaging that "
            "list misses the factors",
            len(held),
            f"{sum(each.nbytes for each in held):,}",
        )


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Path, module and input dimension of every nn.Linear and transformers' Conv1D."""
    for path, module in model.named_modules():
        is_conv1d = type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
        if isinstance(module, nn.Linear) or is_conv1d:
            yield plain_name(path), module, 0 if is_conv1d else 1


def _linear_candidates(root: nn.Module, config: SLConfig, live: LiveObjects) -> list[Candidate]:
    """The linear layers' weights of a model that are likely to be converted sooner or later."""
    linears = {
        id(weight): (weight, input_dim)
        for _, module, input_dim in linear_modules(root)
        if (weight := module._parameters.get("weight")) is not None and module.training
    }
    owners = live.owners(weight for weight, _ in linears.values())
    names = live.names(root)
    use = {id(weight): WeightUse(matmuls=["linear"], input_dim=input_dim) for weight, input_dim in linears.values()}
    weights = [(names[key], weight, owners[key], use[key]) for key, (weight, _) in linears.items()]
    return choose(weights, config)[0]


def _require_convertible(candidate: Candidate, live: LiveObjects) -> None:
    name, weight = candidate.name, candidate.weight
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
    hook = hooks_of(weight, allowed=Update)  # which mend moves to the factors
    if hook is not None:
        raise ValueError(f"{name} carries {hook}, which would be lost; register it after conversion, on the factors")
    if not weight.is_meta and not bool(torch.isfinite(weight.detach()).all()):
        raise ValueError(f"{name} contains NaN or Inf")
    if weight.grad is not None and bool(weight.grad.count_nonzero()):
        raise ValueError(f"{name} has a gradient that conversion would lose; call zero_grad() before")


def _make_weight(candidate: Candidate, config: SLConfig, init: str) -> SLWeight:
    dense = candidate.weight.detach()
    weight = SLWeight(
        dense.shape,
        config,
        name=candidate.name,
        input_dim=candidate.input_dim,
        device=dense.device,
        dtype=dense.dtype,
    )
    if dense.is_meta:
        return weight
    if init == "spectral":
        support = list(weight.operands().values())[-1]
        weight.set_factors(*spectral_factors(dense, weight.rank, weight.scale, weight.values, support))
    else:
        weight.reset_parameters()
    return weight


def _announce(
    level: int,
    roots: Sequence[nn.Module],
    candidates: Sequence[Candidate],
    weights: Sequence[SLWeight],
    init: str,
    report: PassReport,
) -> None:
    dense = sum(each.weight.numel() for each in candidates)
    sparse_low_rank = sum(p.numel() for weight in weights for p in weight.parameters())
    log.log(
        level,
        "slcompile: factorized %d weights of %s (%d left dense): %s -> %s parameters in them, init %s, which replaces "
        "the weights%s",
        len(candidates),
        ", ".join(sorted({base_class(root).__name__ for root in roots})),
        len(report.skipped),
        f"{dense:,}",
        f"{sparse_low_rank:,}",
        init,
        "" if init == "kaiming" else " by their best approximation",
    )
    log.debug("%s", report)

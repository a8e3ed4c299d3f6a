"""The transaction that turns dense weights into factors, or leaves everything as it was; and the way back."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from slcompile import optimizers, torch_private
from slcompile.capture import captured_uses
from slcompile.config import SLConfig
from slcompile.eligibility import decide, require_possible_rank
from slcompile.init import looks_trained, spectral_factors
from slcompile.owners import LiveObjects, hooks_of, wrapper_of
from slcompile.passes import Decision, PassReport, find_matmuls, merge_weights, parameterize_weights, run
from slcompile.passes.find_matmuls import WeightUse, is_weight
from slcompile.weight import (
    SUFFIX,
    Factors,
    SLWeight,
    base_class,
    class_with,
    dense_names,
    put_in_place,
    sl_names,
    take_out,
)

log = logging.getLogger("slcompile")

EXPLICIT = "_slcompile_config"
"""Attribute of a model on which ``factorize_`` was called: the backend then converts nothing more below it."""

_lock = threading.RLock()
_announced: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_reports: deque[PassReport] = deque(maxlen=64)


@dataclass
class Candidate:
    """A dense weight that is to be converted.

    Attributes:
        name: Fully qualified name.
        weight: The dense parameter, [rows, columns].
        owners: Every (module, attribute) that holds it.
        input_dim: Dimension of the weight that its matmul contracts.
    """

    name: str
    weight: nn.Parameter
    owners: list[tuple[nn.Module, str]]
    input_dim: int


def last_report() -> PassReport | None:
    """What the newest conversion of this process replaced and left, with a reason for each; None before the first."""
    return _reports[-1] if _reports else None


def factorize_(
    model: nn.Module,
    config: SLConfig | None = None,
    *,
    example_args: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Factorizes a model's weights in place, ``W = (alpha / rank) * B @ A + S`` (SLTrain, arXiv 2406.02214).

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
    config = _config(config)
    model = unwrapped(model)
    config.require_patterns_match(dense_names(model))
    if example_args is None and example_kwargs is None:
        uses = _uses_by_module_type(model, config)
    else:
        uses = captured_uses(model, tuple(example_args or ()), dict(example_kwargs or {}))
    with _lock:
        live = LiveObjects.find()
        owners = live.owners(weight for weight, _ in uses)
        names = {id(value): name for name, value in model.named_parameters()}
        candidates, report = choose(
            [(names.get(id(weight)), weight, owners[id(weight)], use) for weight, use in uses], config
        )
        if not candidates:
            reasons = sorted({each.reason for each in report.skipped})
            raise ValueError(f"model has no eligible weight; its {len(uses)} weights stay dense: {', '.join(reasons)}")
        convert(candidates, config, live, report)
        object.__setattr__(model, EXPLICIT, config)
    return model


def rewrite(gm: fx.GraphModule, config: SLConfig | None = None) -> PassReport:
    """Replaces the trained weights of any torch.fx graph by weight ops, in place.

    Works on graphs that read parameters as attributes: ``torch.fx.symbolic_trace(model)`` (whose modules are the
    model's own, and are converted with it) and ``ExportedProgram.module()``. Leaf ``nn.Linear`` modules that are
    chosen are inlined, so that the graph shows the weight op.

    Returns:
        The report of ``parameterize_weights``, with a reason for each weight that stays dense.

    Raises:
        ValueError: As ``factorize_``; the graph and its modules are then as they were.
    """
    config = _config(config)
    if not isinstance(gm, fx.GraphModule):
        raise ValueError(f"gm must be a torch.fx.GraphModule, got {type(gm).__name__}")
    config.require_patterns_match(dense_names(gm))
    reads: dict[int, list[fx.Node]] = {}
    uses: dict[int, WeightUse] = {}
    weights: dict[int, nn.Parameter] = {}
    for node in gm.graph.nodes:
        is_linear = node.op == "call_module" and isinstance(gm.get_submodule(node.target), nn.Linear)
        if node.op != "get_attr" and not is_linear:
            continue
        module, name = _owner(gm, node.target + ".weight" if is_linear else node.target)
        weight = module._parameters.get(name)
        if weight is None or not is_weight(weight):
            continue
        weights[id(weight)] = weight
        use = uses.setdefault(id(weight), WeightUse())
        use.add(WeightUse(matmuls=[node]) if is_linear else find_matmuls([node]))
        reads.setdefault(id(weight), []).append(node)
    with _lock:
        live = LiveObjects.find()
        owners = live.owners(weights.values())
        names = {id(value): name for name, value in gm.named_parameters()}
        candidates, report = choose(
            [(names[key], weights[key], owners[key], uses[key]) for key in weights if not uses[key].composed], config
        )
        if not candidates:
            return report
        made = dict(
            zip((id(each.weight) for each in candidates), convert(candidates, config, live, report), strict=True)
        )
    table = {}
    for key, module in made.items():
        for node in reads[key]:
            if node.op == "call_module":
                node = _inline_linear(gm, node)
            table[node.name] = (names[key], module)
    run([lambda graph_module: parameterize_weights(graph_module, table)], gm)
    gm.recompile()
    return report


def merge_(model: nn.Module) -> nn.Module:
    """Turns every factorized weight of a model back into a dense parameter, in place; returns the model.

    Outputs stay the same to rounding. Classes, attributes and keys are those of the model before its conversion.
    One dense weight is made at a time. Optimizers that hold the factors refuse to step afterwards.

    Raises:
        RuntimeError: A seed buffer was overwritten; the model is then as it was.
    """
    model = unwrapped(model)
    places = [(module, name, getattr(module, name + SUFFIX)) for module in model.modules() for name in sl_names(module)]
    for _, _, weight in places:
        weight.check_support()
    merged: dict[int, nn.Parameter] = {}
    done: list[tuple[nn.Module, str, SLWeight]] = []
    try:
        for module, name, weight in places:
            if id(weight) not in merged:
                trained = any(each.requires_grad for each in weight.parameters())
                merged[id(weight)] = nn.Parameter(weight.merged(), requires_grad=trained)
            take_out(module, name, merged[id(weight)])
            done.append((module, name, weight))
    except BaseException:
        for module, name, weight in done:
            put_in_place(module, name, weight)
        raise
    for _, name, weight in places:
        for suffix, parameter in weight.named_parameters():
            optimizers.retire(parameter, f"{name}{SUFFIX}.{suffix}", "merged into a dense weight by merge_")
    for module in model.modules():
        vars(module).pop(EXPLICIT, None)
        if isinstance(module, fx.GraphModule):
            run([merge_weights], module)
    return model


def factors(model: nn.Module) -> dict[str, Factors]:
    """Name of each factorized weight, as it was when dense -> its factors (detached, sharing memory)."""
    return {name: weight.factors() for name, weight in _named_weights(unwrapped(model))}


def merged_state_dict(model: nn.Module) -> Mapping[str, Tensor]:
    """A state dict with dense tensors under the original names; each is composed when it is read, and not kept.

    ``load_state_dict(..., strict=True)`` of a freshly built dense model takes it; ``dict(...)`` makes all at once.
    """
    model = unwrapped(model)
    state = model.state_dict()
    entries: dict[str, Tensor | SLWeight] = {}
    weights = {name + SUFFIX + ".": (name, weight) for name, weight in _named_weights(model)}
    for key, value in state.items():
        prefix = key[: key.rfind(".") + 1]
        if prefix in weights:
            name, weight = weights[prefix]
            entries.setdefault(name, weight)
        else:
            entries[key] = value
    return _MergedStateDict(entries)


class _MergedStateDict(Mapping[str, Tensor]):
    def __init__(self, entries: dict[str, Tensor | SLWeight]) -> None:
        self._entries = entries

    def __getitem__(self, key: str) -> Tensor:
        value = self._entries[key]
        return value.merged() if isinstance(value, SLWeight) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self):
        return OrderedDict, (), None, None, iter(self.items())  # torch.save writes an ordinary state dict


def choose(
    weights: Sequence[tuple[str | None, nn.Parameter, list[tuple[nn.Module, str]], WeightUse]], config: SLConfig
) -> tuple[list[Candidate], PassReport]:
    """Splits weights (name, parameter, owners, use) into those to convert and those left, with reasons."""
    candidates, report = [], PassReport("parameterize_weights")
    for name, weight, owners, use in weights:
        if name is None or not owners:
            shape, detail = tuple(weight.shape), "no module holds it as a parameter (a list, a global, flat weights)"
            report.skipped.append(Decision(name or "?", "not_owned", detail, shape, len(use.matmuls)))
            continue
        decision = decide(name, weight, use, config, [owner for owner, _ in owners])
        (report.skipped if decision.reason else report.rewritten).append(decision)
        if not decision.reason:
            candidates.append(Candidate(name, weight, owners, use.input_dim))
    require_possible_rank([*report.rewritten, *report.skipped], config)
    return candidates, report


def convert(candidates: Sequence[Candidate], config: SLConfig, live: LiveObjects, report: PassReport) -> list[SLWeight]:
    """Converts weights in one transaction: everything is checked and made first, then swapped one at a time.

    Returns:
        The weight module of each candidate, in order.

    Raises:
        ValueError: As ``factorize_``; nothing is changed then.
    """
    with _lock:
        for each in candidates:
            _require_convertible(each, live)
        replaced = {id(each.weight): each.name for each in candidates}
        optimizers.require_mendable(live.optimizers, replaced)
        roots = live.roots(each.weight for each in candidates)
        method = _init_method(candidates, config)
        weights = [_make_weight(each, config, method) for each in candidates]
        order = optimizers.ParameterOrder(roots)
        done: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for each, weight in zip(candidates, weights, strict=True):
                for module, name in each.owners:
                    put_in_place(module, name, weight)
                    done.append((module, name, each.weight))
            optimizers.mend(live.optimizers, {id(c.weight): w for c, w in zip(candidates, weights, strict=True)}, order)
        except BaseException:
            for module, name, dense in done:
                take_out(module, name, dense)
            raise
        for each in candidates:
            optimizers.retire(each.weight, each.name, "converted to sparse-plus-low-rank factors")
        _reports.append(report)
        _announce(roots, candidates, weights, method, report)
        return weights


def _require_convertible(candidate: Candidate, live: LiveObjects) -> None:
    name, weight = candidate.name, candidate.weight
    for module, attribute in candidate.owners:
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{name} cannot be factorized: its owner is a scripted module; exclude it")
        try:
            class_with(module, tuple(sorted({*sl_names(module), attribute})))
        except TypeError as error:
            raise ValueError(f"{name} cannot be factorized: its class {kind} cannot be subclassed ({error})") from error
        wrapper = wrapper_of(module, weight, live)
        if wrapper is not None:
            raise ValueError(
                f"{name} is already held by {wrapper}; factorize the model first (slcompile.factorize_), then wrap it"
            )
    hook = hooks_of(weight)
    if hook is not None:
        raise ValueError(f"{name} carries {hook}, which would be lost; register it after conversion, on the factors")
    if not weight.is_meta and not bool(torch.isfinite(weight.detach()).all()):
        raise ValueError(f"{name} contains NaN or Inf")
    if weight.grad is not None and bool(weight.grad.count_nonzero()):
        raise ValueError(f"{name} has a gradient that conversion would lose; call zero_grad() before")


def _init_method(candidates: Sequence[Candidate], config: SLConfig) -> str:
    if config.init != "auto":
        return config.init
    trained = any(not each.weight.is_meta and looks_trained(each.weight.detach()) for each in candidates)
    return "spectral" if trained else "kaiming"


def _make_weight(candidate: Candidate, config: SLConfig, method: str) -> SLWeight:
    dense = candidate.weight.detach()
    rows, columns = dense.shape
    weight = SLWeight(
        rows,
        columns,
        config,
        name=candidate.name,
        input_dim=candidate.input_dim,
        device=dense.device,
        dtype=dense.dtype,
    )
    if dense.is_meta:
        return weight
    if method == "spectral":
        support = list(weight.operands().values())[-1]
        weight.set_factors(*spectral_factors(dense, weight.rank, weight.scale, weight.values, support))
    else:
        weight.reset_parameters()
    return weight


def _announce(
    roots: Sequence[nn.Module],
    candidates: Sequence[Candidate],
    weights: Sequence[SLWeight],
    method: str,
    report: PassReport,
) -> None:
    dense = sum(each.weight.numel() for each in candidates)
    sparse_low_rank = sum(p.numel() for weight in weights for p in weight.parameters())
    level = logging.INFO if all(root in _announced for root in roots) else logging.WARNING
    _announced.update(roots)
    log.log(
        level,
        "slcompile: factorized %d weights of %s (%d left dense): %s -> %s parameters in them, init %s, which replaces "
        "the weights%s",
        len(candidates),
        ", ".join(sorted({base_class(root).__name__ for root in roots})),
        len(report.skipped),
        f"{dense:,}",
        f"{sparse_low_rank:,}",
        method,
        "" if method == "kaiming" else " by their best approximation",
    )
    log.debug("%s", report)


def _uses_by_module_type(model: nn.Module, config: SLConfig) -> list[tuple[nn.Parameter, WeightUse]]:
    uses: dict[int, tuple[nn.Parameter, WeightUse]] = {}
    for path, module in model.named_modules():
        name = f"{path}.weight".lstrip(".")
        if isinstance(module, torch.jit.ScriptModule):
            if is_weight(getattr(module, "weight", None)) and config.includes(name):
                raise ValueError(
                    f"{name} is of a scripted module and cannot be factorized; exclude it, or script later"
                )
            continue
        is_conv1d = type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
        if not isinstance(module, nn.Linear) and not is_conv1d:
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            if nn.utils.parametrize.is_parametrized(module, "weight") and config.includes(name):
                raise ValueError(f"{name} carries a parametrization; remove it, or exclude the weight")
            continue  # already factorized, or not a parameter
        use = WeightUse(input_dim=0 if is_conv1d else 1)
        uses.setdefault(id(weight), (weight, use))[1].matmuls.append(fx.Graph().placeholder(path.replace(".", "_")))
    return list(uses.values())


def _named_weights(model: nn.Module) -> Iterator[tuple[str, SLWeight]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for name in sl_names(module):
            yield f"{path}.{name}".lstrip("."), getattr(module, name + SUFFIX)


def _owner(gm: fx.GraphModule, target: str) -> tuple[nn.Module, str]:
    path, _, name = str(target).rpartition(".")
    return gm.get_submodule(path), name


def _inline_linear(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Replaces a call of a leaf nn.Linear by F.linear over its attributes; returns the weight's node."""
    with gm.graph.inserting_before(node):
        weight = gm.graph.create_node("get_attr", f"{node.target}.weight")
        has_bias = gm.get_submodule(str(node.target)).bias is not None
        bias = gm.graph.get_attr(f"{node.target}.bias") if has_bias else None
        arguments = {**dict(zip(("input",), node.args, strict=False)), **node.kwargs}
        linear = gm.graph.call_function(nn.functional.linear, (arguments["input"], weight, bias))
    linear.meta = dict(node.meta)
    node.replace_all_uses_with(linear, propagate_meta=False)
    gm.graph.erase_node(node)
    return weight


def _config(config: SLConfig | None) -> SLConfig:
    if config is not None and not isinstance(config, SLConfig):
        raise ValueError(f"config must be an SLConfig, got {type(config).__name__}")
    return config if config is not None else SLConfig()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where torch.compile's wrapper is given."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return torch_private.without_dynamo_wrapper(model)


def template(weight: Tensor, config: SLConfig, input_dim: int) -> SLWeight:
    """A weight module on the meta device: the shapes of the factors of ``weight``, for a graph that is to be built."""
    rows, columns = weight.shape
    return SLWeight(rows, columns, replace(config, seed=0), input_dim=input_dim, device="meta", dtype=weight.dtype)

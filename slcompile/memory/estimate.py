"""What training a model takes, known before it is run: ``estimate_memory``, without a GPU and without the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slcompile import torch_private
from slcompile.config import SLConfig, checked_config, require_choice
from slcompile.convert.ledger import Ledger
from slcompile.factorize import factorize_model
from slcompile.memory.graphs import Call, capture
from slcompile.memory.optimizer_bytes import OPTIMIZERS, Optimizer
from slcompile.memory.report import MemoryReport, Usage
from slcompile.models import meta_copy, positional, require_transformers, unwrapped
from slcompile.passes import BudgetReport
from slcompile.passes.liveness import PARTS, PROOF_LAYERS, Event, Plan, peak_of, profile, repeated, step_events
from slcompile.passes.partition import BudgetedPartitioner
from slcompile.weight.structure import weights_in

Build = Callable[[int | None], nn.Module]
"""Makes a model on the meta device, with that many layers; None: as it is."""


COMPILED = ("model", "layers")
DEVICES = ("cpu", "cuda")


def estimate_memory(
    model_or_config: Any,
    args: Sequence[Any] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: SLConfig | None = None,
    optimizer: str = "adamw",
    per_layer: bool = False,
    dtype: torch.dtype | None = None,
    device: str = "cuda",
    compiled: str | None = None,
) -> MemoryReport:
    """Estimates the memory of a training step from its graphs; nothing of the model's size is allocated.

    A step is ``compiled_model(*args, **kwargs).loss.backward(); optimizer.step(); optimizer.zero_grad()``, any but the
    first one. Of a model that returns no loss, the gradient of what it returns is counted, and the loss is not. Bytes
    are those that tensors ask for; an allocator rounds and caches, and a CUDA context takes memory besides.

    Args:
        model_or_config: A dense model on any device, left as it is; or a transformers configuration with
            ``num_hidden_layers``, of which a causal language model is built on the meta device. For a deep
            model, 3 layers are captured and the middle one is repeated, after checking that this predicts the
            4-layer graph exactly; otherwise, and for a memory budget, every layer is captured.
        args, kwargs: What the model is called with; only shapes and dtypes matter.
        config: Defaults to ``SLConfig()``. With a ``memory_budget``, the report says what is computed again for it.
        optimizer: One of ``OPTIMIZERS``.
        per_layer: Whether ``slcompile.optim.per_layer`` updates parameters and frees gradients in the backward pass.
        dtype: Of floating-point parameters and arguments; by default a model's own, and float32 for a configuration.
        device: ``"cuda"`` or ``"cpu"``: whose lowerings and kernels. Without a GPU at hand, an sm_80's.
        compiled: ``"model"``: in one graph, which returns all gradients at its end, too late for per-layer updates to
            lower the peak. ``"layers"``: each layer by itself; what lies between them is taken to be fused too. By
            default ``"layers"`` with per-layer updates, unless there is a memory budget, which needs ``"model"``.

    Raises:
        ValueError: An argument is not allowed, or as ``factorize_``.
        ImportError: A configuration is given, and transformers is not installed.
        torch._dynamo.exc.Unsupported: The model cannot be captured as one graph.
    """
    config = checked_config(config)
    compiled = compiled or ("layers" if per_layer and config.budget is None else "model")
    require_choice("optimizer", optimizer, OPTIMIZERS)
    require_choice("device", device, DEVICES)
    require_choice("compiled", compiled, COMPILED)
    if config.budget is not None and compiled == "layers":
        raise ValueError(f"memory_budget={config.budget} needs the model in one graph, got compiled='layers'")
    kind = OPTIMIZERS[optimizer]
    plan = Plan(device, kind.scratch_on(device), kind.together, per_layer, compiled == "layers")
    call = (positional(args), dict(kwargs or {}))
    build, layers = builder(model_or_config, dtype)
    usages, depths = {}, []
    fitted: BudgetReport | None = None
    options: dict[str, Any] = {}
    for factorized in (True, False):
        make = factorizing(build, config, call) if factorized else build
        model = make(layers)
        if factorized and config.budget is not None:
            held = _usage(model, [], kind, with_values=True).peak
            events, depth, fitted = _fitted(make, layers, call, dtype, plan, config, held)
        else:
            events, depth = step_of(make, layers, call, dtype, plan, config if factorized else None)
        depths.append(depth)
        options |= options_of(model, config)
        for name in ("sltrain", "low_rank") if factorized else ("dense",):
            usages[name] = _usage(model, events, kind, with_values=name != "low_rank")
    settings: dict[str, Any] = {
        "optimizer": optimizer + (" per layer" if per_layer else ""),
        **options,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": device,
        "compiled": compiled,
    }
    depth = max(filter(None, depths), default=None)
    return MemoryReport(**usages, layers=layers, captured_layers=depth, settings=settings, budget=fitted)


def options_of(model: nn.Module, config: SLConfig) -> dict[str, Any]:
    """Returns those of the options that a model's factorized weights have, for a report."""
    weights = weights_in(model)
    described = {key for each in weights for key in each.describe()}
    names = ["structure"] if weights and config.structure != SLConfig.structure else []
    names += [key for key in ("rank", "density", "support", "blocks", "base") if key in described]
    return {key: getattr(config, key) for key in names if getattr(config, key) is not None}


def held_memory(
    model_or_config: Any, *, config: SLConfig, optimizer: str = "adamw", dtype: torch.dtype | None = None
) -> dict[str, Usage]:
    """Returns what is held all the time, without the graphs: parameters, stored indices, buffers and optimizer state.

    Args and errors as for ``estimate_memory``; weights are those of linear modules.

    Returns:
        ``"sltrain"``, ``"low_rank"`` and ``"dense"``.
    """
    build, layers = builder(model_or_config, dtype)
    factorized = factorizing(build, config, None)(layers)
    kind = OPTIMIZERS[optimizer]
    return {
        "sltrain": _usage(factorized, [], kind, with_values=True),
        "low_rank": _usage(factorized, [], kind, with_values=False),
        "dense": _usage(build(layers), [], kind, with_values=True),
    }


def builder(source: Any, dtype: torch.dtype | None) -> tuple[Build, int | None]:
    """Returns what makes the dense model, and its number of layers where that can be chosen."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    if isinstance(source, nn.Module):
        model = unwrapped(source)
        if weights_in(model):
            raise ValueError("model_or_config must be a dense model, got a factorized one; give it before factorize_")
        return lambda _: meta_copy(model).to(dtype).train(), None
    layers = getattr(source, "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ValueError(
            "model_or_config must be a torch.nn.Module or a transformers configuration with num_hidden_layers, got "
            f"{type(source).__name__}"
        )
    make = require_transformers().AutoModelForCausalLM.from_config

    def build(depth: int | None) -> nn.Module:
        config = copy.deepcopy(source)
        config.num_hidden_layers, config.use_cache = depth, False
        if getattr(config, "layer_types", None):
            config.layer_types = list(config.layer_types)[:depth]
        with torch.device("meta"):
            model: nn.Module = make(config).to(dtype or torch.float32).train()
        return model

    return build, layers


def factorizing(build: Build, config: SLConfig, call: Call | None) -> Build:
    """Makes the factorized model; weights are found on the graph of a call, or without one by the kind of module."""

    def make(depth: int | None) -> nn.Module:
        model = build(depth)
        args, kwargs = (None, None) if call is None else torch_private.map_leaves(to_meta_as(model), call)
        with torch.random.fork_rng(devices=[]):  # seeds are drawn
            return factorize_model(model, config, args, kwargs, Ledger(silent=True))

    def to_meta_as(model: nn.Module) -> Callable[[Any], Any]:
        dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)

        def to_meta(each: Any) -> Any:
            if not isinstance(each, Tensor):
                return each
            return torch.empty_like(each, device="meta", dtype=dtype if each.is_floating_point() else each.dtype)

        return to_meta

    return make


def step_of(
    make: Build, layers: int | None, call: Call, dtype: torch.dtype | None, plan: Plan, config: SLConfig | None
) -> tuple[list[Event], int | None]:
    """Returns the events of a step of a model of this depth, and the depth of the deepest graphs made for them."""

    def captured(depth: int | None) -> list[Event]:
        return step_events(capture(make(depth), call, dtype, plan.device, config), plan)

    proof = PROOF_LAYERS + 1
    if layers is None or layers <= proof:
        return captured(layers), layers
    few, more = captured(PROOF_LAYERS), captured(proof)
    if profile(repeated(few, proof)) != profile(more):
        return captured(layers), layers
    return repeated(few, layers), proof


def _fitted(
    make: Build, layers: int | None, call: Call, dtype: torch.dtype | None, plan: Plan, config: SLConfig, held: int
) -> tuple[list[Event], int | None, BudgetReport]:
    """Returns the same for a memory budget, and what is computed again for it, found on graphs of all layers."""
    partitioner = BudgetedPartitioner(config, held, plan)
    graphs = capture(make(layers), call, dtype, plan.device, config, partitioner)
    (report,) = partitioner.reports
    return step_events(graphs, plan), layers, report


def _usage(model: nn.Module, events: Sequence[Event], optimizer: Optimizer, with_values: bool) -> Usage:
    """Adds what is held all the time to the events of a step."""
    parts = [weight.parts() for weight in weights_in(model)]
    left_out = set() if with_values else {id(each) for part in parts for each in part["values"]}
    indices = {id(each): each for part in parts for each in part["indices"]}
    parameters = [each for each in model.parameters() if id(each) not in left_out]
    trained = [each for each in parameters if each.requires_grad]
    now = dict.fromkeys(PARTS, 0)
    now["parameters"] = sum(each.nbytes for each in parameters)
    now["indices"] = sum(each.nbytes for each in indices.values()) if with_values else 0
    now["buffers"] = sum(each.nbytes for each in model.buffers() if id(each) not in indices)
    now["optimizer state"] = sum(optimizer.state(each.numel(), each.itemsize) for each in trained)
    counted = [each for each in events if with_values or not each.of_values]
    places = profile(counted, now)
    peak, at_peak, where = peak_of(places, now)
    largest = dict(now)
    for event in counted:
        now[event.part] += event.size
        largest[event.part] = max(largest[event.part], now[event.part])
    totals = {label: total for label, (total, _) in places.items()}
    return Usage(sum(each.numel() for each in trained), largest, peak, where, at_peak, totals)

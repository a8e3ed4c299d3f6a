"""What training takes on each of many GPUs, and what it sends, without one of them: ``estimate_many``."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slcompile import torch_private
from slcompile.config import SLConfig, checked_config, require_choice
from slcompile.memory.estimate import DEVICES, Build, builder, factorizing, options_of, step_of
from slcompile.memory.graphs import Call
from slcompile.memory.optimizer_bytes import OPTIMIZERS, Optimizer
from slcompile.memory.sharding import (
    GATHERED,
    REDUCING,
    Layout,
    sent,
    shard_elements,
    sharded_events,
)
from slcompile.models import positional
from slcompile.names import SUFFIX
from slcompile.passes.liveness import PARTS, Event, Plan, peak_of, profile
from slcompile.weight.placing import put_in_place, sl_names
from slcompile.weight.structure import FactorizedWeight, matrix_shape, weights_in

BUCKETS = "DDP's buckets"
MANY_PARTS = (*PARTS, GATHERED, REDUCING, BUCKETS)
"""What memory is for, on one of many GPUs."""


@dataclass(frozen=True)
class Share:
    """What one GPU takes and sends in a training step; bytes throughout.

    Attributes:
        parameter_count: Numbers that are trained, of the whole model.
        peak: The most that is allocated at one time, on the GPU with the largest shards.
        place: Where in the step that is.
        at_peak: What each of ``MANY_PARTS`` takes then; the sum is ``peak``.
        sent: What the GPU sends in a step, by what it is for.
    """

    parameter_count: int
    peak: int
    place: str
    at_peak: Mapping[str, int]
    sent: Mapping[str, int]

    @property
    def wire(self) -> int:
        """All that the GPU sends in a step."""
        return sum(self.sent.values())


@dataclass(frozen=True)
class ManyReport:
    """What training on many GPUs takes on each: with sparse-plus-low-rank weights, and dense.

    Attributes:
        sltrain: With the given config.
        dense: The model as it is, under Inductor.
        layout: How the model is spread.
        settings: What it was asked for.
    """

    sltrain: Share
    dense: Share
    layout: Layout
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns ``settings``, ``layout``, and each ``Share`` under ``variants``, for JSON."""
        variants = {
            name: {**vars(share), "at_peak": dict(share.at_peak), "sent": dict(share.sent)}
            for name, share in (("dense", self.dense), ("sltrain", self.sltrain))
        }
        return {"settings": dict(self.settings), "layout": vars(self.layout), "variants": variants}

    def __str__(self) -> str:
        shares = (self.dense, self.sltrain)

        def row(label: str, cells: Sequence[str]) -> str:
            return f"{label:<48}" + "".join(f"{cell:>12}" for cell in cells)

        def sizes(label: str, values: Sequence[int]) -> str:
            return row(label, [f"{value / 1e9:,.2f}" for value in values])

        def ratio(values: Sequence[int]) -> str:
            return row("of dense", [f"{value / values[0]:.0%}" for value in values])

        rule = "-" * 72
        lines = [str(self.layout), ", ".join(f"{key} {value}" for key, value in self.settings.items()), ""]
        lines += [row("GB on each GPU", ("dense", "sltrain")), rule]
        lines.append(row("trained parameters (million)", [f"{each.parameter_count / 1e6:,.1f}" for each in shares]))
        for part in MANY_PARTS:
            values = [each.at_peak[part] for each in shares]
            if max(values) >= 5e6:
                lines.append(sizes(f"  {part}", values))
        peaks = [each.peak for each in shares]
        lines += [sizes("peak", peaks), ratio(peaks), rule]
        wires = [each.wire for each in shares]
        lines += [sizes("GB that each GPU sends in a step", wires)]
        names = dict.fromkeys(name for each in shares for name in each.sent)
        lines += [sizes(f"  {name}", [each.sent.get(name, 0) for each in shares]) for name in names]
        if wires[0]:
            lines.append(ratio(wires))
        lines += [
            rule,
            f"the peak of dense is in: {self.dense.place}",
            f"the peak of sltrain is in: {self.sltrain.place}",
        ]
        return "\n".join(lines)


def estimate_many(
    model_or_config: Any,
    args: Sequence[Any] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    layouts: Sequence[Layout],
    config: SLConfig | None = None,
    optimizer: str = "adamw",
    per_layer: bool = False,
    dtype: torch.dtype | None = None,
    device: str = "cuda",
) -> list[ManyReport]:
    """Estimates memory and messages of a training step on each of many GPUs; nothing of the model's size is allocated.

    The step is that of ``estimate_memory``, with each layer compiled by itself. Sharded parameters are gathered, and
    gradients reduced, in the order and the buffers of FSDP2 (``fully_shard`` on each layer and on the model, with its
    defaults, but for stacks of fewer matrices than processes: ``sharding.cut_dimension``); DDP keeps a set of
    gradients in its buckets. Tensor parallelism is that of ``parallelize``: the matmuls of the layers are shared by
    heads and by intermediate width, and head and embeddings are not. Experts are shared by their width, too, which
    takes and sends no less than dividing them by number.

    Args:
        model_or_config, args, kwargs, config, optimizer, per_layer, dtype, device: As for ``estimate_memory``; what
            one GPU's share of the batch is called with. Tensor parallelism needs a transformers configuration.
        layouts: How many GPUs there are, and how the model is spread among them. Those that differ only in the number
            of GPUs take no more time than one of them.

    Returns:
        A report for each layout.

    Raises:
        ValueError: An argument is not allowed; heads or widths cannot be divided by a layout's ``tp``; or as
            ``estimate_memory``.
        ImportError: A configuration is given, and transformers is not installed.
    """
    config = checked_config(config)
    require_choice("optimizer", optimizer, OPTIMIZERS)
    require_choice("device", device, DEVICES)
    if config.budget is not None:
        raise ValueError(f"memory_budget={config.budget} is for one GPU: on many, each layer is compiled by itself")
    kind = OPTIMIZERS[optimizer]
    call: Call = (positional(args), dict(kwargs or {}))
    whole, layers = builder(model_or_config, dtype)

    @functools.cache
    def one_process(tp: int, factorized: bool, updates: bool) -> tuple[nn.Module, nn.Module, list[Event]]:
        """Returns what a process computes with, the whole model, and the events of a step with whole parameters."""
        part = whole if tp == 1 else builder(_divided(model_or_config, tp), dtype)[0]
        make_whole = factorizing(whole, config, call) if factorized else whole
        if tp > 1:
            make_whole = functools.cache(make_whole)  # what it makes is only looked at
        make = make_whole if tp == 1 else _matching(part, make_whole) if factorized else part
        plan = Plan(device, kind.scratch_on(device), kind.together, updates, True)
        events, _ = step_of(make, layers, call, dtype, plan, config if factorized else None)
        full = make_whole(layers)
        return full if tp == 1 else make(layers), full, events

    reports = []
    for layout in layouts:
        shares = []
        for factorized in (False, True):
            # Sharded parameters are updated after their reduction, which is added to a step that keeps gradients.
            model, full, events = one_process(layout.tp, factorized, per_layer and not layout.shards)
            if layout.shards:
                ways = {"per_layer": per_layer, "together": kind.together, "gloo": device == "cpu"}
                events = sharded_events(
                    events, dict(model.named_parameters()), layout.data, kind.scratch_on(device), **ways
                )
            shares.append(_share(model, full, events, kind, layout, call))
        settings = {
            "optimizer": optimizer + (" per layer" if per_layer else ""),
            **options_of(full, config),
            "dtype": str(next(full.parameters()).dtype).removeprefix("torch."),
            "device": device,
        }
        reports.append(ManyReport(dense=shares[0], sltrain=shares[1], layout=layout, settings=settings))
    return reports


def _divided(source: Any, tp: int) -> Any:
    """Returns the configuration of what one of several tensor-parallel processes computes."""
    if isinstance(source, nn.Module):
        raise ValueError("tp > 1 needs a transformers configuration as model_or_config, got a module")
    config = copy.deepcopy(source)
    heads = config.num_attention_heads
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // heads
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"):
        size = getattr(config, name, None)
        if size is None:
            continue
        if size % tp:
            raise ValueError(f"tp must divide the model's {name}={size}, got {tp}")
        setattr(config, name, size // tp)
    return config


def _matching(build_part: Build, make_whole: Build) -> Build:
    """Makes one process's part of a model, with factors of the ranks that the whole weights have."""

    def make(depth: int | None) -> nn.Module:
        model, whole = build_part(depth), make_whole(depth)
        modules = dict(model.named_modules())
        for path, module in whole.named_modules():
            for name in sl_names(module):
                weight: FactorizedWeight = getattr(module, name + SUFFIX)
                dense = getattr(modules[path], name)
                with torch.device("meta"):
                    shape = matrix_shape(dense.shape, weight.convolved)
                    put = type(weight).from_description(shape, weight.describe(), name=name, dtype=dense.dtype)
                put_in_place(modules[path], name, put.stored_as(dense.shape))
        return model

    return make


def _share(
    model: nn.Module, whole: nn.Module, events: Sequence[Event], optimizer: Optimizer, layout: Layout, call: Call
) -> Share:
    parameters = dict(model.named_parameters())
    world = layout.data if layout.shards else 1
    now = dict.fromkeys(MANY_PARTS, 0)
    for each in model.parameters():
        elements = shard_elements(each, world)
        now["parameters"] += elements * each.itemsize
        now["optimizer state"] += optimizer.state(elements, each.itemsize) if each.requires_grad else 0
    indices = [each for weight in weights_in(model) for each in weight.parts()["indices"]]
    now["indices"] = sum(each.nbytes for each in indices)
    now["buffers"] = sum(each.nbytes for each in model.buffers()) - now["indices"]
    if layout.data > 1 and not layout.fsdp:
        now[BUCKETS] = sum(each.nbytes for each in parameters.values() if each.requires_grad)
    peak, at_peak, place = peak_of(profile(events, now), now)
    partial, activations = _exchanged(model, whole, call) if layout.tp > 1 else ({}, 0)
    count = sum(each.numel() for each in whole.parameters() if each.requires_grad)
    return Share(count, peak, place, at_peak, sent(parameters, layout, partial, activations))


def _exchanged(model: nn.Module, whole: nn.Module, call: Call) -> tuple[dict[str, nn.Parameter], int]:
    """Returns what tensor-parallel processes hold whole of weights that they share, and the activations they add up.

    A weight whose columns are shared (a row-parallel one) makes a part of [tokens, rows], which is added up forward.
    One whose rows are makes a part of its input's gradient, [tokens, columns], which is added up backward.
    """
    tokens = max(each.numel() for _, each in torch_private.leaves_with_paths(call) if isinstance(each, torch.Tensor))
    partial: dict[str, nn.Parameter] = {}
    activations = 0
    modules = dict(whole.named_modules())
    for path, module in model.named_modules():
        weights: list[tuple[Any, Any, int]] = []
        if isinstance(module, FactorizedWeight):
            other = modules[path]
            weights.append((module.shape, other.shape, module.dtype.itemsize))
            if module.shape != other.shape:
                for name, each in module.named_parameters():
                    if each.shape == other.get_parameter(name).shape:
                        partial[f"{path}.{name}"] = each
        else:
            for name, each in module.named_parameters(recurse=False):
                if each.dim() > 1:
                    weights.append((each.shape, modules[path].get_parameter(name).shape, each.itemsize))
        for (*_, rows, columns), (*_, all_rows, all_columns), itemsize in weights:
            added = rows if columns != all_columns else columns if rows != all_rows else 0
            activations += tokens * added * itemsize
    return partial, activations

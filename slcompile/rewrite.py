"""The passes on any torch.fx graph that reads its parameters as attributes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx, nn

from slcompile.config import SLConfig, checked_config
from slcompile.convert.candidates import gather
from slcompile.convert.eligibility import require_possible_rank
from slcompile.convert.ledger import ledger
from slcompile.convert.transaction import convert
from slcompile.convert.weight_uses import layer_use
from slcompile.passes import PassReport, find_matmuls, parameterize_weights, run
from slcompile.passes.find_matmuls import WeightUse, is_weight
from slcompile.weight.owners import LiveObjects
from slcompile.weight.placing import dense_names
from slcompile.weight.structure import weights_in


@torch.inference_mode(False)
def rewrite(gm: fx.GraphModule, config: SLConfig | None = None) -> PassReport:
    """Replaces the trained weights of a torch.fx graph by weight ops, in place.

    Works on graphs that read parameters as attributes: ``torch.fx.symbolic_trace(model)`` (whose modules are the
    model's own, and are converted with it) and ``ExportedProgram.module()`` (the exported model is left alone). Leaf
    modules of ``nn.Linear`` and of convolutions that are chosen are inlined, so that the graph shows the weight op.

    Returns:
        The report, with a reason for each weight that stays dense.

    Raises:
        ValueError: ``gm`` reads no parameter as an attribute; or as ``factorize_``. The graph and its modules are then
            as they were.
    """
    config = checked_config(config)
    if not isinstance(gm, fx.GraphModule):
        raise ValueError(f"gm must be a torch.fx.GraphModule, got {type(gm).__name__}")
    config.require_patterns_match(dense_names(gm))
    reads: dict[int, list[fx.Node]] = {}
    uses: dict[int, WeightUse] = {}
    weights: dict[int, nn.Parameter] = {}
    for node in gm.graph.nodes:
        leaf = _leaf_use(gm.get_submodule(node.target)) if node.op == "call_module" else None
        if node.op != "get_attr" and leaf is None:
            continue
        path, _, name = f"{node.target}.weight".rpartition(".") if leaf else str(node.target).rpartition(".")
        weight = gm.get_submodule(path)._parameters.get(name)
        if weight is None or not is_weight(weight):
            continue
        weights[id(weight)] = weight
        uses.setdefault(id(weight), WeightUse()).add(leaf or find_matmuls(node))
        reads.setdefault(id(weight), []).append(node)
    if not weights and not weights_in(gm):
        raise ValueError("gm reads no weight as an attribute; graphs whose parameters are inputs cannot be rewritten")
    with ledger.lock:
        live = LiveObjects.find()
        dense = [(weights[key], uses[key]) for key in weights if not uses[key].composed]
        found = gather(dense, config, live, model=gm, rewriting=True)
        report = found.report()
        if not found.chosen:
            require_possible_rank(found.misshapen, config)
            return report
        modules = convert(found.chosen, config, live, report, ledger)
    table = {}
    for candidate, module in zip(found.chosen, modules, strict=True):
        for node in reads[id(candidate.weight)]:
            node = _inline(gm, node) if node.op == "call_module" else node
            table[node.name] = (candidate.name, module)
    run([functools.partial(parameterize_weights, weights=table)], gm)
    return report


def _leaf_use(module: nn.Module) -> WeightUse | None:
    """As ``layer_use``; what has another forward pass than the plain layer is not inlined: its weight stays dense."""
    use = layer_use(module)
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if use is None or not use.matmuls or any(type(module).forward is kind.forward for kind in plain):
        return use
    return WeightUse(others=[f"the forward pass of {type(module).__name__}"])


def _inline(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Replaces a call of a leaf module by its function over its attributes; returns the weight's node."""
    module = gm.get_submodule(str(node.target))
    arguments = {**dict(zip(("input",), node.args, strict=False)), **node.kwargs}
    with gm.graph.inserting_before(node):
        # Not graph.get_attr: until parameterize_weights has run, the attribute is composed, no parameter.
        weight = gm.graph.create_node("get_attr", f"{node.target}.weight")
        bias = gm.graph.get_attr(f"{node.target}.bias") if module.bias is not None else None
        if isinstance(module, nn.Linear):
            result = gm.graph.call_function(nn.functional.linear, (arguments["input"], weight, bias))
        else:
            result = _convolution(gm.graph, module, arguments["input"], weight, bias)
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result, propagate_meta=False)
    gm.graph.erase_node(node)
    return weight


def _convolution(graph: fx.Graph, module: nn.Module, x: Any, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    function = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[len(module.kernel_size)]
    padding = module.padding
    if module.padding_mode != "zeros":
        sides = [side for size in reversed(_sides(module)) for side in size]
        x = graph.call_function(nn.functional.pad, (x, sides), {"mode": module.padding_mode})
        padding = "valid"
    return graph.call_function(function, (x, weight, bias, module.stride, padding, module.dilation, module.groups))


def _sides(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    """Returns how much a convolution pads each size before and behind."""
    if not isinstance(module.padding, str):
        return [(size, size) for size in module.padding]
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    added = [apart * (size - 1) for size, apart in zip(module.kernel_size, module.dilation, strict=True)]
    return [(size // 2, size - size // 2) for size in added]

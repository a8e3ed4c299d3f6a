"""The passes on any torch.fx graph that reads its parameters as attributes."""

from __future__ import annotations

import functools

from torch import fx, nn

from slcompile.config import SLConfig, checked_config
from slcompile.convert.candidates import gather
from slcompile.convert.eligibility import require_possible_rank
from slcompile.convert.ledger import ledger
from slcompile.convert.transaction import convert
from slcompile.passes import PassReport, find_matmuls, parameterize_weights, run
from slcompile.passes.find_matmuls import WeightUse, is_weight
from slcompile.weight.owners import LiveObjects
from slcompile.weight.placing import dense_names
from slcompile.weight.structure import FactorizedWeight


def rewrite(gm: fx.GraphModule, config: SLConfig | None = None) -> PassReport:
    """Replaces the trained weights of a torch.fx graph by weight ops, in place.

    Works on graphs that read parameters as attributes: ``torch.fx.symbolic_trace(model)`` (whose modules are the
    model's own, and are converted with it) and ``ExportedProgram.module()`` (the exported model is left alone). Leaf
    ``nn.Linear`` modules that are chosen are inlined, so that the graph shows the weight op.

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
        is_linear = node.op == "call_module" and isinstance(gm.get_submodule(node.target), nn.Linear)
        if node.op != "get_attr" and not is_linear:
            continue
        path, _, name = f"{node.target}.weight".rpartition(".") if is_linear else str(node.target).rpartition(".")
        weight = gm.get_submodule(path)._parameters.get(name)
        if weight is None or not is_weight(weight):
            continue
        weights[id(weight)] = weight
        use = WeightUse(matmuls=["linear"]) if is_linear else find_matmuls([node])
        uses.setdefault(id(weight), WeightUse()).add(use)
        reads.setdefault(id(weight), []).append(node)
    if not weights and not any(isinstance(module, FactorizedWeight) for module in gm.modules()):
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
            node = _inline_linear(gm, node) if node.op == "call_module" else node
            table[node.name] = (candidate.name, module)
    run([functools.partial(parameterize_weights, weights=table)], gm)
    return report


def _inline_linear(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Replaces a call of a leaf nn.Linear by F.linear over its attributes; returns the weight's node."""
    with gm.graph.inserting_before(node):
        # Not graph.get_attr: until parameterize_weights has run, the attribute is composed, no parameter.
        weight = gm.graph.create_node("get_attr", f"{node.target}.weight")
        has_bias = gm.get_submodule(str(node.target)).bias is not None
        bias = gm.graph.get_attr(f"{node.target}.bias") if has_bias else None
        arguments = {**dict(zip(("input",), node.args, strict=False)), **node.kwargs}
        linear = gm.graph.call_function(nn.functional.linear, (arguments["input"], weight, bias))
    linear.meta = dict(node.meta)
    node.replace_all_uses_with(linear, propagate_meta=False)
    gm.graph.erase_node(node)
    return weight

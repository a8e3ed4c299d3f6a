"""How a model uses its parameters, read from the graphs that Dynamo captures of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from slcompile import torch_private
from slcompile.passes.find_matmuls import WeightUse, find_matmuls, is_weight


def weight_uses(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[int, WeightUse]:
    """Position of each weight among a Dynamo graph's inputs -> how the graph uses it, seen in ATen.

    Factors of weights that are already factorized are not among them.
    """
    positions = [index for index, value in enumerate(example_inputs) if is_weight(value)]
    if not positions:
        return {}
    lowered = torch_private.lower_to_aten(gm, torch_private.captured_inputs(gm))
    placeholders = [node for node in lowered.graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == len(example_inputs), (len(placeholders), len(example_inputs))
    uses = {index: find_matmuls([placeholders[index]]) for index in positions}
    return {index: use for index, use in uses.items() if not use.composed}


@torch.no_grad()
def captured_uses(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[nn.Parameter, WeightUse]]:
    """Runs a model once, without gradients, and collects how each of its weights is used in all captured graphs.

    Buffers and the random state are put back afterwards.
    """
    found: dict[int, tuple[nn.Parameter, WeightUse]] = {}

    def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]):
        for index, use in weight_uses(gm, example_inputs).items():
            parameter = example_inputs[index]
            found.setdefault(id(parameter), (parameter, WeightUse()))[1].add(use)
        return gm.forward

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(enabled=not any(each.is_meta for each in model.parameters())):
            torch.compile(lambda: model(*args, **kwargs), backend=collect)()
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
    return list(found.values())

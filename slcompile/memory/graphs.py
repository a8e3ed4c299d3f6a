"""The graphs of a training step as Inductor would be given them, captured on fake tensors: nothing is allocated.

Dynamo, AOTAutograd, our passes, Inductor's joint passes and its partitioner run as they do under ``backend="sltrain"``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from slcompile import torch_private
from slcompile.captured import JOINT_HOOK, PARTITIONER, GraphPasses
from slcompile.config import SLConfig
from slcompile.passes import joint_passes
from slcompile.passes.liveness import Graphs
from slcompile.passes.partition import BudgetedPartitioner, lowered
from slcompile.weight.structure import weights_in

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of a model."""


def capture(
    model: nn.Module,
    call: Call,
    dtype: torch.dtype | None,
    device: str,
    config: SLConfig | None,
    partitioner: BudgetedPartitioner | None = None,
) -> Graphs:
    """Captures a model on the meta device as one graph.

    Args:
        model: Its parameters and buffers become fake tensors.
        call: What it is called with.
        dtype: Of floating-point arguments; their own by default.
        device: ``"cpu"`` or ``"cuda"``: whose lowerings and kernels.
        config: Of a factorized model, which our passes are run on; None for a dense one.
        partitioner: Keeps the config's memory budget, if it has one.

    Raises:
        torch._dynamo.exc.Unsupported: It cannot be captured as one graph.
        ValueError: It has nothing to train.
    """
    mode = torch_private.new_fake_mode()
    made: dict[int, nn.Parameter] = {}  # of tied parameters one

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        to = dtype if dtype is not None and value.is_floating_point() else value.dtype
        # On the CPU whatever the device: autograd needs its own, and the passes are told where the graph runs.
        return torch.empty(value.shape, dtype=to, device="cpu")

    with mode:
        args, kwargs = torch_private.map_leaves(fake, call)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    new = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                    module._parameters[name] = made.setdefault(id(parameter), new)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="cpu")
    parts = [weight.parts() for weight in weights_in(model)]
    values = {id(each) for part in parts for each in part["values"]}
    found: list[Graphs] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        settings: dict[str, Any] = {}
        if config is not None:
            passes = joint_passes(config, torch.device(device))
            settings[JOINT_HOOK] = GraphPasses(passes, config, [])
        if partitioner is not None:
            settings[PARTITIONER] = partitioner
        parts = torch_private.partitioned(gm, inputs, settings)
        if len(parts) == 2:
            of_values = frozenset(position for position, each in enumerate(inputs) if id(each) in values)
            found.append(lowered(parts, config, device, of_values))
        return gm.forward

    with torch.inference_mode(False), torch.enable_grad(), mode, torch_private.unlimited_recompiles():
        # Not the model itself, whose forward Dynamo may have given up in this process.
        torch.compile(lambda: model(*args, **kwargs), backend=backend, fullgraph=True, dynamic=False)()
    if not found:  # an error in the backend would come as one of Dynamo's
        raise ValueError(
            "model_or_config has no parameter that its output depends on: there is nothing to train. For a frozen base "
            "leave requires_grad as it is: base freezes the weights, and dense is estimated beside"
        )
    return found[0]

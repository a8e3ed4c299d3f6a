"""A graph as Dynamo captures it, for the tests of each private part."""

from __future__ import annotations

import torch
from torch import nn

from slcompile import torch_private


def capture(model: nn.Module, *args: torch.Tensor, dynamic: bool | None = None, within=lambda gm, inputs: None):
    """The graph that Dynamo captures; ``within`` runs where a backend would."""
    captured = []

    def backend(gm, inputs):
        captured.append(gm)
        within(gm, inputs)
        return gm.forward

    torch.compile(model, backend=backend, dynamic=dynamic)(*args)
    (gm,) = captured
    return gm


def symbolic_input(gm):
    """The tensor among a graph's inputs whose first size is symbolic."""
    tensors = [each for each in torch_private.captured_inputs(gm) if isinstance(each, torch.Tensor)]
    return next(each for each in tensors if isinstance(each.shape[0], torch.SymInt))

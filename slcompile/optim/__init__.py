"""Optimizers: updates inside the backward pass, groups by rate, a limit for each step, less state for dense weights."""

from slcompile.optim.blocks import BlockAdamW
from slcompile.optim.galore import GaLoreAdamW
from slcompile.optim.groups import parameter_groups
from slcompile.optim.in_backward import PerLayer, Update, per_layer
from slcompile.optim.step_limit import StepLimit, limit_steps

__all__ = [
    "BlockAdamW",
    "GaLoreAdamW",
    "PerLayer",
    "StepLimit",
    "Update",
    "limit_steps",
    "parameter_groups",
    "per_layer",
]

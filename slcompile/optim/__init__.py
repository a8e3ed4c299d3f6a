"""Around optimizers: updates in the backward pass, groups by rate, limited steps, less state, non-zeros that move."""

from slcompile.optim.blocks import BlockAdamW
from slcompile.optim.galore import GaLoreAdamW
from slcompile.optim.groups import parameter_groups
from slcompile.optim.in_backward import PerLayer, per_layer
from slcompile.optim.step_limit import StepLimit, limit_steps
from slcompile.optim.support_moves import SupportMoves

__all__ = [
    "BlockAdamW",
    "GaLoreAdamW",
    "PerLayer",
    "StepLimit",
    "SupportMoves",
    "limit_steps",
    "parameter_groups",
    "per_layer",
]

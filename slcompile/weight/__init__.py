"""One factorized weight, and where it stands in a model."""

from slcompile.weight.block_low_rank import BlockLowRankWeight
from slcompile.weight.cp import CPWeight
from slcompile.weight.placing import _remake
from slcompile.weight.sl_weight import Factors, SLWeight
from slcompile.weight.tensor_train import TensorTrainWeight

# Older pickles name SLWeight and _remake here.
__all__ = ["BlockLowRankWeight", "CPWeight", "Factors", "SLWeight", "TensorTrainWeight", "_remake"]

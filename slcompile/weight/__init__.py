"""One factorized weight, and where it stands in a model."""

from slcompile.weight.placing import _remake
from slcompile.weight.sl_weight import Factors, SLWeight

__all__ = ["Factors", "SLWeight", "_remake"]  # pickled models name SLWeight and _remake here

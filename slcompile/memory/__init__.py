"""What training a model takes, known before it is run."""

from slcompile.memory.estimate import estimate_memory, held_memory
from slcompile.memory.report import MemoryReport, Usage

__all__ = ["MemoryReport", "Usage", "estimate_memory", "held_memory"]

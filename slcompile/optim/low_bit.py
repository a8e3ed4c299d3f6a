"""8- and 4-bit states of torchao in distributed checkpoints: ``LowBitPlanner``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
SMALLEST = 4096
"""torchao keeps smaller tensors in the parameter's dtype, and those whose size its blocks do not divide."""


class LowBitPlanner(DefaultLoadPlanner):
    """Plans the loading of a checkpoint with torchao's states, and refuses it where it cannot be read.

    torchao quantizes the blocks of each process's shard. Another number of processes cuts other shards, and reads parts
    of those that were written; a part that begins or ends within a block has no scale of its own. For
    ``torch.distributed.checkpoint.load(state, checkpoint_id=..., planner=LowBitPlanner(optimizer))``, which raises
    before the first number of the state is overwritten. Of other optimizers nothing is looked at.

    Args:
        optimizer: What the states are loaded into, plain or per layer.

    Raises:
        ValueError: When it plans: a shard's blocks would be cut. DCP raises it on all processes, as a
            ``CheckpointException`` that holds it.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__()
        is_torchao = any(each.__module__.startswith("torchao.") for each in type(optimizer).__mro__)
        self.block: int | None = getattr(optimizer, "block_size", None) if is_torchao else None

    @override
    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        for item in plan.items if self.block is not None else ():
            name = item.dest_index.fqn
            if name.rpartition(".")[2] not in MOMENTS:
                continue
            assert self.metadata is not None
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            (written,) = [each.sizes for each in stored.chunks if each.offsets == item.storage_index.offset]
            target = self.state_dict[name]
            own = (target.to_local() if isinstance(target, DTensor) else target).shape
            self._require_whole_blocks(name, "was written", written, item.storage_offsets, item.lengths)
            self._require_whole_blocks(name, "is wanted here", own, item.dest_offsets, item.lengths)
        return plan

    def _require_whole_blocks(
        self, name: str, what: str, shard: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]
    ) -> None:
        assert self.block is not None
        size = math.prod(shard)
        if size < SMALLEST or size % self.block or tuple(lengths) == tuple(shard):
            return
        row, first, last = math.prod(shard[1:]), offsets[0], offsets[0] + lengths[0]
        if tuple(lengths[1:]) != tuple(shard[1:]) or first * row % self.block or last * row % self.block:
            raise ValueError(
                f"{name}: the shard {tuple(shard)} that {what} is quantized in blocks of {self.block}, which rows "
                f"{first} to {last} of it cut. torchao's states can then be read by as many processes as wrote them, "
                "in the same layout"
            )

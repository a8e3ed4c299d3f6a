"""Which buffers the kernels that Inductor makes of a graph write and read: what ``liveness`` follows.

What is assumed of Inductor, and nothing else:

- A pointwise node is written only where something reads it that cannot be fused (a matmul, attention, an op of ours),
  where it leaves the graph, or where it has several readers and reads more buffers than Inductor reads again
  (``realize_reads_threshold``). Otherwise its readers compute it, and what it reads lives until they do.
- Pointwise nodes of one size that read a buffer in common, or what the other wrote, are written by one kernel where the
  first of them stands, if all that they read is there by then: so all of them are allocated at once. A transposed copy,
  whose loop runs the other way, is not.
- A view shares its buffer.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from slcompile import torch_private
from slcompile.ops import STRUCTURE_OPS, WEIGHT_OPS
from slcompile.passes.graph import op_name, transposes

FARTHEST = 64
"""Nodes that are written, between the first and the last of a kernel (``Scheduler.are_long_distant_nodes``)."""


_FUSED_NAMES = frozenset(
    """cat clone constant_pad_nd embedding expand full full_like gather index index_select iota scalar_tensor
    select_scatter slice_scatter""".split()
)


def _is_pointwise(node: fx.Node) -> bool:
    """Returns whether each element is computed by itself: Inductor computes those where they are read."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or op_name(node) in _FUSED_NAMES


_SCATTER_NAMES = frozenset(
    "index_put _unsafe_index_put _unsafe_masked_index_put_accumulate scatter scatter_add scatter_reduce".split()
)


def is_fused(node: fx.Node) -> bool:
    """Returns whether Inductor writes a kernel of its own for it, which computes what it reads."""
    tags = getattr(node.target, "tags", ())
    # A scatter computes what it scatters into where its result will be.
    return _is_pointwise(node) or torch.Tag.reduction in tags or op_name(node) in _SCATTER_NAMES


def _is_alias(node: fx.Node) -> bool:
    return node.target is operator.getitem or bool(getattr(node.target, "is_view", False))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yields what reads a node, through views."""
    for user in node.users:
        if _is_alias(user):
            yield from _readers(user)
        else:
            yield user


@dataclass(eq=False)
class Buffer:
    """A piece of memory that a graph writes or is given.

    Attributes:
        size: Bytes.
        itemsize: Bytes of an element.
        part: One of ``PARTS``.
        of_values: As in ``Event``.
        held: Whether somebody else holds it while the graph runs.
        last: Position of the last node that reads it; -1 where none does.
    """

    size: int
    itemsize: int
    part: str = "temporaries"
    of_values: bool = False
    held: bool = False
    last: int = -1


@dataclass(eq=False)
class Kernel:
    """Nodes that are computed at once.

    Attributes:
        position: Of the first one in the graph.
        order: How many nodes, and inputs of the graph, were written before.
        reads: Each buffer that is read, in order -> for how many of the nodes.
        writes: What they are in.
    """

    position: int
    order: int
    reads: Counter[Buffer] = field(default_factory=Counter)
    writes: list[Buffer] = field(default_factory=list)


@dataclass
class Walk:
    """Which buffers the nodes of a graph write and read.

    Attributes:
        graph: Forward or backward.
        given: Name of a placeholder -> the buffers that it is in; those of other placeholders are new.
        reads: Node -> the buffers that its value is in or, where no kernel writes it, is computed from.
        writes: Node that a kernel writes, or placeholder -> its buffers.
        kernels: The first node of each -> the kernel; the output is one, too.
        made_by: Buffer -> the kernel that writes it; only those are written over.
    """

    graph: fx.Graph
    given: Mapping[str, list[Buffer]] = field(default_factory=dict)
    reads: dict[fx.Node, list[Buffer]] = field(default_factory=dict)
    writes: dict[fx.Node, list[Buffer]] = field(default_factory=dict)
    kernels: dict[fx.Node, Kernel] = field(default_factory=dict)
    made_by: dict[Buffer, Kernel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        threshold = torch_private.realize_reads_threshold()
        loops: dict[tuple[Buffer, int], list[Kernel]] = {}  # pointwise ones, by a buffer that they touch and their size
        for position, node in enumerate(self.graph.nodes):
            inputs = list(dict.fromkeys(buffer for each in node.all_input_nodes for buffer in self.reads[each]))
            if node.op == "placeholder":
                self.writes[node] = self.reads[node] = self.given.get(node.name) or buffers_of(node)
            elif node.target is operator.getitem and node.args[0] in self.writes:
                self.reads[node] = [self.writes[node.args[0]][node.args[1]]]
            elif _is_alias(node) or (_is_pointwise(node) and _computed_by_readers(node, len(inputs), threshold)):
                self.reads[node] = inputs
            else:
                size = _loop_size(node)
                beside = () if size is None else (each for buffer in inputs for each in loops.get((buffer, size), ()))
                makers = [self.made_by[buffer] for buffer in inputs if buffer in self.made_by]
                joined = (each for each in beside if self._is_ready(each, makers))
                kernel = min(joined, key=lambda each: each.position, default=None)
                if kernel is None:
                    kernel = self.kernels[node] = Kernel(position, len(self.writes))
                for buffer in inputs:
                    buffer.last = max(buffer.last, kernel.position)
                self.writes[node] = self.reads[node] = [] if node.op == "output" else buffers_of(node)
                self.made_by |= dict.fromkeys(self.writes[node], kernel)
                kernel.reads.update(inputs)
                kernel.writes += self.writes[node]
                if size is not None:
                    for buffer in (*inputs, *self.writes[node]):
                        loops.setdefault((buffer, size), []).append(kernel)

    def _is_ready(self, kernel: Kernel, makers: list[Kernel]) -> bool:
        """Returns whether a kernel is near enough, and runs after those that make what one more node reads."""
        are_made = all(each is kernel or each.position < kernel.position for each in makers)
        return are_made and len(self.writes) - kernel.order <= FARTHEST


def _loop_size(node: fx.Node) -> int | None:
    """Returns how many elements a pointwise node has; None for others, and for a transposed copy."""
    value = node.meta.get("val")
    if not _is_pointwise(node) or not isinstance(value, Tensor):
        return None
    is_transposing = op_name(node) == "clone" and transposes(node.all_input_nodes[0])
    return None if is_transposing else torch_private.size_hint(value.numel())


def _computed_by_readers(node: fx.Node, inputs: int, threshold: int) -> bool:
    readers = list(_readers(node))
    is_read_by_kernels_only = all(is_fused(each) for each in readers)  # and so does not leave the graph
    return is_read_by_kernels_only and (len(readers) <= 1 or inputs <= threshold)


def buffers_of(node: fx.Node) -> list[Buffer]:
    """Returns new buffers for what a node gives."""
    value = node.meta.get("val")
    part = "composed weights" if _is_composed(node) else "temporaries"
    values = value if isinstance(value, (list, tuple)) else [value]
    return [Buffer(size_of(each), each.itemsize, part) if isinstance(each, Tensor) else Buffer(0, 0) for each in values]


def size_of(value: Tensor) -> int:
    """Returns the bytes of what a tensor is in; of a symbolic size, those that it had when it was captured."""
    return torch_private.size_hint(value.untyped_storage().nbytes())


def _is_composed(node: fx.Node) -> bool:
    """Returns whether it is a composed weight, or a weight's dense gradient that is to be projected on the factors."""
    projecting = {torch.ops.slcompile.compose_backward.default, *(ops.backward for ops in STRUCTURE_OPS.values())}
    return node.target in WEIGHT_OPS or any(each.target in projecting for each in _readers(node))

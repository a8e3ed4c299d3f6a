"""When each buffer of a training step is allocated and freed, read from the graphs that Inductor would be given.

An analysis: it changes nothing. The forward and the backward graph are walked in order: every buffer that a kernel
writes is allocated there and freed after its last use. ``torch.distributed._tools.MemTracker`` was the alternative: it
sees what eager dispatch allocates, which is neither what the partitioner saves nor what Inductor fuses away.

What is assumed of Inductor, beside what ``buffers`` says of its kernels:

- A kernel may write a result over a buffer of the same size that it is the last to read, for one of its nodes only, and
  that is no input of the graph.
- A graph frees an input after its last use, where nobody else holds it.
- Kernels run in the graph's order. Inductor may reorder them; what that changes was up to 5 % of a peak.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from slcompile.ops import WEIGHT_OPS
from slcompile.passes.buffers import Buffer, Kernel, Walk, buffers_of, is_fused
from slcompile.passes.graph import arguments
from slcompile.passes.workspace import kept_on_cpu, workspace

PARTS = (
    "parameters",
    "indices",
    "buffers",
    "optimizer state",
    "gradients",
    "activations",
    "composed weights",
    "temporaries",
)
"""What memory is for. ``indices``: of non-zeros, stored ones and, on CPU, those that the factored lowering keeps.
``activations``: saved by the forward pass for the backward pass. ``composed weights``: W, and dense gradients of it."""

Place = tuple[str, int | None]
"""A phase of the step and the layer whose code runs then; None outside the layers."""

START = "before the step"
"""Place of what is held from the first step on."""

PROOF_LAYERS = 3
"""The fewest layers of which one has neighbours on both sides."""


@dataclass(frozen=True)
class Graphs:
    """Forward and backward graph.

    Attributes:
        results: What the forward graph's results are called in the backward graph; our lowering names them otherwise.
        of_values: Positions of ``values`` among the graph's inputs, and so among the gradients.
    """

    forward: fx.Graph
    backward: fx.Graph
    results: tuple[str, ...]
    of_values: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Plan:
    """How a step runs.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``: whose lowerings and kernels.
        scratch: Bytes that the optimizer's step allocates for one parameter, by its elements and bytes an element.
        together: Whether one step holds that for all parameters at once.
        per_layer: Whether parameters are updated in the backward pass.
        by_layers: Whether each layer is compiled by itself.
    """

    device: str
    scratch: Callable[[int, int], int] = lambda count, itemsize: 0
    together: bool = False
    per_layer: bool = False
    by_layers: bool = False


@dataclass(frozen=True)
class Event:
    """An allocation (positive) or a release of ``size`` bytes.

    Attributes:
        place: Phase of the step.
        layer: Whose layer's code runs; None outside the layers.
        part: One of ``PARTS``.
        size: Bytes.
        of_values: Whether it is there for ``values`` or their positions only.
    """

    place: str
    layer: int | None
    part: str
    size: int
    of_values: bool = False

    @property
    def label(self) -> str:
        """The place, and the layer where there is one."""
        return self.place if self.layer is None or self.place == START else f"{self.place} of layer {self.layer}"


def _layer(node: fx.Node, backward: bool) -> int | None:
    """Returns the layer in whose module a node was called; None where it is outside, -1 where the node does not say."""
    # What the backward pass recomputes runs where it is needed, not where it was called; a composed weight just before.
    stack = node.meta.get("fwd_nn_module_stack" if backward and node.target not in WEIGHT_OPS else "nn_module_stack")
    if not stack:
        return -1
    return layer_in(str(list(stack.values())[-1][0]))


def layer_in(path: str) -> int | None:
    """Returns the layer in which a module of this path is, such as ``.layers.3.mlp``; None outside of the layers."""
    number = re.search(r"\.(\d+)(?=\.|$)", path)
    return int(number.group(1)) if number else None


def _places(graph: fx.Graph, place: str) -> dict[fx.Node, Place]:
    """Says for each node what runs then. What runs between layers counts for the one before."""
    backward = place == "backward"
    nodes = list(graph.nodes)
    owners = [_layer(node, backward) for node in nodes]
    inside = [index for index, owner in enumerate(owners) if owner is not None and owner >= 0]
    if not inside:
        return dict.fromkeys(nodes, (place, None))
    outside = ("backward of head and loss", "backward before the layers")
    before, after = outside if backward else ("forward before the layers", "forward of head and loss")
    found: dict[fx.Node, Place] = {}
    current: int | None = None
    ended = False
    for index, (node, owner) in enumerate(zip(nodes, owners, strict=True)):
        if owner is not None and owner >= 0:
            current = owner if current is None else min(current, owner) if backward else max(current, owner)
        ended = ended or (index > inside[-1] and owner is None)
        found[node] = (after, None) if ended else (before, None) if current is None else (place, current)
    return found


def step_events(graphs: Graphs, plan: Plan) -> list[Event]:
    """Returns the allocations of a step in order: forward, backward, optimizer; without what is always held."""
    held = {node.name: buffers_of(node) for node in graphs.forward.find_nodes(op="placeholder")}
    for buffers in held.values():
        for buffer in buffers:
            buffer.held = True
    forward = Walk(graphs.forward, held)
    saved_names = {node.name for node in graphs.backward.find_nodes(op="placeholder")}
    made = zip(graphs.results, result_nodes(graphs.forward), strict=True)
    saved = {name: forward.reads[node] for name, node in made if name in saved_names and isinstance(node, fx.Node)}
    saved_buffers = list(dict.fromkeys(each for buffers in saved.values() for each in buffers if not each.held))
    for buffer in saved_buffers:
        if buffer.part == "temporaries":
            buffer.part = "activations"
    events = [*_kept_positions(graphs)] if plan.device == "cpu" else []
    events += _forward_events(forward, set(saved_buffers), plan)
    for buffer in saved_buffers:
        buffer.last = -1
    backward = Walk(graphs.backward, saved)
    return events + _backward_events(backward, graphs.of_values, plan)


def result_nodes(graph: fx.Graph) -> Sequence[Any]:
    """Returns what a graph returns; of no tensor None or a number."""
    (output,) = graph.find_nodes(op="output")
    results = arguments(output)[0]
    return results if isinstance(results, (list, tuple)) else [results]


def _forward_events(walk: Walk, saved: set[Buffer], plan: Plan) -> list[Event]:
    events: list[Event] = []
    places = _places(walk.graph, "forward")
    for node in walk.graph.nodes:
        if node.op not in ("placeholder", "output"):
            events += _kernel_events(walk, node, saved, places[node], plan)
        elif node.op == "output":  # the caller drops what it is given beside the loss
            events += [Event(*places[node], each.part, -each.size) for each in _dying(walk.kernels[node], saved)]
    return events


def _backward_events(walk: Walk, of_values: frozenset[int], plan: Plan) -> list[Event]:
    events: list[Event] = []
    places = _places(walk.graph, "backward")
    (output,) = walk.graph.find_nodes(op="output")
    gradients: dict[Buffer, None] = {}
    for position, node in enumerate(result_nodes(walk.graph)):
        for buffer in walk.reads[node] if isinstance(node, fx.Node) else ():
            buffer.part, buffer.of_values = "gradients", position in of_values
            gradients[buffer] = None
    waiting: list[Buffer] = []  # gradients that the graph of the layer at work will return
    runs: Place | None = None
    for node in walk.graph.nodes:
        if plan.per_layer and plan.by_layers and waiting and (places[node] != runs or runs[1] is None):
            events += _updates(waiting, runs or places[node], plan)
            waiting = []
        runs = places[node]
        if node.op == "placeholder":
            if node.name.startswith("tangents"):  # of outputs beside the loss autograd makes zeros
                events += [Event(*runs, each.part, each.size) for each in walk.writes[node]]
        elif node.op != "output":
            events += _kernel_events(walk, node, set(gradients), runs, plan)
            waiting += [each for each in walk.writes.get(node, ()) if each in gradients]
    never_read = {
        each for node in walk.writes if node.op == "placeholder" for each in walk.writes[node] if each.last < 0
    }
    events += [Event(*places[output], each.part, -each.size) for each in never_read if not each.held]
    if not (plan.per_layer and plan.by_layers):
        waiting = list(gradients)
    return events + _updates(waiting, ("optimizer step", None), plan)


def _updates(gradients: Sequence[Buffer], place: Place, plan: Plan) -> list[Event]:
    """Returns the optimizer's step with these gradients, which are freed: one by one, or all at the end."""
    events: list[Event] = []
    scratch = {each: plan.scratch(each.size // each.itemsize, each.itemsize) for each in gradients}
    together = plan.together and not plan.per_layer
    for each, size in scratch.items():
        events.append(Event(*place, "temporaries", size, each.of_values))
        if not together:
            events.append(Event(*place, "temporaries", -size, each.of_values))
        if plan.per_layer:
            events.append(Event(*place, "gradients", -each.size, each.of_values))
    for each, size in scratch.items():
        if together:
            events.append(Event(*place, "temporaries", -size, each.of_values))
        if not plan.per_layer:
            events.append(Event(*place, "gradients", -each.size, each.of_values))
    return [each for each in events if each.size]


def _dying(kernel: Kernel, kept: set[Buffer]) -> list[Buffer]:
    """Returns what a kernel is the last to read, and what it writes for nobody."""
    unread = [each for each in kernel.writes if each.last < 0]
    read = [each for each in kernel.reads if each.last == kernel.position]
    return [each for each in dict.fromkeys([*read, *unread]) if not each.held and each not in kept]


def _kernel_events(walk: Walk, node: fx.Node, kept: set[Buffer], place: Place, plan: Plan) -> list[Event]:
    """Returns what the kernel of which a node is the first allocates and frees; nothing for other nodes."""
    if node not in walk.kernels:
        return []
    kernel = walk.kernels[node]
    inside = {each for each in kernel.writes if each.last == kernel.position and each not in kept}  # of no other kernel
    writes = [each for each in kernel.writes if each not in inside]
    dying = [each for each in _dying(kernel, kept) if each not in inside]
    first: list[Buffer] = []
    for buffer in writes if is_fused(node) else ():  # it may be written over what it reads
        own = [each for each in dying if each in walk.made_by and kernel.reads[each] == 1 and each not in first]
        first += [each for each in own if each.size == buffer.size][:1]
    work = workspace(node, plan.device)
    signed = [
        *((each, -each.size) for each in first),
        *((each, each.size) for each in writes),
        *((each, -each.size) for each in dying if each not in first),
    ]
    events = [Event(*place, each.part, size, each.of_values) for each, size in signed if size]
    if work:
        at = len(first) + len([each for each in writes if each.size])
        events[at:at] = [Event(*place, "composed weights", work), Event(*place, "composed weights", -work)]
    return events


def _kept_positions(graphs: Graphs) -> Iterator[Event]:
    """Yields what the factored lowering keeps for each support on CPU from the first step on (ops/*_cpu.py)."""
    seen: set[tuple[str, str]] = set()
    for graph, place in ((graphs.forward, "forward"), (graphs.backward, "backward")):
        layers = _places(graph, place)
        for node in graph.nodes:
            kept = kept_on_cpu(node)
            if kept is None or kept[:2] in seen:
                continue
            seen.add(kept[:2])
            yield Event(START, layers[node][1], "indices", kept[2], of_values=True)


def repeated(events: Sequence[Event], layers: int) -> list[Event]:
    """Returns the events of a model of ``layers`` layers, from one of ``PROOF_LAYERS``, whose middle is repeated."""
    middle, last, more = PROOF_LAYERS // 2, PROOF_LAYERS - 1, layers - PROOF_LAYERS
    result: list[Event] = []
    pending: list[Event] = []
    for event in [*events, None]:
        if event is not None and event.layer == middle and (not pending or event.place == pending[0].place):
            pending.append(event)
            continue
        if pending:
            shifts = range(more + 1) if pending[0].place != "backward" else range(more, -1, -1)
            result += [replace(each, layer=middle + shift) for shift in shifts for each in pending]
            pending = []
        if event is not None and event.layer == middle:
            pending.append(event)
        elif event is not None:
            result.append(replace(event, layer=last + more) if event.layer == last else event)
    return result


def profile(events: Sequence[Event], held: Mapping[str, int] | None = None) -> dict[str, tuple[int, dict[str, int]]]:
    """Returns the most allocated in each place, with what is held all the time, and of what it consists."""
    now = dict.fromkeys(PARTS, 0) if held is None else dict(held)
    found: dict[str, tuple[int, dict[str, int]]] = {}
    for event in events:
        now[event.part] += event.size
        total = sum(now.values())
        if event.label not in found or total > found[event.label][0]:
            found[event.label] = total, dict(now)
    return found


def peak_of(
    places: Mapping[str, tuple[int, dict[str, int]]], held: Mapping[str, int]
) -> tuple[int, dict[str, int], str]:
    """Returns the most of a ``profile``, of what it consists, and its place."""
    found = {START: (sum(held.values()), dict(held)), **places}
    place = max(found, key=lambda each: found[each][0])
    return *found[place], place


def most_of(events: Sequence[Event]) -> int:
    """Returns the most bytes that are allocated at one time, beside what is held all the time."""
    return max(itertools.accumulate((event.size for event in events), initial=0))

"""What every pass shares: its report, the runner, and how a node's op is called at any level of lowering."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg

from slcompile import torch_private
from slcompile.cost.matmul import DTYPES
from slcompile.names import shown
from slcompile.passes.graph_text import diff, lines

log = logging.getLogger("slcompile.passes")


@dataclass(frozen=True)
class Decision:
    """What a pass did with one candidate, and why.

    Attributes:
        name: Fully qualified name of the weight, or the node's name.
        reason: A fixed code; empty for what was replaced.
        detail: The same as a sentence.
        shape: Of the weight.
        matmuls: How many matmuls read it.
        lowering: ``"composed"`` or ``"factored"``, where the pass chooses one.
        costs: Predicted seconds of each lowering.
        node: Name of the graph's node that was decided on, where it is not the weight.
        factor: Name of the node that is the first operand of the weight, which tells weights apart.
        phase: ``"forward"``, ``"backward"`` (the input's gradient) or ``"gradients"`` (of the weight).
    """

    name: str
    reason: str = ""
    detail: str = ""
    shape: tuple[int, ...] = ()
    matmuls: int = 0
    lowering: str = ""
    costs: Mapping[str, float] = field(default_factory=dict)
    node: str = ""
    factor: str = ""
    phase: str = ""


@dataclass
class PassReport:
    """What a pass replaced, and what it left alone with a reason for each.

    Attributes:
        pass_name: The function's name; ``run`` fills it in. ``"weights"`` for the policy on a model's weights.
        replaced, left: The decisions on the candidates.
        seconds: How long the pass took.
    """

    pass_name: str = ""
    replaced: list[Decision] = field(default_factory=list)
    left: list[Decision] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, decision: Decision, is_replaced: bool) -> None:
        """Records what was decided on one candidate."""
        (self.replaced if is_replaced else self.left).append(decision)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON holds it: the pass's name, and a list of decisions."""
        marked = [("replaced", each) for each in self.replaced] + [("left", each) for each in self.left]
        decisions = [
            {"name": each.name, "decision": decision, "reason": each.reason, "detail": each.detail}
            | {"shape": list(each.shape), "matmuls": each.matmuls}
            for decision, each in marked
        ]
        return {"pass": self.pass_name, "decisions": decisions}

    def __str__(self) -> str:
        text = [f"{self.pass_name}: {len(self.replaced)} replaced, {len(self.left)} left"]
        for mark, decisions in (("+", self.replaced), ("-", self.left)):
            for each in decisions:
                shape = "x".join(map(str, each.shape))
                why = f"  {each.reason}" if each.reason else ""
                text.append(f"  {mark} {shown(each.name)} {shape}{why}{': ' + each.detail if each.detail else ''}")
        return "\n".join(text)


GraphPass = Callable[[fx.GraphModule], PassReport]
Watch = Callable[[PassReport, Mapping[str, str], Mapping[str, str]], None]
"""Is told of each pass: its report, and the graph's ``lines`` before and after it."""


def pass_name(graph_pass: GraphPass) -> str:
    """Returns the name of a pass: its function's, also where ``functools.partial`` gave it some arguments."""
    return graph_pass.func.__name__ if isinstance(graph_pass, functools.partial) else graph_pass.__name__


def run(passes: Iterable[GraphPass], gm: fx.GraphModule, watch: Watch | None = None) -> list[PassReport]:
    """Runs passes in order. Where one changed the graph it is linted, and logged at DEBUG level.

    The graph is put into words only where somebody watches or debugs.
    """
    reports = []
    watched = watch is not None or log.isEnabledFor(logging.DEBUG)
    before = lines(gm.graph) if watched else {}
    for graph_pass in passes:
        begin = time.perf_counter()
        report = graph_pass(gm)
        report.pass_name, report.seconds = pass_name(graph_pass), time.perf_counter() - begin
        if report.replaced:
            gm.graph.lint()
        reports.append(report)
        if not watched:
            continue
        after = lines(gm.graph) if report.replaced else before
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s\n%s", report, diff(before, after))
        if watch is not None:
            watch(report, before, after)
        before = after
    return reports


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Returns the positional arguments of a node, whose type depends on its op."""
    return node.args


def op_name(node: fx.Node) -> str:
    """Returns the bare name of what a node calls: ``aten.mm.default``, ``torch.mm`` and ``.mm()`` are all ``mm``.

    An ATen op that is told the dtype of its result, which comes after the operands, is another one: ``mm.dtype``.
    """
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.split("::")[-1]
        return f"{name}.dtype" if node.target._overloadname == "dtype" else name
    return getattr(node.target, "__name__", str(node.target))


def module_stack(node: fx.Node) -> Mapping[str, Any]:
    """Returns the modules that torch says a node belongs to."""
    return node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}


def name_of(node: fx.Node) -> str:
    """Returns where the model calls for this weight, as far as the graph knows; else the node's name."""
    stack = module_stack(node)
    return str(list(stack.values())[-1][0]) if stack else node.name


def nodes_of_backward(graph: fx.Graph) -> set[fx.Node]:
    """Returns the nodes of the backward pass of a joint graph; none of a forward graph.

    Among them are those that depend on no gradient, such as the sigmoid in the gradient of silu.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and str(node.target).startswith("tangents")
        follows = torch_private.in_backward_pass(node) or any(each in found for each in node.all_input_nodes)
        if is_tangent or (follows and node.op != "placeholder"):
            found.add(node)
    return found


# What shows the same matrix transposed, in another dtype or as it is, by op_name.
_TRANSPOSES = frozenset(("t", "permute", "transpose"))
_SAME = frozenset(("alias", "clone", "convert_element_type", "detach", "_to_copy"))
# Where a node comes from, and its checkpointed region.
_INHERITED = ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "recompute", "ac_graph_id", "partitioner_tag")


def trunk(node: fx.Node) -> tuple[fx.Node, bool, bool]:
    """Goes up from a matrix through transposes, casts and copies, to where a cast would lose more (``is_lossy``).

    Returns:
        What they start from, whether ``node`` is its transpose, and whether nothing else reads anything between.
    """
    swapped, exclusive, end = False, True, node
    while node.op == "call_function" and (transposes(node) or op_name(node) in _SAME) and not is_lossy(node, end):
        swapped ^= transposes(node)
        node = node.all_input_nodes[0]
        exclusive &= len(node.users) == 1
    return node, swapped, exclusive


def is_lossy(node: fx.Node, end: fx.Node) -> bool:
    """Returns whether a cast on the way to ``end`` loses what one cast to the dtype of that would not.

    It does so by way of a narrower dtype, as where rounding is simulated, and where one of the two is not one of
    matmuls with weights (8 bits, integers, complex numbers).
    """
    before, after, last = (each.meta["val"].dtype for each in (node.all_input_nodes[0], node, end))
    if before == after:
        return False
    if before not in DTYPES or after not in DTYPES:
        return True
    return torch.promote_types(after, before) != after and torch.promote_types(after, last) != after


def transposes(node: fx.Node) -> bool:
    """Returns whether a node is the transpose of a matrix."""
    if op_name(node) not in _TRANSPOSES or node.meta["val"].dim() != 2:
        return False
    if op_name(node) == "permute":
        return bool(arguments(node)[1][0] % 2 == 1)  # dimensions may be negative
    first, second = arguments(node)[1:] or (0, 1)
    return bool(first % 2 != second % 2)


class Inserter:
    """Inserts nodes into a graph whose nodes have ``meta["val"]``; what is there already is not computed twice.

    Everything inserted must be pure. Nodes take over what the node that they stand in for says of itself: its source
    line, its module, its checkpointed region.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._seen: dict[Any, fx.Node] = {}
        self._traced: dict[Any, fx.GraphModule] = {}

    def call(self, before: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Returns a call of an op."""
        values = map_arg(args, lambda node: node.meta["val"])
        return self._insert(before, target, args, {}, torch_private.run_fake(target, values))

    def inline(self, before: fx.Node, function: Callable[..., Any], *args: Any) -> Any:
        """Inserts the ops of a function, traced; takes nodes as it takes tensors, and returns them likewise."""
        inputs = list(dict.fromkeys(_nodes(args)))
        key = (function, map_aggregate(args, lambda arg: _description(arg, inputs)))
        if str(key) not in self._traced:

            def traced(*tensors: Tensor) -> Any:
                return function(*map_arg(args, lambda node: tensors[inputs.index(node)]))

            self._traced[str(key)] = torch_private.trace(
                traced, [node.meta["val"] for node in inputs], for_inductor=True
            )
        table: dict[fx.Node, fx.Node] = {}
        waiting = iter(inputs)
        for node in self._traced[str(key)].graph.nodes:
            if node.op == "placeholder":
                table[node] = next(waiting)
            elif node.op == "output":
                return map_arg(node.args[0], table.__getitem__)
            else:
                args, kwargs = map_arg((node.args, node.kwargs), table.__getitem__)
                table[node] = self._insert(before, node.target, args, kwargs, node.meta.get("val"))
        raise AssertionError("a graph without an output")

    def transpose(self, before: fx.Node, matrix: fx.Node) -> fx.Node:
        """Returns the transpose of a matrix; of a transpose, the matrix itself."""
        if transposes(matrix):
            return matrix.all_input_nodes[0]
        return self.call(before, torch.ops.aten.permute.default, matrix, [1, 0])

    def _insert(self, before: fx.Node, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        # What has no inputs makes memory, of which everyone needs their own.
        key = str((target, args, kwargs, None if _nodes((args, kwargs)) else len(self._seen)))
        if key not in self._seen:
            with self.graph.inserting_before(before):
                self._seen[key] = self.graph.create_node("call_function", target, args, kwargs)
            inherited = {name: before.meta[name] for name in _INHERITED if name in before.meta}
            self._seen[key].meta = {**inherited, "val": value}
        return self._seen[key]


def _nodes(args: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(args, found.append)
    return found


def _description(arg: Any, inputs: list[fx.Node]) -> Any:
    """Returns what tracing depends on: a tensor's position among the inputs and its description, or a constant."""
    if not isinstance(arg, fx.Node):
        return repr(arg)
    value = arg.meta["val"]
    return (inputs.index(arg), str(value.shape), str(value.stride()), str(value.dtype), str(value.device))

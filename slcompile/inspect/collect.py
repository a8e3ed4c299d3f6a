"""The backend that ``explain`` traces a model with: what our passes do to each graph, weight and matmul."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from slcompile import torch_private
from slcompile.captured import CapturedGraph, expand
from slcompile.config import SLConfig
from slcompile.inspect.graph_diff import GraphDiff, compare, named
from slcompile.inspect.not_captured import first_line
from slcompile.inspect.rows import ADAM, Break, Change, MatmulRow, PassRow
from slcompile.inspect.snapshot import Snapshot, snapshot, source_line
from slcompile.names import SUFFIX, plain_name
from slcompile.ops import WEIGHT_OPS
from slcompile.passes import RECOMPUTING, Decision, PassReport, joint_passes, post_passes, run
from slcompile.passes.find_matmuls import MatmulRead, find_matmuls
from slcompile.passes.graph import Watch
from slcompile.passes.graph_text import diff
from slcompile.weight.owners import LiveObjects
from slcompile.weight.structure import FactorizedWeight


@dataclass(frozen=True)
class TracedRead:
    """A matmul of a captured graph: the graph's number, the node's id there, and what was decided on the weight."""

    graph: int
    node: str
    matmul: MatmulRead
    decision: Decision


@dataclass
class TracedWeight:
    """A weight that captured graphs read.

    Attributes:
        name: Fully qualified.
        dense: The parameter; of a weight that is factorized already, its like on the meta device.
        factors: What takes its place or did already; None where it stays dense.
        trained: Whether a gradient is made for it.
        reads: The matmuls.
        input_grads: How many products of the backward pass read it.
        lowered: The graph's number and the decision on each of its products that can be factored.
        left: Why it stays dense.
    """

    name: str
    dense: Tensor
    factors: FactorizedWeight | None
    trained: bool
    reads: list[TracedRead] = field(default_factory=list)
    input_grads: int = 0
    lowered: list[tuple[int, Decision]] = field(default_factory=list)
    left: Decision | None = None

    @property
    def is_dense(self) -> bool:
        """Whether the model still holds it dense."""
        return isinstance(self.dense, nn.Parameter)

    @property
    def bytes(self) -> Change:
        """Of the weight, its gradient and Adam's states."""
        dense = self.dense.nbytes * (ADAM if self.dense.requires_grad else 1)
        if self.factors is None:
            return Change(dense, dense)
        trained = sum(each.nbytes * (ADAM if each.requires_grad else 1) for each in self.factors.parameters())
        return Change(dense, trained + sum(each.nbytes for each in self.factors.buffers()))

    @property
    def parameters(self) -> Change:
        """Their number."""
        before = self.dense.numel()
        return Change(before, before if self.factors is None else self.factors.numel())


class _Captured:
    """The nodes of a captured graph, to find the one that a traced matmul comes from."""

    def __init__(self, number: int, graph: fx.Graph) -> None:
        self.number = number
        self.traces = {node.name: node.meta.get("stack_trace") or "" for node in graph.nodes}
        placeholders = graph.find_nodes(op="placeholder")
        self.readers = [next((user.name for user in node.users), node.name) for node in placeholders]

    def node(self, read: MatmulRead, index: int) -> str:
        """Finds the captured node of a matmul that reads input ``index``; in a checkpointed region, the region's."""
        return read.origin if self.traces.get(read.origin) == read.stack_trace else self.readers[index]


@dataclass(frozen=True)
class _Use:
    """What one captured graph does with a weight, which is its input at a position."""

    weight: TracedWeight
    decision: Decision
    index: int

    def add(self, read: MatmulRead, captured: _Captured) -> None:
        """Counts one matmul of the traced graph."""
        if read.backward:
            self.weight.input_grads += 1
        else:
            node = captured.node(read, self.index)
            self.weight.reads.append(TracedRead(captured.number, node, read, self.decision))


def factorized_already(factors: FactorizedWeight, name: str = "") -> TracedWeight:
    """Returns a weight that is factorized already."""
    trained = any(each.requires_grad for each in factors.parameters())
    like = torch.empty(factors.stored_shape, dtype=factors.dtype, device="meta", requires_grad=trained)
    return TracedWeight(name, like, factors, trained)


class Collector:
    """A backend that collects what our passes do to the graphs that Dynamo hands it."""

    def __init__(self, model: nn.Module, config: SLConfig) -> None:
        self.config = config
        self.paths = {str(id(module)): plain_name(path) for path, module in model.named_modules()}
        self.weights: dict[
            int, TracedWeight
        ] = {}  # by the id of the parameter, of the first factor if it is factorized
        self.passes: list[PassRow] = []
        self.breaks: list[Break] = []
        self.graphs: list[GraphDiff] = []
        self.captured = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        """Collects one captured graph; returns a function in its place that gives zeros."""
        number, self.captured = self.captured, self.captured + 1
        reason = torch_private.break_reason(gm)
        if reason is not None:
            self.breaks.append(Break(first_line(reason[0]), source_line(reason[1])))
        live = LiveObjects.find()
        graph = CapturedGraph(gm, example_inputs, self.config, {})
        names = graph.parameter_names(example_inputs, live)
        labels = _labels(gm.graph, names)
        before = snapshot(gm.graph, labels, self.paths)
        rewritten, inputs, made = graph.parameterize(graph.wanted, example_inputs, self._watch(number, "captured"))
        weights = self._weights(graph, example_inputs, names, made, live)
        nodes = _Captured(number, gm.graph)
        names = expand(names, {index: _operand_names(names[index], each) for index, each in made.items()})
        labels |= _labels(rewritten.graph, names)
        self._compare(number, "captured", before, snapshot(rewritten.graph, labels, self.paths))
        partition: torch_private.Partition = torch_private.min_cut
        if self.config.budget is not None:
            replaced = {id(example_inputs[index]): each for index, each in made.items()}
            partition = graph.partitioner(replaced, example_inputs, self._watch(number, "joint"))
        labels |= self._trace(nodes, rewritten, inputs, names, weights, partition)
        self.passes = [
            replace(row, diff=named(row.diff, labels)) if row.graph == number else row for row in self.passes
        ]
        return torch_private.zero_outputs(gm)

    def _weights(
        self,
        graph: CapturedGraph,
        inputs: Sequence[Any],
        names: Sequence[str],
        made: Mapping[int, FactorizedWeight],
        live: LiveObjects,
    ) -> list[_Use | None]:
        """Returns the weight and the decision that each input of the rewritten graph is of, dense or as a factor."""
        found: list[_Use | None] = [None] * len(inputs)
        decisions = {each.name: each for each in [*graph.report.replaced, *graph.report.left]}
        for index, use in graph.uses.items():
            parameter, decision = inputs[index], decisions[graph.names[index]]
            trained = parameter.requires_grad and not use.without_grad
            weight = self.weights.setdefault(id(parameter), TracedWeight(decision.name, parameter, None, trained))
            weight.factors = weight.factors or made.get(index)
            weight.left = decision if weight.factors is None else None
            found[index] = _Use(weight, decision, index)
        owners = live.owners(each for each in inputs if isinstance(each, nn.Parameter))
        for index, each in enumerate(inputs):
            for module, attribute in owners.get(id(each), ()):
                if isinstance(module, FactorizedWeight) and attribute == next(iter(module.operands())):
                    name = names[index].removesuffix(f"{SUFFIX}.{attribute}")
                    weight = self.weights.setdefault(id(each), factorized_already(module, name))
                    found[index] = _Use(weight, Decision(name, "", "factorized already"), index)
        return expand(found, {index: [found[index]] * len(each.operands()) for index, each in made.items()})

    def _trace(
        self,
        captured: _Captured,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        names: Sequence[str],
        weights: Sequence[_Use | None],
        partition: torch_private.Partition,
    ) -> dict[str, str]:
        """Traces the joint graph and runs our passes on it and on its parts; returns what its parameters are called."""
        number = captured.number
        labels: dict[str, str] = {}
        whole: list[Snapshot] = []

        def edit(graph_module: fx.GraphModule, stage: str) -> None:
            graph = graph_module.graph
            uses: dict[str, _Use] = {}
            for node in graph.find_nodes(op="placeholder"):
                index = torch_private.input_index(node)
                if index is not None and names[index]:
                    labels[node.name] = names[index]
                use = weights[index] if index is not None else None
                if use is not None:
                    uses[node.name] = use
            origins: dict[str, str] = {}
            for node in graph.nodes:
                use = uses.get(node.args[0].name if node.target in WEIGHT_OPS else node.name)
                if use is None:
                    continue
                for read in find_matmuls(node).reads:
                    origins[read.node] = read.origin
                    use.add(read, captured)

            def collect(report: PassReport) -> None:
                for matmul in [*report.replaced, *report.left]:
                    if matmul.factor in uses:
                        decision = replace(matmul, node=origins.get(matmul.node, ""))
                        uses[matmul.factor].weight.lowered.append((number, decision))

            before = snapshot(graph, labels, self.paths)
            run(joint_passes(self.config), graph_module, self._watch(number, stage, collect))
            if stage == "joint":
                self._compare(number, stage, before, snapshot(graph, labels, self.paths))
            else:
                whole.append(before)

        graphs = torch_private.aot_graphs(gm, inputs, edit, partition)
        for stage, part in zip(("forward", "backward"), graphs, strict=False):
            before = whole.pop() if whole else snapshot(part.graph, labels, self.paths)
            run(post_passes(self.config), part, self._watch(number, stage))
            self._compare(number, stage, before, snapshot(part.graph, labels, self.paths))
        return labels

    def _watch(self, number: int, stage: str, collect: Callable[[PassReport], None] | None = None) -> Watch:
        def watch(report: PassReport, before: Mapping[str, str], after: Mapping[str, str]) -> None:
            if collect is not None:
                collect(report)
            row = PassRow(
                number,
                stage,
                report.pass_name,
                report.seconds,
                before != after,
                len(after.keys() - before.keys()),
                len(before.keys() - after.keys()),
                len(report.replaced),
                len(report.left),
                diff(before, after),
                "\n".join(each.detail for each in report.replaced) if report.pass_name in RECOMPUTING else "",
            )
            self.passes.append(row)

        return watch

    def _compare(self, number: int, stage: str, before: Snapshot, after: Snapshot) -> None:
        self.graphs.append(compare(f"graph {number}, {stage}", before, after))

    def without_matmul(self) -> dict[int, Decision | None]:
        """Returns, by the id of each parameter that is read, why it stays dense if no matmul reads it."""
        return {key: None if each.reads else each.left for key, each in self.weights.items()}

    def rows(self) -> Iterator[MatmulRow]:
        """Yields a row for each matmul, in the order of the graphs."""
        for weight in self.weights.values():
            for read in weight.reads:
                yield _row(weight, read, self.config)


def _row(weight: TracedWeight, read: TracedRead, config: SLConfig) -> MatmulRow:
    factors, tokens = weight.factors, read.matmul.tokens
    own = [each for number, each in weight.lowered if number == read.graph and each.phase == "forward"]
    own = [each for each in own if each.node == read.matmul.origin] or own
    rest = [each for _, each in weight.lowered if each.phase != "forward"]
    share = 1 / len(weight.reads)
    lowerings = {each.lowering for each in [*own, *rest]}
    costs = Counter[str]()
    for part, decisions in ((1 / max(1, len(own)), own), (share, rest)):
        for decision in decisions:
            taken = {"mixed": decision.costs.get(decision.lowering, 0.0)} if len(lowerings) > 1 else {}
            costs.update({name: part * seconds for name, seconds in {**decision.costs, **taken}.items()})
    return MatmulRow(
        name=weight.name,
        shape=tuple(weight.dense.shape),
        tokens=tokens if isinstance(tokens, int) else str(tokens),
        graph=read.graph,
        decision="left" if factors is None else "replaced",
        reason=read.decision.reason if factors is None else "",
        detail=read.decision.detail,
        rank=factors.describe().get("rank") if factors is not None else None,
        density=factors.nonzeros / weight.dense.numel() if factors is not None else None,
        nonzeros=factors.nonzeros if factors is not None else None,
        lowering="mixed" if len(lowerings) > 1 else next(iter(lowerings), ""),
        costs=dict(costs),
        bytes=weight.bytes,
        flops=_flops(weight, read, config, own, rest),
        source=source_line(read.matmul.stack_trace),
        node=read.node,
    )


def _flops(
    weight: TracedWeight, read: TracedRead, config: SLConfig, own: Sequence[Decision], rest: Sequence[Decision]
) -> Change:
    """Returns operations of a training step's products for one matmul; what several matmuls share is shared out."""
    share = 1 / len(weight.reads)
    product, input_grads = read.matmul.flops, weight.input_grads * share
    before = product * (1 + input_grads + weight.trained)
    if weight.factors is None:
        return Change(before, before)
    factors, tokens = weight.factors, torch_private.size_hint(read.matmul.tokens)

    def factored(phase: str, decisions: Sequence[Decision]) -> float:
        """Returns the share of a phase's products that are factored; all are composed where nothing was decided."""
        found = [each.lowering == "factored" for each in decisions if each.phase == phase]
        return sum(found) / len(found) if found else 0.0

    def products(part: float, composes: float) -> float:
        apart = factors.factored_flops(tokens) + (product if factors.has_base else 0)
        return part * apart + (1 - part) * (product + composes * factors.compose_flops)

    grads = factored("gradients", rest)
    after = products(factored("forward", own), share)
    after += input_grads * products(factored("backward", rest), 0 if config.keep_weights else share)
    if weight.trained:
        after += grads * factors.factored_flops(tokens) + (1 - grads) * (product + share * 2 * factors.compose_flops)
    return Change(before, after)


def _labels(graph: fx.Graph, names: Sequence[str]) -> dict[str, str]:
    """Returns name of each placeholder that stands for a parameter -> the parameter's."""
    placeholders = (node.name for node in graph.nodes if node.op == "placeholder")
    return {node: name for node, name in zip(placeholders, names, strict=True) if name}


def _operand_names(name: str, factors: FactorizedWeight) -> list[str]:
    return [f"{name}{SUFFIX}.{operand}" for operand in factors.operands()]

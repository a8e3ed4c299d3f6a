"""One graph that Dynamo captured: which of its weights are factorized, and its compiled forms.

A graph serves every instance of a class. What depends on the graph alone is decided when it is captured; what depends
on the model that runs it (names, owners) is decided once for each weight; whether the owners are in training is asked
at every run.
"""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from slcompile import cost, torch_private
from slcompile import passes as our_passes
from slcompile.config import SLConfig
from slcompile.convert.candidates import Candidates, gather
from slcompile.convert.eligibility import require_possible_rank, structural_reason
from slcompile.convert.held import held_bytes
from slcompile.convert.ledger import ledger
from slcompile.convert.transaction import convert
from slcompile.convert.weight_uses import weight_modules, weight_uses
from slcompile.ops import WEIGHT_OPS
from slcompile.ops.vector_cpu import begin_compiling
from slcompile.passes import PassReport, joint_passes, parameterize_weights, post_passes, run
from slcompile.passes.find_matmuls import WeightUse
from slcompile.passes.graph import GraphPass, Watch
from slcompile.passes.graph_text import lines
from slcompile.passes.liveness import Plan
from slcompile.passes.partition import BudgetedPartitioner
from slcompile.weight.marks import retired_for, successor_of
from slcompile.weight.owners import LiveObjects
from slcompile.weight.placing import dense_names
from slcompile.weight.structure import FactorizedWeight, matrix_shape, template, weights_in

log = logging.getLogger("slcompile")

JOINT_HOOK = "joint_custom_pre_pass"
POST_HOOK = "post_grad_custom_pre_pass"
PARTITIONER = "custom_partitioner_fn"
Wanted = Mapping[int, SLConfig]
"""Positions of the inputs that are to be factorized, and the options of the weight at each."""

_BUDGET_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models of which it was said that they are not one graph."""

REQUIRED_SETTINGS = ("use_joint_graph_passes", "use_post_grad_passes")
"""Inductor's settings without which it calls neither hook; its mode "lite" turns them off."""

_CAPTURED_WEIGHT_OPS = {*WEIGHT_OPS, *(op.overloadpacket for op in WEIGHT_OPS)}


class CapturedGraph:
    """A captured graph, compiled once for each set of inputs that are to be factorized; in practice one or two sets.

    Args:
        gm, example_inputs: From Dynamo, while it compiles; parameters are among the inputs.
        config: The options.
        settings: Inductor's.

    Attributes:
        uses: How the graph uses each dense weight, by its position among the inputs.
        convertible: Positions of the weights that may be converted, as far as the graph can tell.
        wanted: Positions of the inputs to factorize, for the model that the graph was captured of.
        names: Position of each dense weight -> its name in that model.
        report: What was decided on each dense weight of that model.
        roots: The outermost modules of that model.
    """

    def __init__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], config: SLConfig, settings: dict[str, Any]
    ) -> None:
        self.gm, self.config, self.settings = gm, config, settings
        self.captured_inputs = torch_private.captured_inputs(gm)
        self._context = torch_private.tracing_context()
        self._variants: dict[frozenset[tuple[int, SLConfig]], Callable[..., Any]] = {}
        self._decisions: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a parameter -> the decision on it
        self.uses: dict[int, WeightUse] = {}
        self.convertible: frozenset[int] = frozenset()
        self.wanted: Wanted = {}
        self._others: list[int] = []  # positions of the weights that not only matmuls read
        self.names: dict[int, str] = {}
        self.report = PassReport("weights")
        self.roots: list[nn.Module] = []
        if not torch.is_grad_enabled():
            return
        live = LiveObjects.find()
        self.uses = weight_uses(gm, example_inputs)
        self._require_current(example_inputs, live)
        for index in torch_private.kept_inputs(gm) & self.uses.keys():
            self.uses[index].others.append("output")
        self._others = [index for index, use in self.uses.items() if use.others and not use.without_grad]
        self.convertible = frozenset(
            index for index, use in self.uses.items() if not structural_reason(example_inputs[index], use, config)[0]
        )
        found = self._decide(self.uses, example_inputs, live)
        self.names = {index: each.name for index, each in zip(self.uses, found.weights, strict=True)}
        self.roots = live.roots(example_inputs[index] for index in self.uses)
        self.report = found.report()
        _warn_of_hidden(found)
        self._warn_if_dense(live)
        self.wanted = self._wanted(example_inputs)
        self.report = _without_idle(self.report, {self.names[index] for index in self.convertible - self.wanted.keys()})

    def _decide(self, indices: Iterable[int], inputs: Sequence[Any], live: LiveObjects) -> Candidates:
        """Applies the policy to the weights at these positions; from then on the decisions stand."""
        uses = [(inputs[index], self._use_in_all_graphs(index, inputs[index])) for index in indices]
        found = gather(uses, self.config, live)
        for candidate in found.weights:
            ledger.remember_owners(candidate.weight, candidate.owners)
            self._decisions[candidate.weight] = candidate.decision
            ledger.configs[candidate.weight] = candidate.config
        return found

    def _require_current(self, args: Sequence[Any], live: LiveObjects) -> None:
        """Raises RuntimeError where a module holds a dense weight whose place factors of another one took."""
        retired = {id(args[index]): args[index] for index in self.uses if successor_of(args[index]) is not None}
        for key, owners in live.owners(retired.values()).items():
            if owners:
                module, name = owners[0]
                raise RuntimeError(
                    f"{type(module).__name__} holds as {name!r} a dense weight that no longer trains: "
                    f"{retired_for(retired[key])}. Give it a copy: weight.detach().clone()"
                )

    def _use_in_all_graphs(self, index: int, parameter: nn.Parameter) -> WeightUse:
        use = self.uses[index]
        others = ledger.other_reads.get(parameter, [])
        return replace(use, others=[*use.others, *others]) if others else use

    def _warn_if_dense(self, live: LiveObjects) -> None:
        """Says where a model has no weight to convert, and raises ValueError where the options cannot mean that."""
        for root in self.roots:
            self.config.require_patterns_match(dense_names(root))
            if self.report.replaced or weights_in(root):
                continue
            eligible = self._eligible(root, live)
            require_possible_rank(eligible.values(), self.config)
            # Where Dynamo broke the model into several graphs, those to come may read what this one does not.
            left = {decision.name for decision in self.report.left} | ledger.names_left(root)
            if eligible.keys() <= left and root not in ledger.warned:
                ledger.warned.add(root)
                log.warning("slcompile: no weight of %s was factorized. %s", type(root).__name__, self.report)

    def _eligible(self, root: nn.Module, live: LiveObjects) -> dict[str, tuple[int, ...]]:
        """Returns name and shape, as a matrix, of a model's parameters that are large enough and not excluded."""
        names = live.names(root)
        kernels = {id(module._parameters.get("weight")) for _, module, use in weight_modules(root) if use.convolved}
        shapes = {id(each): matrix_shape(each.shape, id(each) in kernels) for each in root.parameters()}
        large = {
            key: shape
            for key, shape in shapes.items()
            if len(shape) in (2, 3) and min(shape[-2:]) >= self.config.min_dim
        }  # matrices and stacks of them
        return {names[key][0]: shape for key, shape in large.items() if self.config.includes(*names[key])}

    def _wanted(self, args: Sequence[Any]) -> Wanted:
        """Returns the inputs to factorize: they can be, they may be, and their owners are in training."""
        unknown = [i for i in self.uses if args[i] not in self._decisions and successor_of(args[i]) is None]
        if unknown:
            live = LiveObjects.find()
            report = self._decide(unknown, args, live).report()
            ledger.note_left(live.roots(args[i] for i in unknown), replace(report, replaced=[]))
        return {
            index: ledger.configs[args[index]]
            for index in sorted(self.convertible)
            if successor_of(args[index]) is not None
            or (not self._decisions[args[index]].reason and ledger.in_training(args[index]))
        }

    def run(self, *args: Any) -> Any:
        """Runs the graph: what Dynamo calls in its place."""
        for index in self._others:
            if args[index] not in ledger.other_reads and ledger.in_training(args[index]):
                ledger.other_reads[args[index]] = self.uses[index].others
        wanted: Wanted = {} if self.config.dryrun else self._wanted(args)
        if not wanted:
            return self.compiled(wanted)(*args)
        compiled = self.compiled(wanted)  # first, so that a failure to compile comes before any conversion
        with torch_private.no_tracing(), ledger.lock:
            weights = self._convert(args, sorted(wanted))
        if weights.keys() != wanted.keys():
            compiled = self.compiled({index: wanted[index] for index in weights})
        return compiled(*expand(args, {index: list(weight.operands().values()) for index, weight in weights.items()}))

    def compiled(self, wanted: Wanted, inputs: Sequence[Any] | None = None) -> Callable[..., Any]:
        """Returns the graph compiled with the inputs at these positions replaced by the operands of weight ops.

        Args:
            wanted: The positions, and the options of the weight at each.
            inputs: Dynamo's, while it compiles; None later, when a model in another mode than the captured one runs.
        """
        key = frozenset(wanted.items())
        if key not in self._variants:
            if inputs is not None:
                self._variants[key] = self._compile(wanted, inputs)
            else:
                with torch_private.resume(self._context):
                    self._variants[key] = self._compile(wanted, self.captured_inputs)
        return self._variants[key]

    def _compile(self, wanted: Wanted, inputs: Sequence[Any]) -> Callable[..., Any]:
        given = inputs
        gm, inputs, weights = self.parameterize(wanted, inputs)
        torch_private.add_artifact("slcompile_before", lambda: "\n".join(lines(self.gm.graph).values()))
        torch_private.add_artifact("slcompile_after", lambda: "\n".join(lines(gm.graph).values()))
        joint = self._graph_passes(JOINT_HOOK, joint_passes(self.config))
        hooks = {
            JOINT_HOOK: joint,
            POST_HOOK: self._graph_passes(POST_HOOK, post_passes(self.config)),
            **dict.fromkeys(REQUIRED_SETTINGS, True),
        }
        if self.config.budget is not None:
            hooks[PARTITIONER] = self.partitioner(
                {id(given[index]): weight for index, weight in weights.items()}, given
            )
        composes = _composes(gm)
        gm, inputs = _recognizable(gm, inputs)
        compiled = torch_private.inductor(gm, inputs, {**self.settings, **hooks})
        if composes and joint.calls and not joint.seen:
            raise RuntimeError("the graph composes weights, but no joint graph held a weight op: nothing was rewritten")
        return compiled

    def partitioner(
        self, replaced: Mapping[int, FactorizedWeight], inputs: Sequence[Any], watch: Watch | None = None
    ) -> BudgetedPartitioner:
        """Returns what keeps the memory budget of the whole model.

        Args:
            replaced: id of each dense weight that is factorized -> its factors.
            inputs: Dynamo's; dense weights are among them.
            watch: Is told of the pass.
        """
        live = LiveObjects.find()
        parameters = [each for each in inputs if isinstance(each, nn.Parameter)]
        roots = live.roots(parameters)
        others = {id(each) for root in roots for each in root.parameters()} - {id(each) for each in parameters}
        if others and not _BUDGET_WARNED.issuperset(roots):
            _BUDGET_WARNED.update(roots)
            log.warning(
                "slcompile: memory_budget is kept as if the model were one graph, and a graph that is compiled reads "
                "%d of its %d parameters: what other graphs save for the backward pass is not counted",
                len(parameters),
                len(parameters) + len(others),
            )
        held = held_bytes(roots, live.optimizers, replaced)
        kinds = {each.device.type for each in parameters}
        device = "cuda" if "cuda" in kinds or ("cpu" not in kinds and torch.cuda.is_available()) else "cpu"
        return BudgetedPartitioner(self.config, held, Plan(device), watch, warns=True)

    def parameterize(
        self, wanted: Wanted, inputs: Sequence[Any], watch: Watch | None = None
    ) -> tuple[fx.GraphModule, list[Any], dict[int, FactorizedWeight]]:
        """Copies the graph; in the copy the inputs at these positions are the operands of weight ops.

        Returns:
            The copy, its inputs, and a weight module on the meta device for each position.
        """
        gm = _copy(self.gm)
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        weights = {
            index: template(inputs[index], own, self.uses[index].input_dim, self.uses[index].convolved)
            for index, own in wanted.items()
        }
        table = {placeholders[index].name: (placeholders[index].name, weight) for index, weight in weights.items()}
        if wanted:
            run([functools.partial(parameterize_weights, weights=table)], gm, watch)
        with torch_private.fake_mode():
            operands = {
                index: [_like(operand, inputs[index].device) for operand in weight.operands().values()]
                for index, weight in weights.items()
            }
        return gm, expand(inputs, operands), weights

    def parameter_names(self, inputs: Sequence[Any], live: LiveObjects) -> list[str]:
        """Returns for each input the fully qualified name of the parameter that it is; empty for any other."""
        names = [""] * len(inputs)
        held = {index: value for index, value in enumerate(inputs) if isinstance(value, nn.Parameter)}
        owners = live.owners(held.values())
        for index, parameter in held.items():
            for module, _ in owners[id(parameter)][:1]:
                names[index] = live.names(live.root(module)).get(id(parameter), [""])[0]
        return names

    def _graph_passes(self, hook: str, ours: Sequence[GraphPass]) -> GraphPasses:
        return GraphPasses(ours, self.config, torch_private.passes_of(self.settings, hook))

    def _convert(self, args: Sequence[Any], wanted: Sequence[int]) -> dict[int, FactorizedWeight]:
        """Converts the owners of these inputs; returns the weight module of each that is factorized now.

        Another thread may have converted some of them since; a model may have been factorized explicitly.
        """
        if torch_private.in_backward():
            raise RuntimeError(
                "the first training run of this model is the recomputation of an eager activation checkpoint, in the "
                "backward pass; call slcompile.factorize_(model) before training"
            )
        if torch_private.in_eager_checkpoint():
            self._require_single_reads(wanted, args)
        converted = {index: successor for index in wanted if (successor := successor_of(args[index])) is not None}
        live = LiveObjects.find()
        self._require_current(args, live)
        if len(converted) == len(wanted):
            return converted
        dense = [index for index in self.uses if index not in converted and successor_of(args[index]) is None]
        found = self._decide(dense, args, live)  # again, under the lock: owners and an explicit choice may have changed
        due = {index: each for index, each in zip(dense, found.weights, strict=True) if index in wanted}
        chosen = {index: each for index, each in due.items() if each.is_chosen}
        if not chosen:
            return converted
        idle = {self._decisions[args[index]].name for index in dense if index in self.convertible - set(wanted)}
        report = _without_idle(found.report(), idle)
        made = convert(list(chosen.values()), self.config, live, report, ledger)
        return converted | dict(zip(chosen, made, strict=True))

    def _require_single_reads(self, wanted: Iterable[int], args: Sequence[Any]) -> None:
        """Raises RuntimeError where a converted module would compose a weight more often than this graph does.

        The recomputation of an eager checkpoint runs the converted model, and must save the same tensors.
        """
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        several = [self._decisions[args[index]].name for index in wanted if len(placeholders[index].users) > 1]
        if several:
            raise RuntimeError(
                f"the first training run of this model is inside an eager activation checkpoint and reads "
                f"{', '.join(several)} several times, which its recomputation would do otherwise; call "
                "slcompile.factorize_(model) before training, or checkpoint inside the compiled function"
            )


def _warn_of_hidden(found: Candidates) -> None:
    """Says which weights stay dense because the garbage collector, which knows modules, shows them no more."""
    hidden = [each.decision.detail for each in found.weights if each.decision.reason == "not_owned"]
    if hidden and gc.get_freeze_count():
        log.warning(
            "slcompile: %d weights of a graph stay dense: %s. Call it after the first training step, or "
            "slcompile.factorize_(model) before it",
            len(hidden),
            hidden[0],
        )


def _without_idle(report: PassReport, names: set[str]) -> PassReport:
    """Returns a report in which these weights, which could be converted, are left: their modules are in .eval()."""
    idle = [decision for decision in report.replaced if decision.name in names]
    left = [replace(decision, reason="eval", detail="its module is in .eval()") for decision in idle]
    replaced = [decision for decision in report.replaced if decision.name not in names]
    return replace(report, replaced=replaced, left=[*report.left, *left])


class GraphPasses(CustomGraphPass):
    """Our passes at one of Inductor's hooks, after the user's own."""

    def __init__(self, passes: Sequence[GraphPass], config: SLConfig, before: Sequence[Any]) -> None:
        self.passes, self.config, self.before = passes, config, list(before)
        self.calls = self.seen = 0

    @override
    def __call__(self, graph: fx.Graph) -> None:
        for user_pass in self.before:
            user_pass(graph)
        self.calls += 1
        self.seen += sum(node.target in WEIGHT_OPS for node in graph.nodes)
        assert graph.owning_module is not None
        run(self.passes, graph.owning_module)
        begin_compiling(graph)  # some seconds of C++, beside Inductor's own

    @override
    def uuid(self) -> Any:
        if self.config.budget is not None:
            return None  # what was compiled before would be taken without saying whether a step fits
        ids = [user_pass.uuid() if isinstance(user_pass, CustomGraphPass) else None for user_pass in self.before]
        return None if None in ids else (_sources_hash(), self.config, cost.fingerprint(), *ids)


@functools.cache
def _sources_hash() -> bytes:
    return get_hash_for_files(tuple(str(path) for path in hashed_files()))


def hashed_files() -> list[Path]:
    """Sources of which a change must invalidate Inductor's caches."""
    # The passes by their own path: rglob does not follow the link to them.
    folders = (Path(__file__).parent, Path(our_passes.__file__).parent)
    return sorted({path.resolve() for folder in folders for path in folder.rglob("*.py")})


def _composes(gm: fx.GraphModule) -> bool:
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return any(node.target in _CAPTURED_WEIGHT_OPS for graph in graphs for node in graph.nodes)


def _recognizable(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """Returns the graph with its nodes named by their places, and its inputs with weights' operands as fake tensors.

    A model is traced again after it was converted. By names of its own, and with parameters that were not there before,
    AOTAutograd's cache would not find that this graph is the one that the conversion compiled, and partition it anew.
    """
    graph = fx.Graph()
    table: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if torch_private.is_query(node):
            continue
        name = f"{node.op}_{len(table)}"
        args, kwargs = fx.map_arg((node.args, node.kwargs), table.__getitem__)
        target = name if node.op == "placeholder" else node.target
        table[node] = graph.create_node(node.op, target, args, kwargs, name)
        table[node].meta = dict(node.meta)
    operands = {each for node in gm.graph.nodes if node.target in _CAPTURED_WEIGHT_OPS for each in node.all_input_nodes}
    return _module(gm, graph), torch_private.as_traced(gm, inputs, operands)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """Copies the nodes to a new module: Dynamo's own accepts no placeholders, and Inductor consumes what it gets."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    return _module(gm, graph)


def _module(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """Returns a module like ``gm`` with another graph."""
    module = fx.GraphModule(gm, graph)
    module.meta = dict(gm.meta)
    return module


def _like(meta: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty(meta.shape, dtype=meta.dtype, device=device, requires_grad=meta.requires_grad)


def expand(values: Sequence[Any], replacements: Mapping[int, list[Any]]) -> list[Any]:
    """Returns the values in order, those at the given positions replaced by several."""
    return [each for index, value in enumerate(values) for each in replacements.get(index, [value])]

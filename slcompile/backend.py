"""``torch.compile(model, backend="sltrain")``."""

from __future__ import annotations

import functools
import json
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.weak import WeakIdKeyDictionary

from slcompile import cost, passes, torch_private
from slcompile.capture import weight_uses
from slcompile.config import SLConfig, did_you_mean
from slcompile.conversion import (
    EXPLICIT,
    Candidate,
    announce_dry_run,
    choose,
    convert,
    lock,
    names_left,
    note_left,
    warn_of_held_weights,
)
from slcompile.eligibility import require_possible_rank, structural_reason
from slcompile.ops import WEIGHT_OPS
from slcompile.owners import LiveObjects, in_training, remember_owners
from slcompile.passes import Decision, PassReport, joint_passes, parameterize_weights, post_passes, run
from slcompile.passes.find_matmuls import WeightUse
from slcompile.passes.graph import GraphPass, Watch
from slcompile.passes.graph_text import lines
from slcompile.step_hook import successor_of
from slcompile.weight import SLWeight, dense_names, template

log = logging.getLogger("slcompile")

JOINT_HOOK = "joint_custom_pre_pass"
POST_HOOK = "post_grad_custom_pre_pass"
RUN = ("use_joint_graph_passes", "use_post_grad_passes")
"""Inductor's settings without which it calls neither hook; its mode "lite" turns them off."""

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_others: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""A dense weight -> how a graph has read it in training, other than by matmuls. In what runs after that graph, perhaps
beyond a graph break, it stays dense too: one step must not see two weights."""


def sltrain(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Compiles a captured graph for training with sparse-plus-low-rank weights; Dynamo calls this.

    A model that is still dense is converted when the compiled function first runs, from the arguments of that run:
    one compiled graph serves every instance of a class. Only training converts: without gradients, for frozen
    weights and for owners in ``.eval()`` the graph is compiled as it is.

    Args:
        gm, example_inputs: From Dynamo; parameters are among the inputs.
        mode: One of torch.compile's modes, passed to Inductor.
        options: Fields of ``SLConfig``, and ``"inductor"`` for Inductor's settings.
        name: Of the compiled region; torch 2.15 passes it.

    Raises:
        ValueError: Unknown or bad options.
    """
    config, settings = SLConfig.from_options(options)
    settings = _inductor_settings(mode, settings)
    warn_of_held_weights()
    graph = CapturedGraph(gm, config, settings)
    wanted: frozenset[int] = frozenset()
    if torch.is_grad_enabled():
        live = LiveObjects.find()
        report = graph.find(example_inputs, live)
        log.info("%s", report)
        graph.warn_if_dense(example_inputs, live, report)
        wanted = graph.wanted(example_inputs)
        graph.leave(report, graph.convertible - wanted)
        torch_private.add_artifact("slcompile_matmuls", lambda: json.dumps(report.to_dict()), "json")
        roots = live.roots(example_inputs[index] for index in graph.uses)
        if config.dryrun:
            announce_dry_run(roots, report)
            wanted = frozenset()
        elif not report.rewritten:
            note_left(roots, report)
    graph.variants[wanted] = graph.compile(wanted, example_inputs)
    return graph.run


@dataclass
class CapturedGraph:
    """A captured graph: compiled once for each set of inputs that are to be factorized, in practice one or two.

    What depends on the graph alone is decided when it is captured (``convertible``). What depends on the model that
    runs it, its names, owners and modes, is decided anew for each model: one graph serves every instance of a class.
    """

    gm: fx.GraphModule
    config: SLConfig
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self.uses: dict[int, WeightUse] = {}  # of each dense weight, by its position among the inputs
        self.others: list[int] = []  # of these, what is not read by matmuls alone
        self.convertible: frozenset[int] = frozenset()
        self.names: dict[int, str] = {}  # of each dense weight, in the model that was looked at last
        self.admitted: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a parameter -> may this one be converted?
        self.captured_inputs = torch_private.captured_inputs(self.gm)
        self.context = torch_private.tracing_context()
        self.variants: dict[frozenset[int], Callable[..., Any]] = {}

    def find(self, example_inputs: Sequence[Any], live: LiveObjects) -> PassReport:
        """Finds the weights that may be converted; returns the decision on each."""
        self.uses = weight_uses(self.gm, example_inputs)
        for index in torch_private.kept_inputs(self.gm) & self.uses.keys():
            self.uses[index].others.append("output")
        self.others = [index for index, use in self.uses.items() if use.others and not use.without_grad]
        self.convertible = frozenset(
            index
            for index, use in self.uses.items()
            if not structural_reason(example_inputs[index], use, self.config)[0]
        )
        return self.choose(live, example_inputs)[1]

    def warn_if_dense(self, example_inputs: Sequence[Any], live: LiveObjects, report: PassReport) -> None:
        """Says where a model has no weight to convert, and raises ValueError where the options cannot mean that."""
        for root in live.roots(example_inputs[index] for index in self.uses):
            self.config.require_patterns_match(dense_names(root))
            is_dense = not any(isinstance(module, SLWeight) for module in root.modules())
            if report.rewritten or not is_dense:
                continue
            eligible = self._eligible(root, live)
            require_possible_rank(eligible.values(), self.config)
            # Where Dynamo broke the model into several graphs, those to come may read what this one does not.
            is_last = eligible.keys() <= {each.name for each in report.skipped} | names_left(root)
            if is_last and root not in _warned:
                _warned.add(root)
                log.warning("slcompile: no weight of %s was factorized. %s", type(root).__name__, report)

    def _eligible(self, root: nn.Module, live: LiveObjects) -> dict[str, torch.Size]:
        """Name and shape of a model's parameters that are large enough and not excluded."""
        names = live.names(root)
        weights = [each for each in root.parameters() if each.dim() in (2, 3)]  # matrices and stacks of them
        large = [each for each in weights if min(each.shape[-2:]) >= self.config.min_dim]
        return {names[id(each)][0]: each.shape for each in large if self.config.includes(*names[id(each)])}

    def choose(self, live: LiveObjects, inputs: Sequence[Any]) -> tuple[list[Candidate], PassReport]:
        """Applies the policy to the weights among these inputs."""
        owners = live.owners(inputs[index] for index in self.uses)
        weights, explicit = [], []
        for index, use in self.uses.items():
            parameter, held = inputs[index], owners[id(inputs[index])]
            if parameter in _others:
                use = replace(use, others=[*use.others, *_others[parameter]])
            remember_owners(parameter, held)
            names = live.names(live.root(held[0][0])).get(id(parameter), []) if held else []
            if any(EXPLICIT in vars(ancestor) for module, _ in held for ancestor in live.ancestors(module)):
                shape, detail = tuple(parameter.shape), "left by an explicit factorize_ of the model"
                explicit.append(Decision(names[0], "explicit", detail, shape, len(use.matmuls)))
            else:
                weights.append((names, parameter, held, use))
            self.names[index] = names[0] if names else "?"
        candidates, report = choose(weights, self.config)
        report.skipped += explicit
        chosen = {id(each.weight) for each in candidates}
        for index in self.uses:
            self.admitted[inputs[index]] = id(inputs[index]) in chosen
        return candidates, report

    def parameter_names(self, inputs: Sequence[Any], live: LiveObjects) -> list[str]:
        """For each input the fully qualified name of the parameter that it is; empty for any other."""
        names = [""] * len(inputs)
        held = {index: each for index, each in enumerate(inputs) if isinstance(each, nn.Parameter)}
        owners = live.owners(held.values())
        for index, parameter in held.items():
            for module, _ in owners[id(parameter)][:1]:
                names[index] = live.names(live.root(module)).get(id(parameter), [""])[0]
        return names

    def leave(self, report: PassReport, indices: Iterable[int]) -> None:
        """Moves the decisions on these weights, which could be converted, to those that stay dense in .eval()."""
        names = {self.names[index] for index in indices}
        waiting = [each for each in report.rewritten if each.name in names]
        report.skipped += [replace(each, reason="eval", detail="its module is in .eval()") for each in waiting]
        report.rewritten = [each for each in report.rewritten if each.name not in names]

    def wanted(self, args: Sequence[Any]) -> frozenset[int]:
        """Positions of the inputs to factorize: they can be, they may be, and their owners are in training."""
        unknown = [i for i in self.uses if args[i] not in self.admitted and successor_of(args[i]) is None]
        if unknown:
            live = LiveObjects.find()
            report = self.choose(live, args)[1]
            note_left(live.roots(args[i] for i in unknown), replace(report, rewritten=[]))
        return frozenset(
            index
            for index in self.convertible
            if successor_of(args[index]) is not None or (self.admitted[args[index]] and in_training(args[index]))
        )

    def run(self, *args: Any) -> Any:
        """What Dynamo calls in the place of the graph."""
        for index in self.others:
            if args[index] not in _others and in_training(args[index]):
                _others[args[index]] = self.uses[index].others
        wanted = frozenset() if self.config.dryrun else self.wanted(args)
        if not wanted:
            return self.variant(wanted)(*args)
        compiled = self.variant(wanted)  # first, so that a failure to compile comes before any conversion
        with torch_private.no_tracing(), lock:
            weights = self.convert(args, sorted(wanted))
        if weights.keys() != wanted:
            compiled = self.variant(frozenset(weights))
        return compiled(*expand(args, {index: list(weight.operands().values()) for index, weight in weights.items()}))

    def variant(self, wanted: frozenset[int]) -> Callable[..., Any]:
        """The compiled graph; one for other owners in training than when it was captured is compiled when it is due."""
        if wanted not in self.variants:
            with torch_private.resume(self.context):
                self.variants[wanted] = self.compile(wanted, self.captured_inputs)
        return self.variants[wanted]

    def compile(self, wanted: frozenset[int], inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compiles the graph with the inputs at these positions replaced by the operands of weight ops."""
        gm, inputs, _ = self.parameterize(wanted, inputs)
        torch_private.add_artifact("slcompile_before", lambda: "\n".join(lines(self.gm.graph).values()))
        torch_private.add_artifact("slcompile_after", lambda: "\n".join(lines(gm.graph).values()))
        joint = self.passes(JOINT_HOOK, joint_passes(self.config))
        hooks = {
            JOINT_HOOK: joint,
            POST_HOOK: self.passes(POST_HOOK, post_passes(self.config)),
            **dict.fromkeys(RUN, True),
        }
        composes = _composes(gm)
        compiled = torch_private.inductor(gm, inputs, {**self.settings, **hooks})
        if composes and joint.calls and not joint.seen:
            raise RuntimeError("the graph composes weights, but no joint graph held a weight op: nothing was rewritten")
        return compiled

    def parameterize(
        self, wanted: frozenset[int], inputs: Sequence[Any], watch: Watch | None = None
    ) -> tuple[fx.GraphModule, list[Any], dict[int, SLWeight]]:
        """A copy of the graph in which the inputs at these positions are the operands of weight ops.

        Returns:
            The copy, its inputs, and a weight module on the meta device for each position.
        """
        gm = _copy(self.gm)
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        weights = {index: template(inputs[index], self.config, self.uses[index].input_dim) for index in wanted}
        table = {placeholders[index].name: (placeholders[index].name, each) for index, each in weights.items()}
        if wanted:
            run([lambda module: parameterize_weights(module, table)], gm, watch)
        with torch_private.fake_mode():
            operands = {
                index: [_like(operand, inputs[index].device) for operand in each.operands().values()]
                for index, each in weights.items()
            }
        return gm, expand(inputs, operands), weights

    def passes(self, hook: str, ours: Sequence[GraphPass]) -> GraphPasses:
        """What to set for one of Inductor's hooks."""
        return GraphPasses(ours, self.config, torch_private.passes_of(self.settings, hook))

    def convert(self, args: Sequence[Any], wanted: Sequence[int]) -> dict[int, SLWeight]:
        """Converts the owners of these inputs; returns the weight module of each that is factorized now.

        Another thread may have converted some of them since; a model may have been factorized explicitly.
        """
        if torch_private.in_backward():
            raise RuntimeError(
                "the first training run of this model is the recomputation of an eager activation checkpoint, in the "
                "backward pass; call slcompile.factorize_(model) before training"
            )
        found = {index: successor for index in wanted if (successor := successor_of(args[index])) is not None}
        if torch_private.in_eager_checkpoint():
            self.require_single_reads(wanted)
        live = LiveObjects.find()
        candidates, report = self.choose(live, args)
        due = {id(args[index]): index for index in wanted if index not in found}
        table = [each for each in candidates if id(each.weight) in due]
        if not table:
            return found
        self.leave(report, self.convertible - set(wanted))
        made = convert(table, self.config, live, report)
        return found | {due[id(each.weight)]: weight for each, weight in zip(table, made, strict=True)}

    def require_single_reads(self, wanted: Iterable[int]) -> None:
        """Raises RuntimeError where a converted module would compose a weight more often than this graph does.

        The recomputation of an eager checkpoint runs the converted model, and must save the same tensors.
        """
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        several = [self.names[index] for index in wanted if len(placeholders[index].users) > 1]
        if several:
            raise RuntimeError(
                f"the first training run of this model is inside an eager activation checkpoint and reads "
                f"{', '.join(several)} several times, which its recomputation would do otherwise; call "
                "slcompile.factorize_(model) before training, or checkpoint inside the compiled function"
            )


class GraphPasses(CustomGraphPass):
    """Our passes at one of Inductor's hooks, after the user's own."""

    def __init__(self, passes: Sequence[GraphPass], config: SLConfig, before: Sequence[Any]) -> None:
        self.passes, self.config, self.before = passes, config, list(before)
        self.calls = self.seen = 0

    def __call__(self, graph: fx.Graph) -> None:
        for user_pass in self.before:
            user_pass(graph)
        self.calls += 1
        self.seen += sum(node.target in WEIGHT_OPS for node in graph.nodes)
        assert graph.owning_module is not None
        run(self.passes, graph.owning_module)

    def uuid(self) -> Any:
        ids = [user_pass.uuid() if isinstance(user_pass, CustomGraphPass) else None for user_pass in self.before]
        return None if None in ids else (_sources_hash(), self.config, cost.fingerprint(), *ids)


@functools.cache
def _sources_hash() -> bytes:
    return get_hash_for_files(tuple(str(path) for path in hashed_files()))


def hashed_files() -> list[Path]:
    """Sources of which a change must invalidate Inductor's caches."""
    # The passes by their own path: rglob does not follow the link to them.
    folders = (Path(__file__).parent, Path(passes.__file__).parent)
    return sorted({path.resolve() for folder in folders for path in folder.rglob("*.py")})


def _composes(gm: fx.GraphModule) -> bool:
    targets = {*WEIGHT_OPS, *(op.overloadpacket for op in WEIGHT_OPS)}
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return any(node.target in targets for graph in graphs for node in graph.nodes)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A new module with the same nodes: Dynamo's own accepts no placeholders, and Inductor consumes what it gets."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    return copied


def _like(meta: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty(meta.shape, dtype=meta.dtype, device=device, requires_grad=meta.requires_grad)


def expand(values: Sequence[Any], replacements: Mapping[int, list[Any]]) -> list[Any]:
    """The values in order, those at the given positions replaced by several."""
    return [each for index, value in enumerate(values) for each in replacements.get(index, [value])]


def _inductor_settings(mode: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    settings = {key.replace("-", "_"): value for key, value in settings.items()}
    known = torch_private.inductor_settings()
    for key in settings:
        if key not in known:
            raise ValueError(f"unknown Inductor setting {key!r} in option 'inductor'{did_you_mean(key, known)}")
        if key in RUN and settings[key] is not True:
            raise ValueError(f"{key} in option 'inductor' must be True, as this backend's passes run there")
    if mode is not None and mode != "default":
        modes = torch._inductor.list_mode_options()
        if mode not in modes:
            raise ValueError(f"mode got {mode!r}{did_you_mean(mode, modes)}")
        settings = {**modes[mode], **settings}
    return settings

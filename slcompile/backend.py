"""``torch.compile(model, backend="sltrain")``."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from slcompile import torch_private
from slcompile.capture import weight_uses
from slcompile.config import SLConfig, did_you_mean
from slcompile.factorize import EXPLICIT, Candidate, choose, convert, template
from slcompile.ops import WEIGHT_OPS
from slcompile.owners import LiveObjects, in_training
from slcompile.passes import JOINT_PASSES, Decision, PassReport, parameterize_weights, run
from slcompile.passes.find_matmuls import WeightUse
from slcompile.weight import SLWeight, base_class, dense_names

log = logging.getLogger("slcompile")

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


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
    graph = _Graph(gm, config, settings)
    if torch.is_grad_enabled():
        graph.find(example_inputs)
    wanted = graph.wanted(example_inputs)
    graph.variants[wanted] = graph.compile(wanted, example_inputs)
    return graph.run


@dataclass
class _Graph:
    """A captured graph: compiled once for each set of inputs that are to be factorized, in practice one or two."""

    gm: fx.GraphModule
    config: SLConfig
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self.uses: dict[int, WeightUse] = {}  # of each dense weight, by its position among the inputs
        self.convertible: frozenset[int] = frozenset()
        self.captured_inputs = torch_private.captured_inputs(self.gm)
        self.context = torch_private.tracing_context()
        self.variants: dict[frozenset[int], Callable[..., Any]] = {}

    def find(self, example_inputs: Sequence[Any]) -> None:
        """Finds the weights that may be converted, and says where there are none."""
        self.uses = weight_uses(self.gm, example_inputs)
        live = LiveObjects.find()
        candidates, report = self.choose(live, example_inputs)
        log.info("%s", report)
        chosen = {id(each.weight) for each in candidates}
        self.convertible = frozenset(index for index in self.uses if id(example_inputs[index]) in chosen)
        for root in live.roots(example_inputs[index] for index in self.uses):
            self.config.require_patterns_match(dense_names(root))
            if not chosen and not _composes(self.gm) and root not in _warned:
                _warned.add(root)
                log.warning("slcompile: no weight of %s was factorized. %s", base_class(root).__name__, report)

    def choose(self, live: LiveObjects, inputs: Sequence[Any]) -> tuple[list[Candidate], PassReport]:
        """Applies the policy to the weights among these inputs."""
        owners = live.owners(inputs[index] for index in self.uses)
        weights, explicit = [], []
        for index, use in self.uses.items():
            held = owners[id(inputs[index])]
            name = live.name(inputs[index], held[0][0]) if held else None
            if any(EXPLICIT in vars(ancestor) for module, _ in held for ancestor, _ in live.ancestors(module)):
                shape, detail = tuple(inputs[index].shape), "left by an explicit factorize_ of the model"
                explicit.append(Decision(name or "?", "explicit", detail, shape, len(use.matmuls)))
            else:
                weights.append((name, inputs[index], held, use))
        candidates, report = choose(weights, self.config)
        report.skipped += explicit
        return candidates, report

    def wanted(self, args: Sequence[Any]) -> frozenset[int]:
        """Positions of the inputs to factorize: they can be, and their owners are in training."""
        return frozenset(index for index in self.convertible if in_training(args[index]))

    def run(self, *args: Any) -> Any:
        """What Dynamo calls in the place of the graph."""
        wanted = self.wanted(args)
        if wanted not in self.variants:  # another set of owners is in training than when the graph was captured
            with torch_private.resume(self.context):
                self.variants[wanted] = self.compile(wanted, self.captured_inputs)
        compiled = self.variants[wanted]
        if not wanted:
            return compiled(*args)
        weights = self.convert(args, sorted(wanted))
        return compiled(*_expand(args, {index: list(weight.operands().values()) for index, weight in weights.items()}))

    def compile(self, wanted: frozenset[int], inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compiles the graph with the inputs at these positions replaced by the operands of weight ops."""
        gm = _copy(self.gm)
        if wanted:
            placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
            weights = {index: template(inputs[index], self.config, self.uses[index].input_dim) for index in wanted}
            table = {placeholders[index].name: (placeholders[index].name, each) for index, each in weights.items()}
            run([lambda module: parameterize_weights(module, table)], gm)
            with torch_private.fake_mode():
                operands = {
                    index: [_like(operand, inputs[index].device) for operand in each.operands().values()]
                    for index, each in weights.items()
                }
            inputs = _expand(inputs, operands)
        joint = JointPasses(self.config, torch_private.joint_passes_of(self.settings))
        composes = _composes(gm)
        compiled = torch_private.inductor(gm, inputs, {**self.settings, "joint_custom_pre_pass": joint})
        if composes and joint.calls and not joint.seen:
            raise RuntimeError("the graph composes weights, but no joint graph held a weight op: nothing was rewritten")
        return compiled

    def convert(self, args: Sequence[Any], wanted: Sequence[int]) -> dict[int, SLWeight]:
        """Converts the owners of these inputs; returns the weight module of each."""
        live = LiveObjects.find()
        candidates, report = self.choose(live, args)
        chosen = {id(each.weight): each for each in candidates}
        left = [index for index in wanted if id(args[index]) not in chosen]
        if left:
            names = [node.name for node in self.gm.graph.nodes if node.op == "placeholder"]
            raise ValueError(
                f"this graph was compiled to factorize {[names[index] for index in left]}, but these are to stay dense "
                f"in the model that runs it now. {report}"
            )
        table = [chosen[id(args[index])] for index in wanted]
        waiting = {each.name for each in candidates} - {each.name for each in table}
        report.skipped += [replace(each, reason="eval", detail="its module is in .eval()")
                           for each in report.rewritten if each.name in waiting]  # fmt: skip
        report.rewritten = [each for each in report.rewritten if each.name not in waiting]
        return dict(zip(wanted, convert(table, self.config, live, report), strict=True))


class JointPasses(CustomGraphPass):
    """JOINT_PASSES as Inductor's ``joint_custom_pre_pass``, after the user's own."""

    def __init__(self, config: SLConfig, before: Sequence[Any]) -> None:
        self.config, self.before = config, list(before)
        self.calls = self.seen = 0

    def __call__(self, graph: fx.Graph) -> None:
        for user_pass in self.before:
            user_pass(graph)
        self.calls += 1
        self.seen += sum(node.target in WEIGHT_OPS for node in graph.nodes)
        assert graph.owning_module is not None
        run(JOINT_PASSES, graph.owning_module)

    def uuid(self) -> Any:
        ids = [user_pass.uuid() if isinstance(user_pass, CustomGraphPass) else None for user_pass in self.before]
        return None if None in ids else (_sources_hash(), self.config, *ids)


@functools.cache
def _sources_hash() -> bytes:
    package = Path(__file__).parent
    return get_hash_for_files(tuple(str(path) for path in sorted(package.rglob("*.py"))))


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


def _expand(values: Sequence[Any], replacements: Mapping[int, list[Any]]) -> list[Any]:
    """The values in order, those at the given positions replaced by several."""
    return [each for index, value in enumerate(values) for each in replacements.get(index, [value])]


def _inductor_settings(mode: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    settings = {key.replace("-", "_"): value for key, value in settings.items()}
    known = torch_private.inductor_settings()
    for key in settings:
        if key not in known:
            raise ValueError(f"unknown Inductor setting {key!r} in option 'inductor'{did_you_mean(key, known)}")
    if mode is not None and mode != "default":
        modes = torch._inductor.list_mode_options()
        if mode not in modes:
            raise ValueError(f"mode got {mode!r}{did_you_mean(mode, modes)}")
        settings = {**modes[mode], **settings}
    return settings

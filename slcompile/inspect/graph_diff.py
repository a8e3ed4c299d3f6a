"""Compares two graphs: which nodes were kept, removed, rewritten, and which are new."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, fx

from slcompile import torch_private
from slcompile.inspect.document import Document
from slcompile.passes.graph_text import arguments_text, diff, target_name

SIDES = ("before", "after")

ModuleStack = tuple[tuple[str, str], ...]
"""Path and class of the modules that a node belongs to, outermost first."""


class Node(NamedTuple):
    """A node of one of two compared graphs.

    Attributes:
        id: Unique in its graph.
        op: As in torch.fx (``"call_function"``, ``"placeholder"``, ...); ``"node"`` in ONNX graphs.
        target: What it calls.
        args: Its arguments as text.
        inputs: Ids of the nodes that it reads, in order; one that is read twice stands there twice.
        shape, dtype: Of its result, where known.
        module: Path and class of the modules that it belongs to, outermost first.
        status: ``"kept"``, ``"removed"``, ``"new"`` or ``"rewritten"``.
        origins: In the graph after: ids of the nodes before that it came from (``"from"`` in JSON).
        weight: Name of the parameter that it stands for.
        source: Where the model's code calls for it.
    """

    id: str
    op: str
    target: str
    args: str
    inputs: tuple[str, ...] = ()
    shape: str = ""
    dtype: str = ""
    module: ModuleStack = ()
    status: str = ""
    origins: tuple[str, ...] = ()
    weight: str = ""
    source: str = ""

    def to_dict(self, tables: Tables) -> dict[str, Any]:
        """As JSON holds it; what nodes share goes into the document's tables."""
        given = {**self._asdict(), "from": list(self.origins), "inputs": list(self.inputs)}
        del given["origins"]
        shared = {"module": tables.modules.position(self.module), "source": tables.sources.position(self.source)}
        return given | shared

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], tables: Tables) -> Node:
        """The inverse of ``to_dict``."""
        known = {key: each for key, each in given.items() if key != "from"}
        known |= {"inputs": tuple(given["inputs"]), "origins": tuple(given["from"])}
        shared = {"module": tables.modules.values[given["module"]], "source": tables.sources.values[given["source"]]}
        return cls(**{**known, **shared})


T = TypeVar("T")


class Table(Generic[T]):
    """Different values, and where each stands among them."""

    def __init__(self, values: Iterable[T] = ()) -> None:
        self.values = list(values)
        self._positions = {each: index for index, each in enumerate(self.values)}

    def position(self, value: T) -> int:
        """Where a value stands; it is added if it is not there yet."""
        if value not in self._positions:
            self._positions[value] = len(self.values)
            self.values.append(value)
        return self._positions[value]


@dataclass(frozen=True)
class Tables:
    """What the nodes of a document share: it is written once, and they hold positions."""

    modules: Table[ModuleStack] = field(default_factory=Table)
    sources: Table[str] = field(default_factory=Table)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        stacks = [[list(each) for each in stack] for stack in self.modules.values]
        return {"modules": stacks, "sources": self.sources.values}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Tables:
        """The inverse of ``to_dict``."""
        stacks = (tuple((path, kind) for path, kind in stack) for stack in given["modules"])
        return cls(Table(stacks), Table(given["sources"]))


class Link(NamedTuple):
    """A matmul that reads a weight, in a model and in its export.

    Attributes:
        weight: The weight's name.
        before, after: Ids of the nodes; empty where there is none.
    """

    weight: str
    before: str
    after: str


@dataclass(frozen=True)
class GraphDiff(Document):
    """Two graphs, each a tuple of nodes in topological order that say what became of them.

    Attributes:
        name: Of the comparison.
        before, after: The nodes.
        matmuls: Of a model and its export, whose ops have other names: what their comparison comes to.
    """

    SCHEMA = "slcompile.graph_diff/2"

    name: str
    before: tuple[Node, ...]
    after: tuple[Node, ...]
    matmuls: tuple[Link, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Number of nodes kept, new and rewritten in the graph after, and removed from the one before."""
        after = Counter(node.status for node in self.after)
        removed = sum(node.status == "removed" for node in self.before)
        return {"kept": after["kept"], "removed": removed, "new": after["new"], "rewritten": after["rewritten"]}

    def text(self) -> str:
        """A header of counts, and what changed as in a unified diff; of a model and its export, the matmuls."""
        if self.matmuls:
            return self._links_text()
        header = f"{self.name}: " + ", ".join(f"{number} {status}" for status, number in self.counts.items())
        # Nodes that were kept are called as before, so that one with another name is no change.
        renamed = {node.id: node.origins[0] for node in self.after if node.status == "kept"}
        return "\n".join([header, diff(_lines(self.before, {}), _lines(self.after, renamed))]).rstrip()

    def _links_text(self) -> str:
        nodes = [{node.id: node for node in side} for side in (self.before, self.after)]
        both = [link for link in self.matmuls if link.before and link.after]
        lines = [f"{self.name}: {len(both)} of {len(self.matmuls)} matmuls with a parameter are in both"]
        kinds = Counter(f"{nodes[0][link.before].target} -> {nodes[1][link.after].target}" for link in both)
        lines += [f"  {number} {kind}" for kind, number in kinds.items()]
        for title, side in (("only before", 0), ("only after", 1)):
            left = [link for link in self.matmuls if not link[2 - side]]
            lines += [title] * bool(left)
            lines += [f"  {link.weight}: {nodes[side][link[1 + side]].target} {link[1 + side]}" for link in left]
        pairs = [(nodes[0][node.origins[0]], node) for node in self.after if node.weight and node.origins]
        changed = [(old, new) for old, new in pairs if (old.shape, old.dtype) != (new.shape, new.dtype)]
        lines += ["weights of another shape or dtype"] * bool(changed)
        lines += [f"  {new.weight}: {old.shape} {old.dtype} -> {new.shape} {new.dtype}" for old, new in changed]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()

    def to_dict(self) -> dict[str, Any]:
        tables = Tables()
        links = {"matmuls": [link._asdict() for link in self.matmuls]} if self.matmuls else {}
        return {"schema": self.SCHEMA, **self.graphs_to_dict(tables), **links, **tables.to_dict()}

    def graphs_to_dict(self, tables: Tables) -> dict[str, Any]:
        """As a document with these tables holds it."""
        graphs = {side: {"nodes": [node.to_dict(tables) for node in getattr(self, side)]} for side in SIDES}
        return {"name": self.name, **graphs, "counts": self.counts}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> GraphDiff:
        cls._require_schema(given)
        links = tuple(Link(**each) for each in given.get("matmuls", ()))
        return replace(cls.graphs_from_dict(given, Tables.from_dict(given)), matmuls=links)

    @classmethod
    def graphs_from_dict(cls, given: Mapping[str, Any], tables: Tables) -> GraphDiff:
        """The inverse of ``graphs_to_dict``."""
        before, after = (tuple(Node.from_dict(node, tables) for node in given[side]["nodes"]) for side in SIDES)
        return cls(given["name"], before, after)


def _lines(nodes: Sequence[Node], renamed: Mapping[str, str]) -> dict[str, str]:
    names = {**renamed, **{node.id: node.weight for node in nodes if node.weight}}
    lines = {}
    for node in nodes:
        result = f"  # {node.shape} {node.dtype}".rstrip() if node.shape else ""
        # A name that another node had before is another line.
        key = renamed.get(node.id, node.id if node.status in ("kept", "removed") else f"{node.id} {node.status}")
        lines[key] = named(f"{node.id} = {node.target}{node.args}", names) + result
    return lines


def named(text: str, weights: Mapping[str, str]) -> str:
    """A text in which the nodes of parameters are called as these are, which says more than ``primals_7``."""
    return re.sub(r"[A-Za-z_]\w*", lambda word: weights.get(word[0], word[0]), text)


def graph_diff(before: fx.GraphModule, after: fx.GraphModule, name: str = "graph") -> GraphDiff:
    """Compares two torch.fx graphs, in time linear in their nodes.

    Nodes are matched in this order:

    1. same name, op and target: a pass that edits a graph, or a copy of it, leaves names alone;
    2. same op, target, constants and matched inputs, whatever the name is: it was made again;
    3. rewritten: the provenance that torch keeps (``meta["from_node"]``) or the name leads to a node that is gone, or
       it stands where an otherwise kept node read one that is gone.

    A node matched by 1 or 2 that reads other inputs or constants, or has another shape or dtype, is rewritten too. All
    others are new, or removed.

    Raises:
        ValueError: One of them is no GraphModule.
    """
    for argument, given in (("before", before), ("after", after)):
        if not isinstance(given, fx.GraphModule):
            raise ValueError(f"{argument} must be a torch.fx.GraphModule, got {type(given).__name__}")
    return compare(name, snapshot(before.graph), snapshot(after.graph))


_INPUT = "\0"
"""Stands for an input in a node's constants; Python's repr writes it otherwise."""


@dataclass(frozen=True)
class Snapshot:
    """A graph as it was: nodes without a status, and what comparing them takes.

    Attributes:
        nodes: In order.
        constants: By id: the arguments without the names of other nodes.
        sources: By id: names of the nodes of earlier graphs that it was traced from, the first one last.
    """

    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, str] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)

    def add(self, node: Node, constants: str, sources: Sequence[str] = ()) -> None:
        """Adds the next node."""
        self.nodes.append(node)
        self.constants[node.id] = constants
        if sources:
            self.sources[node.id] = list(sources)


def snapshot(
    graph: fx.Graph, weights: Mapping[str, str] | None = None, modules: Mapping[str, str] | None = None
) -> Snapshot:
    """A torch.fx graph as it is now.

    Args:
        graph: Is not changed.
        weights: Name of a placeholder -> of the parameter that it stands for.
        modules: Key of a module in ``nn_module_stack`` -> its path; where it has none, the path is what torch says.
    """
    weights, modules = weights or {}, modules or {}
    owner = graph.owning_module
    found = Snapshot()
    paths: dict[tuple[str, ...], ModuleStack] = {}  # thousands of nodes are in few modules
    for node in graph.nodes:
        shape, dtype = _description(node)
        weight = weights.get(node.name, "")
        if node.op == "get_attr" and owner is not None and _is_parameter(owner, str(node.target)):
            weight = str(node.target)
        inputs: list[str] = []
        constants = arguments_text(node, functools.partial(_collect, inputs))
        stack = module_stack(node)
        key = tuple(stack)
        if key not in paths:
            paths[key] = module_path(stack, modules)
        found.add(
            Node(
                node.name,
                node.op,
                target_name(node),
                _filled(constants, inputs),
                tuple(inputs),
                shape,
                dtype,
                paths[key],
                weight=weight,
                source=source_line(node.meta.get("stack_trace") or ""),
            ),
            constants,
            torch_private.traced_from(node),
        )
    return found


def _collect(inputs: list[str], node: fx.Node) -> str:
    """Notes an input, and stands for it in a text that is to hold constants alone."""
    inputs.append(node.name)
    return _INPUT


def _filled(constants: str, inputs: Sequence[str]) -> str:
    """The text of constants with its inputs again."""
    parts = constants.split(_INPUT)
    return "".join([each for pair in zip(parts, inputs, strict=False) for each in pair]) + parts[-1]


def compare(name: str, before: Snapshot, after: Snapshot) -> GraphDiff:
    """Matches the nodes of two snapshots as ``graph_diff`` says."""
    olds = {node.id: node for node in before.nodes}
    match: dict[str, str] = {}  # after -> before
    for node in after.nodes:
        old = olds.get(node.id)
        if old is not None and (old.op, old.target) == (node.op, node.target):
            match[node.id] = old.id
    _match_by_structure(before, after, match)
    rewritten = _rewritten(before, after, match)
    related = {**match, **rewritten}
    for node in after.nodes:
        if node.id in match:
            old = olds[match[node.id]]
            inputs = tuple(related.get(each, "") for each in node.inputs)
            results = (old.shape, old.dtype), (node.shape, node.dtype)
            if (inputs, before.constants[old.id], results[0]) != (old.inputs, after.constants[node.id], results[1]):
                rewritten[node.id] = old.id
    gone = {*olds} - {*related.values()}
    changed = {*rewritten.values()}
    befores = (
        node._replace(status="removed" if node.id in gone else "rewritten" if node.id in changed else "kept")
        for node in before.nodes
    )
    afters = (
        node._replace(
            status="rewritten" if node.id in rewritten else "kept" if node.id in match else "new",
            origins=(related[node.id],) if node.id in related else (),
        )
        for node in after.nodes
    )
    return GraphDiff(name, tuple(befores), tuple(afters))


def _match_by_structure(before: Snapshot, after: Snapshot, match: dict[str, str]) -> None:
    """Matches what is left by what it computes."""
    taken = set(match.values())
    left: dict[Any, list[str]] = {}
    for node in before.nodes:
        if node.id not in taken:
            key = (node.op, node.target, before.constants[node.id], node.inputs, node.weight)
            left.setdefault(key, []).append(node.id)
    for node in after.nodes:
        if node.id not in match and (node.inputs or node.weight):
            inputs = tuple(match.get(each, "") for each in node.inputs)
            same = left.get((node.op, node.target, after.constants[node.id], inputs, node.weight))
            if same:
                match[node.id] = same.pop(0)


def _rewritten(before: Snapshot, after: Snapshot, match: Mapping[str, str]) -> dict[str, str]:
    """Node after -> the node before in whose place it stands, among those that nothing matched."""
    gone = {node.id for node in before.nodes} - {*match.values()}
    found: dict[str, str] = {}

    def pair(node: str, old: str) -> None:
        if node not in match and node not in found and old in gone:
            found[node] = old
            gone.discard(old)

    olds = {node.id: node for node in before.nodes}
    for node in after.nodes:
        if node.id in match:
            old = olds[match[node.id]]
            if len(old.inputs) == len(node.inputs):
                for each, old_input in zip(node.inputs, old.inputs, strict=True):
                    pair(each, old_input)
    for node in after.nodes:
        for source in (*after.sources.get(node.id, ()), node.id):
            pair(node.id, source)
    return found


def _description(node: fx.Node) -> tuple[str, str]:
    value = node.meta.get("val", node.meta.get("example_value"))
    if not isinstance(value, Tensor):
        return "", ""
    return str(list(value.shape)), str(value.dtype).removeprefix("torch.")


def _is_parameter(owner: torch.nn.Module, target: str) -> bool:
    path, _, name = target.rpartition(".")
    try:
        return name in owner.get_submodule(path)._parameters
    except AttributeError:
        return False


def module_stack(node: fx.Node) -> Mapping[str, Any]:
    """The modules that torch says a node belongs to."""
    return node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}


def module_path(stack: Mapping[str, Any], modules: Mapping[str, str]) -> ModuleStack:
    """Path and class of the modules of a stack, outermost first; the model itself is not among them."""
    found = []
    for key, (path, kind) in stack.items():
        name = modules.get(str(key).split("@")[0])
        name = _plain_path(path) if name is None else name
        if name:
            base = getattr(kind, "sl_base", kind)
            found.append((name, base.__name__ if isinstance(base, type) else str(base).rpartition(".")[2]))
    return tuple(found)


def _plain_path(path: str) -> str:
    """``L['self'].layers[0]`` as ``layers.0``."""
    path = re.sub(r"^L(\['[^']*'\])+(\[\d+\])*\.?", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    return re.sub(r"(^|\.)(_modules|_orig_mod)(?=\.|$)", "", path).strip(".")


_FRAME = re.compile(r'File "(?P<file>[^"]*)", line (?P<line>\d+), in (?P<function>[^\n]*)(?:\n[ \t]+(?P<code>[^\n]*))?')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_sources: dict[str, str] = {}


def source_line(stack_trace: str) -> str:
    """The innermost frame of a stack trace that is not torch's: ``model.py:12 in forward: return self.up(x)``."""
    if stack_trace not in _sources:
        if len(_sources) > 10_000:  # nodes share few traces; those of models that are gone must not pile up
            _sources.clear()
        frames = [each.groupdict() for each in _frames(stack_trace)]
        own = [each for each in frames if not each["file"].startswith(_TORCH)] or frames
        _sources[stack_trace] = (
            "{}:{} in {}{}".format(
                os.path.basename(own[-1]["file"]),
                own[-1]["line"],
                own[-1]["function"],
                f": {own[-1]['code'].strip()}" if own[-1]["code"] else "",
            )
            if own
            else ""
        )
    return _sources[stack_trace]


def _frames(stack_trace: str) -> Iterator[re.Match[str]]:
    return _FRAME.finditer(stack_trace)

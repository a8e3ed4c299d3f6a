"""A graph as it was at one moment, as plain text and numbers: it is compared after the graph has changed."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from slcompile import torch_private
from slcompile.inspect.nodes import ModuleStack, Node
from slcompile.passes.graph import module_stack
from slcompile.passes.graph_text import arguments_text, target_name

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
    """Returns a torch.fx graph as it is now.

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
    """Returns the text of constants with its inputs again."""
    parts = constants.split(_INPUT)
    return "".join([each for pair in zip(parts, inputs, strict=False) for each in pair]) + parts[-1]


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


def module_path(stack: Mapping[str, Any], modules: Mapping[str, str]) -> ModuleStack:
    """Returns path and class of the modules of a stack, outermost first; the model itself is not among them."""
    found = []
    for key, (path, kind) in stack.items():
        name = modules.get(str(key).split("@")[0])
        name = _plain_path(path) if name is None else name
        if name:
            base = getattr(kind, "sl_base", kind)
            found.append((name, base.__name__ if isinstance(base, type) else str(base).rpartition(".")[2]))
    return tuple(found)


def _plain_path(path: str) -> str:
    """Writes ``L['self'].layers[0]`` as ``layers.0``."""
    path = re.sub(r"^L(\['[^']*'\])+(\[\d+\])*\.?", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    return re.sub(r"(^|\.)(_modules|_orig_mod)(?=\.|$)", "", path).strip(".")


_FRAME = re.compile(r'File "(?P<file>[^"]*)", line (?P<line>\d+), in (?P<function>[^\n]*)(?:\n[ \t]+(?P<code>[^\n]*))?')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_sources: dict[str, str] = {}


def source_line(stack_trace: str) -> str:
    """Finds the innermost frame of a trace that is not torch's: ``model.py:12 in forward: return self.up(x)``."""
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

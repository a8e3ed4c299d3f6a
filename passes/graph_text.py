"""Graphs as text: a line for each node, and what changed between two of them."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx


def lines(graph: fx.Graph) -> dict[str, str]:
    """Returns name of each node, in order -> what it computes, as a line of text."""
    return {node.name: _line(node) for node in graph.nodes}


def diff(before: Mapping[str, str], after: Mapping[str, str], context: int = 2) -> str:
    """Returns what changed between two ``lines`` of a graph, as in a unified diff; empty where nothing did.

    Lines that keep their name, text and order are unchanged. Takes n log n time, unlike difflib.
    """
    kept = _kept(before, after)
    entries: list[tuple[str, str]] = []
    old = iter(before)
    new: list[tuple[str, str]] = []
    for name in after:
        if name not in kept:
            new.append(("+", after[name]))
            continue
        entries += [("-", before[each]) for each in iter(lambda: next(old), name)]
        entries += [*new, (" ", after[name])]
        new = []
    entries += [*(("-", before[each]) for each in old), *new]
    changed = [index for index, (mark, _) in enumerate(entries) if mark != " "]
    shown = sorted({near for index in changed for near in range(index - context, index + context + 1)})
    text, previous = [], -1
    for index in shown:
        if not 0 <= index < len(entries):
            continue
        if index != previous + 1:
            text.append("  ...")
        text.append(" ".join(entries[index]))
        previous = index
    if changed and previous < len(entries) - 1:
        text.append("  ...")
    return "\n".join(text)


def _kept(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    """Finds the longest run of lines that stand in both in the same order (an increasing subsequence)."""
    position = {name: index for index, name in enumerate(before)}
    lasts: list[int] = []  # of the runs of each length: the smallest position that one ends with
    ends: list[str] = []  # the same by name
    previous: dict[str, str | None] = {}
    for name in after:
        if before.get(name) != after[name]:
            continue
        length = bisect.bisect_left(lasts, position[name])
        previous[name] = ends[length - 1] if length else None
        lasts[length : length + 1], ends[length : length + 1] = [position[name]], [name]
    kept: set[str] = set()
    last = ends[-1] if ends else None
    while last is not None:
        kept.add(last)
        last = previous[last]
    return kept


def _line(node: fx.Node) -> str:
    value = node.meta.get("val", node.meta.get("example_value"))
    shape = f"  # {list(value.shape)} {str(value.dtype).removeprefix('torch.')}" if isinstance(value, Tensor) else ""
    policy = node.meta.get("recompute")
    tag = f" {policy.name.lower()}" if policy is not None else ""
    return f"{node.name} = {target_name(node)}{arguments_text(node)}{shape}{tag}"


def target_name(node: fx.Node) -> str:
    """Returns what a node calls or stands for, as one would write it."""
    if node.op != "call_function":
        return node.op if node.op in ("placeholder", "output") else str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    target: Any = node.target
    module = getattr(target, "__module__", None) or "torch"  # torch.arange and its like have none
    name = getattr(target, "__name__", str(target))
    return name if module in ("_operator", "builtins") else f"{module}.{name}"


def arguments_text(node: fx.Node, name: Callable[[fx.Node], str] = str) -> str:
    """Returns a node's arguments, other nodes by their names or by what ``name`` says: ``(x, weight, dim=1)``."""

    def text(arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return name(arg)
        if isinstance(arg, (list, tuple)):
            inside = ", ".join(map(text, arg))
            return f"[{inside}]" if isinstance(arg, list) else f"({inside}{',' if len(arg) == 1 else ''})"
        if isinstance(arg, dict):
            return "{" + ", ".join(f"{key}: {text(each)}" for key, each in arg.items()) + "}"
        if isinstance(arg, slice):
            return f"slice({text(arg.start)}, {text(arg.stop)}, {text(arg.step)})"
        return repr(arg)

    named = [f"{key}={text(each)}" for key, each in node.kwargs.items()]
    return f"({', '.join([*map(text, node.args), *named])})"

"""Which node of a graph is which of another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slcompile.inspect.nodes import Node
from slcompile.inspect.snapshot import Snapshot


def matched(before: Snapshot, after: Snapshot) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Matches the nodes of two snapshots as ``graph_diff`` says; returns those of both, with a status and origins."""
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
    return tuple(befores), tuple(afters)


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
    """Maps each node after to the node before in whose place it stands, among those that nothing matched."""
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

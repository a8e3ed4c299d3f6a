"""Compares two graphs: which nodes were kept, removed, rewritten, and which are new."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import fx
from typing_extensions import override

from slcompile.inspect import schemas
from slcompile.inspect.document import Document
from slcompile.inspect.match import matched
from slcompile.inspect.nodes import SIDES, Node, Tables
from slcompile.inspect.snapshot import Snapshot, snapshot
from slcompile.passes.graph_text import diff


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

    SCHEMA = schemas.GRAPH_DIFF

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
        """Returns a header of counts, and what changed as in a unified diff; of a model and its export, the matmuls."""
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

    @override
    def to_dict(self) -> dict[str, Any]:
        tables = Tables()
        links = {"matmuls": [link._asdict() for link in self.matmuls]} if self.matmuls else {}
        return {"schema": self.SCHEMA, **self.graphs_to_dict(tables), **links, **tables.to_dict()}

    def graphs_to_dict(self, tables: Tables) -> dict[str, Any]:
        """Returns it as a document with these tables holds it."""
        graphs = {side: {"nodes": [node.to_dict(tables) for node in getattr(self, side)]} for side in SIDES}
        return {"name": self.name, **graphs, "counts": self.counts}

    @classmethod
    @override
    def from_dict(cls, given: Mapping[str, Any]) -> GraphDiff:
        cls._require_schema(given)
        links = tuple(Link(**each) for each in given.get("matmuls", ()))
        return replace(cls.graphs_from_dict(given, Tables.from_dict(given)), matmuls=links)

    @classmethod
    def graphs_from_dict(cls, given: Mapping[str, Any], tables: Tables) -> GraphDiff:
        """Inverts ``graphs_to_dict``."""
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
    """Returns a text in which the nodes of parameters are called as these are, which says more than ``primals_7``."""
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


def compare(name: str, before: Snapshot, after: Snapshot) -> GraphDiff:
    """Compares two snapshots, as ``graph_diff`` does two graphs."""
    return GraphDiff(name, *matched(before, after))

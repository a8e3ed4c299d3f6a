"""What every pass shares: its report, the runner, and how a node's op is called at any level of lowering."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

log = logging.getLogger("slcompile.passes")


@dataclass(frozen=True)
class Decision:
    """What a pass did with one candidate, and why.

    Attributes:
        name: Fully qualified name of the weight, or the node's name.
        reason: A fixed code; empty for what was rewritten.
        detail: The same as a sentence.
        shape: Of the weight.
        matmuls: How many matmuls read it.
    """

    name: str
    reason: str = ""
    detail: str = ""
    shape: tuple[int, ...] = ()
    matmuls: int = 0


@dataclass
class PassReport:
    """What a pass rewrote, and what it left alone with a reason for each."""

    pass_name: str
    rewritten: list[Decision] = field(default_factory=list)
    skipped: list[Decision] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"{self.pass_name}: {len(self.rewritten)} rewritten, {len(self.skipped)} left"]
        for mark, decisions in (("+", self.rewritten), ("-", self.skipped)):
            for each in decisions:
                shape = "x".join(map(str, each.shape))
                why = f"  {each.reason}" if each.reason else ""
                lines.append(f"  {mark} {each.name} {shape}{why}{': ' + each.detail if each.detail else ''}")
        return "\n".join(lines)


GraphPass = Callable[[fx.GraphModule], PassReport]


def run(passes: Iterable[GraphPass], gm: fx.GraphModule) -> list[PassReport]:
    """Runs passes in order. Where one changed the graph it is linted, and logged at DEBUG level."""
    reports = []
    for graph_pass in passes:
        begin = time.perf_counter()
        report = graph_pass(gm)
        report.seconds = time.perf_counter() - begin
        if report.rewritten:
            gm.graph.lint()
        log.debug("%s\n%s", report, gm.graph)
        reports.append(report)
    return reports


def op_name(node: fx.Node) -> str:
    """The bare name of what a node calls: ``aten.mm.default``, ``torch.mm`` and ``.mm()`` are all ``mm``."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    return getattr(node.target, "__name__", str(node.target))

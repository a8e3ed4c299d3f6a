"""Partitions a joint graph so that a step fits a memory budget: ``fit_budget``, and Inductor's own partitioner."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from typing_extensions import override

from slcompile import torch_private
from slcompile.config import SLConfig
from slcompile.passes import post_passes, run
from slcompile.passes.fit_budget import BudgetReport, Step, Tags, fit_budget
from slcompile.passes.graph import Watch
from slcompile.passes.liveness import Graphs, Plan, most_of, result_nodes, step_events

log = logging.getLogger("slcompile")


def lowered(
    parts: Sequence[fx.GraphModule], config: SLConfig | None, device: str, of_values: frozenset[int] = frozenset()
) -> Graphs:
    """Lowers a forward and a backward graph as they would be, to see what is allocated; arguments as of ``Graphs``.

    Kernels of GPUs are seen from outside, with their workspace.
    """
    names = tuple(each.name if isinstance(each, fx.Node) else "" for each in result_nodes(parts[0].graph))
    if config is not None and device == "cpu":
        for part in parts:
            run(post_passes(config), part)
    forward, backward = (part.graph for part in parts)
    return Graphs(forward, backward, names, of_values)


class BudgetedPartitioner(CustomPartitionerFn):
    """Partitions joint graphs so that a training step fits a memory budget, with as little as possible computed again.

    Args:
        config: Has the budget.
        held: Bytes of parameters, buffers and optimizer states.
        plan: How a step runs.
        watch: Is told of the pass.
        warns: Whether a step that does not fit is warned of.

    Attributes:
        reports: Of the joint graphs so far.
    """

    def __init__(
        self, config: SLConfig, held: int, plan: Plan, watch: Watch | None = None, *, warns: bool = False
    ) -> None:
        self.config, self.held, self.plan, self.watch, self.warns = config, held, plan, watch, warns
        self.reports: list[BudgetReport] = []

    @override
    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[Any], **settings: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        assert self.config.budget is not None
        step, device = self.trial(gm, joint_inputs, settings), torch.device(self.plan.device)
        fit = functools.partial(fit_budget, budget=self.config.budget, step=step, device=device)
        (report,) = run([fit], gm, self.watch)
        assert isinstance(report, BudgetReport)
        self.reports.append(report)
        log.info("slcompile: %s", report)
        if report.missing and self.warns:
            log.warning(
                "slcompile: the step does not fit memory_budget: %s bytes are missing. %s; take fewer tokens a "
                "step, a smaller rank or density, or an optimizer with smaller states",
                f"{report.missing:,}",
                report,
            )
        return torch_private.min_cut(gm, joint_inputs, **settings)

    def trial(
        self, gm: fx.GraphModule, joint_inputs: Sequence[Any], settings: Mapping[str, Any]
    ) -> Callable[[Tags], Step]:
        """Returns what partitions copies of a joint graph with some tags, and says what a step comes to."""

        def step(tags: Tags) -> Step:
            graph = copy.deepcopy(gm.graph)
            for node, copied in zip(gm.graph.nodes, graph.nodes, strict=True):
                if node in tags:
                    copied.meta["recompute"] = tags[node]
            parts = torch_private.min_cut(fx.GraphModule(gm, graph), joint_inputs, **settings)
            graphs = lowered(parts, self.config, self.plan.device)
            saved = frozenset(node.name for node in graphs.backward.find_nodes(op="placeholder"))
            return Step(self.held + most_of(step_events(graphs, self.plan)), saved)

        return step

    @override
    def uuid(self) -> None:
        """Keeps what is compiled out of Inductor's caches, from which it would be taken without a report."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Inductor puts all of its settings into the key for its caches, before it asks whether it may use them.
        return tuple, ((self.config, self.held),)

"""Marks the least of the forward pass to be computed again in the backward pass with which a step fits a budget."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from slcompile.passes.graph import Decision, PassReport
from slcompile.passes.recomputable import KINDS, Recomputable, find_recomputable

Tags = Mapping[fx.Node, CheckpointPolicy]
Chosen = tuple[Recomputable, ...]


@dataclass(frozen=True)
class Step:
    """What a training step comes to with some tags.

    Attributes:
        peak: Most bytes allocated at one time.
        saved: Names of the nodes that are saved for the backward pass.
    """

    peak: int
    saved: frozenset[str]


@dataclass
class BudgetReport(PassReport):
    """What is computed again for a memory budget, ``replaced``, and what else could be, ``left``.

    Attributes:
        budget: In bytes.
        peak: Predicted of a step.
        without: The same with nothing computed again.
        seconds_again: Predicted, that a step takes longer.
    """

    budget: int = 0
    peak: int = 0
    without: int = 0
    seconds_again: float = 0.0

    @property
    def missing(self) -> int:
        """Bytes by which the step exceeds the budget; 0 where it fits."""
        return max(0, self.peak - self.budget)

    def to_dict(self) -> dict[str, Any]:
        """Returns the same as JSON holds it, and the report's own numbers."""
        numbers = ("budget", "peak", "without", "missing", "seconds_again")
        return {**super().to_dict(), **{name: getattr(self, name) for name in numbers}}

    def __str__(self) -> str:
        counts = []
        for kind in KINDS:
            chosen, left = ([each for each in some if each.reason == kind] for some in (self.replaced, self.left))
            if chosen or left:
                counts.append(f"{kind} {len(chosen)} of {len(chosen) + len(left)}")
        again = f"computed again: {', '.join(counts)}" if counts else "nothing can be computed again"
        verdict = f"{self.missing:,} bytes are missing" if self.missing else "it fits"
        return (
            f"memory budget {self.budget:,} bytes: a step takes {self.peak:,} at its peak ({self.without:,} with "
            f"nothing computed again), {verdict}; {again} ({1e3 * self.seconds_again:.3g} ms a step)"
        )


def fit_budget(gm: fx.GraphModule, budget: int, step: Callable[[Tags], Step], device: torch.device) -> BudgetReport:
    """Tags what is computed again as MUST_RECOMPUTE, and the hidden matrices that this reads as MUST_SAVE.

    What frees the most bytes for the time that it takes comes first, one after another, until the step's peak fits;
    then what turns out not to be needed is dropped again, the slowest first. Legal because all of it is pure. Where
    the step does not fit whatever is computed again, it gets the lowest peak that was found.

    Args:
        gm: A joint graph of forward and backward; only the nodes' meta changes.
        budget: Bytes.
        step: Partitions the graph with some tags beside those that its nodes have, and says what a step comes to.
        device: Where the graph will run.
    """
    report = BudgetReport(budget=budget)
    now = step({})
    report.without = report.peak = now.peak
    found = find_recomputable(gm.graph, now.saved, device)
    chosen: Chosen = ()
    if now.peak > budget:

        @functools.cache
        def peak_with(chosen: Chosen) -> int:
            return now.peak if not chosen else step(_tags(chosen)).peak

        chosen = _enough(found, budget, peak_with)
        report.peak = peak_with(chosen)
    for node, policy in _tags(chosen).items():
        node.meta["recompute"] = policy
    report.seconds_again = sum(each.seconds for each in chosen)
    for each in found:
        report.add(Decision(each.name, each.kind, str(each), node=min(each.nodes).name), each in chosen)
    return report


def _enough(found: Sequence[Recomputable], budget: int, peak_with: Callable[[Chosen], int]) -> Chosen:
    """Returns what is computed again for a step to fit, or to come as near to that as is known.

    What is alike, as in equal layers, is tried together, the best first, and taken where that lowers the peak: more is
    not always less, where the backward pass has its peak while it computes something again.
    """
    alike: dict[Any, Chosen] = {}
    for each in found:
        key = each.kind, each.freed, each.seconds
        alike[key] = (*alike.get(key, ()), each)
    chosen: Chosen = ()
    helps = True
    while helps:
        helps = False
        for group in alike.values():
            if group[0] in chosen or peak_with((*chosen, *group)) >= peak_with(chosen):
                continue
            if peak_with((*chosen, *group)) <= budget:
                return _without_needless((*chosen, *_first_of(group, chosen, budget, peak_with)), budget, peak_with)
            chosen, helps = (*chosen, *group), True
    everything = tuple(found)
    return min(chosen, everything, key=peak_with)


def _first_of(group: Chosen, chosen: Chosen, budget: int, peak_with: Callable[[Chosen], int]) -> Chosen:
    """Returns as few of a group as are needed beside what is chosen; with all of them a step fits."""
    too_few, enough = 0, len(group)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        fits = peak_with((*chosen, *group[:middle])) <= budget
        too_few, enough = (too_few, middle) if fits else (middle, enough)
    return group[:enough]


def _without_needless(chosen: Chosen, budget: int, peak_with: Callable[[Chosen], int]) -> Chosen:
    """Drops, from the slowest on, those without which a step fits, too; of those that are alike, one is tried."""
    needed: set[tuple[str, int, float]] = set()
    for each in sorted(chosen, key=lambda each: -each.seconds):
        alike = (each.kind, each.freed, each.seconds)
        rest = tuple(other for other in chosen if other is not each)
        if alike not in needed and peak_with(rest) <= budget:
            chosen = rest
        else:
            needed.add(alike)
    return chosen


def _tags(chosen: Chosen) -> Tags:
    again = {node: CheckpointPolicy.MUST_RECOMPUTE for each in chosen for node in each.nodes}
    kept = {node: CheckpointPolicy.MUST_SAVE for each in chosen for node in each.reads}
    return {**kept, **again}

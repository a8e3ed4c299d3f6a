"""``suggest``: a rank for each weight of a model, so that all take a share of its parameters and lose least."""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slcompile.config import SLConfig, checked_config
from slcompile.convert.candidates import gather
from slcompile.convert.weight_uses import uses_of
from slcompile.models import unwrapped
from slcompile.weight.owners import LiveObjects
from slcompile.weight.placing import dense_names
from slcompile.weight.structure import structure_of


@dataclass(frozen=True)
class SuggestedRank:
    """What one weight gets.

    Attributes:
        shape: Of the weight.
        rank: Of its low-rank part.
        parameters: Of its factors and values.
        error: Relative error of the best approximation of this rank, without a sparse part, in the Frobenius norm.
    """

    shape: tuple[int, ...]
    rank: int
    parameters: int
    error: float


@dataclass(frozen=True)
class Suggestion:
    """Ranks for a budget.

    Attributes:
        weights: By fully qualified name, in the model's order.
        budget: The share of these weights' parameters that was asked for.
    """

    weights: Mapping[str, SuggestedRank]
    budget: float

    @property
    def rank(self) -> dict[str, int]:
        """The ranks by name, as ``SLConfig(rank=...)`` takes them: as patterns."""
        return {glob.escape(name): each.rank for name, each in self.weights.items()}

    @property
    def share(self) -> float:
        """The share of the weights' parameters that factors of these ranks and their values take."""
        dense = sum(math.prod(each.shape) for each in self.weights.values())
        return sum(each.parameters for each in self.weights.values()) / dense

    def __str__(self) -> str:
        width = max(len(name) for name in self.weights)
        rows = [f"{'weight':<{width}}  {'shape':>14}  {'rank':>6}  {'parameters':>12}  {'error':>6}"]
        for name, each in self.weights.items():
            shape = "x".join(map(str, each.shape))
            rows.append(f"{name:<{width}}  {shape:>14}  {each.rank:>6}  {each.parameters:>12,}  {each.error:>6.3f}")
        rows.append(f"{self.share:.1%} of the parameters of {len(self.weights)} weights, {self.budget:.1%} asked for")
        return "\n".join(rows)


@torch.no_grad()
def suggest(
    model: nn.Module,
    budget: float,
    config: SLConfig | None = None,
    *,
    example_args: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Suggestion:
    """Distributes rank over a model's weights under one budget of parameters, by their spectra.

    A weight's loss is its relative error, the share of its squared singular values beyond the rank. Each next singular
    direction of a weight costs as many parameters as it has rows and columns, so the directions that lower the sum of
    losses most for each parameter are taken until the budget is spent: the least sum, up to what one direction costs.
    Every weight has at least rank 1, and no more than saves parameters.

    Args:
        model: Dense, with weights that were trained; left as it is.
        budget: Share of the parameters of these weights that factors and values may take, in (0, 1).
        config: Gives density, ``include``, ``exclude`` and ``min_dim``; its rank does not count.
        example_args, example_kwargs: What the model is called with, to find its weights on its graph, as for
            ``factorize_``; without them, the weights are those of linear layers.

    Raises:
        ValueError: The budget is not in (0, 1), or less than rank 1 and the density take; the weights are on the meta
            device; or nothing is eligible.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < 1:
        raise ValueError(f"budget must be a number in (0, 1), got {budget!r}")
    config = replace(checked_config(config), rank=1)
    model = unwrapped(model)
    config.require_patterns_match(dense_names(model))
    uses = uses_of(model, config, example_args, example_kwargs)
    chosen = gather(uses, config, LiveObjects.find(), model=model).chosen
    if not chosen:
        raise ValueError(f"model has no eligible weight of {len(uses)}: nothing to distribute a budget over")
    if any(each.weight.is_meta for each in chosen):
        raise ValueError("model must have weights, got some on the meta device, which have no spectrum")
    energies = {each.name: _energies(each.weight) for each in chosen}
    options = {each.name: each.config for each in chosen}
    shapes = {each.name: tuple(each.weight.shape) for each in chosen}

    def size(name: str, rank: int) -> int:
        own = options[name]
        return structure_of(own).size(shapes[name], replace(own, rank=rank))

    ranks = dict.fromkeys(shapes, 1)
    dense = sum(math.prod(shape) for shape in shapes.values())
    left = budget * dense - sum(size(name, 1) for name in shapes)
    if left < 0:
        least = sum(size(name, 1) for name in shapes) / dense
        raise ValueError(f"budget={budget} cannot be met: rank 1 and density={config.density} take {least:.4f}")
    gains = []
    for name, energy in energies.items():
        cost = size(name, 2) - size(name, 1)
        most = (math.prod(shapes[name]) - 1 - size(name, 1)) // cost + 1  # the largest rank that saves parameters
        gains += [(float(each) / cost, name, cost) for each in energy[1 : max(1, most)]]
    for _, name, cost in sorted(gains, key=lambda gain: -gain[0]):  # of one weight they come in the order of ranks
        if cost <= left:
            ranks[name] += 1
            left -= cost
    found = {
        name: SuggestedRank(shapes[name], rank, size(name, rank), float(energies[name][rank:].sum()) ** 0.5)
        for name, rank in ranks.items()
    }
    return Suggestion(found, budget)


def _energies(weight: Tensor) -> Tensor:
    """Returns the shares of the squared singular values, descending; of a stack of matrices, of them together."""
    values = torch.linalg.svdvals(weight.detach().double()).square()
    values = values if values.dim() == 1 else values.sum(0)
    return (values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)).cpu()

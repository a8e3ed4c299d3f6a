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
from slcompile.convert.candidates import Candidate, gather
from slcompile.convert.weight_uses import uses_of
from slcompile.models import unwrapped
from slcompile.passes.find_matmuls import WeightUse
from slcompile.weight.owners import LiveObjects
from slcompile.weight.placing import dense_names
from slcompile.weight.sl_weight import SLWeight
from slcompile.weight.structure import structure_of


@dataclass(frozen=True)
class SuggestedRank:
    """What one weight gets.

    Attributes:
        shape: Of the weight.
        rank: Of its low-rank part.
        parameters: Of its factors and values.
        error: Relative error of the best approximation of this rank, without a sparse part, in the Frobenius norm;
            of ``compress``, that of what the weight computes.
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
        asked = f"{self.share:.1%} of the parameters of {len(self.weights)} weights, {self.budget:.1%} asked for"
        return f"{table(self.weights)}\n{asked}"


def table(weights: Mapping[str, SuggestedRank]) -> str:
    """Returns one line for each weight, under a heading."""
    width = max(len(name) for name in weights)
    rows = [f"{'weight':<{width}}  {'shape':>14}  {'rank':>6}  {'parameters':>12}  {'error':>6}"]
    for name, each in weights.items():
        shape = "x".join(map(str, each.shape))
        rows.append(f"{name:<{width}}  {shape:>14}  {each.rank:>6}  {each.parameters:>12,}  {each.error:>6.3f}")
    return "\n".join(rows)


@torch.no_grad()
def suggest(
    model: nn.Module,
    budget: float,
    config: SLConfig | None = None,
    *,
    example_args: Sequence[Any] | Tensor | None = None,
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
            ``factorize_``; without them, the weights are those of linear layers, ``Conv1D`` and convolutions.

    Raises:
        ValueError: The budget is not in (0, 1), or less than rank 1 and the density take; the weights are on the meta
            device; nothing is eligible; or the config has another structure than SLTrain's.
    """
    config = replace(checked_config(config), rank=1)
    if structure_of(config) is not SLWeight:
        raise ValueError(
            f"suggest distributes rank by singular values, which say what structure='sparse_low_rank' loses, got "
            f"structure={config.structure!r}"
        )
    model = unwrapped(model)
    chosen = eligible(model, config, uses_of(model, config, example_args, example_kwargs))
    require_possible(budget, chosen)
    energies = {each.name: _energies(each.matrix) for each in chosen}
    ranks = distribute(budget, chosen, energies)
    found = {
        each.name: SuggestedRank(
            tuple(each.weight.shape),
            rank := ranks[each.name],
            _size(each, rank),
            float(energies[each.name][rank:].sum()) ** 0.5,
        )
        for each in chosen
    }
    return Suggestion(found, budget)


def eligible(model: nn.Module, config: SLConfig, uses: Sequence[tuple[nn.Parameter, WeightUse]]) -> list[Candidate]:
    """Returns the weights that the options factorize; ValueError where there are none, or they hold no numbers."""
    config.require_patterns_match(dense_names(model))
    found = gather(uses, config, LiveObjects.find(), model=model)
    found.require_some(model, config)
    if any(each.weight.is_meta for each in found.chosen):
        raise ValueError("model must have weights, got some on the meta device, which have no spectrum")
    for each in found.chosen:
        if not bool(each.weight.detach().isfinite().all()):
            raise ValueError(f"{each.name} holds NaN or Inf")
    return found.chosen


def require_possible(budget: float, chosen: Sequence[Candidate]) -> None:
    """Raises ValueError where a budget is none, or less than what rank 1 takes."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < 1:
        raise ValueError(f"budget must be a number in (0, 1), got {budget!r}")
    least = sum(_size(each, 1) for each in chosen) / sum(each.weight.numel() for each in chosen)
    if least > budget:
        raise ValueError(
            f"budget={budget} cannot be met: rank 1 and density={chosen[0].config.density} take {least:.4f}"
        )


def distribute(budget: float, chosen: Sequence[Candidate], energies: Mapping[str, Tensor]) -> dict[str, int]:
    """Distributes rank by what each next direction of a weight is worth for each parameter."""
    ranks = {each.name: 1 for each in chosen}
    left = budget * sum(each.weight.numel() for each in chosen) - sum(_size(each, 1) for each in chosen)
    gains = []
    for each in chosen:
        cost = _size(each, 2) - _size(each, 1)
        most = (each.weight.numel() - 1 - _size(each, 1)) // cost + 1  # the largest rank that saves parameters
        gains += [(float(energy) / cost, each.name, cost) for energy in energies[each.name][1 : max(1, most)]]
    for _, name, cost in sorted(gains, key=lambda gain: -gain[0]):  # of one weight they come in the order of ranks
        if cost <= left:
            ranks[name] += 1
            left -= cost
    return ranks


def _size(candidate: Candidate, rank: int) -> int:
    own = replace(candidate.config, rank=rank)
    return structure_of(own).size(candidate.shape, own)


def _energies(weight: Tensor) -> Tensor:
    """Returns the shares of the squared singular values, descending; of a stack of matrices, of them together."""
    values = torch.linalg.svdvals(weight.detach().double()).square()
    values = values if values.dim() == 1 else values.sum(0)
    return (values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)).cpu()

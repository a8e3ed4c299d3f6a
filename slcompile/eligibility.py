"""Which of the weights that matmuls read are factorized: the policy, and a reason for every one that is not."""

from __future__ import annotations

import math

from torch import Tensor, nn

from slcompile.config import SLConfig
from slcompile.passes.find_matmuls import WeightUse
from slcompile.passes.graph import Decision
from slcompile.weight import values_shape


def decide(name: str, weight: Tensor, use: WeightUse, config: SLConfig, owners: list[nn.Module]) -> Decision:
    """Whether a weight is factorized: ``reason`` is empty, or the code of why it stays dense.

    The reasons, in the order in which they are looked for: ``no_matmul``, ``tied``, ``other_use``, ``not_2d``,
    ``dtype``, ``frozen``, ``excluded``, ``too_small``, ``no_saving``.
    """
    reason, detail = _reason(name, weight, use, config, owners)
    return Decision(name, reason, detail, tuple(weight.shape), len(use.matmuls))


def _reason(name: str, weight: Tensor, use: WeightUse, config: SLConfig, owners: list[nn.Module]) -> tuple[str, str]:
    if not use.matmuls:
        return "no_matmul", f"read by {', '.join(sorted(set(use.others))) or 'nothing'}, not by a matmul"
    if "embedding" in use.others or any(isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) for owner in owners):
        return "tied", "also the table of an embedding"
    if use.others:
        return "other_use", f"also read by {', '.join(sorted(set(use.others)))}"
    if weight.dim() != 2:
        return "not_2d", f"has {weight.dim()} dimensions"
    if not weight.is_floating_point():
        return "dtype", f"{weight.dtype} is not a floating-point type"
    if not weight.requires_grad:
        return "frozen", "requires_grad is False"
    if not config.includes(name):
        return "excluded", "by the include and exclude patterns"
    rows, columns = weight.shape
    if min(rows, columns) < config.min_dim:
        return "too_small", f"has fewer than {config.min_dim} rows or columns (min_dim)"
    rank = config.rank_for(rows, columns)
    factored = rank * (rows + columns) + math.prod(values_shape(rows, columns, config))
    if factored >= rows * columns:
        return "no_saving", f"rank {rank} and its non-zeros take {factored} parameters, dense {rows * columns}"
    return "", ""


def require_possible_rank(decisions: list[Decision], config: SLConfig) -> None:
    """Raises ValueError where the rank alone, an int, leaves every weight dense that could else be factorized."""
    blocked = [each for each in decisions if each.reason == "no_saving"]
    if isinstance(config.rank, int) and blocked and all(each.reason for each in decisions):
        largest = max(min(each.shape) for each in blocked)
        if config.rank > largest:
            raise ValueError(
                f"rank must be at most {largest}, the smaller side of the largest eligible weight, got {config.rank}"
            )

"""Which of the weights that matmuls read are factorized: the policy, and a reason for every one that is not."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from slcompile.config import SLConfig
from slcompile.passes.find_matmuls import WeightUse
from slcompile.passes.graph import Decision
from slcompile.weight.structure import matrix_shape, structure_of


def decide(
    names: Sequence[str], weight: Tensor, use: WeightUse, config: SLConfig, owners: Sequence[nn.Module]
) -> Decision:
    """Decides whether a weight is factorized: ``reason`` is empty, or the code of why it stays dense."""
    reason, detail = structural_reason(weight, use, config)
    if not reason:
        reason, detail = nominal_reason(names, owners, config)
    if not reason and config.is_by_pattern:
        reason, detail = setting_reason(names, matrix_shape(weight.shape, use.convolved), config)
    if not reason and config.base is not None:
        detail = "stays, frozen; what is added to it is trained"
    return Decision(names[0] if names else "?", reason, detail, tuple(weight.shape), len(use.matmuls))


def structural_reason(weight: Tensor, use: WeightUse, config: SLConfig) -> tuple[str, str]:
    """Says why no weight of this shape, dtype and use is factorized: a code and a sentence, or two empty strings.

    Depends only on what Dynamo guards on, so it holds for every model that reuses the graph. The codes, in the order in
    which they are looked for: ``no_matmul``, ``other_use`` (``tied`` to an embedding), ``no_grad``, ``not_2d``,
    ``dtype``, ``frozen``, ``too_small``, ``shape``, ``no_saving`` (both where no setting depends on names).
    """
    if not use.matmuls:
        return "no_matmul", f"read by {', '.join(sorted(set(use.others))) or 'nothing'}, not by a matmul"
    if "embedding" in use.others:
        return "tied", "also the table of an embedding"
    if use.others:
        return "other_use", f"also read by {', '.join(sorted(set(use.others)))}"
    if use.without_grad:
        return "no_grad", "read under torch.no_grad() alone"
    if weight.dim() != 2 and not use.stacked and not use.convolved:
        return "not_2d", f"has {weight.dim()} dimensions, and is not read as a stack of matrices"
    if weight.dim() != 2 and not use.convolved and not structure_of(config).takes_stacks:
        return "not_2d", f"is a stack of matrices, of which the structure {config.structure!r} takes none"
    if not weight.is_floating_point():
        return "dtype", f"{weight.dtype} is not a floating-point type"
    if not weight.requires_grad and config.base is None:  # it is to be frozen: what is added to it is trained
        return "frozen", "requires_grad is False"
    shape = matrix_shape(weight.shape, use.convolved)
    if min(shape[-2:]) < config.min_dim:
        return "too_small", f"has fewer than {config.min_dim} rows or columns (min_dim)"
    return ("", "") if config.is_by_pattern else _size_reason(shape, config)


def _size_reason(shape: Sequence[int], config: SLConfig) -> tuple[str, str]:
    if misfit := structure_of(config).misfit_of(shape, config):
        return "shape", misfit
    size, dense = structure_of(config).size(shape, config), math.prod(shape)
    if size >= dense:
        return "no_saving", f"its factors take {size} parameters at this rank, dense {dense}"
    return "", ""


def setting_reason(names: Sequence[str], shape: Sequence[int], config: SLConfig) -> tuple[str, str]:
    """Says why a weight has no place under options that depend on names: ``unmatched``, ``shape``, ``no_saving``."""
    own = config.at(*names)
    if own is None:
        return "unmatched", "no pattern of rank, density or alpha matches it"
    return _size_reason(shape, own)


def nominal_reason(names: Sequence[str], owners: Sequence[nn.Module], config: SLConfig) -> tuple[str, str]:
    """Says why this one weight is not factorized: ``not_owned``, ``recurrent``, ``tied`` or ``excluded``.

    Args:
        names: All its fully qualified names; a tied weight has several.
        owners: The modules that hold it as a parameter.
        config: Include and exclude patterns.
    """
    if not owners or not names:
        return "not_owned", "no module holds it as a parameter (a list, a global, flat weights)" + (
            "; gc.freeze() hides modules" if gc.get_freeze_count() else ""
        )
    if any(isinstance(owner, nn.RNNBase) for owner in owners):
        return "recurrent", "a recurrent layer reads it from its list of flat weights"
    if any(isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) for owner in owners):
        return "tied", "also the table of an embedding"
    if not config.includes(*names):
        return "excluded", "by the include and exclude patterns"
    return "", ""


def require_possible_rank(shapes: Iterable[Sequence[int]], config: SLConfig) -> None:
    """Raises ValueError where the rank, an int, is more than the smaller side of every one of these matrices.

    It does so where none of them has a shape that the structure can have, and, with a base, where the factors of every
    one take as many parameters as the matrix. Of a stack of matrices the last two sizes are those of its matrices.
    """
    shapes = list(shapes)
    smaller_sides = [min(shape[-2:]) for shape in shapes]
    if isinstance(config.rank, int) and smaller_sides and config.rank > max(smaller_sides):
        raise ValueError(
            f"rank must be at most {max(smaller_sides)}, the smaller side of the largest eligible weight, got "
            f"{config.rank}"
        )
    if config.is_by_pattern:
        return
    misfits = [structure_of(config).misfit_of(shape, config) for shape in shapes if len(shape) == 2]
    if misfits and all(misfits):
        raise ValueError(f"structure={config.structure!r} fits no eligible weight: one {misfits[0]}")
    if config.base is None:
        return
    shapes = [shape for shape in shapes if len(shape) == 2 or structure_of(config).takes_stacks]
    sizes = [(structure_of(config).size(shape, config), math.prod(shape)) for shape in shapes]
    if sizes and all(size >= dense for size, dense in sizes):
        least, dense = min(sizes, key=lambda each: each[0] / each[1])
        beside = f" with density={config.density}" if structure_of(config).takes_density else ""
        raise ValueError(
            f"rank={config.rank}{beside} saves nothing beside base={config.base!r}: what is "
            f"added takes {least} parameters, and the weight itself has {dense}; take a smaller rank"
        )

"""Tensor parallelism for factorized models: ``parallelize``."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from slcompile.config import did_you_mean
from slcompile.models import unwrapped
from slcompile.names import plain_name

WAYS = {"column": 0, "row": 1}
"""The dimension of a weight [out, in] that is cut."""


def parallelize(model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str]) -> nn.Module:
    """Shares the matmuls of linear layers among the processes of a mesh, in place, by DTensor (tensor parallelism).

    A column-parallel layer takes the whole input and gives its part of the outputs; a row-parallel one takes a part of
    the inputs and gives the whole output. Of a factorized weight, the first cuts B, values and the support by rows and
    keeps A whole, the second cuts A's columns and the support's groups and keeps B whole; dense weights are cut as
    ``torch.distributed.tensor.parallel`` does. The support is that of the uncut weight, bit for bit. Afterwards,
    ``fully_shard`` over another dimension of the mesh makes it two-dimensional.

    Args:
        model: Factorized, with numbers: those of the first process count. Optimizers are made after this.
        mesh: One-dimensional: ``mesh["tp"]`` of one with several dimensions.
        plan: fnmatch pattern of names of ``nn.Linear`` modules -> ``"column"`` or ``"row"``. Between the two, a module
            that counts heads must take the number from the sizes that it meets, as transformers' attention does.

    Returns:
        The model.

    Raises:
        ValueError: The mesh has several dimensions, a pattern fits no linear layer, a way is unknown, or sizes cannot
            be divided among the processes. The model is then as it was.
    """
    from slcompile.weight.parallel import require_shareable, share  # imports DTensor, which takes a second

    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        raise ValueError(f"mesh must be a DeviceMesh of one dimension, got {mesh!r}")
    model = unwrapped(model)
    chosen: dict[str, tuple[nn.Linear, int]] = {}
    for pattern, way in plan.items():
        if way not in WAYS:
            raise ValueError(f"plan[{pattern!r}] got {way!r}{did_you_mean(way, WAYS)}")
        found = {
            plain_name(name): module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and fnmatchcase(plain_name(name), pattern)
        }
        if not found:
            raise ValueError(f"plan[{pattern!r}] fits no linear layer of the model")
        chosen |= {name: (module, WAYS[way]) for name, module in found.items()}
    for name, (module, cut) in chosen.items():
        require_shareable(name, module, mesh, cut)
    for module, cut in chosen.values():
        share(module, mesh, cut)
    return model

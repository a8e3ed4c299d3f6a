"""Tensor parallelism for factorized models: ``parallelize``."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from slcompile.config import did_you_mean
from slcompile.models import unwrapped
from slcompile.names import plain_name

CUTS = {"column": 0, "row": 1}
"""The dimension of a linear layer's weight [out, in] that is cut."""

EXPERT = "expert"
WAYS = (*CUTS, EXPERT)


def parallelize(model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str]) -> nn.Module:
    """Shares linear layers (tensor parallelism) and stacks of experts among the processes of a mesh, in place.

    A column-parallel layer takes the whole input and gives its part of the outputs; a row-parallel one takes a part of
    the inputs and gives the whole output. Of a factorized weight, the first cuts B, values and the support by rows and
    keeps A whole, the second cuts A's columns and the support's groups and keeps B whole; dense weights are cut as
    ``torch.distributed.tensor.parallel`` does. Of a module that holds stacks [experts, rows, columns], dense or
    factorized, each process has as many experts. It computes what they give for all tokens, and the results are added
    up. All parts are DTensors. The support is that of the uncut weight, bit for bit. Afterwards, ``fully_shard`` over
    another dimension of the mesh makes it two-dimensional.

    Args:
        model: Factorized, with numbers: those of the first process count. Optimizers are made after this.
        mesh: One-dimensional: ``mesh["tp"]`` of one with several dimensions.
        plan: fnmatch pattern of names of modules -> ``"column"`` or ``"row"`` for ``nn.Linear``, ``"expert"`` for
            experts as transformers has them: called with tokens, the experts of each and their weights, and counted by
            ``num_experts``. Between ``"column"`` and ``"row"``, a module that counts heads must take the number from
            the sizes that it meets, as transformers' attention does.

    Returns:
        The model.

    Raises:
        ValueError: The mesh has several dimensions, a pattern fits no such module, a way is unknown, or sizes or
            experts cannot be divided among the processes. The model is then as it was.
    """
    # They import DTensor, which takes a second.
    from slcompile.weight.experts import holds_stacks, require_shareable_experts, share_experts
    from slcompile.weight.parallel import require_shareable, share

    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        raise ValueError(f"mesh must be a DeviceMesh of one dimension, got {mesh!r}")
    model = unwrapped(model)
    chosen: dict[str, tuple[nn.Module, str]] = {}
    for pattern, way in plan.items():
        if way not in WAYS:
            raise ValueError(f"plan[{pattern!r}] got {way!r}{did_you_mean(way, WAYS)}")
        modules = {plain_name(name): module for name, module in model.named_modules()}
        found = {
            name: module
            for name, module in modules.items()
            if fnmatchcase(name, pattern) and (holds_stacks(module) if way == EXPERT else isinstance(module, nn.Linear))
        }
        if not found:
            kind = "module with stacks of experts" if way == EXPERT else "linear layer"
            raise ValueError(f"plan[{pattern!r}] fits no {kind} of the model")
        chosen |= {name: (module, way) for name, module in found.items()}
    for name, (module, way) in chosen.items():
        if isinstance(module, nn.Linear):
            require_shareable(name, module, mesh, CUTS[way])
        else:
            require_shareable_experts(name, module, mesh)
    for module, way in chosen.values():
        if isinstance(module, nn.Linear):
            share(module, mesh, CUTS[way])
        else:
            share_experts(module, mesh)
    return model

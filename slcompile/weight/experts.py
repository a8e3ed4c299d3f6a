"""Expert parallelism: stacks of matrices whose first dimension, the experts, is divided among processes.

Each process computes what its experts give for all tokens, and the results are added up. That is exact and dispatches
nothing: the processes see the same tokens, as those that share the matmuls of linear layers do.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from slcompile.names import SUFFIX
from slcompile.weight.parallel import (
    EXPERT,
    ParallelSLWeight,
    added_gradient,
    added_up,
    local_part,
    misfit,
    require_whole,
    shared,
)
from slcompile.weight.placing import sl_names
from slcompile.weight.sl_weight import SLWeight

_IS_DIVIDED = "_is_expert_parallel"
"""What transformers sets where its functions are to leave out tokens whose expert is ``num_experts``."""


def holds_stacks(module: nn.Module) -> bool:
    """Returns whether a module owns stacks of matrices, dense or factorized."""
    return any(len(each.shape) == 3 for each in _held(module).values())


def _held(module: nn.Module) -> dict[str, Any]:
    """Returns a module's own dense parameters and factorized weights, by the names they have when they are dense."""
    dense = {name: each for name, each in module._parameters.items() if each is not None}
    return dense | {name: getattr(module, name + SUFFIX) for name in sl_names(module)}


def _arguments(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def require_shareable_experts(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """Raises ValueError where a module's experts cannot be divided among the processes of a mesh."""
    require_whole(name, module)
    held, size, count = _held(module), mesh.size(), getattr(module, "num_experts", None)
    for own, each in held.items():
        if each.shape[:1] != (count,):
            raise ValueError(
                f"{name} has num_experts={count} and {own} of shape {tuple(each.shape)}: all that it holds must be of "
                "num_experts experts, in the first dimension"
            )
    if any(list(child.parameters()) for child in module.children() if child not in held.values()):
        raise ValueError(f"{name} has parameters in submodules, which would be of all experts: they cannot be shared")
    arguments = _arguments(type(module))
    if len(arguments) != 3 or "forward" in vars(module):
        raise ValueError(
            f"{name} is called with {', '.join(arguments)}: experts must be called with tokens [tokens, width], the "
            "experts of each [tokens, n] and their weights [tokens, n], by the forward of their class"
        )
    if cast(int, count) % size:
        raise ValueError(f"{name}: num_experts={count} must be a multiple of {size} processes")
    for own, each in held.items():
        if why := misfit(each, size, EXPERT):
            raise ValueError(f"{name}.{own}: {why}")


def share_experts(module: nn.Module, mesh: DeviceMesh) -> None:
    """Divides a module's experts: its parameters become DTensors, of which its forward pass meets this process's part.

    What the module counts experts by, ``num_experts``, is their number on this process.
    """
    held = _held(module)
    for name, weight in held.items():
        if isinstance(weight, SLWeight):
            ParallelSLWeight.share(weight, mesh, EXPERT)
        else:
            module._parameters[name] = shared(weight, mesh, Shard(EXPERT))
    divided: Any = module  # of whose class mypy takes Module.__hash__ for the class's own
    module.__class__ = _divided_class(divided.__class__, tuple(held))
    divided._slcompile_mesh, divided._slcompile_meets_parts = mesh, False
    divided.num_experts //= mesh.size()
    if hasattr(module, _IS_DIVIDED):
        setattr(module, _IS_DIVIDED, True)


@functools.cache
def _divided_class(base: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """Returns the subclass of ``base`` that computes with this process's part of ``names``, its experts.

    It is one for all layers of a class: Dynamo guards on the type. While its forward pass runs, ``names`` read as plain
    tensors of these experts; else they are the DTensors that FSDP and state dicts look for.
    """
    arguments = _arguments(base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        tokens, chosen, weights = (*args, *(kwargs[name] for name in arguments[len(args) :]))
        mesh, count = self._slcompile_mesh, self.num_experts
        first = mesh.get_local_rank() * count
        is_here = (chosen >= first) & (chosen < first + count)
        # "grouped_mm" skips tokens of no expert. The other ways compute with an own one, and multiply by 0.
        is_skipping = hasattr(self, _IS_DIVIDED) and self.config._experts_implementation == "grouped_mm"
        elsewhere = torch.full_like(chosen, count) if is_skipping else chosen % count
        chosen = torch.where(is_here, chosen - first, elsewhere)
        weights = added_gradient(weights, mesh).masked_fill(~is_here, 0)
        self._slcompile_meets_parts = True
        try:
            output = base.forward(self, added_gradient(tokens, mesh), chosen, weights)
        finally:
            self._slcompile_meets_parts = False
        return added_up(output, mesh)

    def part_property(name: str) -> property:
        composed = getattr(base, name, None)  # of a factorized weight

        def read(self: Any) -> Tensor:
            whole = self._parameters[name] if composed is None else composed.fget(self)
            return local_part(whole) if self._slcompile_meets_parts else whole

        return property(read)

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        make, args, *rest = cast(tuple[Any, ...], base.__reduce_ex__(self, max(protocol, 2)))
        args = tuple(base if each is type(self) else each for each in args)
        return (_remake, (base, names, make, args), *rest)

    members = {
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "forward": forward,
        **{name: part_property(name) for name in names},
    }
    return types.new_class(f"Parallel{base.__name__}", (base,), exec_body=lambda namespace: namespace.update(members))


def _remake(base: Any, names: tuple[str, ...], make: Any, args: tuple[Any, ...]) -> nn.Module:
    """Makes a copy of a module whose experts are divided; copies and pickles hold what it is called with."""
    module: Any = make(*args)
    module.__class__ = _divided_class(base, names)
    return cast(nn.Module, module)

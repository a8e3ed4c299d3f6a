"""Tensor parallelism: a weight's factors and values on several processes, each of which composes its part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from typing_extensions import override

from slcompile.names import SUFFIX
from slcompile.ops.support import groups_per_row, stratified_columns
from slcompile.weight.marks import mark_values
from slcompile.weight.placing import sl_names
from slcompile.weight.sl_weight import SLWeight

COLUMN, ROW = 0, 1
"""The dimension of a weight [out, in] that is cut: the names of Megatron's layers, which transpose it."""


class ParallelSLWeight(SLWeight):
    """An ``SLWeight`` whose parameters are DTensors, and whose forward is a DTensor: this process's part of the weight.

    Cut by rows (``COLUMN``): B, values and the support's rows are, and A is whole on each process. Cut by columns
    (``ROW``): A's columns and the support's groups are, and B is whole. The gradient of the whole factor is added up
    among the processes. The support is that of the uncut weight. A process keeps the flat positions of its own part, an
    int32 for each non-zero, in a buffer that is no part of a state dict.
    """

    mesh: DeviceMesh
    cut: int
    positions: Tensor

    @classmethod
    def share(cls, weight: SLWeight, mesh: DeviceMesh, cut: int) -> None:
        """Turns a weight into one of several processes, in place; the first process's numbers count.

        Raises:
            ValueError: Its sizes cannot be divided among the processes.
        """
        require_divisible(weight, mesh.size(), cut)
        whole, part = (weight.A, weight.B) if cut == COLUMN else (weight.B, weight.A)
        for name, parameter in weight.named_parameters():
            placement: Placement = Replicate() if parameter is whole else Shard(cut)
            assert parameter is whole or parameter is part or parameter is weight.values
            shared = _shared(parameter, mesh, placement)
            setattr(weight, name, shared)
        mark_values(weight.values)
        weight.__class__ = cls
        assert isinstance(weight, cls)
        weight.mesh, weight.cut = mesh, cut
        weight.register_buffer("positions", torch.empty(0), persistent=False)
        weight._restore_support()

    @override
    def reset_parameters(self) -> None:
        super().reset_parameters()
        whole = self.A if self.cut == COLUMN else self.B
        assert isinstance(whole, DTensor)
        dist.broadcast(whole.to_local().detach(), group=self.mesh.get_group(), group_src=0)

    @override
    def _composed(self, op: Callable[..., Tensor]) -> Tensor:
        B, A, values = (_local(each) for each in (self.B, self.A, self.values))
        if self.cut == COLUMN:
            A = added_gradient(A, self.mesh)
        else:
            B = added_gradient(B, self.mesh)
        local = op(B, A, values.flatten(), self.positions, self.scale)
        return DTensor.from_local(local, self.mesh, [Shard(self.cut)], run_check=False)

    @override
    def _restore_support(self) -> None:
        super()._restore_support()
        if "positions" in self._buffers and not self.seed.is_meta:
            self.positions = self._own_positions().to(self.seed.device)

    @override
    def loaded(self) -> None:
        super().loaded()
        self._restore_support()  # a loaded seed moves the non-zeros

    def _own_positions(self) -> Tensor:
        """Returns the flat positions of this process's non-zeros in its part of the weight."""
        rows, columns = self.shape
        size, rank = self.mesh.size(), self.mesh.get_local_rank()
        groups = groups_per_row(columns, self.density)
        seed = torch.tensor(self.drawn_seed)
        if self.cut == COLUMN:
            rows //= size
            found = stratified_columns(seed, rows, columns, groups, first_row=rank * rows, vector=self.vector)
        else:
            columns, groups = columns // size, groups // size
            found = stratified_columns(seed, rows, self.shape[1], groups * size, vector=self.vector)
            found = found[:, rank * groups : (rank + 1) * groups] - rank * columns
        return (torch.arange(rows).unsqueeze(1) * columns + found).flatten().to(torch.int32)


def require_divisible(weight: SLWeight, size: int, cut: int) -> None:
    """Raises ValueError where a weight cannot be cut for so many processes."""
    if len(weight.shape) != 2 or weight.input_dim != 1 or weight.has_index:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} with support={weight.support!r} cannot be shared: only those of "
            "nn.Linear can, with the stratified or the vector support"
        )
    if weight.has_base or not weight.density:
        raise ValueError("a weight with a frozen base or without a sparse part cannot be shared")
    length = weight.shape[cut]
    if length % size:
        raise ValueError(f"{('rows', 'columns')[cut]} of a weight must be a multiple of {size} processes, got {length}")
    if cut == ROW:
        columns, groups = weight.shape[1], groups_per_row(weight.shape[1], weight.density)
        if groups % size:
            nearest = max(size, round(weight.density * columns / size) * size)
            raise ValueError(
                f"density={weight.density} puts {groups} non-zeros in each row of {columns} columns, which {size} "
                f"processes cannot share by columns; the nearest that they can is density={nearest / columns:.6g}"
            )


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


class _AddedGradient(torch.autograd.Function):
    """Identity; its backward adds up the gradients of all processes of a mesh."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        partial = DTensor.from_local(grad, ctx.mesh, [Partial()], run_check=False)
        return partial.redistribute(placements=[Replicate()]).to_local(), None


def added_gradient(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Returns a tensor that all processes hold, whose gradient is the sum of theirs."""
    return _AddedGradient.apply(tensor, mesh)


def _weight(module: nn.Linear) -> Any:
    return getattr(module, "weight" + SUFFIX) if sl_names(module) else module._parameters["weight"]


def require_shareable(name: str, module: nn.Linear, mesh: DeviceMesh, cut: int) -> None:
    """Raises ValueError where a layer of this name cannot be shared by the processes of a mesh."""
    weight = _weight(module)
    if any(isinstance(each, DTensor) for each in module.parameters()):
        raise ValueError(f"{name} is shared or sharded already: call parallelize once, before fully_shard")
    if any(each.is_meta for each in module.parameters()):
        raise ValueError(f"{name} is on the meta device: give it memory and numbers before it is shared")
    try:
        if isinstance(weight, SLWeight):
            require_divisible(weight, mesh.size(), cut)
        elif not isinstance(weight, Tensor):
            raise ValueError(f"a {type(weight).__name__} cannot be shared")
        elif weight.shape[cut] % mesh.size():
            raise ValueError(f"size {weight.shape[cut]} must be a multiple of {mesh.size()} processes")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def share(module: nn.Linear, mesh: DeviceMesh, cut: int) -> None:
    """Shares a layer: its parameters become DTensors, and hooks cut what it takes and gives."""
    weight = _weight(module)
    if isinstance(weight, SLWeight):
        ParallelSLWeight.share(weight, mesh, cut)
    else:
        module.weight = _shared(weight, mesh, Shard(cut))
    if module.bias is not None:
        module.bias = _shared(module.bias, mesh, Shard(0) if cut == COLUMN else Replicate())
    given, wanted = (Replicate(), Shard(-1)) if cut == COLUMN else (Shard(-1), Replicate())

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        return (x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [given], run_check=False), *rest)

    def after(_: nn.Module, args: Any, output: DTensor) -> Tensor:
        return output.redistribute(placements=[wanted]).to_local()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _shared(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement]), parameter.requires_grad)

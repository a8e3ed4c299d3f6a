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
from slcompile.ops.support import stratified_columns, uniform_dtype
from slcompile.weight.placing import sl_names
from slcompile.weight.sl_weight import SLWeight

COLUMN, ROW = 0, 1
"""The dimension of a weight [out, in] that is cut: the names of Megatron's layers, which transpose it."""

EXPERT = 0
"""The dimension of a stack [experts, rows, columns] that is cut."""


class ParallelSLWeight(SLWeight):
    """An ``SLWeight`` whose parameters are DTensors, and whose forward is a DTensor: this process's part of the weight.

    Cut by rows (``COLUMN``): B, values and the support's rows are, and A is whole on each process. Cut by columns
    (``ROW``): A's columns and the support's groups are, and B is whole. The gradient of the whole factor is added up
    among the processes. A stack (``EXPERT``) is cut between two matrices, and so is all that it is made of. The support
    is that of the uncut weight. A process keeps the flat positions of its own part, an int32 for each non-zero (an
    int64 where the part has 2**31 entries), in a buffer that is no part of a state dict.
    """

    mesh: DeviceMesh
    cut: int
    positions: Tensor

    @classmethod
    def share(cls, weight: SLWeight, mesh: DeviceMesh, cut: int) -> None:
        """Turns a weight into one of several processes, in place; the first process's numbers count."""
        assert not misfit(weight, mesh.size(), cut)
        whole = _whole_factor(weight.shape, cut)
        for name, parameter in weight.named_parameters():
            assert name in ("B", "A", "values")
            setattr(weight, name, shared(parameter, mesh, Replicate() if name == whole else Shard(cut)))
        weight.__class__ = cls
        assert isinstance(weight, cls)
        weight.mesh, weight.cut = mesh, cut
        weight.register_buffer("positions", torch.empty(0), persistent=False)
        weight._restore_support()

    @override
    def reset_parameters(self) -> None:
        super().reset_parameters()
        whole = _whole_factor(self.shape, self.cut)
        if whole:
            part = local_part(self.get_parameter(whole)).detach()
            dist.broadcast(part, group=self.mesh.get_group(), group_src=0)

    @override
    def _composed(self, op: Callable[..., Tensor]) -> Tensor:
        B, A, values = (local_part(each) for each in (self.B, self.A, self.values))
        whole = _whole_factor(self.shape, self.cut)
        if whole == "A":
            A = added_gradient(A, self.mesh)
        elif whole == "B":
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
        rows, columns = self.as_matrix
        size, rank = self.mesh.size(), self.mesh.get_local_rank()
        groups = self.groups
        seed = torch.tensor(self.drawn_seed)
        if self.cut == COLUMN:
            rows //= size
            found = stratified_columns(seed, rows, columns, groups, first_row=rank * rows, vector=self.vector)
        else:
            columns, groups = columns // size, groups // size
            found = stratified_columns(seed, rows, columns * size, groups * size, vector=self.vector)
            found = found[:, rank * groups : (rank + 1) * groups] - rank * columns
        return (torch.arange(rows).unsqueeze(1) * columns + found).flatten().to(uniform_dtype(rows, columns))


def _whole_factor(shape: tuple[int, ...], cut: int) -> str | None:
    """Names the factor that each process has whole; of a stack, whose matrices are divided, there is none."""
    if len(shape) > 2:
        return None
    return "A" if cut == COLUMN else "B"


def misfit(weight: Any, size: int, cut: int) -> str:
    """Says why a weight, dense or factorized, cannot be cut for so many processes; empty if it can."""
    if isinstance(weight, Tensor):
        length = weight.shape[cut]
        return f"size {length} must be a multiple of {size} processes" if length % size else ""
    if not isinstance(weight, SLWeight):
        return f"a {type(weight).__name__} cannot be shared"
    is_stack = len(weight.shape) > 2
    if weight.has_index or not (is_stack or weight.input_dim == 1):
        return (
            f"a weight of shape {tuple(weight.shape)} with support={weight.support!r} cannot be shared: only those of "
            "nn.Linear and of experts can, with the stratified or the vector support"
        )
    if weight.has_base or not weight.density:
        return "a weight with a frozen base or without a sparse part cannot be shared"
    length = weight.shape[cut]
    if length % size:
        what = "experts" if is_stack else ("rows", "columns")[cut]
        return f"{what} of a weight must be a multiple of {size} processes, got {length}"
    columns, groups = weight.shape[-1], weight.groups
    if cut == ROW and groups % size:
        nearest = max(size, round(weight.density * columns / size) * size)
        return (
            f"density={weight.density} puts {groups} non-zeros in each row of {columns} columns, which {size} "
            f"processes cannot share by columns; the nearest that they can is density={nearest / columns:.6g}"
        )
    return ""


def local_part(parameter: Tensor) -> Tensor:
    """Returns what this process has of a DTensor."""
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


def added_up(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Returns the sum of the tensors that the processes have; each one's gradient is the sum's."""
    return (
        DTensor.from_local(tensor, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()
    )


def _weight(module: nn.Linear) -> Any:
    return getattr(module, "weight" + SUFFIX) if sl_names(module) else module._parameters["weight"]


def require_whole(name: str, module: nn.Module) -> None:
    """Raises ValueError where a module's parameters are shared already, or have no numbers."""
    if any(isinstance(each, DTensor) for each in module.parameters()):
        raise ValueError(f"{name} is shared or sharded already: call parallelize once, before fully_shard")
    if any(each.is_meta for each in module.parameters()):
        raise ValueError(f"{name} is on the meta device: give it memory and numbers before it is shared")


def require_shareable(name: str, module: nn.Linear, mesh: DeviceMesh, cut: int) -> None:
    """Raises ValueError where a layer of this name cannot be shared by the processes of a mesh."""
    require_whole(name, module)
    if why := misfit(_weight(module), mesh.size(), cut):
        raise ValueError(f"{name}: {why}")


def share(module: nn.Linear, mesh: DeviceMesh, cut: int) -> None:
    """Shares a layer: its parameters become DTensors, and hooks cut what it takes and gives."""
    weight = _weight(module)
    if isinstance(weight, SLWeight):
        ParallelSLWeight.share(weight, mesh, cut)
    else:
        module.weight = shared(weight, mesh, Shard(cut))
    if module.bias is not None:
        module.bias = shared(module.bias, mesh, Shard(0) if cut == COLUMN else Replicate())
    given, wanted = (Replicate(), Shard(-1)) if cut == COLUMN else (Shard(-1), Replicate())

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        return (x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [given], run_check=False), *rest)

    def after(_: nn.Module, args: Any, output: DTensor) -> Tensor:
        return output.redistribute(placements=[wanted]).to_local()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def shared(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """Returns a parameter as a DTensor; the first process's numbers count."""
    return nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement]), parameter.requires_grad)

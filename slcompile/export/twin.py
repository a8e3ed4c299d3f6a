"""The dense twin of a factorized model: its structure on the meta device, its tensors made one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slcompile.factorize import merge_
from slcompile.models import buffers_restored, deep_copy, in_eval, meta_copy, require_numbers
from slcompile.names import SUFFIX, plain_name, qualified
from slcompile.torch_private import without_wrappers
from slcompile.weight.structure import FactorizedWeight, weights_in

MakeTensor = Callable[[], Tensor]


def floating_dtype(model: nn.Module) -> torch.dtype:
    """Returns the dtype of a model's first floating-point parameter; float32 for a model without one."""
    return next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)


def export_dtype(model: nn.Module, dtype: torch.dtype | None) -> torch.dtype:
    """Returns the dtype to write: the model's own, but float32 for bfloat16 ones, unless one is asked for.

    Raises:
        ValueError: It is not float32, float64, float16 or bfloat16.
    """
    own = floating_dtype(model)
    if dtype is None:
        return torch.float32 if own is torch.bfloat16 else own
    allowed = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    if dtype not in allowed:
        raise ValueError(f"dtype must be one of {', '.join(map(str, allowed))}, got {dtype}")
    return dtype


def meta_twin(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Returns a dense copy of a model on the meta device, in eval mode; nothing of the model's size is allocated.

    Modules that torch.compile or torch's checkpoint_wrapper wrapped stand in it without their wrapper, so that names
    are those of the dense model.

    Args:
        model: Left as it is.
        dtype: Of the copy's floating-point parameters and persistent buffers; None leaves each its own. Other buffers
            are computed, not trained (rotary tables), and keep their precision.
    """
    twin = merge_(meta_copy(model)).eval().requires_grad_(False)
    for module in list(twin.modules()):
        for name, child in module._modules.items():
            module._modules[name] = None if child is None else without_wrappers(child)
    for module in twin.modules() if dtype is not None else ():
        computed = module._non_persistent_buffers_set
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and tensor.is_floating_point() and name not in computed:
                tensor.data = tensor.data.to(dtype)
    return twin


def untouched_on_cpu(twin: nn.Module) -> None:
    """Moves a twin from the meta device to the CPU, without values.

    Its memory is asked for and neither written nor read, so that no page of it is ever there. What a model makes
    beside its tensors while it is traced, ``torch.tensor(1.0, device=x.device)``, has its value then.
    """
    made: dict[int, Tensor] = {}  # tied ones stay tied
    for module in twin.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in holders:
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    empty = torch.empty_like(tensor, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
                if tensor is not None:
                    tensors[name] = made[id(tensor)]
        for name, each in vars(module).items():
            if isinstance(each, Tensor):
                vars(module)[name] = each.cpu()


def dense_tensors(model: nn.Module, twin: nn.Module) -> dict[str, MakeTensor]:
    """Returns name of every parameter and buffer of the twin -> what makes its values, on the CPU, in its dtype there.

    A factorized weight is composed in at least float32 and rounded once. Buffers that are not in the state dict
    (rotary tables) are among them. Nothing is kept: each call makes the tensor again. A call raises ValueError where
    a weight does not fit the dtype.
    """
    sources: dict[str, MakeTensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FactorizedWeight):
            sources[plain_name(path).removesuffix(SUFFIX)] = module.merged_wide
            continue
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                sources[plain_name(qualified(path, name))] = tensor.detach

    trained = {name for name, _ in twin.named_parameters(remove_duplicate=False)}

    def cast(name: str, dtype: torch.dtype) -> MakeTensor:
        def make() -> Tensor:
            tensor = sources[name]().to("cpu", dtype).contiguous()
            if name in trained and not bool(torch.isfinite(tensor).all()):  # a buffer may be a mask of -inf
                raise ValueError(f"weight {name} has values beyond the range of {dtype}; nothing was written")
            return tensor

        return make

    twins = [*twin.named_parameters(remove_duplicate=False), *twin.named_buffers(remove_duplicate=False)]
    return {name: cast(name, meta.dtype) for name, meta in twins}


def state_hash(model: nn.Module) -> str:
    """Returns SHA-256 of a model's parameters and buffers, names included: what an exported file was made from."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_finite(model: nn.Module) -> None:
    """Raises ValueError naming a parameter that holds NaN or Inf, or a tensor on the meta device.

    Raises RuntimeError where factors are sharded: to look at their numbers, all processes would have to come here.
    """
    for weight in weights_in(model):
        weight.check_whole()
    require_numbers(model)
    for name, tensor in model.named_parameters():
        if not bool(torch.isfinite(tensor.detach()).all()):
            raise ValueError(f"parameter {name} contains NaN or Inf; nothing was written")


def reference(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Returns the trained model; a float32 copy of it, still factorized, where it rounds more than the file does."""
    low = {each.dtype for each in model.parameters()} & {torch.float16, torch.bfloat16}
    rounds_more = any(torch.finfo(each).eps > torch.finfo(dtype).eps for each in low)
    return deep_copy(model).float() if rounds_more else model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode, without gradients and autocast; afterwards modes and buffers are what they were.

    Compiled parts run eagerly: their graphs would not see what ``merged_weights`` changes.
    """
    kept = buffers_restored(model, but=FactorizedWeight)
    device = next((each.device.type for each in model.parameters()), "cpu")
    precise = torch.autocast(device, enabled=False)
    with in_eval(model), kept, precise, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def merged_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Lets a model compute with exactly the weights that are written: composed wide, rounded once to ``dtype``."""
    weights = weights_in(model)

    def composed(weight: FactorizedWeight) -> MakeTensor:
        return lambda: weight.merged_wide().to(dtype).to(weight.dtype)

    for weight in weights:
        vars(weight)["forward"] = composed(weight)
    try:
        yield
    finally:
        for weight in weights:
            del vars(weight)["forward"]

"""What eager mode does: transforms, checkpoints, hooks, wrappers, nested arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override


def is_transforming() -> bool:
    """Returns whether a transform of torch.func or forward-mode AD is active; Dynamo traces this as a constant."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_exporting() -> bool:
    """Returns whether torch.export traces; Dynamo traces this as a constant.

    While it compiles, torch 2.11's Dynamo takes torch.compiler.is_exporting() for true whatever it is.
    """
    return bool(torch.compiler._is_exporting_flag)


def allocations(profile: torch.profiler.profile) -> list[int]:
    """Returns the bytes that a profile with memory saw allocated (positive) and freed, in order of time."""
    results = cast(Any, profile).profiler.kineto_results
    events = [each for each in results.events() if each.name() == "[memory]"]
    return [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]


def in_eager_checkpoint() -> bool:
    """Returns whether a non-reentrant ``torch.utils.checkpoint`` outside of compiled code watches what is saved."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook.")


def in_backward() -> bool:
    """Says whether autograd runs a backward pass in this thread, as when it recomputes a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def post_accumulate_hooks(parameter: Tensor) -> list[Any]:
    """Returns the hooks that were registered on a parameter with ``register_post_accumulate_grad_hook``."""
    return list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())


def is_stepped_in_backward(parameter: Tensor) -> bool:
    """Returns whether torch's ``_apply_optimizer_in_backward`` steps a parameter, by a hook that cannot be seen."""
    return bool(getattr(parameter, "_in_backward_optimizers", None))


def after_backward(callback: Callable[[], None]) -> None:
    """Calls ``callback`` at the end of the backward pass that runs, before what is asked for after this."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def leave_gradients_in_buckets(wrapper: torch.nn.parallel.DistributedDataParallel) -> None:
    """Keeps DDP from copying reduced gradients to ``grad`` at the end of a backward pass: its hook has used them."""
    cast(Any, wrapper.reducer)._set_optimizer_in_backward()


def bucket_hooks(wrapper: torch.nn.parallel.DistributedDataParallel) -> list[Any]:
    """Returns the communication hooks that DDP was given."""
    return [hook for hook, _ in wrapper._comm_hooks]


def step_without_hooks(optimizer_cls: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """Returns a class's ``step`` without the step hooks around it, which the first instance of the class puts there."""
    step: Any = optimizer_cls.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Names of the module inside the wrappers of torch.compile and of torch's ``checkpoint_wrapper``."""


def without_wrappers(module: torch.nn.Module) -> torch.nn.Module:
    """Returns the module inside the wrappers of torch.compile and of torch's ``checkpoint_wrapper``."""
    inner = next((module._modules[name] for name in WRAPPED if name in module._modules), None)
    return module if inner is None else without_wrappers(inner)


def before_load_state_dict(check: Callable[[torch.nn.Module, Any, bool, bool], None]) -> None:
    """Calls ``check`` with what ``load_state_dict`` is given before any module loads; torch's hooks are of one each."""
    original = torch.nn.Module.load_state_dict

    @functools.wraps(original)
    def load_state_dict(self: torch.nn.Module, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        check(self, state_dict, strict, assign)
        return original(self, state_dict, strict, assign)

    cast(Any, torch.nn.Module).load_state_dict = load_state_dict


def leaves_with_paths(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Returns the leaves of nested arguments or outputs in torch.export's order, with keys, indices and fields."""
    from torch.utils._pytree import tree_flatten_with_path

    def key(entry: Any) -> str:
        return str(next(getattr(entry, field) for field in ("key", "idx", "name") if hasattr(entry, field)))

    return [(tuple(key(entry) for entry in path), leaf) for path, leaf in tree_flatten_with_path(tree)[0]]


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Returns nested arguments with each leaf replaced by ``function`` of it."""
    from torch.utils._pytree import tree_map

    return tree_map(function, tree)


def memory_of(tensor: Tensor) -> StorageWeakRef:
    """Returns what is equal for tensors that share their memory, also once it was freed and something else is there.

    It does not keep the memory.
    """
    return StorageWeakRef(tensor.untyped_storage())


class Watching(TorchDispatchMode):
    """A context in which ``seen(name, args, result)`` is called after each ATen op of this thread.

    Ops that are made of others come as those. What ``seen`` does itself is not watched.
    """

    def __init__(self, seen: Callable[[str, Sequence[Any], Any], None]) -> None:
        super().__init__()
        self._seen = seen

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with self:  # under inference mode, what is made of others comes whole
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        result = func(*args, **(kwargs or {}))
        self._seen(func.overloadpacket.__name__, args, result)
        return result

"""The parts of torch that are not public and that we cannot do without, each behind one function.

Tried with torch 2.11.0 and 2.13.0; tests/test_torch_private.py exercises each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx


def captured_inputs(gm: fx.GraphModule) -> list[Any]:
    """The fake tensors and symbolic integers with which Dynamo traced a graph, one for each placeholder."""
    return [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]


def fake_mode() -> Any:
    """The fake mode of the compile in progress; a new one where there is none."""
    mode = torch._guards.detect_fake_mode()
    return mode if mode is not None else torch._subclasses.FakeTensorMode()


def lower_to_aten(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Traces a graph to ATen on fake inputs, checkpointed regions inlined; placeholders keep their order."""
    return trace(gm, inputs)


def tracing_context() -> Any:
    """The context of the compile in progress, for ``resume``."""
    return torch._guards.TracingContext.try_get()


def resume(context: Any) -> contextlib.AbstractContextManager[Any]:
    """Enters the context of an earlier compile again, for one that happens later on the same captured graph."""
    return torch._guards.tracing(context)


def inductor_settings() -> set[str]:
    """Names of Inductor's settings."""
    return set(torch._inductor.config.get_config_copy())


def passes_of(settings: dict[str, Any], hook: str) -> list[Any]:
    """The passes that a user has set at one of Inductor's hooks, in these settings or globally."""
    passes = settings.get(hook, getattr(torch._inductor.config, hook))
    return list(passes) if isinstance(passes, (list, tuple)) else [passes] if passes is not None else []


def inductor(gm: fx.GraphModule, inputs: Sequence[Any], settings: dict[str, Any]) -> Callable[..., Any]:
    """Compiles a graph with Inductor under these settings; they hold for the backward, which may compile later."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        return compile_fx_inner(gm, [_with_symbolic_strides(each) for each in inputs], **kwargs)

    return cast(Callable[..., Any], compile_fx(gm, inputs, inner_compile=inner, config_patches=settings))


def _with_symbolic_strides(value: Any) -> Any:
    """A fake tensor of symbolic shape whose strides follow from its sizes; anything else as it is.

    Where the forward pass saves a tensor in another layout than autograd saw, AOTAutograd gives the backward graph the
    strides of the captured call as numbers; comparing them with sizes would guard the graph to that call's shape.
    """
    if not isinstance(value, Tensor) or all(isinstance(size, int) for size in value.shape):
        return value
    shape, strides, step = list(value.shape), list(value.stride()), 1
    if not all(isinstance(stride, int) for stride in strides):
        return value
    for axis in sorted(range(value.dim()), key=lambda axis: (strides[axis], -axis)):
        if strides[axis] != size_hint(step):
            return value  # with gaps, or broadcast: no fresh tensor has them
        strides[axis], step = step, step * shape[axis]
    with _mode_of([value]):
        return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)


def partitioned(gm: fx.GraphModule, inputs: Sequence[Any], settings: dict[str, Any]) -> list[fx.GraphModule]:
    """What Inductor would be given for a captured graph, forward and backward, or one for inference; not compiled."""
    import torch._functorch.config
    from torch._inductor.compile_fx import compile_fx

    graphs: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
        compile_fx(gm, inputs, inner_compile=inner, config_patches=settings)
    return graphs


def new_fake_mode() -> Any:
    """A mode in which tensors have shapes and no memory."""
    return torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)


def realize_reads_threshold() -> int:
    """Up to how many buffers Inductor reads again rather than write what several kernels compute from them."""
    return int(torch._inductor.config.realize_reads_threshold)


def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in AMX tiles."""
    return bool(torch.cpu._is_amx_tile_supported())


def size_hint(size: int | torch.SymInt) -> int:
    """A size, or the one that a symbolic size had when it was captured; 1 where there was none (data-dependent)."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1


def run_fake(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """What a function returns for fake tensors, as fake tensors; shapes may be symbolic."""
    from torch.utils._pytree import tree_leaves

    with _mode_of(tree_leaves(args)), torch.no_grad():
        return function(*args)


def trace(function: Callable[..., Any], inputs: Sequence[Any], *, for_inductor: bool = False) -> fx.GraphModule:
    """Traces a function to ATen on the fake inputs of a graph that is being compiled.

    With ``for_inductor`` the ops are those that AOTAutograd would hand to Inductor; it accepts no others.
    """
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table() if for_inductor else None
    # Not in the compile's own context: while a backend runs, that has another fake mode than Dynamo's inputs.
    with torch._guards.tracing(None), _mode_of(inputs), torch.no_grad():
        return make_fx(function, decomposition_table=table)(*inputs)


def _mode_of(values: Sequence[Any]) -> Any:
    """The fake mode of the fake tensors among these."""
    modes = (each.fake_mode for each in values if isinstance(each, torch._subclasses.FakeTensor))
    return next(modes, contextlib.nullcontext())


def unlimited_recompiles() -> contextlib.AbstractContextManager[Any]:
    """While it is entered, Dynamo captures a function however often it was captured before."""
    return torch._dynamo.config.patch(recompile_limit=2**31, accumulated_recompile_limit=2**31)


def no_tracing() -> contextlib.AbstractContextManager[Any]:
    """Keeps Dynamo from tracing in other threads: it would meet modules that change under its hands."""
    return torch._dynamo.convert_frame.compile_lock


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread, as it does when it recomputes a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def is_higher_order(node: fx.Node) -> bool:
    """Whether a node calls a higher-order op: one that takes other ops or graphs."""
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def post_accumulate_hooks(parameter: Tensor) -> list[Any]:
    """The hooks that were registered on a parameter with ``register_post_accumulate_grad_hook``."""
    return list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())


def step_without_hooks(optimizer_cls: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """A class's ``step`` without the step hooks around it, which the first instance of the class puts there."""
    step: Any = optimizer_cls.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def without_dynamo_wrapper(module: torch.nn.Module) -> torch.nn.Module:
    """The module that torch.compile was given, where this is what it returned."""
    return module._orig_mod if isinstance(module, torch._dynamo.OptimizedModule) else module


def leaves_with_paths(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    """The leaves of nested arguments or outputs in torch.export's order, each with its keys, indices and fields."""
    from torch.utils._pytree import tree_flatten_with_path

    def key(entry: Any) -> str:
        return str(next(getattr(entry, field) for field in ("key", "idx", "name") if hasattr(entry, field)))

    return [(tuple(key(entry) for entry in path), leaf) for path, leaf in tree_flatten_with_path(tree)[0]]


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Nested arguments with each leaf replaced by ``function`` of it."""
    from torch.utils._pytree import tree_map

    return tree_map(function, tree)

"""Inductor: its settings, its call, what its C++ code gets wrong."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.torch_version import TorchVersion

from slcompile.torch_private.aot import _mode_of, size_hint


def inductor_settings() -> set[str]:
    """Returns names of Inductor's settings."""
    return set(torch._inductor.config.get_config_copy())


def inductor_modes() -> dict[str, dict[str, Any]]:
    """Returns each ``mode`` of torch.compile -> Inductor's settings in it."""
    return torch._inductor.list_mode_options()


def passes_of(settings: dict[str, Any], hook: str) -> list[Any]:
    """Returns the passes that a user has set at one of Inductor's hooks, in these settings or globally."""
    passes = settings.get(hook, getattr(torch._inductor.config, hook))
    return list(passes) if isinstance(passes, (list, tuple)) else [passes] if passes is not None else []


def inductor(gm: fx.GraphModule, inputs: Sequence[Any], settings: dict[str, Any]) -> Callable[..., Any]:
    """Compiles a graph with Inductor under these settings; they hold for the backward, which may compile later."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        for submodule in gm.modules():
            if submodule is not gm and isinstance(submodule, fx.GraphModule):
                submodule.meta[_SUBGRAPH] = True
        return compile_fx_inner(gm, [_with_symbolic_strides(each) for each in inputs], **kwargs)

    for placeholder in gm.graph.find_nodes(op="placeholder"):
        placeholder.meta.pop("val", None)  # with cpp_wrapper, it would be taken for the input, on whatever device it is
    _mend_inductor()
    return cast(Callable[..., Any], compile_fx(gm, inputs, inner_compile=inner, config_patches=settings))


@functools.cache
def _mend_inductor() -> None:
    """Mends what Inductor's C++ kernels get wrong of transposed operands, in this process from now on.

    For good, and not while a graph is compiled: another thread may be compiling when that ends. Each defect is seen in
    torch 2.11.0 and 2.13.0; torch 2.14 has both mended (see docs/upstream.md).
    """
    if TorchVersion(torch.__version__) < "2.14":
        _mend_scatters()
        _mend_local_buffers()


def _mend_scatters() -> None:
    """Makes kernels scatter from transposed tiles to where they should.

    The tiled kernel adds the position in the tile to the index of an atomic addition twice: once in ``store`` and once
    in ``index_expr``, which that calls. An embedding's gradient then goes to wrong places, even beyond the buffer,
    where it is fused with a product whose tokens are in the columns.
    """
    from torch._inductor import config
    from torch._inductor.codegen.cpp import CppTile2DKernel, CppVecKernel

    original: Any = CppTile2DKernel.store

    def store(self: Any, name: str, index: Any, value: Any, mode: Any = None) -> None:
        is_parallel = config.cpp.dynamic_threads or self.num_threads != 1
        if mode == "atomic_add" and is_parallel and not self.need_vec_transpose(self.rename_indexing(index)):
            CppVecKernel.store(self, name, index, value, mode)
        else:
            original(self, name, index, value, mode)

    cast(Any, CppTile2DKernel).store = store


def _mend_local_buffers() -> None:
    """Keeps kernels that share an outer loop from keeping a whole tile's rows in memory for one row.

    What one of them writes and only the others read is kept in a local buffer of one row: one iteration's, where the
    loop goes row by row. Transposed operands make it go by tiles of rows, and each row of a tile is written to the same
    place: the last one's numbers are taken for all. Such kernels get loops of their own, as where their loops differ.
    """
    from torch._inductor.codegen.cpp import OuterLoopFusedSchedulerNode
    from torch._inductor.virtualized import V

    original: Any = OuterLoopFusedSchedulerNode.check_outer_fusion_loop_level_attr

    def can_share_loops(self: Any, kernels: Any, depth: int) -> bool:
        is_tiled = any(loop.steps != 1 for kernel in kernels for loop in kernel.loop_nest.loops[:depth])
        return not (is_tiled and V.local_buffer_context.local_buffers) and bool(original(self, kernels, depth))

    cast(Any, OuterLoopFusedSchedulerNode).check_outer_fusion_loop_level_attr = can_share_loops


def _with_symbolic_strides(value: Any) -> Any:
    """Returns a fake tensor of symbolic shape whose strides follow from its sizes; anything else as it is.

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


def add_artifact(name: str, text: Callable[[], str], encoding: str = "string") -> None:
    """Adds a text to the structured trace (TORCH_TRACE, tlparse) of the compile in progress, if there is a trace."""
    torch._logging.trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=text
    )


def partitioned(gm: fx.GraphModule, inputs: Sequence[Any], settings: dict[str, Any]) -> list[fx.GraphModule]:
    """Returns what Inductor would be given for a captured graph: forward and backward, or one for inference."""
    import torch._functorch.config
    from torch._inductor.compile_fx import compile_fx

    graphs: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
        compile_fx(gm, inputs, inner_compile=inner, config_patches=settings)
    return graphs


def realize_reads_threshold() -> int:
    """Returns up to how many buffers Inductor reads again rather than write what several kernels compute from them."""
    return int(torch._inductor.config.realize_reads_threshold)


def has_amx() -> bool:
    """Returns whether this CPU multiplies bfloat16 matrices in AMX tiles."""
    return bool(torch.cpu._is_amx_tile_supported())


def cpp_library(source: str) -> Any:
    """Compiles C++ with Inductor's compiler and flags, for this CPU, or finds it in Inductor's cache.

    Returns:
        A library whose ``extern "C"`` functions are its attributes; a call of one lets other Python threads run.
    """
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source)


def fresh_cache() -> contextlib.AbstractContextManager[Any]:
    """While it is entered, Inductor and Triton find nothing that was compiled before."""
    from torch._inductor.utils import fresh_cache

    return fresh_cache()


def calls_aten() -> bool:
    """Returns whether Inductor, as it is set now, calls ATen for every op and compiles none (its mode "lite")."""
    return bool(torch._inductor.config.fallback_by_default)


def is_higher_order(node: fx.Node) -> bool:
    """Returns whether a node calls a higher-order op: one that takes other ops or graphs."""
    return isinstance(node.target, torch._ops.HigherOrderOperator)


_SUBGRAPH = "slcompile_subgraph"


def is_subgraph(gm: fx.GraphModule) -> bool:
    """Says whether Inductor compiles this graph as the operand of a higher-order op of another graph."""
    return _SUBGRAPH in gm.meta


def returned_to_user(output: fx.Node) -> list[int]:
    """Returns which results of a graph that Inductor compiles the user gets; the others are saved for the backward."""
    return list(output.meta.get("user_visible_output_idxs", ()))

"""The parts of torch that are not public and that we cannot do without, each behind one function.

Tried with torch 2.11.0 and 2.13.0; tests/test_torch_private.py exercises each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.torch_version import TorchVersion


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


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keeps Python from looking for cyclic garbage: it would walk over every node of every graph, again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with torch._dynamo.config.patch(run_gc_after_compile=False):
            yield
    finally:
        if was_enabled:
            gc.enable()


def traced_from(node: fx.Node) -> list[str]:
    """Names of the nodes of earlier graphs that a node was traced from, the earliest one last."""
    return [source.name for source in _sources(node.meta.get("from_node") or [])]


def _sources(sources: Sequence[Any]) -> list[Any]:
    return [each for source in sources for each in (source, *_sources(source.from_node))]


def in_backward_pass(node: fx.Node) -> bool:
    """Whether AOTAutograd traced a node of a joint graph in the backward pass."""
    return node.meta.get("partitioner_tag") == "is_backward"


def input_index(placeholder: fx.Node) -> int | None:
    """Position among the inputs of the graph that AOTAutograd traced; None for tangents and what it made itself."""
    index = getattr(placeholder.meta.get("desc"), "idx", None)
    return index if type(placeholder.meta.get("desc")).__name__ == "PlainAOTInput" else None


def aot_graphs(
    gm: fx.GraphModule, inputs: Sequence[Any], edit: Callable[[fx.GraphModule, str], None]
) -> list[fx.GraphModule]:
    """Traces the joint graph of a captured graph as Inductor does, without compiling anything.

    Args:
        gm, inputs: From Dynamo.
        edit: Is called with the joint graph before it is partitioned and ``"joint"``, or with the forward graph and
            ``"forward"`` where nothing needs gradients, and may change it.

    Returns:
        The forward and the backward graph; the forward graph alone where nothing needs gradients.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[fx.GraphModule] = []

    def partition(joint: fx.GraphModule, joint_inputs: Sequence[Any], **kwargs: Any) -> Any:
        edit(joint, "joint")
        graphs.extend(min_cut_rematerialization_partition(joint, joint_inputs, compiler="inductor", **kwargs))
        return graphs[0], graphs[1]

    def compile_inference(forward: fx.GraphModule, forward_inputs: Sequence[Any]) -> Any:
        edit(forward, "forward")
        graphs.append(forward)
        return compile_nothing(forward, forward_inputs)

    def compile_nothing(*_: Any) -> Any:
        return make_boxed_func(lambda *_: None)  # nobody runs it; asking a graph for its forward would generate code

    aot_autograd(
        fw_compiler=compile_nothing,
        bw_compiler=compile_nothing,
        inference_compiler=compile_inference,
        partition_fn=partition,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )(gm, inputs)
    return graphs


def zero_outputs(gm: fx.GraphModule) -> Callable[..., list[Any]]:
    """A function that takes what a captured graph takes and returns zeros in the place of its outputs."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    symbols = [each.meta["example_value"] for each in placeholders]
    outputs = [each.meta["example_value"] if isinstance(each, fx.Node) else each for each in _outputs(gm)]

    def run(*args: Any) -> list[Any]:
        pairs = zip(symbols, args, strict=True)
        bindings = {each.node.expr: int(arg) for each, arg in pairs if isinstance(each, torch.SymInt)}

        def size(value: Any) -> Any:
            return int(value.node.expr.xreplace(bindings)) if isinstance(value, torch.SymInt) else value

        def zeros(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return size(value)
            made = torch.zeros([size(each) for each in value.shape], dtype=value.dtype, device=value.device)
            # A copy, because what needs gradients and is a leaf cannot be changed in place.
            return made.requires_grad_().clone() if value.requires_grad else made

        return [zeros(each) for each in outputs]

    return run


def _outputs(gm: fx.GraphModule) -> Sequence[Any]:
    return cast(Sequence[Any], gm.graph.output_node().args[0])


def kept_inputs(gm: fx.GraphModule) -> set[int]:
    """Positions of the inputs that the function being compiled returns, stores or needs after a graph break.

    Such a read is not in the graph: the code around it loads the input again, after the graph has run.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.variables.base import VariableTracker
    from torch._dynamo.variables.lazy import LazyVariableTracker

    kept: set[Any] = set()

    def collect(value: Any) -> None:
        if isinstance(value, LazyVariableTracker):  # untouched as yet: asking it anything would add it to the graph
            source = value.original_source()
        else:
            source = value.source if value.is_tensor() else None
        while source is not None:  # of a view by an attribute, such as ``weight.T``, the tensor's own is the base
            kept.add(source)
            source = getattr(source, "base", None)

    translator: Any = InstructionTranslator.current_tx()
    changes = translator.output.side_effects.store_attr_mutations
    VariableTracker.visit(collect, [list(each.values()) for each in changes.values()])
    while translator is not None:
        VariableTracker.visit(collect, [translator.stack, translator.symbolic_locals])
        translator = translator.parent
    arguments = [node.meta.get("grapharg") for node in gm.graph.find_nodes(op="placeholder")]
    return {index for index, each in enumerate(arguments) if each is not None and each.source in kept}


def break_reason(gm: fx.GraphModule) -> tuple[str, str] | None:
    """Why Dynamo ended a graph here, and where: a sentence and a stack trace. None where the function returned."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    return str(reason.reason), "".join(traceback.format_list(reason.user_stack))


@dataclasses.dataclass(frozen=True)
class SkippedFrame:
    """A function that Dynamo gave up to capture: it runs in Python.

    Attributes:
        code: File and first line of the function.
        reason: A sentence.
        stack_trace: The line at which Dynamo gave up.
    """

    code: tuple[str, int]
    reason: str
    stack_trace: str


@contextlib.contextmanager
def skipped_frames() -> Iterator[list[SkippedFrame]]:
    """A list that holds, once it is left, the functions that Dynamo skipped while it was entered."""
    from torch._dynamo import utils

    found: list[SkippedFrame] = []
    limit, before = utils._compilation_metrics.maxlen, len(utils.get_compilation_metrics())
    utils.set_compilation_metrics_limit(sys.maxsize)
    try:
        yield found
    finally:
        for each in utils.get_compilation_metrics()[before:]:
            if each.fail_type is not None:
                code = (each.co_filename or "", each.co_firstlineno or 0)
                at = (each.fail_user_frame_filename or code[0], each.fail_user_frame_lineno or code[1])
                trace = traceback.format_list([traceback.FrameSummary(*at, each.co_name or "")])
                found.append(SkippedFrame(code, (each.fail_reason or each.fail_type).strip(), "".join(trace)))
        utils.set_compilation_metrics_limit(limit or utils.DEFAULT_COMPILATION_METRICS_LIMIT)


def is_disabled(value: Any) -> bool:
    """Whether a function or a module is what ``torch.compiler.disable`` returned."""
    if isinstance(value, torch._dynamo.OptimizedModule):
        return isinstance(value.dynamo_ctx, torch._dynamo.eval_frame.DisableContext)
    return not isinstance(value, torch.nn.Module) and bool(getattr(value, "_torchdynamo_disable", False))


def without_disable(function: Any) -> Any:
    """The function that ``torch.compiler.disable`` was given, where this is what it returned."""
    return getattr(function, "_torchdynamo_orig_callable", function)


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
        for each in gm.modules():
            if each is not gm and isinstance(each, fx.GraphModule):
                each.meta[_SUBGRAPH] = True
        return compile_fx_inner(gm, [_with_symbolic_strides(each) for each in inputs], **kwargs)

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


def add_artifact(name: str, text: Callable[[], str], encoding: str = "string") -> None:
    """Adds a text to the structured trace (TORCH_TRACE, tlparse) of the compile in progress, if there is a trace."""
    torch._logging.trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=text
    )


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
    with _compiling(), torch._guards.tracing(None), _mode_of(inputs), torch.no_grad():
        return make_fx(function, decomposition_table=table)(*inputs)


def _compiling() -> contextlib.AbstractContextManager[Any]:
    """Says that this process is compiling, as Dynamo does (torch 2.13), also while a backward graph is compiled later.

    Else every other thread that calls a compiled function while this one traces is told that it may not.
    """
    session: Any = getattr(torch.compiler, "_compile_session_context", contextlib.nullcontext)
    return cast(contextlib.AbstractContextManager[Any], session())


def _mode_of(values: Sequence[Any]) -> Any:
    """The fake mode of the fake tensors among these."""
    modes = (each.fake_mode for each in values if isinstance(each, torch._subclasses.FakeTensor))
    return next(modes, contextlib.nullcontext())


def unlimited_recompiles() -> contextlib.AbstractContextManager[Any]:
    """While it is entered, Dynamo captures a function however often it was captured before."""
    return torch._dynamo.config.patch(recompile_limit=2**31, accumulated_recompile_limit=2**31)


def capturing_rnns() -> contextlib.AbstractContextManager[Any]:
    """While it is entered, Dynamo captures functions that call nn.LSTM, nn.GRU or nn.RNN; else it skips them."""
    return torch._dynamo.config.patch(allow_rnn=True)


def no_tracing() -> contextlib.AbstractContextManager[Any]:
    """Keeps Dynamo from tracing in other threads: it would meet modules that change under its hands."""
    return torch._dynamo.convert_frame.compile_lock


def is_transforming() -> bool:
    """Whether a transform of torch.func or forward-mode AD is active; Dynamo traces this as a constant."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def in_eager_checkpoint() -> bool:
    """Whether a non-reentrant ``torch.utils.checkpoint`` outside of compiled code watches what is saved."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook.")


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread, as it does when it recomputes a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def calls_aten() -> bool:
    """Whether Inductor, as it is set now, calls ATen for every op and compiles none (its mode "lite")."""
    return bool(torch._inductor.config.fallback_by_default)


def is_higher_order(node: fx.Node) -> bool:
    """Whether a node calls a higher-order op: one that takes other ops or graphs."""
    return isinstance(node.target, torch._ops.HigherOrderOperator)


_SUBGRAPH = "slcompile_subgraph"


def is_subgraph(gm: fx.GraphModule) -> bool:
    """Whether Inductor compiles this graph, in ``inductor``, as the operand of a higher-order op of another graph."""
    return _SUBGRAPH in gm.meta


def post_accumulate_hooks(parameter: Tensor) -> list[Any]:
    """The hooks that were registered on a parameter with ``register_post_accumulate_grad_hook``."""
    return list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())


def step_without_hooks(optimizer_cls: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """A class's ``step`` without the step hooks around it, which the first instance of the class puts there."""
    step: Any = optimizer_cls.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Names of the module inside the wrappers of torch.compile and of torch's ``checkpoint_wrapper``."""


def without_wrappers(module: torch.nn.Module) -> torch.nn.Module:
    """The module that torch.compile, or torch's ``checkpoint_wrapper``, was given, where this is what it returned."""
    inner = next((module._modules[name] for name in WRAPPED if name in module._modules), None)
    return module if inner is None else without_wrappers(inner)


def before_load_state_dict(check: Callable[[torch.nn.Module, Any], None]) -> None:
    """Calls ``check`` with module and state dict before any module loads one; torch's hooks are of one module each."""
    original = torch.nn.Module.load_state_dict

    @functools.wraps(original)
    def load_state_dict(self: torch.nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        check(self, state_dict)
        return original(self, state_dict, *args, **kwargs)

    cast(Any, torch.nn.Module).load_state_dict = load_state_dict


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

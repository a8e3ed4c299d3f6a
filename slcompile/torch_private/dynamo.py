"""What Dynamo knows while it captures: inputs, breaks, what it skipped, its locks and limits."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from slcompile.torch_private.eager import memory_of


def captured_inputs(gm: fx.GraphModule) -> list[Any]:
    """Returns the fake tensors and symbolic integers with which Dynamo traced a graph, one for each placeholder."""
    return [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]


def as_traced(gm: fx.GraphModule, inputs: Sequence[Any], which: Collection[fx.Node]) -> list[Any]:
    """Returns a graph's inputs, those of ``which`` as the fake tensors with which Dynamo traced them.

    As they are stay subclasses, and what shares its memory with another input: fake tensors would not say so, and of
    two that are one AOTAutograd must know, lest it read the one's numbers of before the other was changed.
    """

    def is_plain(value: Any) -> bool:
        return type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided

    held = Counter(memory_of(each) for each in inputs if is_plain(each))

    def shown(placeholder: fx.Node, value: Any) -> Any:
        fake = placeholder.meta.get("example_value")
        can_be = placeholder in which and isinstance(fake, torch._subclasses.FakeTensor)
        return fake if can_be and is_plain(value) and held[memory_of(value)] == 1 else value

    return [shown(*pair) for pair in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)]


def is_query(node: fx.Node) -> bool:
    """Returns whether a captured node is a leftover of a custom op's Python, which nothing reads."""
    return node.target is getattr(torch._C, "_are_functorch_transforms_active", None) and not node.users


def fake_mode() -> Any:
    """Returns the fake mode of the compile in progress; a new one where there is none."""
    mode = torch._guards.detect_fake_mode()
    return mode if mode is not None else torch._subclasses.FakeTensorMode()


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


def zero_outputs(gm: fx.GraphModule) -> Callable[..., list[Any]]:
    """Returns a function that takes what a captured graph takes and returns zeros in the place of its outputs."""
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
    """Returns positions of the inputs that the function being compiled returns, stores or needs after a graph break.

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
    """Says why Dynamo ended a graph here, and where: a sentence and a stack trace. None where the function returned."""
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
    """Yields a list that holds, once it is left, the functions that Dynamo skipped while it was entered."""
    from torch._dynamo import utils

    found: list[SkippedFrame] = []
    limit, before = utils._compilation_metrics.maxlen, len(utils.get_compilation_metrics())
    utils.set_compilation_metrics_limit(sys.maxsize)
    try:
        yield found
    finally:
        for metrics in utils.get_compilation_metrics()[before:]:
            if metrics.fail_type is not None:
                code = (metrics.co_filename or "", metrics.co_firstlineno or 0)
                at = (metrics.fail_user_frame_filename or code[0], metrics.fail_user_frame_lineno or code[1])
                trace = traceback.format_list([traceback.FrameSummary(*at, metrics.co_name or "")])
                found.append(SkippedFrame(code, (metrics.fail_reason or metrics.fail_type).strip(), "".join(trace)))
        utils.set_compilation_metrics_limit(limit or utils.DEFAULT_COMPILATION_METRICS_LIMIT)


def is_disabled(value: Any) -> bool:
    """Returns whether a function or a module is what ``torch.compiler.disable`` returned."""
    if isinstance(value, torch._dynamo.OptimizedModule):
        return isinstance(value.dynamo_ctx, torch._dynamo.eval_frame.DisableContext)
    return not isinstance(value, torch.nn.Module) and bool(getattr(value, "_torchdynamo_disable", False))


def without_disable(function: Any) -> Any:
    """Returns the function that ``torch.compiler.disable`` was given, where this is what it returned."""
    return getattr(function, "_torchdynamo_orig_callable", function)


def tracing_context() -> Any:
    """Returns the context of the compile in progress, for ``resume``."""
    return torch._guards.TracingContext.try_get()


def resume(context: Any) -> contextlib.AbstractContextManager[Any]:
    """Enters the context of an earlier compile again, for one that happens later on the same captured graph."""
    return torch._guards.tracing(context)


def sets_grad_mode(node: fx.Node) -> bool:
    """Returns whether a node of a captured graph enables or disables gradients for those after it."""
    return node.target is torch._C._set_grad_enabled


def new_fake_mode() -> Any:
    """Returns a mode in which tensors have shapes and no memory."""
    return torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)


def unlimited_recompiles() -> contextlib.AbstractContextManager[Any]:
    """While it is entered, Dynamo captures a function however often it was captured before."""
    return torch._dynamo.config.patch(recompile_limit=2**31, accumulated_recompile_limit=2**31)


def unshared(backend: str, **settings: Any) -> Callable[..., Any]:
    """Returns a backend of torch.compile for which Dynamo takes no code that was compiled before: it compares them."""
    return functools.partial(torch._dynamo.lookup_backend(backend), **settings)


def capturing_rnns() -> contextlib.AbstractContextManager[Any]:
    """While it is entered, Dynamo captures functions that call nn.LSTM, nn.GRU or nn.RNN; else it skips them."""
    return torch._dynamo.config.patch(allow_rnn=True)


def no_tracing() -> contextlib.AbstractContextManager[Any]:
    """Keeps Dynamo from tracing in other threads: it would meet modules that change under its hands."""
    return torch._dynamo.convert_frame.compile_lock

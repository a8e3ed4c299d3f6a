"""Tracing to ATen, as AOTAutograd does it, and what it says of the nodes of its graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx


def lower_to_aten(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Traces a graph to ATen on fake inputs, checkpointed regions inlined; placeholders keep their order."""
    return trace(gm, inputs)


def traced_from(node: fx.Node) -> list[str]:
    """Returns names of the nodes of earlier graphs that a node was traced from, the earliest one last."""
    return [source.name for source in _sources(node.meta.get("from_node") or [])]


def _sources(sources: Sequence[Any]) -> list[Any]:
    return [each for source in sources for each in (source, *_sources(source.from_node))]


def in_backward_pass(node: fx.Node) -> bool:
    """Returns whether AOTAutograd traced a node of a joint graph in the backward pass."""
    return node.meta.get("partitioner_tag") == "is_backward"


def input_index(placeholder: fx.Node) -> int | None:
    """Returns the position among the inputs of the graph that AOTAutograd traced; None for what it made itself."""
    index = getattr(placeholder.meta.get("desc"), "idx", None)
    return index if type(placeholder.meta.get("desc")).__name__ == "PlainAOTInput" else None


Partition = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]
"""Makes a forward and a backward graph of a joint graph and its inputs; takes the partitioner's keyword arguments."""


def min_cut(joint: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Partitions a joint graph as Inductor does by default; the graph is consumed."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    return min_cut_rematerialization_partition(joint, inputs, **settings)


def aot_graphs(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    edit: Callable[[fx.GraphModule, str], None],
    partition_with: Partition = min_cut,
) -> list[fx.GraphModule]:
    """Traces the joint graph of a captured graph as Inductor does, without compiling anything.

    Args:
        gm, inputs: From Dynamo.
        edit: Is called with the joint graph before it is partitioned and ``"joint"``, or with the forward graph and
            ``"forward"`` where nothing needs gradients, and may change it.
        partition_with: Is called with the joint graph after that.

    Returns:
        The forward and the backward graph; the forward graph alone where nothing needs gradients.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[fx.GraphModule] = []

    def partition(joint: fx.GraphModule, joint_inputs: Sequence[Any], **kwargs: Any) -> Any:
        edit(joint, "joint")
        graphs.extend(partition_with(joint, joint_inputs, compiler="inductor", **kwargs))
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


def size_hint(size: int | torch.SymInt) -> int:
    """Returns a size, or the one that a symbolic size had when it was captured; 1 if data-dependent."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1


def run_fake(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Returns what a function returns for fake tensors, as fake tensors; shapes may be symbolic."""
    from torch.utils._pytree import tree_leaves

    with _mode_of(tree_leaves(args)), torch.no_grad():
        return function(*args)


def trace(function: Callable[..., Any], inputs: Sequence[Any], *, for_inductor: bool = False) -> fx.GraphModule:
    """Traces a function to ATen on the fake inputs of a graph that is being compiled.

    With ``for_inductor`` the ops are those that AOTAutograd would hand to Inductor; it accepts no others. Several
    inputs may be described by one fake tensor; they stay several.
    """
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table() if for_inductor else None
    # Not in the compile's own context: while a backend runs, that has another fake mode than Dynamo's inputs.
    with _compiling(), torch._guards.tracing(None), _mode_of(inputs), _dispatching(inputs), torch.no_grad():
        # Tensors are known by their identity: of two that are one, the second would be read in the first one's place.
        seen: set[int] = set()
        distinct = []
        for each in inputs:
            distinct.append(each.detach() if isinstance(each, torch.Tensor) and id(each) in seen else each)
            seen.add(id(each))
        return make_fx(function, decomposition_table=table)(*distinct)


def _compiling() -> contextlib.AbstractContextManager[Any]:
    """Says that this process is compiling, as Dynamo does (torch 2.13), also while a backward graph is compiled later.

    Else every other thread that calls a compiled function while this one traces is told that it may not.
    """
    session: Any = getattr(torch.compiler, "_compile_session_context", contextlib.nullcontext)
    return cast(contextlib.AbstractContextManager[Any], session())


def _dispatching(inputs: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Has ATen's Python decompositions taken where sizes are symbolic, as AOTAutograd does: some C++ ones know none."""
    from torch._dispatch.python import enable_python_dispatcher

    sizes = (size for each in inputs for size in (each.shape if isinstance(each, torch.Tensor) else (each,)))
    is_symbolic = any(isinstance(size, torch.SymInt) for size in sizes)
    return enable_python_dispatcher() if is_symbolic else contextlib.nullcontext()


def _mode_of(values: Sequence[Any]) -> Any:
    """Returns the fake mode of the fake tensors among these."""
    modes = (each.fake_mode for each in values if isinstance(each, torch._subclasses.FakeTensor))
    return next(modes, contextlib.nullcontext())

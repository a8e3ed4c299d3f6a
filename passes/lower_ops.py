"""Turns the ops that the other passes work on into what a device runs: ATen on CPU, Triton launches on GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize

from slcompile import torch_private
from slcompile.cost import why_no_kernels
from slcompile.ops import KERNEL_DTYPES, STRUCTURE_OPS
from slcompile.ops.linear_factored import linear_factored_aten
from slcompile.ops.project import project_aten
from slcompile.ops.values_grad import values_grad_aten
from slcompile.ops.weight_grads import weight_grads_aten
from slcompile.passes.graph import Decision, Inserter, PassReport, arguments, op_name

_OPS = torch.ops.slcompile
_ATEN = torch.ops.aten
_TOLD_STRIDES = frozenset((
    *(_ATEN.as_strided.default, _ATEN.as_strided_copy.default, _ATEN.as_strided_scatter.default),
    *(_ATEN.view.dtype, _ATEN.view_copy.dtype, _ATEN.view_as_complex.default, _ATEN.view_as_complex_copy.default),
))  # fmt: skip
"""What means something else, or nothing, of an operand with other strides."""


def lower_ops(gm: fx.GraphModule, autotune: bool = False) -> PassReport:
    """Replaces each of our ops by its implementation, traced, so that Inductor sees it and fuses what is around it.

    It runs on the forward and the backward graph after they were partitioned, so that a composed weight is recomputed
    as one node. A cast that is all that reads a composed weight becomes the dtype in which it is written. On CPU
    ``compose`` and ``compose_backward`` stay calls of their ATen implementation, which writes in place: Inductor would
    lower that to slow scatters. So they do on GPUs for float64, and where no kernel runs. Those of other structures are
    calls everywhere, and their ``grads`` a product and a call.

    The CPU's factored matmul is traced with its result transposed, for which Inductor makes up in every op but
    higher-order ones, which take operands, and whose graphs return results, in the layout that was traced: attention
    in a checkpointed region is run by one, which saves the state of the random numbers, and would misread
    it; the branches of ``torch.cond`` must agree on it. In a graph with such an op, and in such an op's graph, it
    stays a call: its result is contiguous. It stays one, too, in a graph with an op that is told strides (as_strided)
    or demands them (view_as_complex). So nothing reads a transposed result but what Inductor itself compiles, or
    calls with the layout that the op asks for. On GPUs, where rows may have gaps between them, results are copied then.

    Args:
        gm: A graph with ``meta["val"]``; changed in place.
        autotune: Whether the kernels time several configurations, once for each shape.
    """
    report = PassReport()
    insert = Inserter(gm.graph)
    gapped: set[fx.Node] = set()
    tells_strides = any(node.target in _TOLD_STRIDES for node in gm.graph.nodes)
    has_fixed_layouts = (
        tells_strides
        or torch_private.calls_aten()
        or torch_private.is_subgraph(gm)
        or any(map(torch_private.is_higher_order, gm.graph.nodes))
    )
    structures = {ops.grads: ops.grads_composed for ops in STRUCTURE_OPS.values()}
    ours = [node for node in gm.graph.nodes if str(node.target).startswith("slcompile.") or node.target in structures]
    for node in ours:
        if node.target is _OPS.compose.default:
            node = _fold_cast(insert, node)
        value = arguments(node)[0].meta["val"]
        why_aten = why_no_kernels(value.device)
        if not why_aten and value.dtype not in KERNEL_DTYPES:
            why_aten = f"no kernel computes in {value.dtype}"
        on_gpu = not why_aten
        table = _triton(autotune) if on_gpu else _aten()
        lowered = table.get(node.target) or structures.get(node.target)
        why = f": {why_aten}" if why_aten else ""
        if lowered is None:
            report.left.append(Decision(node.name, "in_place", f"{op_name(node)} runs its ATen implementation{why}"))
            continue
        is_factored = node.target is _OPS.linear_factored.default
        if has_fixed_layouts and not on_gpu and is_factored and arguments(node)[7:] in ((), (1,)):
            detail = "an op may read its result in the layout that it was traced with"
            report.left.append(Decision(node.name, "layout", detail))
            continue
        results = insert.inline(node, lowered, *arguments(node))
        for user in [node] if isinstance(results, fx.Node) else list(node.users):
            result = results if isinstance(results, fx.Node) else results[arguments(user)[1]]
            if on_gpu and result.meta["val"].stride() != user.meta["val"].stride():
                if tells_strides or (is_factored and has_fixed_layouts):
                    result = insert.inline(user, _contiguous, result)
                elif not isinstance(results, fx.Node):
                    gapped.add(result)
            user.replace_all_uses_with(result, propagate_meta=False)
        report.replaced.append(Decision(node.name, detail=why_aten))
    if report.replaced:
        _return_contiguous(insert, gapped)
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return report


def _return_contiguous(insert: Inserter, gapped: set[fx.Node]) -> None:
    """Copies matrices with gaps between their rows where the user gets them, who was told that there are none."""
    (output,) = insert.graph.find_nodes(op="output")
    results = arguments(output)[0]
    for index in torch_private.returned_to_user(output):
        node = results if isinstance(results, fx.Node) else results[index]
        while op_name(node) in ("view", "_unsafe_view", "reshape"):
            node = node.all_input_nodes[0]
        if node in gapped:
            gapped.remove(node)
            readers = list(node.users)
            copy = insert.inline(node.next, _contiguous, node)
            for reader in readers:
                reader.replace_input_with(node, copy)


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


@functools.cache
def _aten() -> Mapping[Any, Callable[..., Any]]:
    return {
        _OPS.linear_factored.default: linear_factored_aten,
        _OPS.project.default: project_aten,
        _OPS.values_grad.default: values_grad_aten,
        _OPS.weight_grads.default: weight_grads_aten,
    }


@functools.cache
def _triton(autotune: bool) -> Mapping[Any, Callable[..., Any]]:
    """Returns the launchers; functional, since Inductor's graphs are: it decides what is written in place."""
    from slcompile.kernels import compose, linear_factored, project, weight_grads

    launchers: dict[Any, Callable[..., Any]] = {
        _OPS.compose.default: compose.compose,
        _OPS.compose_backward.default: weight_grads.compose_backward,
        _OPS.linear_factored.default: functools.partial(linear_factored.linear_factored, autotune=autotune),
        _OPS.project.default: functools.partial(project.project, autotune=autotune),
        _OPS.values_grad.default: functools.partial(weight_grads.values_grad, autotune=autotune),
        _OPS.weight_grads.default: weight_grads.weight_grads,
    }
    return {op: functionalize(launcher) for op, launcher in launchers.items()}


def _fold_cast(insert: Inserter, compose: fx.Node) -> fx.Node:
    """Lets a compose write its weight in the dtype that everything casts it to, if there is one; returns it."""
    dtypes = {user.args[1] if op_name(user) == "convert_element_type" else None for user in compose.users}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else None
    if not isinstance(dtype, torch.dtype) or compose.args[5:6] not in ((), (None,)):
        return compose
    written = insert.call(compose, _OPS.compose.default, *compose.args[:5], dtype, *compose.args[6:])
    for user in list(compose.users):
        user.replace_all_uses_with(written, propagate_meta=False)
        compose.graph.erase_node(user)
    compose.graph.erase_node(compose)
    return written

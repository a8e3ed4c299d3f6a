"""Makes matmuls of convolutions whose kernels have size 1, so that their factored lowering can be chosen."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from slcompile import torch_private
from slcompile.cost import device_class, rates
from slcompile.ops import STRUCTURE_OPS, WEIGHT_OPS
from slcompile.passes.choose_lowering import Costs, matmul_of, why_composed
from slcompile.passes.graph import Decision, Inserter, PassReport, arguments, is_lossy, name_of, op_name

_CONVOLUTION = torch.ops.aten.convolution.default
_BACKWARD = torch.ops.aten.convolution_backward.default
_COMPOSE = torch.ops.slcompile.compose.default
# What lies between a composed matrix and a convolution, or between its gradient and the matrix's.
_BETWEEN = frozenset(("view", "reshape", "_unsafe_view", "clone", "convert_element_type", "_to_copy", "alias"))


def flatten_convolutions(gm: fx.GraphModule, lowering: str = "auto", device: torch.device | None = None) -> PassReport:
    """Replaces convolutions with kernels of size 1 and composed weights by matmuls over all positions.

    ``conv(x [N, I, *P], W [O, I, 1...])`` becomes ``mm(rows(x) [N * P, I], W^T)``, in which the later passes know the
    weight as any other: ``choose_lowering`` may factor the product. The gradients of the input, the weight and the
    bias become matmuls and a sum likewise. Legal where the stride is 1, nothing is padded and there are no groups: each
    position of the result then is the product with that position of x. A channels-last x already lies as rows.

    It does so where the matmuls are predicted to be faster factored than the convolutions are composed, with the copies
    that other layouts need. Left: other convolutions, which stay composed, and weights without a factored lowering.

    Args:
        gm: A graph with ``meta["val"]``, forward and backward in one or either alone; changed in place.
        lowering: ``"auto"``; ``"composed"`` leaves all; ``"factored"`` takes each that can be.
        device: Where the graph will run; the device of its tensors by default.
    """
    report = PassReport()
    found: dict[tuple[fx.Node, fx.Node], list[fx.Node]] = {}  # input and weight -> the convolution, and its gradients
    for node in gm.graph.nodes:
        if node.target in (_CONVOLUTION, _BACKWARD):
            x, weight = arguments(node)[:2] if node.target is _CONVOLUTION else arguments(node)[1:3]
            if _source(weight).target in WEIGHT_OPS:
                found.setdefault((x, weight), []).append(node)
    insert = Inserter(gm.graph)
    for nodes in found.values():
        decision = _decide(nodes, lowering, device)
        report.add(decision, not decision.reason)
        if decision.reason:
            continue
        for node in nodes:
            (_flatten if node.target is _CONVOLUTION else _flatten_backward)(insert, node)
    if report.replaced:
        _join_gradients(gm.graph, insert)
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return report


def _source(node: fx.Node) -> fx.Node:
    """Goes up from a convolution's weight, or from the gradient of a matrix, through views, casts and copies.

    It ends at a cast that loses more than one cast from there (``is_lossy``).
    """
    end = node
    while op_name(node) in _BETWEEN and node.all_input_nodes and not is_lossy(node, end):
        node = node.all_input_nodes[0]
    return node


def _decide(nodes: Sequence[fx.Node], lowering: str, device: torch.device | None) -> Decision:
    """Decides on a convolution and its gradients: ``reason`` is empty where they become matmuls."""
    first, compose = nodes[0], _source(_operands(nodes[0])[1])
    x, weight = (each.meta["val"] for each in _operands(first))
    costs: dict[str, float] = {}
    if why_not := _why_no_matmul(first, compose, weight):
        reason, detail = "not_pointwise", f"a convolution of kernel {list(weight.shape[2:])}: {why_not}"
    elif compose.target is not _COMPOSE and compose.target not in STRUCTURE_OPS:
        reason, detail = "no_factors", f"{op_name(compose)} has no factored lowering"
    elif lowering == "composed":
        reason, detail = "asked_for", "asked for by lowering='composed'"
    else:
        cost = _cost(compose, x, device)
        reason, detail = why_composed(_operands(first)[0], compose, cost, False, device, lowering) or ("", "")
        if not reason:
            is_factored_back = not why_composed(_operands(first)[0], compose, cost, True, device, lowering)
            costs = _costs(nodes, cost, x, device, is_factored_back)
            detail = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in costs.items())
        if costs and lowering == "auto" and costs["composed"] <= costs["factored"]:
            reason, detail = "slower", f"factored is predicted to be slower: {detail}"
    return Decision(name_of(compose), reason, detail, tuple(weight.shape), len(nodes), costs=costs, node=first.name)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    x, weight = arguments(node)[:2] if node.target is _CONVOLUTION else arguments(node)[1:3]
    return x, weight


def _why_no_matmul(node: fx.Node, compose: fx.Node, weight: Tensor) -> str:
    """Says why a convolution is no matmul over positions; empty where it is one."""
    begin = 3 if node.target is _CONVOLUTION else 4
    stride, padding, _, transposed, _, groups = arguments(node)[begin : begin + 6]
    if any(size != 1 for size in weight.shape[2:]):
        return "it reads patches"
    if any(size != 1 for size in stride) or any(size != 0 for size in padding):
        return "its stride or padding gives other positions"
    if weight.shape[:2] != compose.meta["val"].shape:
        return "its weight is a view of a matrix of other sizes"
    return "it is transposed or has groups" if transposed or groups != 1 else ""


def _cost(compose: fx.Node, x: Tensor, device: torch.device | None) -> Costs:
    """Predicts the costs of one product over all positions of x."""
    matmul, at = matmul_of(compose, x.dtype), rates(device or x.device)
    return Costs(
        matmul,
        x.numel() // x.shape[1],
        functools.partial(matmul.composed, rates=at),
        functools.partial(matmul.factored, rates=at),
        device_class(device or x.device).factored_tokens if matmul.nonzeros else None,
    )


def _costs(
    nodes: Sequence[fx.Node], cost: Costs, x: Tensor, device: torch.device | None, is_factored_back: bool
) -> dict[str, float]:
    """Predicts seconds of a convolution and its gradients composed, and as factored matmuls with the copies.

    ``is_factored_back`` says whether the product that makes the input's gradient can be factored, too.
    """
    at, matmul, tokens = rates(device or x.device), cost.matmul, torch_private.size_hint(cost.tokens)
    composed = factored = 0.0
    moved = 0
    for node in nodes:
        if node.target is _CONVOLUTION:
            phases = [False]
        else:
            makes_input, makes_weight, _ = arguments(node)[10]
            phases = [True] if makes_input else []
            if makes_weight:
                composed += matmul.grads_composed(tokens, rates=at)
                factored += matmul.grads_factored(tokens, rates=at, hiddens=0 if makes_input else 1)
        for transposed in phases:
            composed += cost.composed(tokens)
            if transposed and not is_factored_back:
                factored += cost.composed(tokens)
            else:
                factored += matmul.factored(tokens, rates=at, transposed=transposed)
        moved += tokens * (matmul.rows + matmul.columns)
    copies = 0.0 if _lies_as_rows(x) else 2 * moved * x.dtype.itemsize / at.memory
    return {"composed": composed, "factored": factored + copies}


def _lies_as_rows(x: Tensor) -> bool:
    return bool(x.movedim(1, -1).is_contiguous())


def _is_to_lie_as_rows(traced: Tensor) -> bool:
    return _lies_as_rows(traced) and not (_is_one_position(traced) and traced.stride(-1) == 1)


def _is_one_position(x: Tensor) -> bool:
    return all(isinstance(size, int) and size == 1 for size in x.shape[2:])


def _rows(x: Tensor) -> Tensor:
    """Shows [N, I, *P] as [N * P, I]; copies it where it lies otherwise."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _positions(rows: Tensor, like: Tensor, as_rows: bool) -> Tensor:
    """Shows [N * P, O] as [N, O, *P], the sizes of ``like``; a copy where it is not to lie as rows."""
    if not as_rows and _is_one_position(like):  # lies either way, whose strides tell convolutions apart
        return rows.reshape(like.shape[0], rows.shape[1], *like.shape[2:])
    shown = rows.reshape(like.shape[0], *like.shape[2:], rows.shape[1]).movedim(-1, 1)
    return shown if as_rows else shown.contiguous()


def _cast(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix.to(dtype)


def _summed(rows: Tensor) -> Tensor:
    return rows.sum(0)


def _matrix(insert: Inserter, node: fx.Node) -> fx.Node:
    """Returns the composed matrix in the dtype of the convolution's weight, without the views between."""
    weight = _operands(node)[1]
    return insert.inline(node, _cast, _source(weight), weight.meta["val"].dtype)


def _flatten(insert: Inserter, node: fx.Node) -> None:
    x, _, bias, *_ = arguments(node)
    rows = insert.inline(node, _rows, x)
    matrix = insert.transpose(node, _matrix(insert, node))
    if bias is None:
        product = insert.call(node, torch.ops.aten.mm.default, rows, matrix)
    else:
        product = insert.call(node, torch.ops.aten.addmm.default, bias, rows, matrix)
    shown = insert.inline(node, _positions, product, x, _is_to_lie_as_rows(node.meta["val"]))
    node.replace_all_uses_with(shown, propagate_meta=False)


def _flatten_backward(insert: Inserter, node: fx.Node) -> None:
    gradient, x, weight, *_ = arguments(node)
    rows = insert.inline(node, _rows, gradient)
    for user in list(node.users):
        which = arguments(user)[1]
        made: Any
        if which == 0:
            product = insert.call(node, torch.ops.aten.mm.default, rows, _matrix(insert, node))
            made = insert.inline(node, _positions, product, gradient, _is_to_lie_as_rows(user.meta["val"]))
        elif which == 1:
            turned = insert.transpose(node, rows)
            product = insert.call(node, torch.ops.aten.mm.default, turned, insert.inline(node, _rows, x))
            made = insert.call(node, torch.ops.aten.view.default, product, list(weight.meta["val"].shape))
        else:
            made = insert.inline(node, _summed, rows)
        user.replace_all_uses_with(made, propagate_meta=False)


def _join_gradients(graph: fx.Graph, insert: Inserter) -> None:
    """Hands a product to the op that projects a weight's gradient without the views between.

    Later passes do not look through views.
    """
    backwards = {torch.ops.slcompile.compose_backward.default, *(ops.backward for ops in STRUCTURE_OPS.values())}
    for node in graph.nodes:
        if node.target not in backwards:
            continue
        gradient = arguments(node)[0]
        product = _source(gradient)
        if op_name(product) == "mm" and product.meta["val"].shape == gradient.meta["val"].shape:
            node.update_arg(0, insert.inline(node, _cast, product, gradient.meta["val"].dtype))

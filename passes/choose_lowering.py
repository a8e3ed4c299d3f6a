"""Chooses for each matmul with a factorized weight: compose the weight, or multiply with the factors one by one."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true
from torch.utils.checkpoint import CheckpointPolicy

from slcompile import torch_private
from slcompile.cost import Matmul, aligned, crossover, device_class, rates, why_no_kernels
from slcompile.cost.matmul import FEW_TOKENS, LEAST_VECTOR
from slcompile.ops import KERNEL_DTYPES, LINEAR_FACTORED, STRUCTURE_OPS, WEIGHT_OPS
from slcompile.ops.quantized import as_base
from slcompile.passes.graph import (
    Decision,
    Inserter,
    PassReport,
    arguments,
    name_of,
    nodes_of_backward,
    op_name,
    transposes,
    trunk,
)

_COMPOSE = torch.ops.slcompile.compose.default
_GRADS = torch.ops.slcompile.weight_grads.default


def choose_lowering(gm: fx.GraphModule, lowering: str = "auto", device: torch.device | None = None) -> PassReport:
    """Replaces matmuls with composed weights by factored ones where those are predicted to be faster.

    ``x W^T`` becomes ``hidden = scale * x A^T`` and ``linear_factored(x, hidden, B, ...)``, ``x W`` likewise with the
    roles of the factors exchanged, and ``weight_grads`` becomes two products through the rank and ``values_grad``. The
    ops of other structures become what their formulas say (``slcompile.ops.STRUCTURE_OPS``). With a base, its own
    product stays, and the rest is added to it; without a sparse part that is a plain product. The hidden matrices of
    the forward pass are those of the gradients too. Legal because products are associative and W is a sum; the result
    is rounded elsewhere. A weight that no composed matmul reads any more is not composed.

    Left composed: what is predicted to be faster so, and what is not a product with the whole matrix (a slice of a
    packed weight, a batched product, a weight op without factors). With a symbolic number of tokens it chooses for the
    one that was captured, and guards the graph to that side of where composed and factored would cost the same, and of
    the most tokens that the device's kernels are for; for more, the vector support has others.

    Args:
        gm: A graph with ``meta["val"]``, forward and backward in one or either alone; changed in place.
        lowering: ``"auto"``, or ``"composed"`` or ``"factored"`` for each matmul that can be.
        device: Where the graph will run; the device of its tensors by default.
    """
    report = PassReport()
    sites: list[Site] = []
    for weight in [node for node in gm.graph.nodes if node.target in WEIGHT_OPS]:
        found, left = _products(weight)
        sites += found
        report.left += left
    backward = nodes_of_backward(gm.graph)
    phases = Counter((site.weight, site.node in backward) for site in sites)
    readers = Counter((site.x, site.transposed) for site in sites)
    grads_ops = {_GRADS, *(ops.grads for ops in STRUCTURE_OPS.values())}
    grads = [node for node in gm.graph.nodes if node.target in grads_ops]
    grads_readers = Counter(arguments(node)[1] for node in grads)
    of_weights = {key for node in grads for key in _hiddens_of(node)}

    def costs_of(site: Site, shared: set[Hidden]) -> Costs:
        hidden = 0.5 if _hidden_of(site) in shared else 1.0
        products, copies = phases[site.weight, site.node in backward], readers[site.x, site.transposed]
        return _costs(site, products, copies, hidden, device)

    def decide(site: Site, cost: Costs) -> Decision:
        why_not = why_composed(site.x, site.weight, cost, site.transposed, device, lowering)
        decision = _choose(name_of(site.weight), cost, lowering, why_not)
        phase = "backward" if site.node in backward else "forward"
        return replace(decision, node=site.node.name, factor=arguments(site.weight)[0].name, phase=phase)

    costs = [costs_of(site, of_weights) for site in sites]
    if lowering == "auto":
        grads_costs = [_grads_costs(node, 0, grads_readers[arguments(node)[1]], device) for node in grads]
        _guard_to_one_side([*costs, *grads_costs])
    chosen: dict[fx.Node, Site | None] = {}  # of the nodes to make factored: the site, None for weight_grads
    decisions = list(map(decide, sites, costs))
    hiddens = {_hidden_of(site) for site, each in zip(sites, decisions, strict=True) if each.lowering == "factored"}
    of_factored: set[Hidden] = set()  # what gradients read that are factored
    grads_decisions: list[Decision] = []
    for node in grads:
        left, right, first, *_ = arguments(node)
        missing = sum(key not in hiddens for key in _hiddens_of(node))
        why_not = why_composed(left, node, None, False, device, lowering)
        cost = _grads_costs(node, missing, grads_readers[right], device)
        decision = _choose(f"{name_of(node)} gradients", cost, lowering, why_not)
        decision = replace(decision, node=node.name, factor=first.name, phase="gradients")
        grads_decisions.append(decision)
        if decision.lowering == "factored":
            chosen[node] = None
            of_factored.update(_hiddens_of(node))
    for site, before in zip(sites, decisions, strict=True):
        # Half of a hidden matrix is not the price of a product whose weight's gradients are not factored after all.
        is_alone = _hidden_of(site) in of_weights - of_factored
        decision = decide(site, costs_of(site, set())) if is_alone and before.lowering == "factored" else before
        report.add(decision, decision.lowering == "factored")
        if decision.lowering == "factored":
            chosen[site.node] = site
    for decision in grads_decisions:
        report.add(decision, decision.lowering == "factored")
    insert = Inserter(gm.graph)
    for node in [node for node in gm.graph.nodes if node in chosen]:  # in the graph's order: what comes later may share
        chosen_site = chosen[node]
        if chosen_site is None:
            _grads_factored(insert, node)
        else:
            _multiply_factored(insert, chosen_site)
    if report.replaced:
        gm.graph.eliminate_dead_code()
        assert chosen.keys().isdisjoint(gm.graph.nodes), "a matmul that was rewritten is still read"
        gm.recompile()
    return report


@dataclass(frozen=True, eq=False)
class Site:
    """A product with a whole composed weight.

    Attributes:
        node: mm or addmm.
        weight: The compose that it reads, perhaps through transposes and casts.
        weight_first: Whether it is ``W x`` or ``W^T x``: then the transposes are multiplied, and the result transposed.
        transposed: Whether x (or its transpose) multiplies W and not W^T.
    """

    node: fx.Node
    weight: fx.Node
    weight_first: bool
    transposed: bool

    @property
    def x(self) -> fx.Node:
        """The other operand; another one, once the matmul that made it was rewritten."""
        first, second = arguments(self.node)[-2:]
        return second if self.weight_first else first


def _products(weight: fx.Node) -> tuple[list[Site], list[Decision]]:
    """Returns the products that read a weight and can be factored, and a decision for whatever else reads it."""
    sites: list[Site] = []
    others: list[Decision] = []
    if weight.target is not _COMPOSE and weight.target not in STRUCTURE_OPS:
        detail = f"{op_name(weight)} has no factored lowering"
        return [], [Decision(name_of(weight), "no_factors", detail, _shape(weight), lowering="composed")]
    waiting, seen = list(weight.users), set(weight.users)
    while waiting:
        node = waiting.pop(0)
        if trunk(node)[0] is weight:
            new = [user for user in node.users if user not in seen]
            waiting += new
            seen.update(new)
            continue
        name = op_name(node)
        operands = arguments(node)[1:3] if name == "addmm" else arguments(node)[:2] if name == "mm" else ()
        sources = [trunk(each) for each in operands]
        which = [source is weight for source, _, _ in sources]
        if sum(which) == 1 and not node.kwargs:
            weight_first = which[0]
            swapped = sources[0 if weight_first else 1][1]
            sites.append(Site(node, weight, weight_first, swapped == weight_first))
        else:
            reader = op_name(next(iter(node.users), node)) if name == "view" else name  # a convolution reads a view
            detail = f"{reader} reads it, which is no plain product with the whole matrix"
            others.append(Decision(name_of(weight), "not_a_product", detail, _shape(weight), lowering="composed"))
    return sites, others


Hidden = tuple[fx.Node, bool, fx.Node, bool]
"""A hidden matrix: what is multiplied, whether transposed, the first part of a weight, whether x multiplies W."""


def _hidden_of(site: Site) -> Hidden:
    """Returns the hidden matrix of a product."""
    return *_matrix(site.x, site.weight_first), arguments(site.weight)[0], site.transposed


def _hiddens_of(grads: fx.Node) -> tuple[Hidden, Hidden]:
    """Returns the hidden matrices that the gradients of a weight's parts are made of."""
    left, right, first, *_ = arguments(grads)
    return (*_matrix(left, False), first, True), (*_matrix(right, False), first, False)


def _matrix(x: fx.Node, transposed: bool) -> tuple[fx.Node, bool]:
    """Returns a matrix or its transpose as a node, and whether that is to be transposed: the same for equal ones."""
    return (x.all_input_nodes[0], not transposed) if transposes(x) else (x, transposed)


def _multiply_factored(insert: Inserter, site: Site) -> None:
    node = site.node
    x = insert.transpose(node, site.x) if site.weight_first else site.x
    bias: fx.Node | None = arguments(node)[0] if op_name(node) == "addmm" else None
    if base := _base(site.weight):
        bias = _with_base(insert, site, base)
    if ops := STRUCTURE_OPS.get(site.weight.target):
        inside = None
        given = arguments(site.weight)[: len(ops.parts) + 1]
        result = insert.inline(node, ops.multiply, x, site.transposed, *given)
    else:
        # linear_factored takes one number for each row; anything else that addmm broadcasts is added afterwards.
        plain = bias is not None and not site.weight_first and not site.transposed and base is None
        rows = arguments(site.weight)[0].meta["val"].shape[:1]
        inside = bias if plain and bias is not None and bias.meta["val"].shape == rows else None
        result = _multiplied(insert, site, x, inside)
    if site.weight_first:
        result = insert.transpose(node, result)
    if bias is not None and inside is None:
        result = insert.call(node, torch.ops.aten.add.Tensor, result, bias)
    node.replace_all_uses_with(result, propagate_meta=False)


def _multiplied(insert: Inserter, site: Site, x: fx.Node, bias: fx.Node | None) -> fx.Node:
    """Returns a product with factors and a sparse part, and the bias."""
    node, (B, A, values, support, scale, *_) = site.node, arguments(site.weight)
    dtype = x.meta["val"].dtype
    # The factor at x's side gives the hidden matrix: [R, width of x].
    reading, writing = (insert.transpose(node, B), A) if site.transposed else (A, B)
    hidden = insert.inline(node, _hidden, x, reading, scale)
    writing, values = (insert.inline(node, _as, each, dtype) for each in (writing, values))
    if _is_empty(values):
        assert bias is None, "without a sparse part there is a base, whose product has the bias"
        out = writing if site.transposed else insert.transpose(node, writing)
        return insert.call(node, torch.ops.aten.mm.default, hidden, out)
    many = insert.call(
        node,
        LINEAR_FACTORED,
        *(x, [hidden], [writing], [values], [support], [bias], site.transposed, *_vector(site.weight)),
    )
    return insert.call(node, operator.getitem, many, 0)


def _with_base(insert: Inserter, site: Site, base: fx.Node) -> fx.Node:
    """Returns the same product with the base alone: what the dense model computes."""
    node, dtype = site.node, site.x.meta["val"].dtype
    cast = insert.inline(node, as_base, base, _shape(site.weight)[-1], dtype)
    if cast is not base:
        cast.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE  # it is as large as a composed weight
    is_swapped = site.transposed == site.weight_first
    matrix = insert.transpose(node, cast) if is_swapped else cast
    args = list(arguments(node))
    args[-2 if site.weight_first else -1] = matrix
    assert callable(node.target)
    return insert.call(node, node.target, *args)


def _grads_factored(insert: Inserter, node: fx.Node) -> None:
    if ops := STRUCTURE_OPS.get(node.target):
        made = insert.inline(node, ops.gradients, *arguments(node))
        for user in list(node.users):
            user.replace_all_uses_with(made[arguments(user)[1]], propagate_meta=False)
        return
    left, right, B, A, values, support, scale, *_ = arguments(node)
    reading = (insert.transpose(node, B), A)
    hiddens = [insert.inline(node, _hidden, x, factor, scale) for x, factor in zip((left, right), reading, strict=True)]
    grads = [
        insert.inline(node, _product, insert.transpose(node, left), hiddens[1], B.meta["val"].dtype),
        insert.inline(node, _product, insert.transpose(node, hiddens[0]), right, A.meta["val"].dtype),
        insert.call(node, torch.ops.slcompile.values_grad.default, left, right, values, support, *_vector(node)),
    ]
    for user in list(node.users):
        user.replace_all_uses_with(grads[arguments(user)[1]], propagate_meta=False)


def _vector(node: fx.Node) -> tuple[Any, ...]:
    """Returns how many rows share their columns, as the last argument of ops; none where each row has its own."""
    return arguments(node)[6:7] if node.target is _COMPOSE else arguments(node)[7:]


def _base(compose: fx.Node) -> fx.Node | None:
    """Returns the weight that a compose adds the rest to, if there is one."""
    ops = STRUCTURE_OPS.get(compose.target)
    return next(iter(arguments(compose)[len(ops.parts) + 1 if ops else 7 :]), None)


def _is_empty(values: fx.Node) -> bool:
    return values.meta["val"].numel() == 0


def _hidden(x: Tensor, factor: Tensor, scale: float) -> Tensor:
    # beta=0: the first argument is not read. The product is scaled as it is written, not in a pass of its own.
    read, columns = factor.to(x.dtype), factor.shape[1]
    if x.device.type == "cuda" and guard_or_true(x.shape[0] > FEW_TOKENS):
        # The vendor's matmuls take twice the time where rows are not aligned; beside many tokens a copy is nothing.
        more = aligned(columns, x.dtype) - columns
        read = torch.nn.functional.pad(read, (0, more)).narrow(1, 0, columns) if more else read
    return torch.addmm(factor[:1, :1].to(x.dtype), x, read.t(), beta=0, alpha=scale)


def _as(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return factor.to(dtype)


def _product(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    return (first @ second).to(dtype)


@dataclass(frozen=True)
class Costs:
    """Predicted seconds of the two lowerings of one matmul, by the number of tokens."""

    matmul: Matmul
    tokens: int | torch.SymInt
    composed: Callable[[int], float]
    factored: Callable[[int], float]
    few: int | None
    """Up to so many tokens other kernels multiply than above; None where the same ones do."""


def _costs(site: Site, composes: int, readers: int, hidden: float, device: torch.device | None) -> Costs:
    """Predicts the costs of a product.

    ``composes`` products share one composition, ``readers`` of x a copy of it; ``hidden`` is as for ``Matmul``.
    """
    x = site.x.meta["val"]
    device = device or x.device
    at = rates(device)
    matmul = matmul_of(site.weight, x.dtype)
    return Costs(
        matmul,
        x.shape[1 if site.weight_first else 0],
        functools.partial(matmul.composed, rates=at, composes=1 / composes),
        functools.partial(matmul.factored, rates=at, transposed=site.transposed, shared=readers, hidden=hidden),
        device_class(device).factored_tokens if matmul.nonzeros else None,
    )


def _grads_costs(node: fx.Node, missing: int, readers: int, device: torch.device | None) -> Costs:
    """Predicts the costs of a weight_grads; ``missing`` hidden matrices are made for it alone, ``readers`` as above."""
    left = arguments(node)[0]
    device = device or left.meta["val"].device
    at = rates(device)
    matmul = matmul_of(node, left.meta["val"].dtype)
    return Costs(
        matmul,
        left.meta["val"].shape[0],
        functools.partial(matmul.grads_composed, rates=at),
        functools.partial(matmul.grads_factored, rates=at, hiddens=missing, shared=readers),
        device_class(device).factored_tokens if matmul.nonzeros else None,
    )


def _guard_to_one_side(costs: list[Costs]) -> None:
    """Guards each symbolic number of tokens to the side of one limit, at which the whole graph's costs are equal.

    One limit and not one for each matmul: a graph for each of their intervals would be compiled. Where other kernels
    are for many tokens, it is that side too: the costs cross on each.
    """
    for name, tokens in {str(each.tokens): each.tokens for each in costs}.items():
        if isinstance(tokens, int):
            continue
        group = [each for each in costs if str(each.tokens) == name]
        composed, factored = (functools.partial(_sum, group, each) for each in ("composed", "factored"))
        few = group[0].few
        if few is None:
            limit = crossover(composed, factored)
        elif guard_or_true(tokens > few):
            limit = crossover(composed, factored, least=few + 1)
        else:
            limit = crossover(composed, factored, limit=few + 1)
        if limit is not None:
            guard_or_false(tokens >= limit)


def _sum(costs: list[Costs], lowering: str, tokens: int) -> float:
    return sum(getattr(each, lowering)(tokens) for each in costs)


def why_composed(
    x: fx.Node,
    reader: fx.Node,
    cost: Costs | None,
    transposed: bool,
    device: torch.device | None,
    lowering: str,
) -> tuple[str, str] | None:
    """Says why a product has no factored lowering on its device, if it has none; the cost is None for gradients.

    ``reader`` is what takes the weight's parts: the weight's op, or that of its gradients. A symbolic number of tokens
    is guarded to one side of the most that kernels are for, unless nothing is factored.
    """
    device = device or x.meta["val"].device
    kind = device_class(device)
    if reader.target in STRUCTURE_OPS:  # ATen multiplies with the parts on every device
        return None
    values = arguments(reader)[2 if reader.target is _COMPOSE else 4]
    if kind.per_thread or lowering == "composed" or _is_empty(values):
        return None
    if missing := why_no_kernels(device):
        return "device", missing
    if x.meta["val"].dtype not in KERNEL_DTYPES:
        return "dtype", f"no kernel multiplies factors in {x.meta['val'].dtype}"
    if transposed and values.meta["val"].dim() == 1:
        return "uniform_support", "a product with W itself would scatter: no kernel does it for stored positions"
    if cost is None or cost.few is None or not guard_or_true(cost.tokens > cost.few):
        return None
    if cost.matmul.vector < LEAST_VECTOR:
        most = f"kernels multiply factors for up to {cost.few} tokens"
        return "tokens", f"{most}; for more, they would write gigabytes of partial sums"
    return None


def _choose(name: str, cost: Costs, lowering: str, why_not: tuple[str, str] | None = None) -> Decision:
    """Returns the decision on one matmul, with both predicted costs, and with a reason where it stays composed."""
    tokens = torch_private.size_hint(cost.tokens)
    costs = {"composed": cost.composed(tokens), "factored": cost.factored(tokens)}
    reason, detail = "asked_for", "asked for by lowering='composed'"
    if why_not:
        lowering, (reason, detail) = "composed", why_not
    elif lowering == "auto":
        lowering = min(costs, key=costs.__getitem__)
        reason, detail = "slower", "factored is predicted to be slower"
    predicted = ", ".join(f"{each} {1e3 * seconds:.3g} ms" for each, seconds in costs.items()) + f" at {tokens} tokens"
    if lowering == "factored":
        reason, detail = "", predicted
    else:
        detail = f"{detail}: {predicted}"
    return Decision(name, reason, detail, (cost.matmul.rows, cost.matmul.columns), 1, lowering, costs)


def matmul_of(reader: fx.Node, dtype: torch.dtype) -> Matmul:
    """Returns the sizes of a weight, from its op or that of its gradients."""
    given, base = arguments(reader), reader.target in WEIGHT_OPS and _base(reader) is not None
    if ops := STRUCTURE_OPS.get(reader.target):
        start = 2 if reader.target is ops.grads else 0
        B, A = torch_private.run_fake(ops.factors, [each.meta["val"] for each in given[start:][: len(ops.parts)]])
        blocks = len(B) if B.dim() == 3 else 1
        return Matmul(blocks * B.shape[-2], blocks * A.shape[-1], B.shape[-1], 0, dtype, 1, base, blocks)
    B, A, values = (each.meta["val"] for each in given[0 if reader.target is _COMPOSE else 2 :][:3])
    rows, rank, columns, nonzeros = map(torch_private.size_hint, (*B.shape, A.shape[1], values.numel()))
    return Matmul(rows, columns, rank, nonzeros, dtype, next(iter(_vector(reader)), 1), base)


def _shape(weight: fx.Node) -> tuple[int, ...]:
    return tuple(weight.meta["val"].shape)

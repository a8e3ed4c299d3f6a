from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from slcompile.ops import compose
from slcompile.ops.support import groups_per_row, uniform_index
from slcompile.passes import choose_lowering, fuse_weight_grads, group_projections, lower_ops

SCALE = 0.5
T, K = 24, 48
# rows, columns, rank: what multiplies x [T, K] from the right, transposed.
QKV = ((40, K, 8), (24, K, 4), (56, K, 16))
PAIR = ((40, K, 8), (40, K, 4))
FORWARD = "linear_factored_default"


def factored(
    function: Callable[..., Tensor],
    shapes: Sequence[tuple[int, int, int]] = QKV,
    supports: Sequence[str] = ("stratified",) * 3,
    mode: str = "fake",
    tokens: int = T,
) -> tuple[fx.GraphModule, list[Tensor]]:
    """The joint graph of ``function(x, *weights)`` after choose_lowering, and inputs for it."""
    random = torch.Generator().manual_seed(0)
    x, inputs = torch.randn(tokens, K, generator=random), []
    for index, ((rows, columns, rank), support) in enumerate(zip(shapes, supports, strict=False)):
        where = uniform_index(index, rows, columns, 0.1) if support == "uniform" else torch.tensor([index])
        size = tuple(where.shape) if support == "uniform" else (rows, groups_per_row(columns, 0.1))
        inputs += [*(torch.randn(each, generator=random) for each in ((rows, rank), (rank, columns), size)), where]
    y = function(x, *(torch.zeros(rows, columns) for rows, columns, _ in shapes))
    inputs = [x, torch.randn(y.shape, generator=random), *inputs]

    def joint(x, tangents, *factors):
        leaves = [each.detach().requires_grad_(each.is_floating_point()) for each in (x, *factors)]
        weights = [
            compose(*leaves[4 * index + 1 : 4 * index + 5], SCALE, vector=16 if support == "vector" else 1)
            for index, support in enumerate(supports[: len(shapes)])
        ]
        y = function(leaves[0], *weights)
        return (y.detach(), *torch.autograd.grad(y, [each for each in leaves if each.requires_grad], tangents))

    gm = make_fx(joint, tracing_mode=mode, decomposition_table=select_decomp_table())(*inputs)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        node.replace_all_uses_with(node.args[0])
    gm.graph.eliminate_dead_code()
    gm.recompile()
    fuse_weight_grads(gm)
    choose_lowering(gm, "factored")
    return gm, inputs


def qkv(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # The activation and the bias lie between the projections: what the later ones need moves before the first one.
    return torch.cat([torch.relu(x @ q.t()), torch.addmm(x[0, :24].tanh(), x, k.t()), x @ v.t()], 1)


def reasons(report) -> list[tuple[str, str]]:
    return [(each.name, each.reason) for each in report.left]


def test_graph(stratified_joint):
    gm, _ = factored(lambda x, q, k: x @ q.t() + x @ k.t(), PAIR)
    report = group_projections(gm)
    assert [(each.name, each.matmuls) for each in report.replaced] == [
        (f"{FORWARD}, {FORWARD}_1", 2),
        # The gradients of the two products with the same tangents.
        (f"{FORWARD}_2, {FORWARD}_3", 2),
    ]
    assert report.left == []
    # The arguments are x, the tangents, and B, A, values and support of q (2 to 5) and of k (6 to 9). What the second
    # sibling needs comes before the one op.
    assert stratified_joint.text_of(gm)[:26] == [
        "slice_tensor = aten.slice.Tensor(arg3_1, 0, 0, 1)",
        "slice_tensor_1 = aten.slice.Tensor(slice_tensor, 1, 0, 1)",
        "permute_default = aten.permute(arg3_1, [1, 0])",
        "addmm_default = aten.addmm(slice_tensor_1, arg0_1, permute_default, beta=0, alpha=0.5)",
        "slice_tensor_2 = aten.slice.Tensor(arg7_1, 0, 0, 1)",
        "slice_tensor_3 = aten.slice.Tensor(slice_tensor_2, 1, 0, 1)",
        "permute_default_1 = aten.permute(arg7_1, [1, 0])",
        "addmm_default_1 = aten.addmm(slice_tensor_3, arg0_1, permute_default_1, beta=0, alpha=0.5)",
        "linear_factored_default_4 = slcompile.linear_factored(arg0_1, [addmm_default, addmm_default_1], "
        "[arg2_1, arg6_1], [arg4_1, arg8_1], [arg5_1, arg9_1], [None, None], False)",
        "getitem_10 = getitem(linear_factored_default_4, 0)",
        "getitem_11 = getitem(linear_factored_default_4, 1)",
        "add = aten.add.Tensor(getitem_10, getitem_11)",
        "permute_default_2 = aten.permute(arg6_1, [1, 0])",
        "slice_tensor_4 = aten.slice.Tensor(permute_default_2, 0, 0, 1)",
        "slice_tensor_5 = aten.slice.Tensor(slice_tensor_4, 1, 0, 1)",
        "permute_default_3 = aten.permute(permute_default_2, [1, 0])",
        "addmm_default_2 = aten.addmm(slice_tensor_5, arg1_1, permute_default_3, beta=0, alpha=0.5)",
        "permute_default_4 = aten.permute(arg2_1, [1, 0])",
        "slice_tensor_6 = aten.slice.Tensor(permute_default_4, 0, 0, 1)",
        "slice_tensor_7 = aten.slice.Tensor(slice_tensor_6, 1, 0, 1)",
        "permute_default_5 = aten.permute(permute_default_4, [1, 0])",
        "addmm_default_3 = aten.addmm(slice_tensor_7, arg1_1, permute_default_5, beta=0, alpha=0.5)",
        "linear_factored_default_5 = slcompile.linear_factored(arg1_1, [addmm_default_2, addmm_default_3], "
        "[arg7_1, arg3_1], [arg8_1, arg4_1], [arg9_1, arg5_1], [None, None], True)",
        "getitem_12 = getitem(linear_factored_default_5, 0)",
        "getitem_13 = getitem(linear_factored_default_5, 1)",
        "add_1 = aten.add.Tensor(getitem_12, getitem_13)",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("lowered", [False, True], ids=["ops", "lowered"])
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("support", ["stratified", "vector", "uniform"])
def test_siblings_become_one_with_the_same_numbers(stratified_joint, support, mode, lowered):
    gm, inputs = factored(qkv, supports=[support] * 3, mode=mode)
    expected = gm(*inputs)
    report = group_projections(gm)
    gm.graph.lint()
    assert [(each.name, each.matmuls) for each in report.replaced] == [(f"{FORWARD}, {FORWARD}_1, {FORWARD}_2", 3)]
    # The gradients of the three projections have three different inputs.
    assert {reason for _, reason in reasons(report)} == {"alone"}
    assert len(report.left) == 3
    assert stratified_joint.ours(gm).count("linear_factored") == 4
    if lowered:
        lower_ops(gm)
    # The same ATen calls, before and after.
    stratified_joint.assert_close(gm(*inputs), expected, eps=0)


def test_twice_changes_nothing(stratified_joint):
    gm, _ = factored(qkv)
    group_projections(gm)
    before = stratified_joint.text_of(gm)
    again = group_projections(gm)
    assert again.replaced == []
    assert len(again.left) == 4
    assert stratified_joint.text_of(gm) == before


NOT_SIBLINGS = {
    "one projection": (lambda x, w: x @ w.t(), QKV[:1], ("stratified",)),
    "another input": (lambda x, q, k: torch.cat([x @ q.t(), x.tanh() @ k.t()], 1), PAIR, ("stratified",) * 2),
    "another direction": (lambda x, q, k: x @ q.t() + x @ k, ((40, K, 8), (K, 40, 4)), ("stratified",) * 2),
    "another kind of support": (lambda x, q, k: torch.cat([x @ q.t(), x @ k.t()], 1), PAIR, ("stratified", "uniform")),
    "other blocks of rows": (lambda x, q, k: torch.cat([x @ q.t(), x @ k.t()], 1), PAIR, ("stratified", "vector")),
}


@pytest.mark.parametrize("name", NOT_SIBLINGS)
def test_what_has_no_sibling_is_left(stratified_joint, name):
    gm, inputs = factored(*NOT_SIBLINGS[name])
    before, expected = stratified_joint.text_of(gm), gm(*inputs)
    report = group_projections(gm)
    count = stratified_joint.ours(gm).count("linear_factored")
    assert count >= 2
    assert [(each.reason, each.detail) for each in report.left] == [
        ("alone", "no other factored matmul reads its input")
    ] * count
    assert report.replaced == []
    assert stratified_joint.text_of(gm) == before
    stratified_joint.assert_close(gm(*inputs), expected, eps=0)


def test_what_needs_a_result_of_the_group_is_left(stratified_joint):
    """k's bias is made of q's result; v is merged with q all the same, past k."""

    def function(x, q, k, v):
        first = x @ q.t()
        return torch.cat([torch.addmm(first[0, :24], x, k.t()), x @ v.t(), first], 1)

    gm, inputs = factored(function)
    expected = gm(*inputs)
    report = group_projections(gm)
    gm.graph.lint()
    assert [each.name for each in report.replaced] == [f"{FORWARD}, {FORWARD}_2"]
    assert [(each.name, each.detail) for each in report.left if each.reason == "depends"] == [
        (f"{FORWARD}_1", f"it needs the result of {FORWARD}")
    ]
    stratified_joint.assert_close(gm(*inputs), expected, eps=0)
    before = stratified_joint.text_of(gm)
    assert group_projections(gm).replaced == []
    assert stratified_joint.text_of(gm) == before


def test_a_graph_without_factored_matmuls_is_left():
    gm = fx.symbolic_trace(torch.nn.Linear(4, 4))
    before = str(gm.graph)
    report = group_projections(gm)
    assert (report.replaced, report.left) == ([], [])
    assert str(gm.graph) == before


def pretend_gpu(gm: fx.GraphModule) -> None:
    """Says of every tensor that it lies on a GPU; without one, autograd cannot trace such a graph."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            with value.fake_mode:
                node.meta["val"] = torch.empty_like(value, device="cuda")


@pytest.mark.parametrize(("tokens", "projects"), [(64, 1), (65, 0)])
def test_few_tokens_on_a_gpu_share_their_hidden_matrices(stratified_joint, tokens, projects):
    gm, inputs = factored(qkv, tokens=tokens)
    expected = gm(*inputs)
    pretend_gpu(gm)
    group_projections(gm)
    gm.graph.lint()
    assert stratified_joint.ours(gm).count("project") == projects
    # Run on the CPU: the same products.
    stratified_joint.assert_close(gm(*inputs), expected)


def test_merging_one_group_may_move_members_of_another(stratified_joint):
    """``z`` needs ``q``, of the other input: it is moved before ``a``, and ``q`` with it."""

    def projections(x, w):
        u = torch.tanh(x)
        a = x @ w.t()
        p = u @ w.t()
        q = torch.addmm(x[1, :40], u, w.t())
        return a + p + q + torch.addmm(q[0], x, w.t())

    gm, inputs = stratified_joint.graph(projections)
    expected = gm(*inputs)
    fuse_weight_grads(gm)
    choose_lowering(gm, "factored")
    report = group_projections(gm)
    gm.graph.lint()
    assert report.replaced
    stratified_joint.assert_close(gm(*inputs), expected)

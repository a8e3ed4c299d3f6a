from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from slcompile import cost
from slcompile.ops import compose
from slcompile.passes import choose_lowering, fuse_weight_grads, lower_ops, recompute_inputs

MODULE = sys.modules["slcompile.passes.choose_lowering"]  # the package's attribute of this name is the function


def prepared(joint, *args, **kwargs) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    gm, inputs = joint.graph(*args, **kwargs)
    fuse_weight_grads(gm)
    return gm, inputs


def test_graph(stratified_joint):
    gm, _ = prepared(stratified_joint, lambda x, w: x @ w.t())
    report = choose_lowering(gm, "factored")
    assert [(each.name, each.lowering) for each in report.replaced] == [
        ("compose", "factored"),
        ("compose", "factored"),
        ("weight_grads_default gradients", "factored"),
    ]
    # W is not composed any more, and the hidden matrices of the products, addmm_default and addmm_default_1, are
    # those of the gradients.
    assert stratified_joint.text_of(gm) == [
        "slice_tensor = aten.slice.Tensor(a_1, 0, 0, 1)",
        "slice_tensor_1 = aten.slice.Tensor(slice_tensor, 1, 0, 1)",
        "permute_default = aten.permute(a_1, [1, 0])",
        "addmm_default = aten.addmm(slice_tensor_1, x_1, permute_default, beta=0, alpha=0.5)",
        "linear_factored_default = slcompile.linear_factored(x_1, [addmm_default], [b_1], [values_1], "
        "[support_1], [None], False)",
        "getitem_3 = getitem(linear_factored_default, 0)",
        "permute_default_1 = aten.permute(b_1, [1, 0])",
        "slice_tensor_2 = aten.slice.Tensor(permute_default_1, 0, 0, 1)",
        "slice_tensor_3 = aten.slice.Tensor(slice_tensor_2, 1, 0, 1)",
        "permute_default_2 = aten.permute(permute_default_1, [1, 0])",
        "addmm_default_1 = aten.addmm(slice_tensor_3, tangents_1, permute_default_2, beta=0, alpha=0.5)",
        "linear_factored_default_1 = slcompile.linear_factored(tangents_1, [addmm_default_1], [a_1], [values_1], "
        "[support_1], [None], True)",
        "getitem_4 = getitem(linear_factored_default_1, 0)",
        "permute_default_3 = aten.permute(tangents_1, [1, 0])",
        "mm_default = aten.mm(permute_default_3, addmm_default)",
        "permute_default_4 = aten.permute(addmm_default_1, [1, 0])",
        "mm_default_1 = aten.mm(permute_default_4, x_1)",
        "values_grad_default = slcompile.values_grad(tangents_1, x_1, values_1, support_1)",
    ]


FUNCTIONS = {
    "linear": (lambda x, w: x @ w.t(), (24, 48)),
    "conv1d": (lambda x, w: x @ w, (24, 40)),
    "weight first": (lambda x, w: w @ x, (48, 24)),
    "transposed weight first": (lambda x, w: w.t() @ x, (40, 24)),
    "batched input": (lambda x, w: torch.nn.functional.linear(x, w), (2, 3, 48)),
    "bias of a linear": (lambda x, w: torch.addmm(x[0, :40], x, w.t()), (24, 48)),
    "bias of a conv1d": (lambda x, w: torch.addmm(torch.ones(48, dtype=x.dtype), x, w), (24, 40)),
    "matrix for a bias": (lambda x, w: torch.addmm(x[:, :40], x, w.t()), (24, 48)),
    "bias of one element": (lambda x, w: torch.addmm(x[0, :1], x, w.t()), (24, 48)),
}


@pytest.mark.slow
@pytest.mark.parametrize("lowered", [False, True], ids=["ops", "lowered"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_numbers_and_twice_changes_nothing(joint, name, lowered):
    function, x_shape = FUNCTIONS[name]
    gm, inputs = prepared(joint, function, x_shape)
    expected = gm(*inputs)
    report = choose_lowering(gm, "factored")
    assert [each.lowering for each in report.replaced] == ["factored"] * 3
    assert sorted(joint.ours(gm)) == ["linear_factored", "linear_factored", "values_grad"]
    again = choose_lowering(gm, "factored")
    assert (again.replaced, again.left) == ([], [])
    if lowered:
        lower_ops(gm)
    joint.assert_close(gm(*inputs), expected)


@pytest.mark.parametrize(
    ("dims", "width"), [([0, 1], 40), ([-2, -1], 40), ([0, -1], 40), ((-2, 1), 40), ([1, 0], 48), ([-1, -2], 48)]
)
def test_a_permutation_is_a_transpose_only_where_it_exchanges_rows_and_columns(stratified_joint, dims, width):
    gm, inputs = prepared(stratified_joint, lambda x, w: x @ w.permute(dims), (24, width))
    expected = gm(*inputs)
    choose_lowering(gm, "factored")
    stratified_joint.assert_close(gm(*inputs), expected)


LOSSY = {
    "float8": lambda x, w: x @ w.to(torch.float8_e4m3fn).to(x.dtype).t(),
    "bfloat16 and back": lambda x, w: x @ w.to(torch.bfloat16).to(x.dtype).t(),
    "bfloat16 to float16": lambda x, w: (x.half() @ w.bfloat16().half().t()).to(x.dtype),
    "complex": lambda x, w: torch.view_as_real(x.to(torch.complex64) @ w.to(torch.complex64).t()),
}


@pytest.mark.parametrize("name", LOSSY)
def test_a_weight_that_a_cast_changes_stays_composed(stratified_joint, name):
    """A module may simulate such rounding; its gradient is rounded likewise."""
    gm, inputs = prepared(stratified_joint, LOSSY[name])
    expected = gm(*inputs)
    report = choose_lowering(gm, "factored")
    assert not report.replaced
    assert {each.reason for each in report.left} == {"not_a_product"}
    assert "weight_grads" not in stratified_joint.ours(gm)
    stratified_joint.assert_close(gm(*inputs), expected)


@pytest.mark.parametrize("name", ["mm", "addmm"])
def test_a_product_that_is_told_its_dtype_stays_composed(name):
    """CUDA has it: sums of bfloat16 products as float32."""
    if name == "addmm" and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 takes out_dtype for beta where it traces addmm: TypeError, for dense weights, too")
    bias = [torch.ones(1)] if name == "addmm" else []

    def function(x, B, A, values, seed, *bias):
        return getattr(torch, name)(*bias, x, compose(B, A, values, seed, 1.0).t(), out_dtype=torch.float32)

    factors = [torch.ones(size, dtype=torch.bfloat16) for size in ((24, 48), (40, 8), (8, 48), (40, 2))]
    gm = make_fx(function, tracing_mode="fake")(*factors, torch.tensor([1]), *bias)
    before = gm.code
    report = choose_lowering(gm, "factored")
    assert [each.reason for each in report.left] == ["not_a_product"]
    recompute_inputs(gm)
    assert gm.code == before


def test_a_cast_that_changes_no_number_is_factored(stratified_joint):
    gm, inputs = prepared(stratified_joint, lambda x, w: (x.double() @ w.double().t()).to(x.dtype))
    expected = gm(*inputs)
    assert len(choose_lowering(gm, "factored").replaced) == 3
    stratified_joint.assert_close(gm(*inputs), expected)


def test_casts_of_the_weight_become_casts_of_the_factors(joint):
    gm, inputs = prepared(joint, lambda x, w: x @ w.t(), cast=torch.bfloat16)
    truth, _ = joint.graph(lambda x, w: x @ w.t(), cast=torch.float64)
    exact = truth(*(each.double() if each.is_floating_point() else each for each in inputs))
    composed = gm(*inputs)
    choose_lowering(gm, "factored")
    factored = gm(*inputs)
    assert [each.dtype for each in factored] == [each.dtype for each in composed]
    for ours, eager, wanted in zip(factored, composed, exact, strict=True):
        error, allowed = (float((each.double() - wanted.double()).norm()) for each in (ours, eager))
        # No worse than composing, up to half a unit in the last place of bfloat16.
        assert error <= allowed + 2**-9 * float(wanted.double().norm())


def test_auto_takes_the_cheaper_and_says_both_costs(stratified_joint, monkeypatch):
    slow_sparse = cost.Rates({"float32": 1e11}, {"float32": 1e3}, 1e10)
    fast_sparse = cost.Rates({"float32": 1e6}, {"float32": 1e11}, 1e10)
    for rates, lowering in ((slow_sparse, "composed"), (fast_sparse, "factored")):
        monkeypatch.setattr(MODULE, "rates", lambda device, rates=rates: rates)
        gm, inputs = prepared(stratified_joint, lambda x, w: x @ w.t())
        expected = gm(*inputs)
        report = choose_lowering(gm)
        decisions = report.replaced + report.left
        assert [each.lowering for each in decisions] == [lowering] * 3
        for decision in decisions:
            assert min(decision.costs, key=decision.costs.__getitem__) == lowering
            assert f"composed {1e3 * decision.costs['composed']:.3g} ms" in decision.detail
            assert f"factored {1e3 * decision.costs['factored']:.3g} ms at 24 tokens" in decision.detail
            assert decision.reason == ("slower" if lowering == "composed" else "")
        stratified_joint.assert_close(gm(*inputs), expected)


def test_mixed_choices_share_what_they_can(stratified_joint, monkeypatch):
    """Only the gradients factored: both hidden matrices are made for them, and W is composed for the products."""
    gm, inputs = prepared(stratified_joint, lambda x, w: x @ w.t())
    expected = gm(*inputs)
    found = []

    def grads_factored(self, tokens, rates, hiddens, shared):
        found.append(hiddens)
        return 0.0

    monkeypatch.setattr(cost.Matmul, "factored", lambda self, *args, **kwargs: 1e9)
    monkeypatch.setattr(cost.Matmul, "grads_factored", grads_factored)
    report = choose_lowering(gm)
    assert [each.lowering for each in report.left + report.replaced] == ["composed", "composed", "factored"]
    assert found == [2]
    assert stratified_joint.ours(gm) == ["compose", "values_grad"]
    stratified_joint.assert_close(gm(*inputs), expected)


def test_composed_on_request_changes_nothing(joint):
    gm, _ = prepared(joint, lambda x, w: x @ w.t())
    before = joint.text_of(gm)
    report = choose_lowering(gm, "composed")
    assert joint.text_of(gm) == before
    assert [(each.lowering, each.reason) for each in report.left] == [("composed", "asked_for")] * 3
    assert report.replaced == []


def test_what_is_no_product_with_the_whole_weight_stays_composed(stratified_joint):
    gm, inputs = prepared(stratified_joint, lambda x, w: x @ w[:20].t() + (x @ w.t())[:, :20])
    expected = gm(*inputs)
    report = choose_lowering(gm, "factored")
    reasons = {(each.reason, each.detail) for each in report.left}
    assert reasons == {("not_a_product", "slice reads it, which is no plain product with the whole matrix")}
    assert len(report.replaced) == 2  # the other product, forward and backward; the summed gradients are not fused
    assert "compose" in stratified_joint.ours(gm)
    stratified_joint.assert_close(gm(*inputs), expected)


def test_another_weight_op_is_left(stratified_joint, monkeypatch):
    gm, _ = prepared(stratified_joint, lambda x, w: x @ w.t())
    monkeypatch.setattr(MODULE, "WEIGHT_OPS", (torch.ops.aten.mm.default,))
    report = choose_lowering(gm, "factored")
    assert {(each.reason, each.detail) for each in report.left} == {("no_factors", "mm has no factored lowering")}


def test_a_symbolic_number_of_tokens_gets_one_guard(stratified_joint, monkeypatch):
    """To the side of the number at which the whole graph costs the same either way; 24 tokens were captured."""
    rates = cost.Rates({"float32": 1e9}, {"float32": 1e8}, 1e12)
    monkeypatch.setattr(MODULE, "rates", lambda device: rates)
    gm, inputs = prepared(stratified_joint, lambda x, w: x @ w.t(), mode="symbolic")
    expected = gm(*inputs)
    shape_env = next(node.meta["val"] for node in gm.graph.nodes if "val" in node.meta).fake_mode.shape_env
    before = len(shape_env.guards)
    report = choose_lowering(gm)
    (guard,) = shape_env.guards[before:]
    (limit,) = map(int, re.findall(r"^s\d+ < (\d+)$", str(guard.expr)))
    assert limit > 24
    B, A, values, _ = stratified_joint.factors
    matmul = cost.Matmul(len(B), A.shape[1], len(A), values.numel(), torch.float32)

    def costs(tokens: int) -> tuple[float, float]:
        """Of two products and the gradients, composed and factored."""
        return (
            2 * matmul.composed(tokens, rates=rates, composes=1) + matmul.grads_composed(tokens, rates=rates),
            2 * matmul.factored(tokens, rates=rates) + matmul.grads_factored(tokens, rates=rates, hiddens=0),
        )

    below, at = (composed < factored for composed, factored in map(costs, (limit - 1, limit)))
    assert below != at
    assert [each.lowering for each in report.left] == ["composed"] * 3
    assert all("at 24 tokens" in each.detail for each in report.left)
    lower_ops(gm)
    stratified_joint.assert_close(gm(*inputs), expected)


@pytest.mark.parametrize("lowering", ["composed", "factored"])
def test_a_lowering_that_is_asked_for_needs_no_guard(stratified_joint, lowering):
    gm, _ = prepared(stratified_joint, lambda x, w: x @ w.t(), mode="symbolic")
    shape_env = next(node.meta["val"] for node in gm.graph.nodes if "val" in node.meta).fake_mode.shape_env
    before = len(shape_env.guards)
    choose_lowering(gm, lowering)
    assert len(shape_env.guards) == before


def test_a_matmul_that_reads_the_result_of_another(stratified_joint):
    """The first one's result is replaced after both were found."""

    def twice(x, w):
        return (x @ w.t()) @ w

    gm, inputs = stratified_joint.graph(twice)
    expected = gm(*inputs)
    fuse_weight_grads(gm)
    choose_lowering(gm, "factored")
    stratified_joint.assert_close(gm(*inputs), expected)
    ours = stratified_joint.ours(gm)
    assert (ours.count("compose"), ours.count("linear_factored")) == (0, 4)


GPU = torch.device("cuda")


@pytest.mark.parametrize(("tokens", "lowering"), [(256, "factored"), (257, "composed")])
def test_kernels_for_few_tokens_are_given_no_more(stratified_joint, tokens, lowering):
    """For a training batch they would write gigabytes of partial sums, whatever was asked for."""
    gm, _ = prepared(stratified_joint, lambda x, w: x @ w.t(), x_shape=(tokens, 48))
    report = choose_lowering(gm, "factored", GPU)
    decisions = {each.phase: each for each in report.replaced + report.left}
    assert decisions["gradients"].lowering == "factored"
    assert decisions["forward"].lowering == decisions["backward"].lowering == lowering
    if lowering == "composed":
        assert {each.reason for each in report.left} == {"tokens"}
        assert report.left[0].detail.startswith("kernels multiply factors for up to 256 tokens; for more")
        assert "at 257 tokens" in report.left[0].detail


@pytest.mark.parametrize(("vector", "reasons"), [(8, {"tokens"}), (16, set())])
def test_the_vector_support_has_kernels_for_many_tokens(stratified_joint, vector, reasons):
    stratified_joint.vector = vector
    gm, _ = prepared(stratified_joint, lambda x, w: x @ w.t(), x_shape=(257, 48))
    report = choose_lowering(gm, "factored", GPU)
    assert {each.reason for each in report.left} == reasons
    assert len(report.replaced) == 3 - 2 * bool(reasons)


@pytest.mark.parametrize(("tokens", "side"), [(24, "<= 256"), (300, "> 256")])
def test_costs_are_compared_where_kernels_are_the_same(stratified_joint, tokens, side):
    """Other kernels are for more than 256 tokens: the graph is of one side, and of one side of equal costs on it."""
    stratified_joint.vector = 16
    gm, _ = prepared(stratified_joint, lambda x, w: x @ w.t(), x_shape=(tokens, 48), mode="symbolic")
    size = next(iter(gm.graph.find_nodes(op="placeholder"))).meta["val"].shape[0]
    choose_lowering(gm, "auto", GPU)
    guards = [str(each.expr) for each in size.node.shape_env.guards if re.search(r"\d{2,}", str(each.expr))]
    assert any(eval(each, {str(size): 256}) != eval(each, {str(size): 257}) for each in guards), side
    assert all(eval(each, {str(size): tokens}) for each in guards)


@pytest.mark.parametrize(("tokens", "other"), [(24, 2000), (300, 24)])
def test_a_symbolic_number_of_tokens_is_guarded_to_what_kernels_are_for(stratified_joint, tokens, other):
    gm, _ = prepared(stratified_joint, lambda x, w: x @ w.t(), x_shape=(tokens, 48), mode="symbolic")
    size = next(iter(gm.graph.find_nodes(op="placeholder"))).meta["val"].shape[0]
    shape_env = size.node.shape_env
    report = choose_lowering(gm, "factored", GPU)
    lowerings = {each.lowering for each in report.replaced + report.left if each.phase == "forward"}
    assert lowerings == {"factored" if tokens <= 256 else "composed"}
    (guard,) = {str(each.expr) for each in shape_env.guards if "256" in str(each.expr)}
    assert eval(guard, {str(size): tokens})
    assert not eval(guard, {str(size): other})


@pytest.mark.parametrize("lowering", ["auto", "factored"])
def test_without_kernels_weights_are_composed(stratified_joint, lowering):
    gm, _ = prepared(stratified_joint, lambda x, w: x @ w.t())
    report = choose_lowering(gm, lowering, torch.device("mps"))
    assert report.replaced == []
    assert {(each.reason, each.lowering) for each in report.left} == {("device", "composed")}
    assert all(each.detail.startswith("no kernel runs on mps, but ATen does") for each in report.left)

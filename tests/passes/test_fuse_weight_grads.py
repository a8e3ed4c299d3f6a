from __future__ import annotations

import pytest
import torch

from slcompile.passes import fuse_weight_grads


def test_graph(stratified_joint):
    gm, _ = stratified_joint.graph(lambda x, w: x @ w.t())
    report = fuse_weight_grads(gm)
    assert [each.shape for each in report.replaced] == [(40, 48)]
    assert report.left == []
    assert stratified_joint.text_of(gm) == [
        "compose = slcompile.compose(b_1, a_1, values_1, support_1, 0.5)",
        "permute = aten.permute(compose, [1, 0])",
        "mm = aten.mm(x_1, permute)",
        "permute_3 = aten.permute(permute, [1, 0])",
        "mm_2 = aten.mm(tangents_1, permute_3)",
        "weight_grads_default = slcompile.weight_grads(tangents_1, x_1, b_1, a_1, values_1, support_1, 0.5)",
        "getitem = getitem(weight_grads_default, 0)",
        "getitem_1 = getitem(weight_grads_default, 1)",
        "getitem_2 = getitem(weight_grads_default, 2)",
    ]


FUNCTIONS = {
    "linear": (lambda x, w: x @ w.t(), (24, 48)),
    "conv1d": (lambda x, w: x @ w, (24, 40)),
    "weight first": (lambda x, w: w @ x, (48, 24)),
    "transposed weight first": (lambda x, w: w.t() @ x, (40, 24)),
    "batched input": (lambda x, w: torch.nn.functional.linear(x, w), (2, 3, 48)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_same_numbers_and_twice_changes_nothing(joint, name, cast):
    function, x_shape = FUNCTIONS[name]
    gm, inputs = joint.graph(function, x_shape, cast=cast)
    expected = gm(*inputs)
    assert len(fuse_weight_grads(gm).replaced) == 1
    assert joint.ours(gm) == ["compose", "weight_grads"]
    # The same products in the same order; in bfloat16 the dense gradient is rounded, fused or not.
    joint.assert_close(gm(*inputs), expected)
    before = joint.text_of(gm)
    again = fuse_weight_grads(gm)
    assert (again.replaced, again.left) == ([], [])
    assert joint.text_of(gm) == before


def test_a_sum_of_gradients_is_left(stratified_joint):
    gm, inputs = stratified_joint.graph(lambda x, w: torch.tanh(x @ w.t()) @ w)
    before, expected = stratified_joint.text_of(gm), gm(*inputs)
    report = fuse_weight_grads(gm)
    assert [(each.reason, each.detail) for each in report.left] == [
        ("not_a_product", "the gradient comes from add, not from one product")
    ]
    assert report.replaced == []
    assert stratified_joint.text_of(gm) == before
    stratified_joint.assert_close(gm(*inputs), expected, eps=0)


def test_a_gradient_that_something_else_reads_is_left(stratified_joint):
    gm, _ = stratified_joint.graph(lambda x, w: x @ w.t())
    (backward,) = [node for node in gm.graph.nodes if "compose_backward" in str(node.target)]
    output = next(iter(reversed(gm.graph.nodes)))
    for read in (backward.args[0], backward.args[0].args[0].args[0]):  # a transpose of the product, the product
        output.args = ((*output.args[0][:5], read),)
        report = fuse_weight_grads(gm)
        assert [each.reason for each in report.left] == ["shared"]
        assert report.replaced == []


def test_another_view_of_the_gradient_is_left(stratified_joint):
    gm, _ = stratified_joint.graph(lambda x, w: x @ w.t()[:, :20])  # a slice of a packed weight
    report = fuse_weight_grads(gm)
    assert [each.reason for each in report.left] == ["not_a_product"]

from __future__ import annotations

import pytest
import torch

from slcompile.passes import choose_lowering, fuse_weight_grads, lower_ops


def test_graph_of_a_factored_matmul_on_cpu(stratified_joint):
    gm, _ = stratified_joint.graph(lambda x, w: x @ w.t())
    fuse_weight_grads(gm)
    choose_lowering(gm, "factored")
    report = lower_ops(gm)
    assert [each.name for each in report.rewritten] == [
        "linear_factored_default",
        "linear_factored_default_1",
        "values_grad_default",
    ]
    assert [line for line in stratified_joint.text_of(gm) if "clone" in line or "sparse" in line] == [
        "clone_default = aten.clone(permute_default_5)",
        "sparse_addmm_default = slcompile.sparse_addmm(b_1, mul_tensor, values_1, support_1, clone_default, False)",
        "permute_default_6 = aten.permute(sparse_addmm_default, [1, 0])",
        "clone_default_1 = aten.clone(permute_default_7)",
        "sparse_addmm_default_1 = slcompile.sparse_addmm(a_1, mul_tensor_1, values_1, support_1, clone_default_1, "
        "True)",
        "permute_default_8 = aten.permute(sparse_addmm_default_1, [1, 0])",
        # Both transposed copies are there already.
        "sparse_dots_default = slcompile.sparse_dots(clone_default_1, clone_default, values_1, support_1)",
    ]


def test_composed_ops_on_cpu(stratified_joint):
    gm, inputs = stratified_joint.graph(lambda x, w: x @ w.t())
    expected = gm(*inputs)
    fuse_weight_grads(gm)
    report = lower_ops(gm)
    assert [each.name for each in report.rewritten] == ["weight_grads_default"]
    assert [(each.name, each.reason) for each in report.skipped] == [("compose", "in_place")]
    assert stratified_joint.ours(gm) == ["compose", "compose_backward"]
    stratified_joint.assert_close(gm(*inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_same_numbers_and_twice_changes_nothing(joint, dtype):
    joint = type(joint)("stratified" if joint.factors[2].dim() == 2 else "uniform", dtype)
    gm, inputs = joint.graph(lambda x, w: torch.addmm(x[0, :40], x, w.t()))
    fuse_weight_grads(gm)
    choose_lowering(gm, "factored")
    expected = gm(*inputs)
    lower_ops(gm)
    # The same ATen calls, before and after.
    joint.assert_close(gm(*inputs), expected, eps=2 * torch.finfo(dtype).eps)
    before = joint.text_of(gm)
    assert lower_ops(gm).rewritten == []
    assert joint.text_of(gm) == before


def test_a_graph_without_our_ops_is_left():
    gm = torch.fx.symbolic_trace(torch.nn.Linear(4, 4))
    before = str(gm.graph)
    report = lower_ops(gm)
    assert (report.rewritten, report.skipped) == ([], [])
    assert str(gm.graph) == before

from __future__ import annotations

import operator

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from slcompile.captured import GraphPasses
from slcompile.config import SLConfig
from slcompile.ops import compose, compose_backward, vector_cpu
from slcompile.passes import choose_lowering, fuse_weight_grads, group_projections, lower_ops
from slcompile.passes.graph import op_name


def test_graph_of_a_factored_matmul_on_cpu(stratified_joint):
    gm, _ = stratified_joint.graph(lambda x, w: x @ w.t())
    fuse_weight_grads(gm)
    choose_lowering(gm, "factored")
    report = lower_ops(gm)
    assert [each.name for each in report.replaced] == [
        "linear_factored_default",
        "linear_factored_default_1",
        "values_grad_default",
    ]
    assert [line for line in stratified_joint.text_of(gm) if "clone" in line or "sparse" in line] == [
        "clone_default = aten.clone(permute_default_5, memory_format=torch.contiguous_format)",
        "sparse_addmm_default = slcompile.sparse_addmm(b_1, addmm_default, values_1, support_1, clone_default, False)",
        "permute_default_6 = aten.permute(sparse_addmm_default, [1, 0])",
        "clone_default_1 = aten.clone(permute_default_7, memory_format=torch.contiguous_format)",
        "sparse_addmm_default_1 = slcompile.sparse_addmm(a_1, addmm_default_1, values_1, support_1, clone_default_1, "
        "True)",
        "permute_default_8 = aten.permute(sparse_addmm_default_1, [1, 0])",
        # Both transposed copies are there already.
        "sparse_dots_default = slcompile.sparse_dots(clone_default_1, clone_default, values_1, support_1)",
    ]


def test_a_result_that_a_higher_order_op_may_read_keeps_its_layout(stratified_joint):
    """Inductor hands those their operands as they come; the lowered product comes transposed."""
    gm, inputs = stratified_joint.graph(lambda x, w: x @ w.t())
    fuse_weight_grads(gm)
    choose_lowering(gm, "factored")
    expected = gm(*inputs)
    (product, *_) = gm.graph.find_nodes(op="call_function", target=torch.ops.slcompile.linear_factored.default)
    (result,) = product.users
    with gm.graph.inserting_after(result):
        run_and_save = torch.ops.higher_order.run_and_save_rng_state
        wrapped = gm.graph.call_function(run_and_save, (torch.ops.aten.sin.default, result))
        wrapped.meta["val"] = None
    with gm.graph.inserting_after(wrapped):
        second = gm.graph.call_function(operator.getitem, (wrapped, 1))
        second.meta["val"] = result.meta["val"]
    (output,) = [node for node in gm.graph.nodes if node.op == "output"]
    output.args = ((*output.args[0], second),)
    report = lower_ops(gm)
    assert [each.name for each in report.replaced] == ["values_grad_default"]
    assert [(each.name, each.reason) for each in report.left] == [
        ("linear_factored_default", "layout"),
        ("linear_factored_default_1", "layout"),
    ]
    gm.recompile()
    *got, sine = gm(*inputs)
    stratified_joint.assert_close(got, expected)
    torch.testing.assert_close(sine, expected[0].sin())


def test_the_cpp_of_the_vector_support_is_compiled_beside_the_graph(joint, monkeypatch):
    calls = []
    monkeypatch.setattr(vector_cpu, "_begin_compiling", lambda *of: calls.append(of))
    gm, _ = joint.graph(lambda x, w: x @ w.t())
    fuse_weight_grads(gm)
    choose_lowering(gm, "factored")
    GraphPasses([lower_ops], SLConfig(), [])(gm.graph)
    assert calls == ([(torch.float32, 16)] * 3 if joint.vector == 16 else [])


def test_composed_ops_on_cpu(stratified_joint):
    gm, inputs = stratified_joint.graph(lambda x, w: x @ w.t())
    expected = gm(*inputs)
    fuse_weight_grads(gm)
    report = lower_ops(gm)
    assert [each.name for each in report.replaced] == ["weight_grads_default"]
    assert [(each.name, each.reason) for each in report.left] == [("compose", "in_place")]
    assert stratified_joint.ours(gm) == ["compose", "compose_backward"]
    stratified_joint.assert_close(gm(*inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_same_numbers_and_twice_changes_nothing(joint, dtype):
    joint = type(joint)(joint.support, dtype)
    gm, inputs = joint.graph(lambda x, w: torch.addmm(x[0, :40], x, w.t()))
    fuse_weight_grads(gm)
    choose_lowering(gm, "factored")
    expected = gm(*inputs)
    lower_ops(gm)
    # The same ATen calls, before and after.
    joint.assert_close(gm(*inputs), expected, eps=2 * torch.finfo(dtype).eps)
    before = joint.text_of(gm)
    assert lower_ops(gm).replaced == []
    assert joint.text_of(gm) == before


@pytest.fixture
def gpu(monkeypatch):
    """A machine with an accelerator, for which tensors on the meta device stand; its Triton driver is ``target``."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))


LAUNCH = torch.ops.higher_order.triton_kernel_wrapper_functional


def on_meta(gm, inputs):
    """The same graph with tensors on the meta device."""
    with FakeTensorMode():
        fakes = [torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta") for each in inputs]
        return make_fx(gm, decomposition_table=select_decomp_table())(*fakes)


def lowered_on_gpu(joint, lowering, function=lambda x, w: x @ w.t(), **kwargs):
    gm = on_meta(*joint.graph(function, **kwargs))
    fuse_weight_grads(gm)
    choose_lowering(gm, lowering)
    group_projections(gm)
    return gm, lower_ops(gm)


@pytest.mark.slow
@pytest.mark.usefixtures("target", "gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lowering", ["composed", "factored"])
@pytest.mark.parametrize("support", ["stratified", "vector", "uniform"])
def test_every_op_becomes_launches_on_a_gpu(stratified_joint, support, lowering, dtype):
    joint = type(stratified_joint)(support, dtype)
    gm, report = lowered_on_gpu(joint, lowering)
    assert joint.ours(gm) == []
    assert report.left == []
    ops = {"composed": ["compose", "weight_grads"], "factored": ["linear_factored", "linear_factored", "values_grad"]}
    expected = ops[lowering]
    if (support, lowering) == ("uniform", "factored"):  # x @ W would scatter, see choose_lowering
        expected = ["compose", "linear_factored", "values_grad"]
    assert sorted(each.name.split("_default")[0] for each in report.replaced) == expected
    assert len(gm.graph.find_nodes(op="call_function", target=LAUNCH)) >= len(expected)
    shapes = [tuple(each.meta["val"].shape) for each in gm.graph.find_nodes(op="output")[0].all_input_nodes]
    values = joint.factors[2].shape
    assert shapes == [(24, 40), (24, 48), (40, 8), (8, 48), tuple(values)]


@pytest.mark.usefixtures("target", "gpu")
@pytest.mark.parametrize(("tokens", "projects"), [(16, 1), (128, 0)])
def test_siblings_of_few_tokens_share_launches_on_a_gpu(tokens, projects):
    def siblings(x, *factors):
        return [x @ compose(*factors[first : first + 4], 0.5).t() for first in (0, 4, 8)]

    shapes = [(tokens, 48), *[(40, 8), (8, 48), (40, 5), (1,)] * 3]
    with FakeTensorMode():
        fakes = [torch.empty(each, device="meta", dtype=torch.int64 if each == (1,) else None) for each in shapes]
        gm = make_fx(siblings)(*fakes)
    choose_lowering(gm, "factored")
    assert [each.matmuls for each in group_projections(gm).replaced] == [3]
    lowered = [each.name for each in lower_ops(gm).replaced]
    assert lowered == ["project_default"] * projects + ["linear_factored_default_3"]


@pytest.mark.usefixtures("target", "gpu")
def test_a_stack_of_matrices_is_composed_by_one_launch_on_a_gpu():
    def experts(x, *factors):
        return torch.bmm(x, compose(*factors, 0.5).mT)

    shapes = [(4, 24, 48), (4, 40, 8), (4, 8, 48), (4, 40, 5), (1,)]
    with FakeTensorMode():
        fakes = [torch.empty(each, device="meta", dtype=torch.int64 if each == (1,) else None) for each in shapes]
        gm = make_fx(experts)(*fakes)
    report = choose_lowering(gm, "factored")
    assert [(each.reason, each.shape, each.lowering) for each in report.left] == [
        ("not_a_product", (4, 40, 48), "composed")
    ]
    lower_ops(gm)
    (launch,) = gm.graph.find_nodes(op="call_function", target=LAUNCH)
    # Experts are further rows; all are multiplied at once.
    assert launch.kwargs["kwargs"]["p_matrix"].meta["val"].shape == (160, 48)
    assert [op_name(node) for node in gm.graph.nodes].count("bmm") == 2  # to compose, and the product


@pytest.mark.usefixtures("target", "gpu")
def test_a_cast_is_folded_into_the_composition_on_a_gpu(stratified_joint):
    gm, _ = lowered_on_gpu(stratified_joint, "composed", lambda x, w: x @ w.t(), cast=torch.bfloat16)
    (launch, *_) = gm.graph.find_nodes(op="call_function", target=LAUNCH)
    assert launch.kwargs["kwargs"]["p_matrix"].meta["val"].dtype == torch.bfloat16
    # Of float32, no matrix unit would multiply anything; what is added is not rounded before.
    assert dtypes_of_products(gm) == {torch.bfloat16}
    assert launch.kwargs["kwargs"]["p_values"].meta["val"].dtype == torch.float32


def products(gm):
    return [node for node in gm.graph.nodes if op_name(node) in ("mm", "addmm", "bmm", "baddbmm")]


def dtypes_of_products(gm):
    return {operand.meta["val"].dtype for node in products(gm) for operand in node.all_input_nodes}


@pytest.mark.usefixtures("target", "gpu")
def test_products_on_a_gpu_read_nothing_that_was_not_written(stratified_joint):
    """Inductor's own matmuls multiply the first operand of an addmm with beta=0: of NaN, that is NaN."""
    gm, _ = lowered_on_gpu(stratified_joint, "composed")
    scaled = [node for node in products(gm) if op_name(node) == "addmm"]
    assert [node.kwargs["beta"] for node in scaled] == [0, 0, 0]
    for node in scaled:
        source = node.args[0]
        while op_name(source) in ("slice", "narrow", "permute", "convert_element_type"):
            source = source.args[0]
        assert source.op == "placeholder" or source in products(gm)


@pytest.mark.usefixtures("target", "gpu")
@pytest.mark.parametrize(
    ("rows", "columns", "strides", "copies"),
    [
        (40, 48, {"W": (48, 1), "G": (48, 1)}, 0),
        # A is copied with aligned rows, once for both that read it; G only where neither axis is aligned.
        (40, 45, {"W": (64, 1), "G": (1, 40)}, 1),
        (37, 48, {"W": (48, 1), "G": (48, 1)}, 0),
        (37, 45, {"W": (64, 1), "G": (64, 1)}, 2),
    ],
)
def test_matrices_on_a_gpu_have_aligned_rows_or_columns(rows, columns, strides, copies):
    """The vendors' fast matmuls need them, and what is not aligned is loaded by two bytes at a time."""

    def step(x, tangent, B, A, values, seed):
        W = compose(B, A, values, seed, 0.5)
        return x @ W.t(), *compose_backward(tangent.t() @ x, B, A, values, seed, 0.5)

    shapes = [(24, columns), (24, rows), (rows, 8), (8, columns), (rows, 5), (1,)]
    with FakeTensorMode():
        fakes = [
            torch.empty(each, device="meta", dtype=torch.int64 if each == (1,) else torch.bfloat16) for each in shapes
        ]
        gm = make_fx(step)(*fakes)
    fuse_weight_grads(gm)
    lower_ops(gm)
    launches = gm.graph.find_nodes(op="call_function", target=LAUNCH)
    found = [launch.kwargs["kwargs"]["p_matrix"].meta["val"].stride() for launch in launches]
    assert found == [strides["W"], strides["G"]]
    assert sum(op_name(node) in ("constant_pad_nd", "clone", "cat") for node in gm.graph.nodes) == copies


@pytest.mark.parametrize("lacking", ["device", "triton"])
@pytest.mark.parametrize("lowering", ["auto", "factored"])
def test_aten_runs_where_kernels_do_not(stratified_joint, monkeypatch, lowering, lacking):
    kind = torch.device("mps" if lacking == "device" else "cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: kind)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("slcompile.cost.devices.has_triton", lambda: lacking != "triton")
    gm, report = lowered_on_gpu(stratified_joint, lowering)
    assert stratified_joint.ours(gm) == ["compose", "compose_backward"]
    why = {"device": "no kernel runs on meta, but ATen does", "triton": "Triton is not installed"}[lacking]
    assert [(each.name, each.reason) for each in report.left] == [("compose", "in_place")]
    assert [each.detail for each in report.left] == [f"compose runs its ATen implementation: {why}"]
    assert [each.detail for each in report.replaced] == [why]
    assert gm.graph.find_nodes(op="call_function", target=LAUNCH) == []


@pytest.mark.usefixtures("target", "gpu")
@pytest.mark.parametrize("lowering", ["composed", "factored"])
def test_float64_runs_in_aten_on_a_gpu(stratified_joint, lowering):
    joint = type(stratified_joint)("stratified", torch.float64)
    gm, report = lowered_on_gpu(joint, lowering)
    assert joint.ours(gm) == ["compose", "compose_backward"]
    assert [(each.name, each.reason) for each in report.left] == [("compose", "in_place")]
    assert gm.graph.find_nodes(op="call_function", target=LAUNCH) == []


def test_a_graph_without_our_ops_is_left():
    gm = torch.fx.symbolic_trace(torch.nn.Linear(4, 4))
    before = str(gm.graph)
    report = lower_ops(gm)
    assert (report.replaced, report.left) == ([], [])
    assert str(gm.graph) == before


@pytest.mark.usefixtures("target", "gpu")
def test_an_op_that_is_told_strides_reads_no_gaps_on_a_gpu():
    def step(B, A, values, seed):
        W = compose(B, A, values, seed, 0.5)
        return W.as_strided((39, 45), (45, 1), 45), W.sum()

    with FakeTensorMode():
        fakes = [torch.empty(each, device="meta", dtype=torch.bfloat16) for each in ((40, 8), (8, 45), (40, 5))]
        gm = make_fx(step)(*fakes, torch.empty(1, device="meta", dtype=torch.int64))
    lower_ops(gm)
    (launch,) = gm.graph.find_nodes(op="call_function", target=LAUNCH)
    assert launch.kwargs["kwargs"]["p_matrix"].meta["val"].stride() == (64, 1)
    (rows,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.as_strided.default)
    assert rows.args[0].meta["val"].stride() == (45, 1)

"""Matmuls read the padded transposed copy of an activation; what something else reads, or made, stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from slcompile.passes import read_transposed
from slcompile.passes.graph import op_name

pytest.importorskip("triton")
from slcompile.kernels.vector_products import tokens_side_by_side

T, K, R = 24, 40, 8


def graph(function, *shapes) -> tuple[fx.GraphModule, list[Tensor]]:
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in shapes]
    gm = make_fx(function, tracing_mode="fake", decomposition_table=select_decomp_table())(*inputs)
    assert any(op_name(node) == "constant_pad_nd" for node in gm.graph.nodes)
    return gm, inputs


def activation(x: Tensor, gate: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * x


def readers_of(gm: fx.GraphModule, name: str) -> list[str]:
    (node,) = (each for each in gm.graph.nodes if each.name == name)
    return [op_name(user) for user in node.users]


def test_an_activation_is_read_by_its_copy_alone_also_where_the_copy_came_last():
    def forward(x, gate, A, left):
        y = activation(x, gate)
        hidden = torch.addmm(A[:1, :1], y, A.t(), beta=0, alpha=0.5)
        return hidden, left.t() @ y, tokens_side_by_side(y)

    gm, inputs = graph(forward, (T, K), (T, K), (R, K), (T, R))
    expected = gm(*inputs)
    (replaced,) = read_transposed(gm).replaced
    gm.graph.lint()
    assert replaced.shape == (T, K)
    assert readers_of(gm, replaced.node) == ["constant_pad_nd"]
    products = [node for node in gm.graph.nodes if op_name(node) in ("mm", "addmm")]
    assert replaced.detail == ", ".join(each.name for each in products)
    assert [op_name(each.args[1]) for each in products] == ["slice", "slice"]
    for node in gm.graph.nodes:
        if node.op == "call_function":
            assert node.meta["val"].shape == node.target(*_values(node.args), **_values(node.kwargs)).shape
    found = gm(*inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[2], expected[2])
    again = read_transposed(gm)
    assert (again.replaced, again.left) == ([], [])


def _values(args):
    return fx.node.map_arg(args, lambda node: node.meta["val"])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, gate, A: (x @ A.t(), tokens_side_by_side(x)), ("there", "placeholder made it")),
        (lambda x, gate, A: ((y := x @ x.t() @ gate) @ A.t(), tokens_side_by_side(y)), ("there", "mm made it")),
        (
            lambda x, gate, A: ((y := activation(x, gate)) @ A.t(), y, tokens_side_by_side(y)),
            ("read", "output reads it"),
        ),
        (
            lambda x, gate, A: ((y := activation(x, gate)) @ A.t(), y.sum(1), tokens_side_by_side(y)),
            ("read", "sum reads it"),
        ),
        (lambda x, gate, A: tokens_side_by_side(activation(x, gate)), None),  # only the copy reads it
    ],
    ids=["an input", "a product", "returned", "summed", "no product"],
)
def test_what_is_needed_itself_is_left(function, reason):
    gm, inputs = graph(function, (T, K), (T, K), (R, K))
    before, code = gm(*inputs), gm.code
    report = read_transposed(gm)
    assert report.replaced == []
    assert [(each.reason, each.detail.split(",")[0].split(":")[0]) for each in report.left] == (
        [reason] if reason else []
    )
    assert gm.code == code
    torch.testing.assert_close(gm(*inputs), before)


def test_a_copy_that_is_not_padded_or_is_read_by_others_is_another_matter():
    def forward(x, gate, A):
        y = activation(x, gate)
        padded = torch.nn.functional.pad(y, (0, 3))
        copy = torch.nn.functional.pad(y, (0, 0, 0, 40)).t().contiguous()
        return (
            y @ A.t(),
            padded.t().contiguous().as_strided((3, 3), (1, 3)),
            copy.sum(),
            copy.as_strided((2, 2), (2, 1)),
        )

    gm, _ = graph(forward, (T, K), (T, K), (R, K))
    report = read_transposed(gm)
    assert (report.replaced, report.left) == ([], [])


@pytest.mark.parametrize(
    ("padding", "strides"),
    [(3, (1, K)), (-3, (T - 3, 1))],
    ids=["read in another layout", "cut"],
)
def test_a_copy_of_the_models_own_that_does_not_hold_the_activation_is_another_matter(padding, strides):
    def forward(x, gate, A):
        y = activation(x, gate)
        copy = torch.nn.functional.pad(y, (0, 0, 0, padding)).t().contiguous()
        return y @ A.t(), copy.as_strided(copy.shape, strides)

    gm, inputs = graph(forward, (T, K), (T, K), (R, K))
    expected = gm(*inputs)
    report = read_transposed(gm)
    assert (report.replaced, report.left) == ([], [])
    torch.testing.assert_close(gm(*inputs), expected)

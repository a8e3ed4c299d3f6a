"""Convolutions with kernels of size 1 as matmuls: the same numbers, and only where that is legal and pays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slcompile.passes import choose_lowering, flatten_convolutions, fuse_weight_grads
from tests.passes.conftest import Joint, K, N


def with_bias(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w.view(N, K, 1, 1), torch.linspace(-1, 1, N, dtype=x.dtype))


FLATTENED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "2d": (lambda x, w: F.conv2d(x, w.view(N, K, 1, 1)), (2, K, 3, 5)),
    "bias": (with_bias, (2, K, 3, 5)),
    "dilated": (lambda x, w: F.conv2d(x, w.view(N, K, 1, 1), dilation=3), (1, K, 3, 5)),
    "channels last": (
        lambda x, w: F.conv2d(x.contiguous(memory_format=torch.channels_last), w.view(N, K, 1, 1)), (2, K, 3, 5)
    ),
    "one position": (lambda x, w: F.conv2d(x, w.view(N, K, 1, 1)), (2, K, 1, 1)),
    "one position, channels last": (
        lambda x, w: F.conv2d(x.contiguous(memory_format=torch.channels_last), w.view(N, K, 1, 1)), (2, K, 1, 1)
    ),
    "1d": (lambda x, w: F.conv1d(x, w.view(N, K, 1)), (2, K, 7)),
    "3d": (lambda x, w: F.conv3d(x, w.view(N, K, 1, 1, 1)), (2, K, 3, 1, 2)),
    "viewed afterwards": (lambda x, w: F.conv2d(x, w.view(N, K, 1, 1)).flatten(1).view(2, -1), (2, K, 3, 5)),
}  # fmt: skip


def calls(gm: torch.fx.GraphModule) -> list[str]:
    return [
        str(node.target).split(".")[1]
        for node in gm.graph.nodes
        if node.op == "call_function" and "." in str(node.target)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", FLATTENED)
def test_the_products_and_all_gradients_are_matmuls_with_the_same_numbers(name: str, joint: Joint) -> None:
    function, size = FLATTENED[name]
    gm, inputs = joint.graph(function, size)
    expected = gm(*inputs)
    report = flatten_convolutions(gm, "factored")
    assert [(each.shape, each.matmuls, each.reason) for each in report.replaced] == [
        ((N, K) + (1,) * (len(size) - 2), 2, "")
    ]
    gm.graph.lint()
    assert not {"convolution", "convolution_backward"} & set(calls(gm))
    found = gm(*inputs)
    joint.assert_close(found, expected)
    # Convolutions after it choose their layouts by these strides, also of one position, and were traced with them.
    assert [each.stride() for each in found] == [each.stride() for each in expected]
    # Nothing is left to do, and the later passes know the products: each is factored.
    assert not flatten_convolutions(gm, "factored").replaced
    assert len(fuse_weight_grads(gm).replaced) == 1
    assert len(choose_lowering(gm, "factored").replaced) == 3
    assert "compose" not in joint.ours(gm)
    joint.assert_close(gm(*inputs), expected)


def test_a_weight_that_a_cast_changes_is_left(stratified_joint: Joint) -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w.view(N, K, 1, 1).to(torch.float8_e4m3fn).to(x.dtype))

    gm, inputs = stratified_joint.graph(function, (2, K, 3, 5))
    expected = gm(*inputs)
    assert not flatten_convolutions(gm, "factored").replaced
    assert not fuse_weight_grads(gm).replaced
    stratified_joint.assert_close(gm(*inputs), expected)


def test_graph(stratified_joint: Joint) -> None:
    gm, _ = stratified_joint.graph(FLATTENED["channels last"][0], (2, K, 3, 5))
    flatten_convolutions(gm, "factored")
    found = calls(gm)
    assert found.count("mm") == 3
    assert found.count("clone") == 2  # which the function asks for, and of the tangents, which lie otherwise


def test_a_cast_weight_is_multiplied_in_its_dtype(joint: Joint) -> None:
    gm, inputs = joint.graph(FLATTENED["2d"][0], (2, K, 3, 5), cast=torch.bfloat16)
    expected = gm(*inputs)
    assert flatten_convolutions(gm, "factored").replaced
    joint.assert_close(gm(*inputs), expected, eps=2**-7)
    assert len(fuse_weight_grads(gm).replaced) == 1


LEFT: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], str, str]] = {
    "kernel": (lambda x, w: F.conv2d(x, w.view(N, 12, 2, 2)), (2, 12, 3, 5), "factored", "not_pointwise"),
    "stride": (lambda x, w: F.conv2d(x, w.view(N, K, 1, 1), stride=2), (2, K, 3, 5), "factored", "not_pointwise"),
    "padding": (lambda x, w: F.conv2d(x, w.view(N, K, 1, 1), padding=1), (2, K, 3, 5), "factored", "not_pointwise"),
    "groups": (lambda x, w: F.conv2d(x, w.view(N, K, 1, 1), groups=2), (2, 2 * K, 3, 5), "factored", "not_pointwise"),
    "another view": (lambda x, w: F.conv2d(x, w.view(2 * N, 24, 1, 1)), (2, 24, 3, 5), "factored", "not_pointwise"),
    "composed": (FLATTENED["2d"][0], (2, K, 3, 5), "composed", "asked_for"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_and_why(name: str, stratified_joint: Joint) -> None:
    function, size, lowering, reason = LEFT[name]
    gm, _ = stratified_joint.graph(function, size)
    before = stratified_joint.text_of(gm)
    report = flatten_convolutions(gm, lowering)
    assert [each.reason for each in report.left] == [reason]
    assert stratified_joint.text_of(gm) == before


def test_the_cost_model_decides() -> None:
    """At few positions composing is most of the time; at many, so large a rank is slower than the weight itself."""
    joint = Joint()
    decisions = []
    for positions in (2, 4000):
        gm, _ = joint.graph(FLATTENED["1d"][0], (1, K, positions))
        report = flatten_convolutions(gm)
        (decision,) = [*report.replaced, *report.left]
        costs = decision.costs
        assert (costs["factored"] < costs["composed"]) == bool(report.replaced)
        assert decision.reason == ("" if report.replaced else "slower")
        decisions.append(costs["factored"] / costs["composed"])
    assert decisions[0] < decisions[1]


def test_with_sizes_that_are_symbols(stratified_joint: Joint) -> None:
    gm, inputs = stratified_joint.graph(FLATTENED["bias"][0], (2, K, 3, 5), mode="symbolic")
    expected = gm(*inputs)
    assert flatten_convolutions(gm, "factored").replaced
    stratified_joint.assert_close(gm(*inputs), expected)

from __future__ import annotations

from collections.abc import Callable
from textwrap import dedent
from typing import Any

import pytest
import torch
from functorch.compile import (
    aot_function,
    default_partition,
    make_boxed_func,
    min_cut_rematerialization_partition,
    nop,
)
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy

from slcompile.ops import compose
from slcompile.passes import recompute_weights
from slcompile.passes.graph import Decision, PassReport
from tests.testing import text_of

FACTORS = (torch.ones(8, 2), torch.ones(2, 6), torch.ones(8, 3), torch.tensor([5]))
x_TK = torch.ones(5, 6)


def weight(B: Tensor, A: Tensor, values: Tensor, seed: Tensor) -> Tensor:
    return compose(B, A, values, seed, 0.5)


def traced_in_a_checkpointed_region(function: Callable[..., object], *args: Tensor) -> fx.GraphModule:
    """A graph as AOTAutograd would hand it over: every node lies in a region, and is to be kept."""
    gm = make_fx(function)(*args)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta["ac_graph_id"] = 1
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return gm


def tagged(gm: fx.GraphModule) -> list[str]:
    """Names of the nodes to recompute. Those and no others have left their checkpointed region."""
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    recomputed = [node.name for node in calls if node.meta["recompute"] is CheckpointPolicy.MUST_RECOMPUTE]
    assert recomputed == [node.name for node in calls if "ac_graph_id" not in node.meta]
    return recomputed


def tags_of(function: Callable[..., object], *args: Tensor) -> list[str]:
    gm = traced_in_a_checkpointed_region(function, *args)
    recompute_weights(gm)
    return tagged(gm)


def test_graph_and_tags() -> None:
    def function(x: Tensor, B: Tensor, A: Tensor, values: Tensor, seed: Tensor) -> Tensor:
        return x.bfloat16() @ weight(B, A, values, seed).bfloat16().t()

    gm = traced_in_a_checkpointed_region(function, x_TK, *FACTORS)
    report = recompute_weights(gm)
    # Only meta changes.
    assert text_of(gm) == dedent("""\
        graph():
            %x_1 = placeholder[target=x_1]
            %b_1 = placeholder[target=B_1]
            %a_1 = placeholder[target=A_1]
            %values_1 = placeholder[target=values_1]
            %seed_1 = placeholder[target=seed_1]
            %_to_copy = call_function[target=torch.ops.aten._to_copy.default](args = (%x_1,), kwargs = {dtype: torch.bfloat16})
            %compose = call_function[target=torch.ops.slcompile.compose.default](args = (%b_1, %a_1, %values_1, %seed_1, 0.5), kwargs = {})
            %_to_copy_1 = call_function[target=torch.ops.aten._to_copy.default](args = (%compose,), kwargs = {dtype: torch.bfloat16})
            %t = call_function[target=torch.ops.aten.t.default](args = (%_to_copy_1,), kwargs = {})
            %mm = call_function[target=torch.ops.aten.mm.default](args = (%_to_copy, %t), kwargs = {})
            return mm""")  # noqa: E501  # a graph's lines are as long as they are
    assert tagged(gm) == ["compose", "_to_copy_1", "t"]
    assert report == PassReport(replaced=[Decision("compose", shape=(8, 6))])


def test_concatenation_of_weights_is_tagged() -> None:
    def function(x: Tensor, *factors: Tensor) -> Tensor:
        return F.linear(x, torch.cat([weight(*factors), 2 * weight(*factors).permute(0, 1)]))

    assert tags_of(function, x_TK, *FACTORS) == ["compose", "compose_1", "permute", "mul", "cat", "t"]


@pytest.mark.parametrize("other", [x_TK, torch.ones(3, 6)], ids=["activation", "dense weight"])
def test_concatenation_with_another_input_is_left_alone(other: Tensor) -> None:
    def function(x: Tensor, other: Tensor, *factors: Tensor) -> Tensor:
        return F.linear(x, torch.cat([weight(*factors), other]))

    assert tags_of(function, x_TK, other, *FACTORS) == ["compose"]


def test_product_with_an_activation_and_what_follows_it_is_left_alone() -> None:
    def function(x: Tensor, *factors: Tensor) -> Tensor:
        return F.linear(x, weight(*factors)).relu().t()

    assert tags_of(function, x_TK, *FACTORS) == ["compose", "t"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, *factors: F.linear(x, torch.randn(8, 6)),
        lambda x, *factors: (factors[0].t() @ (factors[0] @ factors[1])).relu(),
    ],
    ids=["dense weight", "factors alone"],
)
def test_graph_without_weight_ops_is_left_alone(function: Callable[..., Tensor]) -> None:
    gm = traced_in_a_checkpointed_region(function, x_TK, *FACTORS)
    report = recompute_weights(gm)
    assert tagged(gm) == []
    assert report == PassReport()


def test_twice_changes_nothing() -> None:
    gm = traced_in_a_checkpointed_region(lambda x, *factors: F.linear(x, weight(*factors)), x_TK, *FACTORS)
    first = recompute_weights(gm)
    text, tags = text_of(gm), tagged(gm)
    assert recompute_weights(gm) == first
    assert (text_of(gm), tagged(gm)) == (text, tags)


def kept_by_the_partitioner(*, with_pass: bool) -> list[tuple[int, ...]]:
    """Shapes of what the partitioner keeps between the forward and the backward pass."""
    saved: list[tuple[int, ...]] = []

    def partition(joint: fx.GraphModule, inputs: object, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        if with_pass:
            recompute_weights(joint)
        return min_cut_rematerialization_partition(joint, inputs, **options)

    def record_outputs(gm: fx.GraphModule, _: object) -> fx.GraphModule:
        (outputs,) = gm.graph.output_node().args
        saved.extend(tuple(node.meta["val"].shape) for node in outputs[1:])  # the first is the function's own
        return gm

    def function(x: Tensor, B: Tensor, A: Tensor, values: Tensor, seed: Tensor) -> Tensor:
        return F.linear(x.tanh(), weight(B, A, values, seed))

    *trained, seed = (x_TK, *FACTORS)
    trained = [each.clone().requires_grad_() for each in trained]
    compiled = aot_function(function, record_outputs, nop, partition_fn=partition)
    compiled(*trained, seed).sum().backward()
    return saved


def test_partitioner_keeps_no_composed_weight() -> None:
    shape = (8, 6)
    assert shape in kept_by_the_partitioner(with_pass=False)
    assert shape not in kept_by_the_partitioner(with_pass=True)


def partitioned(
    function: Callable[..., Tensor], *, keep: bool, partition: Callable[..., Any]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graphs of forward and backward of a function of an activation and factors."""
    graphs: list[fx.GraphModule] = []

    def after_the_pass(joint: fx.GraphModule, inputs: object, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        recompute_weights(joint, keep)
        return partition(joint, inputs, **options)

    def record(gm: fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    *trained, seed = (x_TK, *FACTORS)
    trained = [each.clone().requires_grad_() for each in trained]
    aot_function(function, record, record, partition_fn=after_the_pass)(*trained, seed).sum().backward()
    forward, backward = graphs
    return forward, backward


def saved_weights(forward: fx.GraphModule) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and sizes, in ascending order, of what is saved and as large as the weight or a view of it."""
    (outputs,) = forward.graph.output_node().args
    values = [node.meta["val"] for node in outputs[1:]]  # the first is the function's own
    return [(each.dtype, tuple(sorted(each.shape))) for each in values if each.numel() == 8 * 6]


def composed(gm: fx.GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=torch.ops.slcompile.compose.default))


def concatenated(W: Tensor) -> Tensor:
    return torch.cat([W[4:], W[:4]])


# What an activation meets: the weight, its cast, or a concatenation of its parts.
MET = {
    "weight": (lambda x, *factors: F.linear(x.tanh(), weight(*factors)), torch.float32),
    "cast": (lambda x, *factors: F.linear(x.tanh().bfloat16(), weight(*factors).bfloat16()), torch.bfloat16),
    "concatenation": (lambda x, *factors: F.linear(x.tanh(), concatenated(weight(*factors))), torch.float32),
}
DEFAULT = pytest.param(default_partition, id="default")
MIN_CUT = pytest.param(min_cut_rematerialization_partition, id="min cut")


@pytest.mark.parametrize("partition", [DEFAULT, MIN_CUT])
@pytest.mark.parametrize("name", MET)
def test_keep_saves_what_an_activation_meets(name: str, partition: Callable[..., Any]) -> None:
    function, dtype = MET[name]
    forward, backward = partitioned(function, keep=True, partition=partition)
    # Once, and not what leads to it: the float32 weight of a cast, the weight of a concatenation.
    assert saved_weights(forward) == [(dtype, (6, 8))]
    assert (composed(forward), composed(backward)) == (1, 0)


@pytest.mark.parametrize("partition", [DEFAULT, MIN_CUT])
@pytest.mark.parametrize("name", MET)
def test_without_keep_the_backward_composes_again(name: str, partition: Callable[..., Any]) -> None:
    function, _ = MET[name]
    forward, backward = partitioned(function, keep=False, partition=partition)
    assert saved_weights(forward) == []
    assert (composed(forward), composed(backward)) == (1, 1)

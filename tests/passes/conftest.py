"""Graphs of forward and backward, as AOTAutograd hands them over."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from slcompile.ops import compose
from tests.testing import drawn, support_of

SCALE = 0.5
N, K, R, T = 40, 48, 8, 24


class Joint:
    """Graphs of a function of x and a weight [N, K] of rank R, and of its gradients.

    A graph takes ``x, tangents, B, A, values, support`` and returns ``y, dx, dB, dA, dvalues``.
    """

    def __init__(self, support: str = "stratified", dtype: torch.dtype = torch.float32) -> None:
        where, shape = support_of(support, N, K, 0.1, seed=7)
        self.support, self.vector = support, 16 if support == "vector" else 1
        self.factors = [*drawn([(N, R), (R, K), shape], dtype, seed=0), where]
        self.dtype = dtype

    def graph(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        x_shape: Sequence[int] = (T, K),
        *,
        mode: str = "fake",
        cast: torch.dtype | None = None,
    ) -> tuple[fx.GraphModule, list[Tensor]]:
        """The joint graph of ``function(x, weight)`` and inputs for it; with ``cast``, the weight is cast to it."""
        (x,) = drawn([x_shape], cast or self.dtype, seed=1)
        y = function(x, torch.zeros(N, K, dtype=x.dtype))
        (tangents,) = drawn([y.shape], y.dtype, seed=2)

        def joint(x, tangents, B, A, values, support):
            leaves = [each.detach().requires_grad_() for each in (x, B, A, values)]
            weight = compose(*leaves[1:], support, SCALE, vector=self.vector)
            y = function(leaves[0], weight if cast is None else weight.to(cast))
            return (y.detach(), *torch.autograd.grad(y, leaves, tangents))

        inputs = [x, tangents, *self.factors]
        gm = make_fx(joint, tracing_mode=mode, decomposition_table=select_decomp_table())(*inputs)
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
            node.replace_all_uses_with(node.args[0])
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return gm, inputs

    @staticmethod
    def text_of(gm: fx.GraphModule) -> list[str]:
        """The calls of a graph: ``name = op(arguments)``."""
        lines = []
        for node in gm.graph.nodes:
            if node.op == "call_function":
                target = re.sub(r"<built-in function (\w+)>", r"\1", str(node.target)).removesuffix(".default")
                keywords = [f"{key}={value}" for key, value in node.kwargs.items()]
                lines.append(f"{node.name} = {target}({', '.join([*map(str, node.args), *keywords])})")
        return lines

    @staticmethod
    def ours(gm: fx.GraphModule) -> list[str]:
        """Our ops in a graph, in order."""
        return [str(node.target).split(".")[1] for node in gm.graph.nodes if str(node.target).startswith("slcompile.")]

    @staticmethod
    def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], eps: float = 2**-20) -> None:
        """Both are sums of at most 48 products of numbers of about 1; ``eps`` is relative to a result's norm."""
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            assert float((ours.double() - theirs.double()).norm()) <= eps * float(theirs.double().norm())


@pytest.fixture(params=["stratified", "vector", "uniform"])
def joint(request: pytest.FixtureRequest) -> Joint:
    return Joint(request.param)


@pytest.fixture
def stratified_joint() -> Joint:
    return Joint()

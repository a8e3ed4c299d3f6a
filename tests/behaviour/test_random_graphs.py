"""Random graphs of products, views, casts and elementwise ops compute what they compute in eager mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytestmark = pytest.mark.slow

WIDTHS = (32, 45, 64)


class Program(nn.Module):
    """A chain of steps, each a method of that name, over weights that several of them may read.

    Args:
        steps: (name, width that a product leads to, number of the weight of that shape, a number to vary it by).
        width: Of the input.
    """

    def __init__(self, steps: list[tuple[str, int, int, int]], width: int) -> None:
        super().__init__()
        self.steps = []
        random = torch.Generator().manual_seed(0)
        for name, out, number, variant in steps:
            is_product = name in PRODUCTS
            weight = f"w{number}_{max(width, out)}_{min(width, out)}" if is_product else ""
            if is_product and weight not in self._parameters:
                shape = (max(width, out), min(width, out))
                self.register_parameter(weight, nn.Parameter(torch.randn(shape, generator=random) / 8))
            self.steps.append((name, weight, out, variant))
            width = out if is_product else width

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for name, weight, out, variant in self.steps:
            h = self.product(name, h, weight, out, variant) if weight else getattr(self, name)(h, variant)
        return h

    def product(self, name: str, h: Tensor, weight: str, out: int, variant: int) -> Tensor:
        W = getattr(self, weight)
        # As [out, in] or [in, out]: a square weight is read as either.
        swapped = W.shape[0] != out or (W.shape[0] == W.shape[1] and variant % 2 == 1)
        return getattr(self, name)(h, W.t() if swapped else W, variant)

    def linear(self, h: Tensor, W: Tensor, variant: int) -> Tensor:
        return F.linear(h, W, W.new_ones(W.shape[0]) if variant % 3 == 0 else None)

    def matmul(self, h: Tensor, W: Tensor, variant: int) -> Tensor:
        return h @ W.mT if variant % 3 else torch.matmul(h, W.transpose(-1, -2).contiguous())

    def left(self, h: Tensor, W: Tensor, variant: int) -> Tensor:
        return (W @ h.mT).mT

    def addmm(self, h: Tensor, W: Tensor, variant: int) -> Tensor:
        added = (W.new_ones(W.shape[0]), W.new_ones(1, 1), h.flatten(0, -2)[:, :1])[variant % 3]
        return torch.addmm(added, h.flatten(0, -2), W.t()).unflatten(0, h.shape[:-1])

    def einsum(self, h: Tensor, W: Tensor, variant: int) -> Tensor:
        equation = ("...i,oi->...o", "oi,...i->...o", "...i,oi->o...")[variant % 3]
        operands = (W, h) if variant % 3 == 1 else (h, W)
        result = torch.einsum(equation, *operands)
        return result.movedim(0, -1) if variant % 3 == 2 else result

    def bmm(self, h: Tensor, W: Tensor, variant: int) -> Tensor:
        batched = h if h.dim() == 3 else h[None]
        many = W.t().expand(batched.shape[0], -1, -1)
        result = torch.bmm(batched, many) if variant % 2 else torch.baddbmm(batched[:, :, :1], batched, many)
        return result.view(*h.shape[:-1], W.shape[0])

    def slices(self, h: Tensor, W: Tensor, variant: int) -> Tensor:
        if variant % 2:
            return torch.cat([F.linear(h, part) for part in W.split([16, W.shape[0] - 16])], -1)
        return F.linear(h[..., :16], W[:, :16]) + F.linear(h[..., 16:], W[:, 16:])

    def views(self, h: Tensor, W: Tensor, variant: int) -> Tensor:
        W = W.clone() if variant % 2 else W.reshape(1, *W.shape).transpose(1, 2).squeeze(0).t()
        return F.linear(h, W)

    def cast(self, h: Tensor, W: Tensor, variant: int) -> Tensor:
        dtype = torch.bfloat16 if variant % 2 and h.dtype is torch.float32 else torch.float64
        return F.linear(h.to(dtype), W.to(dtype)).to(h.dtype)

    def broken(self, h: Tensor, W: Tensor, variant: int) -> Tensor:
        torch._dynamo.graph_break()
        return F.linear(h, W)

    def gated(self, h: Tensor, W: Tensor, variant: int) -> Tensor:
        return F.linear(h, torch.sin(W) if variant % 2 else W) * W.sum()

    def activate(self, h: Tensor, variant: int) -> Tensor:
        return (torch.tanh, F.gelu, torch.sin, F.softplus)[variant % 4](h)

    def normalise(self, h: Tensor, variant: int) -> Tensor:
        return F.layer_norm(h, h.shape[-1:]) if variant % 2 else h.softmax(-1)

    def combine(self, h: Tensor, variant: int) -> Tensor:
        return (h + h.flip(0), h * torch.cos(h), torch.maximum(h, h.roll(1, -1)), h / (1 + h.square()))[variant % 4]

    def turn(self, h: Tensor, variant: int) -> Tensor:
        return h.transpose(0, 1).contiguous() if variant % 2 and h.dim() == 3 else h.transpose(0, -2)


PRODUCTS = ("linear", "matmul", "left", "addmm", "einsum", "bmm", "slices", "views", "cast", "broken", "gated")
OTHERS = ("activate", "normalise", "combine", "turn")

step = st.tuples(
    st.one_of(st.sampled_from(PRODUCTS), st.sampled_from(OTHERS)),
    st.sampled_from(WIDTHS),
    st.integers(0, 1),
    st.integers(0, 11),
)
programs = st.lists(step, min_size=2, max_size=8).filter(lambda steps: any(name in PRODUCTS for name, *_ in steps))
shapes = st.one_of(st.tuples(st.integers(1, 20)), st.tuples(st.integers(1, 4), st.integers(1, 9)))
options = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 12),
        "density": st.sampled_from((0.02, 0.1)),
        "support": st.sampled_from(("stratified", "vector", "uniform")),
        "lowering": st.sampled_from(("composed", "factored", "auto")),
        "keep_weights": st.booleans(),
    }
)
few = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def check(assert_eager, steps, width, shape, options) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Program(steps, width)
    compiled = torch.compile(model, backend="sltrain", options={**options, "init": "spectral"})
    x = torch.randn(*shape, width)
    low = any(name == "cast" and variant % 2 for name, _, _, variant in steps)
    for _ in range(2):  # the call that converts, and one of the converted model
        assert_eager(compiled, model, (x,), eps=2**-5 if low else 2**-18)


@settings(max_examples=16, **few)
@given(programs, st.sampled_from(WIDTHS), shapes, options)
def test_random_graphs_compute_what_eager_mode_does(aten_kernels, assert_eager, steps, width, shape, options):
    check(assert_eager, steps, width, shape, options)


@settings(max_examples=2, **few)
@given(programs, st.sampled_from(WIDTHS), shapes, options)
def test_random_graphs_in_generated_code(assert_eager, steps, width, shape, options):
    check(assert_eager, steps, width, shape, options)

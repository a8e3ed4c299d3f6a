"""Random programs of products, views, casts, in-place ops and elementwise ops, and the options to train them with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTHS = (32, 37, 45, 64)
Step = tuple[str, int, int, int]


class Program(nn.Module):
    """A chain of steps, each a method of that name, over weights that several of them may read.

    Args:
        steps: (name, width that a product leads to, number of the weight of that shape, a number to vary it by).
        width: Of the input.
    """

    def __init__(self, steps: list[Step], width: int) -> None:
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
        h, seen = x, [x]
        for name, weight, out, variant in self.steps:
            if weight:
                h = self.product(name, h, weight, out, variant)
            elif name == "skip":
                h = self.skip(h, seen, variant)
            else:
                h = getattr(self, name)(h, variant)
            seen.append(h)
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
        dtype = torch.bfloat16 if is_low("cast", variant) and h.dtype is torch.float32 else torch.float64
        return F.linear(h.to(dtype), W.to(dtype)).to(h.dtype)

    def broken(self, h: Tensor, W: Tensor, variant: int) -> Tensor:
        torch._dynamo.graph_break()
        return F.linear(h, W)

    def gated(self, h: Tensor, W: Tensor, variant: int) -> Tensor:
        return F.linear(h, torch.sin(W) if variant % 2 else W) * W.sum()

    def siblings(self, h: Tensor, W: Tensor, variant: int) -> Tensor:
        """Two products of one input, with one weight or with it and its double."""
        first, second = F.linear(h, W), F.linear(h, W if variant % 2 else 2 * W)
        return torch.sigmoid(first) * second if variant % 3 else first + second.flip(-1)

    def written(self, h: Tensor, W: Tensor, variant: int) -> Tensor:
        """A product that is written over a part of a buffer, or added to it in place."""
        result = F.linear(h, W)
        buffer = result.new_zeros(2, *result.shape)
        buffer[variant % 2] = result
        buffer[1 - variant % 2].add_(result, alpha=0.5)
        return buffer.sum(0)

    def rows(self, h: Tensor, W: Tensor, variant: int) -> Tensor:
        """Some rows of the weight as an embedding's, beside its product."""
        found = F.embedding(torch.arange(h.shape[0]) * (variant + 1) % W.shape[0], W)
        return F.linear(h, W) + found.mean()

    def activate(self, h: Tensor, variant: int) -> Tensor:
        return (torch.tanh, F.gelu, torch.sin, F.softplus)[variant % 4](h)

    def normalise(self, h: Tensor, variant: int) -> Tensor:
        return F.layer_norm(h, h.shape[-1:]) if variant % 2 else h.softmax(-1)

    def combine(self, h: Tensor, variant: int) -> Tensor:
        return (h + h.flip(0), h * torch.cos(h), torch.logaddexp(h, h.roll(1, -1)), h / (1 + h.square()))[variant % 4]

    def turn(self, h: Tensor, variant: int) -> Tensor:
        return h.transpose(0, 1).contiguous() if variant % 2 and h.dim() == 3 else h.transpose(0, -2)

    def inplace(self, h: Tensor, variant: int) -> Tensor:
        h = h.clone(memory_format=torch.contiguous_format)  # which can be viewed as a vector
        if variant % 3 == 0:
            h[..., ::2].mul_(0.5)
        elif variant % 3 == 1:
            h[..., 1:].add_(torch.tanh(h[..., :-1]))
        else:
            h.view(-1)[: h.numel() // 2].sin_()
        return h

    def moved(self, h: Tensor, variant: int) -> Tensor:
        """Rows and columns in another order, by an index, a scatter or an addition at an index."""
        order = torch.arange(h.shape[-1] - 1, -1, -1)
        if variant % 3 == 0:
            return h.index_select(-1, order)
        if variant % 3 == 1:
            return torch.zeros_like(h).scatter_add(-1, (order // 2).expand(h.shape), h)
        return h.index_add(0, torch.zeros(1, dtype=torch.int64), h[-1:])

    def reduce(self, h: Tensor, variant: int) -> Tensor:
        if variant % 3 == 0:
            return h - h.mean(-1, keepdim=True)
        return h.cumsum(0) / 2 if variant % 3 == 1 else h * h.square().mean(0, keepdim=True).add(1).rsqrt()

    def skip(self, h: Tensor, seen: list[Tensor], variant: int) -> Tensor:
        """Adds everything of this shape that went before: a residual stream, with many readers."""
        same = [each for each in seen if each.shape == h.shape]
        return sum(same[variant % 2 :], h) if variant % 3 else torch.stack([h, *same]).mean(0)


PRODUCTS = ("linear", "matmul", "left", "addmm", "einsum", "bmm", "slices", "views", "cast", "broken", "gated")
PRODUCTS += ("siblings", "written", "rows")
OTHERS = ("activate", "normalise", "combine", "turn", "inplace", "moved", "reduce", "skip")

step = st.tuples(
    st.one_of(st.sampled_from(PRODUCTS), st.sampled_from(OTHERS)),
    st.sampled_from(WIDTHS),
    st.integers(0, 1),
    st.integers(0, 11),
)
programs = st.lists(step, min_size=1, max_size=6).filter(lambda steps: any(name in PRODUCTS for name, *_ in steps))
widths = st.sampled_from(WIDTHS)
shapes = st.one_of(st.tuples(st.integers(1, 20)), st.tuples(st.integers(1, 4), st.integers(1, 9)))
options = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 12),
        "density": st.sampled_from((0.02, 0.1)),
        "support": st.sampled_from(("vector", "stratified", "uniform")),
        "lowering": st.sampled_from(("factored", "auto", "composed")),
        "keep_weights": st.booleans(),
        "save": st.sampled_from(("auto", "all", "low_rank")),
    }
)


def is_low(name: str, variant: int) -> bool:
    """Whether a step computes in bfloat16."""
    return name == "cast" and variant % 3 == 0


def roundoff(steps: list[Step]) -> float:
    """How much further than eager mode a run may be from float64, of a tensor's norm."""
    return 2**-5 if any(is_low(name, variant) for name, _, _, variant in steps) else 2**-18

"""The models whose code is generated: pieces of a transformer, on the meta device."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from slcompile.ops import compose_reference


class Mlp(nn.Module):
    """The MLP of a LLaMA layer."""

    def __init__(self, hidden: int, inner: int, autocast: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, hidden, bias=False)
        self.autocast = autocast

    def forward(self, x: Tensor) -> Tensor:
        # The step is traced on the CPU and moved to the GPU afterwards.
        with torch.autocast("cpu", dtype=torch.bfloat16) if self.autocast else contextlib.nullcontext():
            hidden = self.norm(x)
            return x + self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))


class Layer(nn.Module):
    """The linear layers of a LLaMA layer and what is pointwise; a product stands for attention."""

    def __init__(self, hidden: int, inner: int, autocast: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.mlp = Mlp(hidden, inner)
        self.autocast = autocast

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            hidden = self.norm(x)
            return self.mlp(x + self.o(self.q(hidden) * self.k(hidden) + self.v(hidden)))


class PackedConv1D(nn.Module):
    """GPT-2's way: a weight stored [in, out] with q, k and v side by side, and a bias."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden, 3 * inner))
        self.bias = nn.Parameter(torch.empty(3 * inner))
        self.out = nn.Parameter(torch.empty(inner, hidden))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.addmm(self.bias, x, self.weight).chunk(3, dim=-1)
        return (torch.tanh(q * k) + v) @ self.out


class Experts(nn.Module):
    """A stack of matrices, all of which multiply all tokens."""

    def __init__(self, hidden: int, inner: int, count: int = 4) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(count, inner, hidden))
        self.down = nn.Parameter(torch.empty(count, hidden, inner))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.bmm(x.expand(self.up.shape[0], -1, -1), self.up.mT)
        return torch.bmm(torch.tanh(hidden), self.down.mT).sum(0)


class Reference(nn.Module):
    """A weight composed by plain ops, as in compiled transforms of torch.func."""

    def forward(self, B: Tensor, A: Tensor, values: Tensor, support: Tensor) -> Tensor:
        return compose_reference(B, A, values, support, 0.5)

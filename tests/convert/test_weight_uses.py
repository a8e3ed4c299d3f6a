"""Each way to use a weight: what is factorized, what is left, and eager's outputs and gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import slcompile
from tests.testing import SPECTRAL, Model, Plain, attention, converted

pytestmark = pytest.mark.usefixtures("aten_kernels")


@dataclass
class Case:
    """Members of a model: shapes of parameters, or what makes a module. ``left``: the reasons of what stays dense."""

    function: Callable[..., object]
    members: dict[str, object] = field(default_factory=lambda: {"w": (96, 64)})
    left: dict[str, str] = field(default_factory=dict)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def symmetric() -> nn.Module:
    layer = nn.Linear(64, 64)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


square, tall, wide = {"w": (64, 64)}, {"w": (96, 64)}, {"w": (64, 96)}
two = {"v": (64, 64), "w": (64, 64)}

CASES = {
    # Spellings of one product.
    "einsum": Case(lambda m, x: torch.einsum("bti,oi->bto", x, m.w)),
    "einsum of [in, out]": Case(lambda m, x: torch.einsum("bti,io->bto", x, m.w), wide),
    "einsum into heads": Case(lambda m, x: torch.einsum("bti,hdi->bhtd", x, m.w.view(4, 24, 64))),
    "einsum, weight first": Case(lambda m, x: torch.einsum("oi,bti->bot", m.w, x)),
    "einsum of three": Case(lambda m, x: torch.einsum("bti,oi,po->btp", x, m.w, m.v), {"w": (96, 64), "v": (64, 96)}),
    "x @ W.T": Case(lambda m, x: x @ m.w.T),
    "W @ x": Case(lambda m, x: m.w @ x.mT),
    "W @ vector": Case(lambda m, x: m.w @ x[0, 0]),
    "vector @ W": Case(lambda m, x: x[0, 0] @ m.w, wide),
    "tensordot": Case(lambda m, x: torch.tensordot(x, m.w, dims=([2], [1]))),
    "multi_dot": Case(lambda m, x: torch.linalg.multi_dot([x[0], m.w, m.v]), {"w": (64, 96), "v": (96, 64)}),
    "addmm with alpha and beta": Case(lambda m, x: torch.addmm(m.first.bias, x[0], m.w, beta=0.5, alpha=2.0), square),
    "addmm with a matrix": Case(lambda m, x: torch.addmm(x[0, :, :1], x[0], m.w), wide),
    "bmm": Case(lambda m, x: torch.bmm(x, m.w.T.expand(4, 64, 96))),
    "baddbmm": Case(lambda m, x: torch.baddbmm(x[:, :, :1], x, m.w.T.expand(4, 64, 96))),
    # Views.
    "chained views": Case(lambda m, x: x @ m.w.view(2, 48, 64).flatten(0, 1)[None].transpose(1, 2)[0].reshape(64, 96)),
    "views that mix rows and columns": Case(lambda m, x: x.reshape(4, 20, 32) @ m.w.view(192, 32).T),
    "slices": Case(lambda m, x: F.linear(x, m.w[:48]) + F.linear(x, m.w[48:])),
    "a slice of the columns": Case(lambda m, x: F.linear(x[..., :32], m.w[:, :32])),
    "every second row": Case(lambda m, x: F.linear(x, m.w[::2])),
    "rows by index": Case(lambda m, x: F.linear(x, m.w[torch.arange(48)]), left={"w": "no_matmul"}),
    # Several uses.
    "two matmuls": Case(lambda m, x: torch.tanh(x @ m.w.T) @ m.w),
    "two matmuls, one direction": Case(lambda m, x: torch.tanh(F.linear(x, m.w)) + F.linear(x.flip(1), m.w), square),
    "a product of weights": Case(lambda m, x: x @ (m.w @ m.v), two),
    "W @ W": Case(lambda m, x: x @ (m.w @ m.w), square),
    "a matmul and a penalty": Case(lambda m, x: (x @ m.w.T, m.w.square().sum()), left={"w": "other_use"}),
    "a matmul and a gate": Case(lambda m, x: x @ m.w.T @ torch.relu(m.w), left={"w": "other_use"}),
    "a sum of weights": Case(lambda m, x: x @ (m.v + m.w), two, {"v": "no_matmul", "w": "no_matmul"}),
    "a concatenation": Case(lambda m, x: F.linear(x, torch.cat([m.v, m.w])), two, {"v": "no_matmul", "w": "no_matmul"}),
    "returned beside a matmul": Case(lambda m, x: (x @ m.w.T, m.w), left={"w": "other_use"}),
    "a view returned beside a matmul": Case(lambda m, x: (x @ m.w.T, m.w.T), left={"w": "other_use"}),
    # Modules.
    "weight norm": Case(
        lambda m, x: m.layer(x),
        {"layer": lambda: parametrizations.weight_norm(nn.Linear(64, 64))},
        {f"layer.parametrizations.weight.original{index}": "no_matmul" for index in range(2)},
    ),
    "spectral norm": Case(
        lambda m, x: m.layer(x),
        {"layer": lambda: parametrizations.spectral_norm(nn.Linear(64, 64))},
        {"layer.parametrizations.weight.original": "other_use"},
    ),
    "orthogonal": Case(
        lambda m, x: m.layer(x),
        {"layer": lambda: parametrizations.orthogonal(nn.Linear(64, 64))},
        {"layer.parametrizations.weight.original": "no_matmul"},
    ),
    "a parametrization": Case(
        lambda m, x: m.layer(x), {"layer": symmetric}, {"layer.parametrizations.weight.original": "no_matmul"}
    ),
    "MultiheadAttention": Case(
        lambda m, x: m.layer(x, x, x, need_weights=False)[0],
        {"layer": lambda: nn.MultiheadAttention(64, 4, batch_first=True)},
    ),
    "MultiheadAttention with weights": Case(
        lambda m, x: m.layer(x, x, x), {"layer": lambda: nn.MultiheadAttention(64, 4, batch_first=True)}
    ),
    "MultiheadAttention of other widths": Case(
        lambda m, x: m.layer(x, x[..., :48], x[..., :40])[0],
        {"layer": lambda: nn.MultiheadAttention(64, 4, kdim=48, vdim=40, batch_first=True)},
    ),
    "fused QKV": Case(lambda m, x: attention(*m.qkv(x).chunk(3, -1)), {"qkv": lambda: nn.Linear(64, 192)}),
    "fused QKV, split before": Case(
        lambda m, x: attention(*(F.linear(x, each) for each in m.w.chunk(3))), {"w": (192, 64)}
    ),
    "TransformerEncoderLayer": Case(
        lambda m, x: m.layer(x),
        {"layer": lambda: nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, activation=F.gelu, batch_first=True)},
    ),
    "LSTMCell": Case(lambda m, x: m.cell(x[0]), {"cell": lambda: nn.LSTMCell(64, 64)}),
    "BatchNorm": Case(lambda m, x: m.norm(x[0] @ m.w.T), tall | {"norm": lambda: nn.BatchNorm1d(96)}),
    "Bilinear": Case(
        lambda m, x: m.layer(x, x), {"layer": lambda: nn.Bilinear(64, 64, 32)}, {"layer.weight": "no_matmul"}
    ),
    "a 1x1 convolution": Case(lambda m, x: m.layer(x.mT), {"layer": lambda: nn.Conv1d(64, 64, 1)}),
    "a grouped convolution": Case(
        lambda m, x: m.layer(x.mT), {"layer": lambda: nn.Conv1d(64, 64, 1, groups=2)}, {"layer.weight": "no_matmul"}
    ),
    # Dtypes, layouts, sizes.
    "complex": Case(
        lambda m, x: x.to(torch.complex64) @ m.w,
        {"w": lambda: nn.Parameter(torch.randn(64, 64, dtype=torch.complex64) / 8)},
        {"w": "dtype"},
    ),
    "cast to complex": Case(
        lambda m, x: (x.to(torch.complex64) @ m.w.to(torch.complex64)).abs(),
        {"w": lambda: nn.Parameter(torch.randn(64, 64) / 8)},
        {"w": "no_matmul"},
    ),
    "integers": Case(
        lambda m, x: x + (x > 0).long() @ m.w,
        {"w": lambda: nn.Parameter(torch.randint(-3, 3, (64, 64)), requires_grad=False)},
        {"w": "dtype"},
    ),
    "float64": Case(lambda m, x: x.double() @ m.w, {"w": lambda: nn.Parameter(torch.randn(64, 64).double() / 8)}),
    "stored transposed": Case(lambda m, x: F.linear(x, m.w), {"w": lambda: nn.Parameter(torch.randn(64, 96).t() / 8)}),
    "changed in place": Case(lambda m, x: F.linear(x, m.w).add_(1).mul_(x.sum())),
    "no tokens": Case(lambda m, x: F.linear(x[:, :0], m.w)),
}


# Composed products are ordinary ones; what differs is how the gradients of several uses come together.
BOTH = [name for name in CASES if name.startswith(("slices", "W @ W", "a product", "fused QKV, split", "no"))]


# What is told apart in the same places as another case is.
ALIKE = {
    "einsum of [in, out]", "einsum, weight first", "einsum of three", "vector @ W", "tensordot", "multi_dot",
    "addmm with a matrix", "baddbmm", "every second row", "two matmuls, one direction", "a matmul and a gate",
    "a product of weights", "a sum of weights", "a view returned beside a matmul", "weight norm", "orthogonal",
    "MultiheadAttention with weights",
}  # fmt: skip
assert CASES.keys() > ALIKE


def marks(name: str) -> Any:
    return pytest.mark.long if name in ALIKE else () if name in BOTH else pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "lowering"),
    [pytest.param(name, "factored", marks=marks(name)) for name in CASES]
    + [pytest.param(name, "composed", marks=pytest.mark.slow) for name in BOTH],
)
def test_every_use_of_a_weight_trains_as_in_eager_mode(name, lowering, assert_eager):
    case = CASES[name]
    model = Model(case.function, case.members)
    weights = {name for name, each in model.named_parameters() if each.dim() >= 2}
    compiled = torch.compile(model, backend="sltrain", options={**SPECTRAL, "lowering": lowering})
    x = torch.randn(4, 10, 64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Casting complex values")
        for _ in range(2):  # the call that converts, and one of the converted model
            assert_eager(compiled, model, (x,))
    assert {each.name: each.reason for each in slcompile.last_report().left} == case.left
    assert converted(model) == weights - case.left.keys()


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize(("lowering", "dtype"), [("composed", torch.float32), ("factored", torch.bfloat16)])
def test_autocast_on_either_side(inside, lowering, dtype, assert_eager):
    def autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.autocast("cpu", torch.bfloat16)(function)

    model = Model(lambda m, x: F.gelu(x @ m.w.T) @ m.w, {"w": (96, 64)}).to(dtype)
    if inside:
        model.function = autocast(model.function)
    compiled = torch.compile(model, backend="sltrain", options={**SPECTRAL, "lowering": lowering})
    x = torch.randn(4, 10, 64, dtype=dtype)
    for _ in range(2):
        if inside:
            # bfloat16 has 8 bits, and each product rounds its operands, its result and the hidden matrix to it.
            assert_eager(compiled, model, (x,), eps=2**-6)
        else:
            assert_eager(autocast(compiled), model, (x,), eps=2**-6, reference=autocast(model))
    assert converted(model) == {"first.weight", "w"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "lowering"), [((0, 64), "composed"), ((0, 64), "factored"), ((4, 0, 64), "factored")]
)
def test_batches_without_tokens(sizes, lowering, assert_eager):
    model = Plain()
    compiled = torch.compile(model, backend="sltrain", options={**SPECTRAL, "lowering": lowering})
    for shape in (sizes, sizes, [size or 3 for size in sizes], sizes):
        assert_eager(compiled, model, (torch.randn(shape),))
    assert converted(model) == {"up.weight", "down.weight"}


class Resized(nn.Module):
    """Beside a linear layer, something is resized to sizes of the input, as position biases of vision models are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(64, 96), nn.Parameter(torch.randn(1, 2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        resized = nn.functional.interpolate(self.table, size=x.shape[:2], mode="bilinear")
        return self.linear(x) + resized.mean(1)[0].unsqueeze(-1)


@pytest.mark.slow
def test_weights_are_found_beside_an_op_that_takes_symbolic_sizes(assert_eager, aten_kernels):
    model, x = Resized(), torch.randn(3, 5, 64)
    compiled = torch.compile(model, backend="sltrain", options={"rank": 4, "density": 0.1}, dynamic=True)
    compiled(x)
    assert set(slcompile.factors(model)) == {"linear.weight"}
    assert_eager(compiled, model, [torch.randn(6, 7, 64)])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic", "automatic"])
def test_batch_and_sequence_change_without_a_compile_for_each_size(how, counting, assert_eager):
    # No float among its attributes: with dynamic=True Dynamo makes them symbolic, and then starts anew without.
    model = Model(lambda m, x: attention(*m.qkv(x).chunk(3, -1)), {"qkv": lambda: nn.Linear(64, 192)})
    options = {**SPECTRAL, "lowering": "factored"}
    compiled = torch.compile(model, backend=counting, options=options, dynamic=True if how == "dynamic=True" else None)

    def run(x: Tensor) -> Tensor:
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
        return compiled(x)

    for batch, sequence in ((3, 7), (4, 9), (2, 31), (9, 5), (17, 16)):
        assert_eager(run, model, (torch.randn(batch, sequence, 64),))
    assert counting.calls == 2  # before and after the conversion; by then, "automatic" has seen that sizes change

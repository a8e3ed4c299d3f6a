"""Second moments of inputs and gradients: the same whatever a model spells and whatever copy a product reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slcompile.convert.moments import use_moments


class Reads(nn.Module):
    """A weight and what is computed with it."""

    def __init__(self, shape: tuple[int, ...], function: Callable[..., Any]) -> None:
        super().__init__()
        self.w, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, *x: Tensor) -> Any:
        return self.function(self.w, *x)


def moments_of(model: Reads, input_dim: int, *batches: Any) -> Tensor:
    (found,) = use_moments(model, [(model.w, input_dim)], batches).values()
    return found.inputs


X = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1))

SPELLINGS: dict[str, tuple[tuple[int, ...], int, Callable[..., Any]]] = {
    "linear": ((10, 12), 1, lambda w, x: F.linear(x, w)),
    "bias": ((10, 12), 1, lambda w, x: F.linear(x, w, torch.zeros(10))),
    "matmul": ((12, 10), 0, lambda w, x: x @ w),
    "addmm": ((12, 10), 0, lambda w, x: torch.addmm(torch.zeros(10), x.flatten(0, 1), w)),
    "einsum": ((12, 2, 5), 0, lambda w, x: torch.einsum("btd,dhe->bhte", x, w)),
    "from the left": ((10, 12), 1, lambda w, x: w @ x.mT),
    "broadcast": ((12, 10), 0, lambda w, x: torch.bmm(x, w.expand(2, 12, 10))),
    "vectors": ((10, 12), 1, lambda w, x: [w.mv(each) for each in x.flatten(0, 1)]),
    "a cast": ((10, 12), 1, lambda w, x: F.linear(x.double(), w.double())),
    "a relaid copy": ((12, 10), 0, lambda w, x: F.linear(x, w.t().contiguous())),
    "a copy of a copy": ((12, 10), 0, lambda w, x: F.linear(x.double(), w.t().contiguous().double())),
    "halves of the inputs": ((10, 12), 1, lambda w, x: F.linear(x[..., :5], w[:, :5]) + F.linear(x[..., 5:], w[:, 5:])),
    "rows": ((10, 12), 1, lambda w, x: w[torch.tensor([3, 1])] @ x.mT),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_moment_of_its_inputs(spelling):
    shape, input_dim, function = SPELLINGS[spelling]
    model = Reads(shape, function)
    model.w = nn.Parameter(model.w.detach().reshape(shape[0], -1))
    if len(shape) == 3:
        model.function = lambda w, x: function(w.unflatten(1, shape[1:]), x)
    rows = X.flatten(0, 1)
    expected = rows.t() @ rows
    if spelling == "halves of the inputs":
        expected[:5, 5:] = expected[5:, :5] = 0
    torch.testing.assert_close(moments_of(model, input_dim, X, (X,)), 2 * expected, rtol=1e-4, atol=1e-4)


def test_each_part_of_a_packed_weight_adds_its_inputs():
    model = Reads((30, 12), lambda w, x: [F.linear(x, each) for each in w.chunk(3)])
    rows = X.flatten(0, 1)
    torch.testing.assert_close(moments_of(model, 1, X), 3 * (rows.t() @ rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spelling", ["bmm", "by expert", "gathered", "grouped"])
def test_each_matrix_of_a_stack_has_the_moment_of_its_own_tokens(spelling):
    tokens, which = X.flatten(0, 1)[:12], torch.arange(12) // 4
    spellings = {
        "bmm": lambda w, x: torch.bmm(x.view(3, 4, 12), w),
        "by expert": lambda w, x: [x[which == expert] @ w[expert] for expert in range(3)],
        "gathered": lambda w, x: torch.bmm(x.unsqueeze(1), w[which]),
        "grouped": lambda w, x: F.grouped_mm(x.bfloat16(), w.bfloat16(), offs=torch.tensor([4, 8, 12]).int()),
    }
    model = Reads((3, 12, 16), spellings[spelling])
    if spelling == "grouped":
        tokens = F.pad(tokens, (0, 4)).bfloat16().float()  # it takes multiples of 16 bytes
        model = Reads((3, 16, 16), spellings[spelling])
    expected = torch.stack([each.t() @ each for each in tokens.split(4)])
    torch.testing.assert_close(moments_of(model, 0, (tokens,)), expected, rtol=1e-4, atol=1e-4)


def test_what_contracts_the_other_dimension_or_is_no_product_adds_nothing():
    model = Reads((12, 12), lambda w, x: (x @ w.t()) + w.sum())
    assert use_moments(model, [(model.w, 0)], [X]) == {}
    torch.testing.assert_close(moments_of(model, 1, X), X.flatten(0, 1).t() @ X.flatten(0, 1))


def test_autocast_reads_a_copy():
    model = Reads((16, 12), lambda w, x: F.linear(x, w))
    with torch.autocast("cpu", torch.bfloat16):
        found = moments_of(model, 1, X)
    rows = X.flatten(0, 1).bfloat16().float()
    torch.testing.assert_close(found, rows.t() @ rows)  # float32 sums of what is in bfloat16


class TwoLayers(nn.Module):
    """12 -> 10 -> 8, the second as a Conv1D-style weight, and inputs that may be looked up."""

    def __init__(self, looked_up: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 12) if looked_up else nn.Identity()
        self.first, self.second = nn.Linear(12, 10), nn.Parameter(torch.randn(10, 8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"ids": torch.arange(3), "y": self.first(self.table(x)) @ self.second}


@pytest.mark.parametrize("looked_up", [False, True])
def test_gradients_are_those_of_a_random_sum_of_the_outputs(looked_up):
    model = TwoLayers(looked_up).requires_grad_(False)
    x = torch.randint(0, 5, (2, 7)) if looked_up else X
    weights = [(model.first.weight, 1), (model.second, 0)]
    first, second = use_moments(model, weights, [x, {"x": x}]).values()
    assert (first.tokens, second.tokens) == (28, 28)
    assert (second.gradients.shape, first.gradients.shape) == ((8, 8), (10, 10))
    # Each output has the sign + or -, and the first layer gets them through the second.
    assert torch.equal(second.gradients.diagonal(), torch.full((8,), 28.0))
    assert 0 < second.gradients.triu(1).abs().max() < 28
    torch.testing.assert_close(
        first.gradients, model.second @ second.gradients @ model.second.t(), rtol=1e-4, atol=1e-3
    )
    assert not any(each.requires_grad or each.grad is not None for each in model.parameters())


def test_without_a_gradient_the_inputs_are_known():
    model = Reads((10, 12), lambda w, x: F.linear(x, w).argmax(-1))
    (found,) = use_moments(model, [(model.w, 1)], [X]).values()
    assert not found.gradients.any()
    assert found.inputs.any()


CONVOLVED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "2d": ((10, 4, 3, 2), (2, 4, 6, 7), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "same": ((10, 4, 3, 3), (2, 4, 6, 7), {"padding": "same"}),
    "channels last": ((10, 4, 3, 3), (2, 4, 6, 7), {}),
    "cast": ((10, 4, 3, 3), (2, 4, 6, 7), {}),
}


@pytest.mark.parametrize("name", CONVOLVED)
def test_the_inputs_of_a_convolution_are_its_patches(name):
    shape, size, settings = CONVOLVED[name]
    x = torch.randn(size, generator=torch.Generator().manual_seed(2))
    dtype = torch.float64 if name == "cast" else torch.float32
    model = Reads(shape, lambda w, x: F.conv2d(x.to(dtype), w.to(dtype), **settings))
    if name == "channels last":
        model.w = nn.Parameter(model.w.detach().contiguous(memory_format=torch.channels_last))
    (found,) = use_moments(model, [(model.w, 1)], [x]).values()
    unfolding = {"padding": 1} if name == "same" else settings
    rows = F.unfold(x, shape[2:], **unfolding).transpose(1, 2).flatten(0, 1)
    assert found.tokens == len(rows)
    torch.testing.assert_close(found.inputs, rows.t() @ rows, rtol=1e-4, atol=1e-4)
    # The sum's signs are the gradients of the outputs: one for each position.
    assert torch.equal(found.gradients.diagonal(), torch.full((10,), float(len(rows))))


@pytest.mark.parametrize(("dims", "function"), [(1, F.conv1d), (3, F.conv3d)])
def test_patches_of_other_dimensions(dims, function):
    x = torch.randn(2, 3, *range(5, 5 + dims), generator=torch.Generator().manual_seed(2))
    model = Reads((8, 3, *[2] * dims), lambda w, x: function(x, w, stride=2, padding=1))
    (found,) = use_moments(model, [(model.w, 1)], [x]).values()
    # Each row of an identity as a kernel gives one column of the patches.
    rows = function(x, torch.eye(3 * 2**dims).unflatten(1, (3, *[2] * dims)), stride=2, padding=1)
    rows = rows.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(found.inputs, rows.t() @ rows, rtol=1e-4, atol=1e-4)


def test_a_kernel_that_is_turned_has_no_moments():
    model = Reads((4, 4, 1, 1), lambda w, x: F.conv2d(x, w.transpose(0, 1)))
    assert use_moments(model, [(model.w, 1)], [torch.randn(2, 4, 3, 3)]) == {}


class Packed(nn.Module):
    """Two layers whose weights are parts of one tensor; the second reads half of the first's outputs."""

    def __init__(self, dim: int, owned: bool) -> None:
        super().__init__()
        packed = torch.randn(64, 16) if dim == 0 else torch.randn(32, 32)
        packed.copy_(torch.randn(packed.shape, generator=torch.Generator().manual_seed(3)))
        halves = (each.clone() if owned else each for each in packed.chunk(2, dim))
        self.q, self.k = (nn.Parameter(each) for each in halves)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.q)[:, :16], self.k[:20])


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("names", ["q", "k", "qk"])
def test_weights_that_share_memory_have_each_their_own_moments(dim, names):
    x = torch.randn(10, 16, generator=torch.Generator().manual_seed(2))
    found = []
    for owned in (False, True):
        model = Packed(dim, owned)
        torch.manual_seed(0)
        held = use_moments(model, [(getattr(model, name), 1) for name in names], [x])
        found.append([held[id(getattr(model, name))] for name in names])
    for shared, own in zip(*found, strict=True):
        assert shared.tokens == own.tokens == 10
        torch.testing.assert_close(shared.inputs, own.inputs)
        torch.testing.assert_close(shared.gradients, own.gradients)


def test_a_read_of_several_weights_at_once_is_no_ones():
    packed = torch.randn(20, 12)
    model = Reads((10, 12), lambda w, x: F.linear(x, packed) + F.linear(x, w).sum())
    model.w = nn.Parameter(packed[:10])
    rows = X.flatten(0, 1)
    torch.testing.assert_close(moments_of(model, 1, X), rows.t() @ rows, rtol=1e-4, atol=1e-4)


def test_a_weight_that_lies_by_columns_has_the_moment_of_its_inputs():
    model = Reads((10, 12), lambda w, x: F.linear(x, w))
    model.w = nn.Parameter(torch.randn(12, 10).t())
    rows = X.flatten(0, 1)
    torch.testing.assert_close(moments_of(model, 1, X), rows.t() @ rows, rtol=1e-4, atol=1e-4)

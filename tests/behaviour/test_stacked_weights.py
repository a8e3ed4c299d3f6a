"""Three-dimensional weights that are stacks of matrices, as the experts of a mixture are."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import slcompile
from slcompile.ops import compose
from slcompile.ops.support import groups_per_row
from slcompile.weight.start import looks_trained, spectral_factors
from tests.testing import OPTIONS, SUPPORTS, some_of

EXPERTS, WIDTH, HIDDEN = 4, 64, 96


class Experts(nn.Module):
    """Stacks ``up`` [experts, out, in] and ``down`` [experts, in, out], multiplied in one of three ways."""

    def __init__(self, multiply: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.multiply = multiply
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 8)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 10)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        hidden = torch.tanh(self.multiply(self.mix(x), self.up.mT, expert))
        return self.multiply(hidden, self.down, expert)


def all_experts(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """Every expert has as many tokens."""
    return torch.bmm(x.view(EXPERTS, -1, x.shape[-1]), weight).view(x.shape[0], -1)


def each_tokens_expert(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    return torch.bmm(x.unsqueeze(1), weight[expert]).squeeze(1)


def grouped(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """Tokens are sorted by their expert."""
    ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * (x.shape[0] // EXPERTS)
    return torch._grouped_mm(x, weight, offs=ends)


WAYS = {"bmm": all_experts, "gathered": each_tokens_expert, "grouped_mm": grouped}


@pytest.fixture
def experts(request: pytest.FixtureRequest) -> Experts:
    # Inductor lowers grouped_mm for bfloat16 only.
    return Experts(WAYS[request.param]).to(torch.bfloat16 if request.param == "grouped_mm" else torch.float32)


@pytest.fixture
def tokens(experts: Experts) -> tuple[Tensor, Tensor]:
    return torch.randn(32, WIDTH, dtype=experts.up.dtype), torch.arange(32) // (32 // EXPERTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experts", "support"),
    some_of(
        itertools.product(WAYS, SUPPORTS), [("bmm", "uniform"), ("gathered", "vector"), ("grouped_mm", "stratified")]
    ),
    indirect=["experts"],
)
def test_the_string_factorizes_them_and_trains_as_eager_does(experts, tokens, support):
    config = {**OPTIONS, "support": support}
    compiled = torch.compile(experts, backend="sltrain", options=config)
    compiled(*tokens).float().square().mean().backward()
    assert set(slcompile.factors(experts)) == {"up", "down", "mix.weight"}
    assert experts.up_sl.shape == (EXPERTS, HIDDEN, WIDTH)
    # The factor that reads the input is the one that starts random.
    assert (experts.up_sl.input_dim, experts.down_sl.input_dim) == (1, 0)
    experts.zero_grad()
    with torch.no_grad():
        for weight in (experts.up_sl, experts.down_sl):
            weight.B.normal_(std=0.1)
            weight.A.normal_(std=0.1)
    double = copy.deepcopy(experts).double()
    double.multiply = each_tokens_expert if experts.multiply is grouped else experts.multiply
    results = []
    for run, x in ((compiled, tokens[0]), (experts, tokens[0]), (double, tokens[0].double())):
        loss = run(x, tokens[1]).to(x.dtype).square().mean()
        loss.backward()
        model = double if run is double else experts
        results.append([loss.detach().double(), *(p.grad.double() for p in model.parameters())])
        model.zero_grad()
    eps = torch.finfo(experts.up.dtype).eps  # half an ulp of a result's norm, and twice that for another order of sums
    for ours, eager, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= (eager - exact).norm() + 2 * eps * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("support", some_of(SUPPORTS, ["vector", "uniform"]))
def test_what_a_factorized_weight_can_do_a_stack_can(support, tmp_path):
    model = Experts(all_experts)
    tokens = torch.randn(32, WIDTH), torch.arange(32)
    dense = {name: each.shape for name, each in model.state_dict().items()}
    slcompile.factorize_(model, slcompile.SLConfig(**OPTIONS, support=support), example_args=tokens)
    expected = model(*tokens)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again(*tokens), expected)
    other = Experts(all_experts)
    slcompile.factorize_(other, slcompile.SLConfig(**OPTIONS, support=support), example_args=tokens)
    assert not torch.equal(other(*tokens), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(*tokens), expected)
    report = slcompile.export_onnx(model, tokens, tmp_path / "small.onnx", compact=True)  # composed by onnxruntime
    assert report.max_rel < 96 * 2**-24 * 8  # sums of at most 96 terms, three of them in a row, each compared twice
    assert {name: each.shape for name, each in slcompile.merged_state_dict(model).items()} == dense
    slcompile.merge_(model)
    assert torch.equal(model(*tokens), expected)
    assert {name: each.shape for name, each in model.state_dict().items()} == dense


@pytest.mark.parametrize("explicit", [False, True])
def test_a_rank_above_every_matrix_is_refused(explicit):
    model, tokens = Experts(all_experts), (torch.randn(32, WIDTH), torch.arange(32))
    if explicit:
        config = slcompile.SLConfig(rank=100, exclude=("mix*",))
        run = functools.partial(slcompile.factorize_, model, config, example_args=tokens)
    else:
        compiled = torch.compile(model, backend="sltrain", options={"rank": 100, "exclude": ("mix*",)})
        run = functools.partial(compiled, *tokens)
    with pytest.raises(Exception, match=r"rank must be at most 64, .* got 100"):
        run()


def test_a_learned_stack_starts_from_its_best_approximation():
    stack = torch.stack([torch.randn(64, 5) @ torch.randn(5, 48) for _ in range(3)])
    assert looks_trained(torch.cat([torch.randn(2, 64, 48), stack[:1]]))
    assert not looks_trained(torch.randn(3, 64, 48))
    values = torch.empty(3, 64, groups_per_row(48, 0.05))
    B, A, values = spectral_factors(stack, 8, 0.5, values, torch.tensor([3]))
    assert (B.shape, A.shape) == ((3, 64, 8), (3, 8, 48))
    found = compose(B, A, values, torch.tensor([3]), 0.5)
    assert (found - stack).norm() <= 1e-5 * stack.norm()  # its rank is below 8: what is left are roundings


def test_a_stack_that_is_read_otherwise_stays_dense(aten_kernels):
    class Heads(nn.Module):
        """One matrix [width, heads * size] that is stored in three dimensions."""

        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Parameter(torch.randn(WIDTH, 2, 48) / 8)
            self.out = nn.Linear(96, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.einsum("td,dhk->thk", x, self.q).flatten(1))

    model = Heads()
    torch.compile(model, backend="sltrain", options=OPTIONS)(torch.randn(8, WIDTH)).sum().backward()
    (left,) = slcompile.last_report().left
    assert (left.name, left.reason) == ("q", "not_2d")
    assert "stack of matrices" in left.detail

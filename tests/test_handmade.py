"""Models written by hand, one for each way to use a weight: what is factorized, what is left, and eager's gradients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import slcompile

pytestmark = pytest.mark.usefixtures("aten_kernels")

OPTIONS = {"rank": 8, "density": 0.05, "init": "spectral"}


class Model(nn.Module):
    """A linear layer, so that the input needs gradients and something converts; then a function of its result."""

    def __init__(self, function: Callable[..., object], members: dict[str, object]) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.function = function
        for name, member in members.items():
            if isinstance(member, tuple):
                self.register_parameter(name, nn.Parameter(torch.randn(member) / 8))
            else:
                setattr(self, name, member() if callable(member) else member)

    def forward(self, x: Tensor) -> object:
        return self.function(self, torch.tanh(self.first(x)))


@dataclass
class Case:
    """Members of a model: shapes of parameters, or what makes a module. ``left``: the reasons of what stays dense."""

    function: Callable[..., object]
    members: dict[str, object] = field(default_factory=lambda: {"w": (96, 64)})
    left: dict[str, str] = field(default_factory=dict)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, -1)).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v))


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
    "a 1x1 convolution": Case(
        lambda m, x: m.layer(x.mT), {"layer": lambda: nn.Conv1d(64, 64, 1)}, {"layer.weight": "no_matmul"}
    ),
    # Dtypes, layouts, sizes.
    "complex": Case(
        lambda m, x: x.to(torch.complex64) @ m.w,
        {"w": lambda: nn.Parameter(torch.randn(64, 64, dtype=torch.complex64) / 8)},
        {"w": "dtype"},
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


def converted(model: nn.Module) -> set[str]:
    return set(slcompile.factors(model))


# Composed products are ordinary ones; what differs is how the gradients of several uses come together.
BOTH = [
    name for name in CASES if name.startswith(("two", "slices", "W @ W", "a product", "fused", "Transformer", "no"))
]


@pytest.mark.parametrize(
    ("name", "lowering"), [(name, "factored") for name in CASES] + [(name, "composed") for name in BOTH]
)
def test_every_use_of_a_weight_trains_as_in_eager_mode(name, lowering, assert_eager):
    case = CASES[name]
    model = Model(case.function, case.members)
    weights = {name for name, each in model.named_parameters() if each.dim() >= 2}
    compiled = torch.compile(model, backend="sltrain", options={**OPTIONS, "lowering": lowering})
    x = torch.randn(4, 10, 64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Casting complex values")
        for _ in range(2):  # the call that converts, and one of the converted model
            assert_eager(compiled, model, (x,))
    assert {each.name: each.reason for each in slcompile.last_report().skipped} == case.left
    assert converted(model) == weights - case.left.keys()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def compiled_with(backend: object, model: nn.Module, **kwargs: object) -> Callable[..., Tensor]:
    return torch.compile(model, backend=backend, options=OPTIONS, **kwargs)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize(("lowering", "dtype"), [("composed", torch.float32), ("factored", torch.bfloat16)])
def test_autocast_on_either_side(inside, lowering, dtype, assert_eager):
    def autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.autocast("cpu", torch.bfloat16)(function)

    model = Model(lambda m, x: F.gelu(x @ m.w.T) @ m.w, {"w": (96, 64)}).to(dtype)
    if inside:
        model.function = autocast(model.function)
    compiled = torch.compile(model, backend="sltrain", options={**OPTIONS, "lowering": lowering})
    x = torch.randn(4, 10, 64, dtype=dtype)
    for _ in range(2):
        if inside:
            # bfloat16 has 8 bits, and each product rounds its operands, its result and the hidden matrix to it.
            assert_eager(compiled, model, (x,), eps=2**-6)
        else:
            assert_eager(autocast(compiled), model, (x,), eps=2**-6, reference=autocast(model))
    assert converted(model) == {"first.weight", "w"}


@pytest.mark.parametrize(
    ("sizes", "lowering"), [((0, 64), "composed"), ((0, 64), "factored"), ((4, 0, 64), "factored")]
)
def test_batches_without_tokens(sizes, lowering, assert_eager):
    model = Plain()
    compiled = torch.compile(model, backend="sltrain", options={**OPTIONS, "lowering": lowering})
    for shape in (sizes, sizes, [size or 3 for size in sizes], sizes):
        assert_eager(compiled, model, (torch.randn(shape),))
    assert converted(model) == {"up.weight", "down.weight"}


@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic", "automatic"])
def test_batch_and_sequence_change_without_a_compile_for_each_size(how, counting, assert_eager):
    # No float among its attributes: with dynamic=True Dynamo makes them symbolic, and then starts anew without.
    model = Model(lambda m, x: attention(*m.qkv(x).chunk(3, -1)), {"qkv": lambda: nn.Linear(64, 192)})
    options = {**OPTIONS, "lowering": "factored"}
    compiled = torch.compile(model, backend=counting, options=options, dynamic=True if how == "dynamic=True" else None)

    def run(x: Tensor) -> Tensor:
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
        return compiled(x)

    for batch, sequence in ((3, 7), (4, 9), (2, 31), (9, 5), (17, 16)):
        assert_eager(run, model, (torch.randn(batch, sequence, 64),))
    assert counting.calls == 2  # before and after the conversion; by then, "automatic" has seen that sizes change


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x: Tensor, sign: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.left(x) if sign.sum() > 0 else self.right(x)


class Conditional(Branching):
    """The same, both branches in one graph."""

    def forward(self, x: Tensor, sign: Tensor) -> Tensor:
        def left(x: Tensor) -> Tensor:
            return x @ self.left.weight.T

        def right(x: Tensor) -> Tensor:
            return x @ self.right.weight.T

        return torch.cond(sign.sum() > 0, left, right, (torch.tanh(self.first(x)),))


def test_a_data_dependent_branch_converts_when_it_is_first_taken(counting, assert_eager):
    model, x = Branching(), torch.randn(8, 64)
    compiled = compiled_with(counting, model)
    for sign, names in (
        (-1, "first right"),
        (1, "first left right"),
        (-1, "first left right"),
        (1, "first left right"),
    ):
        assert_eager(compiled, model, (x, torch.tensor(sign)))
        assert converted(model) == {f"{name}.weight" for name in names.split()}
    assert counting.calls == 6  # three graphs, before and after


def test_weights_inside_a_branch_of_a_graph_stay_dense(assert_eager):
    model, x = Conditional(), torch.randn(8, 64)
    compiled = compiled_with("sltrain", model, fullgraph=True)
    for sign in (1, -1, 1):
        assert_eager(compiled, model, (x, torch.tensor(sign)))
    assert converted(model) == {"first.weight"}
    skipped = slcompile.last_report().skipped
    assert [(each.name, each.detail) for each in skipped] == [
        (f"{side}.weight", "read by cond, not by a matmul") for side in ("left", "right")
    ]


class Keeping(nn.Module):
    """Keeps a weight, or what holds it, for after a graph break; or hands it out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.how = how

    def forward(self, x: Tensor) -> object:
        weight, layer = self.layer.weight, self.layer
        x = torch.tanh(x @ weight.T)
        if self.how == "local":
            torch._dynamo.graph_break()
            return self.last(x @ weight)
        if self.how == "module":
            torch._dynamo.graph_break()
            return self.last(layer(x))
        if self.how == "list":
            return [self.last(x), weight]
        if self.how == "transposed":
            return self.last(x), weight.T
        if self.how == "attribute":
            object.__setattr__(self, "kept", weight)
        return self.last(x)


@pytest.mark.parametrize("how", ["local", "module", "list", "transposed", "attribute", "nowhere"])
def test_a_weight_that_a_region_hands_on_stays_dense(how, counting, assert_eager):
    for _ in range(2):  # the second model finds the graphs of the first
        model, x = Keeping(how), torch.randn(8, 64)
        compiled = compiled_with(counting, model)
        for _ in range(3):
            assert_eager(compiled, model, (x,))
        expected = {"last.weight"} if how not in ("module", "nowhere") else {"layer.weight", "last.weight"}
        assert converted(model) == expected
        if how not in ("module", "nowhere"):
            (left,) = slcompile.last_report().skipped
            assert (left.name, left.reason, left.detail) == ("layer.weight", "other_use", "also read by output")


class Apart(nn.Module):
    """Two graphs, and a weight that both read: the first one by other ops than matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.last(self.layer(x))

    def first(self, x: Tensor) -> Tensor:
        return x * self.layer.weight.sum()


def test_a_weight_that_an_earlier_graph_reads_otherwise_stays_dense(assert_eager):
    model = Apart()
    compiled = compiled_with("sltrain", model)
    for _ in range(3):
        assert_eager(compiled, model, (torch.randn(8, 64),))
    assert converted(model) == {"last.weight"}
    (left,) = slcompile.last_report().skipped
    assert (left.name, left.reason, left.detail) == ("layer.weight", "other_use", "also read by sum")


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(64, 64), layer, nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(torch.tanh(self.first(x)))[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_left_with_the_reason(kind, assert_eager):
    model, x = Recurrent(kind(64, 64, batch_first=True)), torch.randn(3, 5, 64)
    flat = {"layer.weight_ih_l0", "layer.weight_hh_l0"}
    compiled = compiled_with("sltrain", model)
    assert_eager(compiled, model, (x,))
    assert converted(model) == set()  # Dynamo skips it
    with torch._dynamo.config.patch(allow_rnn=True):
        torch._dynamo.reset()
        for _ in range(2):
            assert_eager(compiled_with("sltrain", model), model, (x,))
    assert converted(model) == {"first.weight", "last.weight"}
    reasons = {each.name: each.reason for each in slcompile.last_report().skipped}
    assert reasons == dict.fromkeys(flat, "no_matmul" if kind is nn.LSTM else "recurrent")  # an LSTM stays one op


def test_a_model_with_a_recurrent_layer_is_factorized_explicitly(assert_eager):
    model, x = Recurrent(nn.LSTM(64, 64, batch_first=True)), torch.randn(3, 5, 64)
    slcompile.factorize_(model, slcompile.SLConfig(**OPTIONS), example_args=(x,))
    assert converted(model) == {"first.weight", "last.weight"}
    assert_eager(compiled_with("sltrain", model), model, (x,))


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


@pytest.mark.parametrize("inner", ["sltrain", "eager"])
def test_the_outermost_compile_is_the_one_that_counts(inner, counting, assert_eager):
    plain = Plain()
    model = Outer(torch.compile(plain, backend=inner))
    compiled = compiled_with(counting, model)
    eager = Outer(plain)
    eager.last = model.last
    for _ in range(2):
        assert_eager(compiled, eager, (torch.randn(8, 64),))
    assert converted(model) == {"inner.up.weight", "inner.down.weight", "last.weight"}
    assert counting.calls == 2
    torch._dynamo.reset()
    assert_eager(compiled_with("sltrain", compiled), eager, (torch.randn(8, 64),))  # compiled twice


def test_under_another_backend_a_nested_sltrain_converts_nothing():
    model = Outer(compiled_with("sltrain", Plain()))
    torch.compile(model, backend="aot_eager")(torch.randn(8, 64)).sum().backward()
    assert converted(model) == set()


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("where", ["inside", "around", "around, factorized before"])
def test_activation_checkpointing(where, reentrant, assert_eager):
    def checkpointed(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: checkpoint(run, x, use_reentrant=reentrant)

    model = Model(lambda m, x: checkpointed(m.plain)(x), {"plain": Plain}) if where == "inside" else Plain()
    if where == "around, factorized before":
        slcompile.factorize_(model, slcompile.SLConfig(**OPTIONS))
    compiled = compiled_with("sltrain", model)
    run = compiled if where == "inside" else checkpointed(compiled)
    x = torch.randn(8, 64)
    if where == "around" and reentrant:
        with pytest.raises(RuntimeError, match=r"call slcompile\.factorize_\(model\) before training"):
            assert_eager(run, model, (x,))
        assert converted(model) == set()
        return
    for _ in range(2):
        assert_eager(run, model, (x,))
    assert len(converted(model)) == (3 if where == "inside" else 2)


def test_an_eager_checkpoint_around_a_first_run_that_reads_a_weight_twice_is_refused(assert_eager):
    model, x = Model(lambda m, x: torch.tanh(x @ m.w.T) @ m.w, {"w": (96, 64)}), torch.randn(8, 64)
    compiled = compiled_with("sltrain", model)

    def run(x: Tensor) -> Tensor:
        return checkpoint(compiled, x, use_reentrant=False)

    with pytest.raises(RuntimeError, match=r"reads w several times.*call slcompile\.factorize_\(model\) before"):
        run(x)
    assert converted(model) == set()
    slcompile.factorize_(model, slcompile.SLConfig(**OPTIONS), example_args=(x,))
    assert_eager(run, model, (x,))


def test_double_backward_works_in_eager_mode_and_is_refused_by_compiled_code():
    model, x = Plain(), torch.randn(8, 64, requires_grad=True)
    compiled = compiled_with("sltrain", model)
    compiled(x).sum().backward()
    model.zero_grad()

    def penalty(run: Callable[..., Tensor], x: Tensor, parameters: object = None) -> Tensor:
        (gradient,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        return gradient.square().sum()

    penalty(model, x).backward()
    merged = slcompile.merge_(copy.deepcopy(model))
    weights = {name: each.detach().requires_grad_() for name, each in merged.named_parameters()}
    penalty(lambda x: functional_call(merged, weights, (x,)), x).backward()
    for name, weight in (("up.weight", model.up), ("down.weight", model.down)):
        factors = weight.weight_sl
        torch.testing.assert_close(
            factors.B.grad, factors.scale * weights[name].grad @ factors.A.T, rtol=1e-4, atol=1e-5
        )
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        penalty(compiled, x).backward()


def loss_of(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(model, parameters, (x,)).square().sum()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    found = {name: each.grad for name, each in model.named_parameters()}
    model.zero_grad()
    return found


def func_grad(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    return torch.func.grad(lambda parameters: loss_of(model, parameters, x))(parameters)


def func_vmap(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Gradients for each sample, added up."""
    per_sample = torch.func.vmap(
        torch.func.grad(lambda parameters, x: loss_of(model, parameters, x)), in_dims=(None, 0)
    )(parameters, x)
    return {name: each.sum(0) for name, each in per_sample.items()}


def func_jacrev(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    jacobian = torch.func.jacrev(lambda parameters: loss_of(model, parameters, x)[None])(parameters)
    return {name: each[0] for name, each in jacobian.items()}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inside"])
@pytest.mark.parametrize("transform", [func_grad, func_vmap, func_jacrev])
def test_transforms_differentiate_the_factors(transform, compiled):
    support = "uniform" if compiled else "stratified"
    model = slcompile.factorize_(Plain(), slcompile.SLConfig(**OPTIONS, support=support))
    parameters, x = {name: each.detach() for name, each in model.named_parameters()}, torch.randn(5, 64)
    run = compiled_with("sltrain", transform, fullgraph=True) if compiled else transform
    found = run(model, parameters, x)
    for name, expected in gradients(model, x).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4, msg=name)


def func_jvp(model: nn.Module, parameters: dict[str, Tensor], x: Tensor, directions: dict[str, Tensor]) -> Tensor:
    return torch.func.jvp(lambda parameters: loss_of(model, parameters, x), (parameters,), (directions,))[1]


def dual_numbers(model: nn.Module, parameters: dict[str, Tensor], x: Tensor, directions: dict[str, Tensor]) -> Tensor:
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(each, directions[name]) for name, each in parameters.items()}
        return forward_ad.unpack_dual(loss_of(model, duals, x)).tangent


@pytest.mark.parametrize(("transform", "compiled"), [(func_jvp, False), (func_jvp, True), (dual_numbers, False)])
def test_forward_mode_differentiates_the_factors(transform, compiled):
    model = slcompile.factorize_(Plain(), slcompile.SLConfig(**OPTIONS))
    parameters, x = {name: each.detach() for name, each in model.named_parameters()}, torch.randn(5, 64)
    directions = {name: torch.randn_like(each) for name, each in parameters.items()}
    run = compiled_with("sltrain", transform, fullgraph=True) if compiled else transform
    expected = sum((each * directions[name]).sum() for name, each in gradients(model, x).items())
    torch.testing.assert_close(run(model, parameters, x, directions), expected, rtol=1e-4, atol=1e-3)


def test_an_ensemble_of_factorized_models_is_vectorised():
    models = [slcompile.factorize_(Plain(), slcompile.SLConfig(**OPTIONS)) for _ in range(3)]  # each with other seeds
    x = torch.randn(5, 64)
    parameters, buffers = torch.func.stack_module_state(models)
    many = torch.func.vmap(lambda *state: functional_call(models[0], state, (x,)))(parameters, buffers)
    torch.testing.assert_close(many, torch.stack([model(x) for model in models]), rtol=1e-5, atol=1e-6)


class Transforming(nn.Module):
    """Transforms with respect to inputs, inside the model: weights are constants to them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.plain, self.last = Plain(), nn.Linear(64, 64)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "grad":
            return self.last(torch.func.grad(lambda x: self.plain(x).square().sum())(x))
        if self.how == "vmap":
            return self.last(torch.func.vmap(lambda x: self.plain(x))(x))
        return self.last(torch.func.jvp(self.plain, (x,), (x.detach(),))[1])


@pytest.mark.parametrize("how", ["grad", "vmap", "jvp"])
def test_a_model_that_transforms_its_own_parts_converts(how, counting, assert_eager):
    model, x = Transforming(how), torch.randn(8, 64)
    compiled = compiled_with(counting, model, fullgraph=True)
    for _ in range(3):
        assert_eager(compiled, model, (x,))
    assert converted(model) == {"plain.up.weight", "plain.down.weight", "last.weight"}
    assert counting.calls == 2


@pytest.mark.parametrize(
    "transform",
    [
        lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
        lambda function, x: torch.func.vmap(function)(x),
        lambda function, x: torch.func.jvp(function, (x,), (x,))[1],
    ],
    ids=["grad", "vmap", "jvp"],
)
def test_a_transform_of_a_compiled_function_runs_it_eagerly(transform):
    model, x = Plain(), torch.randn(8, 64)
    torch.testing.assert_close(transform(compiled_with("sltrain", model), x), transform(model, x))
    assert converted(model) == set()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.func\.(grad|vmap|jvp)\(compiled_fn\)"):
        transform(compiled_with("sltrain", model, fullgraph=True), x)


def test_models_of_one_process_share_graphs_and_nothing_else(counting, assert_eager):
    x = torch.randn(8, 64)
    models = [Plain() for _ in range(4)]
    narrow, frozen = Plain(), Plain().requires_grad_(False)
    narrow.up, narrow.down = nn.Linear(64, 48), nn.Linear(48, 64)
    runs = {model: compiled_with(counting, model) for model in (*models, narrow, frozen)}
    calls = []
    for _ in range(2):
        for model, run in runs.items():
            assert_eager(run, model, (x,))
            calls.append(counting.calls)
    #         equal ones share two   narrow    frozen
    assert calls == [1, 1, 1, 1] + [2] + [3] + [4, 4, 4, 4] + [5] + [5]
    assert len({id(each) for model in models for each in model.parameters()}) == 4 * 8
    assert converted(narrow) == {"up.weight", "down.weight"}
    assert converted(frozen) == set()

"""Models written by hand: control flow, recurrence, nesting, checkpoints: what converts, and eager's gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slcompile
from tests.testing import SPECTRAL, Model, Plain, compiled_with, converted, some_of

pytestmark = pytest.mark.usefixtures("aten_kernels")


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_weights_inside_a_branch_of_a_graph_stay_dense(assert_eager):
    model, x = Conditional(), torch.randn(8, 64)
    compiled = compiled_with("sltrain", model, fullgraph=True)
    for sign in (1, -1, 1):
        assert_eager(compiled, model, (x, torch.tensor(sign)))
    assert converted(model) == {"first.weight"}
    skipped = slcompile.last_report().left
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


@pytest.mark.slow
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
            (left,) = slcompile.last_report().left
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


@pytest.mark.slow
def test_a_weight_that_an_earlier_graph_reads_otherwise_stays_dense(assert_eager):
    model = Apart()
    compiled = compiled_with("sltrain", model)
    for _ in range(3):
        assert_eager(compiled, model, (torch.randn(8, 64),))
    assert converted(model) == {"last.weight"}
    (left,) = slcompile.last_report().left
    assert (left.name, left.reason, left.detail) == ("layer.weight", "other_use", "also read by sum")


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(64, 64), layer, nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(torch.tanh(self.first(x)))[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", some_of([nn.LSTM, nn.GRU, nn.RNN], [nn.LSTM, nn.GRU]))
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
    reasons = {each.name: each.reason for each in slcompile.last_report().left}
    assert reasons == dict.fromkeys(flat, "no_matmul" if kind is nn.LSTM else "recurrent")  # an LSTM stays one op


def test_a_model_with_a_recurrent_layer_is_factorized_explicitly(assert_eager):
    model, x = Recurrent(nn.LSTM(64, 64, batch_first=True)), torch.randn(3, 5, 64)
    slcompile.factorize_(model, slcompile.SLConfig(**SPECTRAL), example_args=(x,))
    assert converted(model) == {"first.weight", "last.weight"}
    assert_eager(compiled_with("sltrain", model), model, (x,))


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("where", ["inside", "around", "around, factorized before"])
def test_activation_checkpointing(where, reentrant, assert_eager):
    def checkpointed(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: checkpoint(run, x, use_reentrant=reentrant)

    model = Model(lambda m, x: checkpointed(m.plain)(x), {"plain": Plain}) if where == "inside" else Plain()
    if where == "around, factorized before":
        slcompile.factorize_(model, slcompile.SLConfig(**SPECTRAL))
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


@pytest.mark.slow
def test_an_eager_checkpoint_around_a_first_run_that_reads_a_weight_twice_is_refused(assert_eager):
    model, x = Model(lambda m, x: torch.tanh(x @ m.w.T) @ m.w, {"w": (96, 64)}), torch.randn(8, 64)
    compiled = compiled_with("sltrain", model)

    def run(x: Tensor) -> Tensor:
        return checkpoint(compiled, x, use_reentrant=False)

    with pytest.raises(RuntimeError, match=r"reads w several times.*call slcompile\.factorize_\(model\) before"):
        run(x)
    assert converted(model) == set()
    slcompile.factorize_(model, slcompile.SLConfig(**SPECTRAL), example_args=(x,))
    assert_eager(run, model, (x,))


@pytest.mark.slow
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

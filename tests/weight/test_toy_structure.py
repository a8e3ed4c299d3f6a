"""A structure of weights that lives in this file alone: its op, its class, and all that the package does with it.

``W = diagonal(d) + B @ A``, for rectangular matrices too. Nothing of slcompile names it: what works here works for any
structure that is registered.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import slcompile
from slcompile.captured import REQUIRED_SETTINGS
from slcompile.config import STRUCTURES, SLConfig
from slcompile.ops import WEIGHT_OPS
from slcompile.weight.structure import FactorizedWeight, register

RANK = 4
OPTIONS: dict[str, Any] = {"structure": "diagonal", "rank": RANK}
LITE = {"inductor": {**torch._inductor.list_mode_options()["lite"], **dict.fromkeys(REQUIRED_SETTINGS, True)}}
"""Options with which our passes run and Inductor calls ATen: no code is generated."""


@torch.library.custom_op("toy::add_diagonal", mutates_args=())
def add_diagonal(d: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """Composes a weight [N, K] of the diagonal [min(N, K)], B [N, R] and A [R, K]."""
    with torch.autocast(B.device.type, enabled=False):
        weight = B @ A
        weight.diagonal().add_(d)
        return weight


@add_diagonal.register_fake
def _(d: Tensor, B: Tensor, A: Tensor) -> Tensor:
    return B.new_empty(B.shape[0], A.shape[1])


@torch.library.custom_op("toy::add_diagonal_backward", mutates_args=())
def add_diagonal_backward(grad: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Projects a weight's gradient to those of the diagonal, B and A."""
    with torch.autocast(B.device.type, enabled=False):
        grad = grad.to(B.dtype)
        return grad.diagonal().clone(), grad @ A.t(), B.t() @ grad


@add_diagonal_backward.register_fake
def _(grad: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return B.new_empty(min(grad.shape)), B.new_empty(B.shape), A.new_empty(A.shape)


add_diagonal.register_autograd(
    lambda ctx, grad: add_diagonal_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
)


class DiagonalWeight(FactorizedWeight):
    """A diagonal and a product of factors."""

    structure = "diagonal"
    op = torch.ops.toy.add_diagonal.default

    def __init__(
        self,
        shape: Sequence[int],
        config: SLConfig,
        *,
        name: str = "",
        input_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(shape, config, input_dim=input_dim)
        rows, columns = self.shape
        self.rank = config.rank_for(rows, columns)

        def new(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        self.d, self.B, self.A = new(min(rows, columns)), new(rows, self.rank), new(self.rank, columns)

    @classmethod
    def size(cls, shape: Sequence[int], config: SLConfig) -> int:
        rows, columns = shape
        return config.rank_for(rows, columns) * (rows + columns) + min(rows, columns)

    def operands(self) -> dict[str, Tensor]:
        return {"d": self.d, "B": self.B, "A": self.A}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.d.uniform_(-1, 1)
        self.A.uniform_(-1 / math.sqrt(self.shape[1]), 1 / math.sqrt(self.shape[1]))
        self.B.zero_()

    @torch.no_grad()
    def approximate(self, dense: Tensor) -> None:
        U, s, V = torch.linalg.svd(dense.float(), full_matrices=False)
        root = s[: self.rank].sqrt()
        self.B.copy_(U[:, : self.rank] * root)
        self.A.copy_((V[: self.rank].t() * root).t())
        self.d.copy_((dense - self.B @ self.A).diagonal())

    def describe(self) -> dict[str, Any]:
        return {"rank": self.rank, "input_dim": self.input_dim}

    @property
    def compose_flops(self) -> int:
        return 2 * self.rank * math.prod(self.shape) + self.d.numel()


class Net(nn.Module):
    """Two layers, 64 -> 96 -> 64."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


SIZES = {"up.weight": (96, 64), "down.weight": (64, 96)}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch):
    """The structure, while a test runs."""
    ops = list(WEIGHT_OPS)
    monkeypatch.setitem(STRUCTURES, "diagonal", None)
    assert register(DiagonalWeight) is DiagonalWeight
    yield
    WEIGHT_OPS[:] = ops


def factorized(model: nn.Module, **options: Any) -> nn.Module:
    """With every part random."""
    slcompile.factorize_(model, SLConfig(**OPTIONS, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def composed(weight: DiagonalWeight) -> Tensor:
    """The weight as its formula says, in float64."""
    d, B, A = (each.detach().double() for each in weight.operands().values())
    return torch.zeros(weight.shape, dtype=torch.float64).fill_diagonal_(0).diagonal_scatter(d) + B @ A


def weights(model: nn.Module) -> dict[str, DiagonalWeight]:
    found = {f"{name}.weight": layer.weight_sl for name, layer in model.named_children()}
    assert all(type(each) is DiagonalWeight for each in found.values())
    return found


def test_the_op_is_registered_as_torch_asks():
    operands = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (6, (6, 2), (2, 9))]
    torch.library.opcheck(add_diagonal, operands)
    assert torch.autograd.gradcheck(add_diagonal, operands)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["kaiming", "spectral"])
def test_the_string_converts_and_trains(init):
    model = Net()
    dense, dense_weights = copy.deepcopy(model), [model.up.weight]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    compiled = torch.compile(model, backend="sltrain", options={**OPTIONS, **LITE, "init": init})
    x, target = torch.randn(16, 64), torch.randn(16, 64)
    first = F.mse_loss(compiled(x), target)
    with pytest.raises(RuntimeError, match=r"up\.weight was converted to factors"):
        torch.optim.SGD(dense_weights).step()
    assert {name: tuple(each.shape) for name, each in weights(model).items()} == SIZES
    trained = [each for group in optimizer.param_groups for each in group["params"]]
    assert [id(each) for each in trained] == [id(each) for each in model.parameters()]
    if init == "spectral":
        for name, weight in weights(model).items():
            rest = composed(weight) - dense.get_parameter(name)
            assert rest.diagonal().abs().max() < 1e-6
            # No other matrix of this rank is nearer; the diagonal is nearer still.
            tail = torch.linalg.svdvals(dense.get_parameter(name).double())[RANK:]
            assert rest.norm() < tail.norm()
    losses = [first]
    for _ in range(40):
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(F.mse_loss(compiled(x), target))
    assert losses[-1] < losses[0] / 2
    report = slcompile.last_report()
    assert report is not None
    assert [each.name for each in report.replaced] == list(SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["auto", "composed", "factored"])  # of which it has one
def test_gradients_are_those_of_float64(lowering, assert_eager):
    model = factorized(Net())
    assert_eager(
        torch.compile(model, backend="sltrain", options={**OPTIONS, **LITE, "lowering": lowering}),
        model,
        [torch.randn(16, 64)],
    )


def test_generated_code_computes_the_same(assert_eager):
    model = factorized(Net())
    assert_eager(torch.compile(model, backend="sltrain", options=OPTIONS), model, [torch.randn(16, 64)])


def test_what_is_too_large_or_excluded_or_a_stack_stays_dense():
    model = Net()
    slcompile.factorize_(model, SLConfig(**OPTIONS, exclude="up.*"))
    assert list(slcompile.factors(model)) == ["down.weight"]
    with pytest.raises(ValueError, match=r"model has no eligible weight.*no_saving"):
        slcompile.factorize_(Net(), SLConfig(structure="diagonal", rank=48))
    with pytest.raises(ValueError, match="structure got 'diagonl', did you mean 'diagonal'"):
        SLConfig(structure="diagonl")

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.experts = nn.Linear(64, 64), nn.Parameter(torch.randn(4, 64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(self.first(x), self.experts)

    experts = Experts()
    slcompile.factorize_(experts, SLConfig(**OPTIONS), example_args=(torch.randn(4, 8, 64),))
    report = slcompile.last_report()
    assert report is not None
    assert [(each.name, each.reason, each.detail) for each in report.left] == [
        ("experts", "not_2d", "is a stack of matrices, of which the structure 'diagonal' takes none")
    ]


def test_state_dicts_round_trip_and_do_not_meet_dense_ones():
    model, other = factorized(Net()), factorized(Net())
    state = model.state_dict()
    assert [name for name in state if "up" in name] == ["up.bias", "up.weight_sl.d", "up.weight_sl.B", "up.weight_sl.A"]
    other.load_state_dict(state)
    x = torch.randn(4, 64)
    assert torch.equal(other(x), model(x))
    with pytest.raises(RuntimeError, match=r"holds the factors of up\.weight and 1 more, dense in this Net"):
        Net().load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match=r"holds dense weights for up\.weight and 1 more, factorized in this Net"):
        model.load_state_dict(Net().state_dict(), strict=False)


def test_copies_and_merging():
    model = factorized(Net())
    expected = {name: composed(weight) for name, weight in weights(model).items()}
    x = torch.randn(4, 64)
    before = model(x)
    assert torch.equal(copy.deepcopy(model)(x), before)
    for found in (slcompile.merged_state_dict(model), slcompile.merge_(model).state_dict()):
        for name, want in expected.items():
            torch.testing.assert_close(found[name].double(), want, rtol=1e-6, atol=1e-6)
    assert type(model.up) is nn.Linear
    torch.testing.assert_close(model(x), before)


def test_a_graph_of_torch_fx_is_rewritten_and_merged():
    model = Net()
    gm = torch.fx.symbolic_trace(model)
    report = slcompile.rewrite(gm, SLConfig(**OPTIONS))
    assert [each.name for each in report.replaced] == list(SIZES)
    x = torch.randn(4, 64)
    before = gm(x)
    assert [node.target for node in gm.graph.nodes if node.target in WEIGHT_OPS] == [DiagonalWeight.op] * 2
    assert torch.equal(model(x), before)
    slcompile.merge_(gm)
    assert not [node for node in gm.graph.nodes if node.target in WEIGHT_OPS]
    torch.testing.assert_close(gm(x), before)


@pytest.mark.slow
@pytest.mark.parametrize("compact", [False, True])
def test_onnx(compact, tmp_path):
    model = factorized(Net())
    x = torch.randn(4, 64)
    report = slcompile.export_onnx(model, x, tmp_path / "net.onnx", compact=compact)
    assert set(report.merged) == set(SIZES)
    assert report.max_rel is not None
    assert report.max_rel < 1e-5
    assert json.loads(report.metadata["factorization"]) == [{"structure": "diagonal", "rank": RANK, "input_dim": 1}]
    stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(report.path).graph.initializer}
    for name, weight in weights(model).items():  # a structure that says no other operators is written merged
        torch.testing.assert_close(torch.tensor(stored[name]).double(), composed(weight), rtol=1e-6, atol=1e-6)


def test_checkpoints_of_transformers_models(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = torch.arange(34).reshape(2, 17)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=64)).eval()
    factorized(model)
    slcompile.save_factorized(model, tmp_path)
    loaded = slcompile.load_factorized(tmp_path).eval()
    assert list(slcompile.factors(loaded)) == list(slcompile.factors(model))
    layer = loaded.transformer.h[0].mlp.c_fc.weight_sl
    assert type(layer) is DiagonalWeight
    assert (layer.shape, layer.input_dim, layer.rank) == ((64, 256), 0, RANK)  # Conv1D stores [in, out]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_explain():
    config = SLConfig(**OPTIONS)
    found = slcompile.explain(Net(), (torch.randn(16, 64),), config=config)
    assert [(row.name, row.decision, row.rank) for row in found.matmuls] == [(n, "replaced", RANK) for n in SIZES]
    sizes = [DiagonalWeight.size(shape, config) for shape in SIZES.values()]
    assert found.summary.parameters.after == sum(sizes) + 96 + 64
    step = 3 * 2 * 16 * 64 * 96  # forward, the gradients of input and weight
    compose = 2 * RANK * 64 * 96 + 64
    rows = {row.name: row for row in found.matmuls}
    # Composed in the forward pass and again in the backward; its gradients take twice as much.
    assert rows["down.weight"].flops.before == step
    assert rows["down.weight"].flops.after == step + 4 * compose
    assert "diagonal" in json.dumps(found.to_dict())
    assert "2 of 2 matmuls with a parameter replaced" in str(found)
    again = slcompile.explain(factorized(Net()), (torch.randn(16, 64),), config=config)
    assert [row.detail for row in again.matmuls] == ["factorized already"] * 2
    assert again.summary.parameters == found.summary.parameters


@pytest.mark.slow
def test_memory():
    model = Net()
    config = SLConfig(**OPTIONS)
    report = slcompile.estimate_memory(model, (torch.randn(16, 64),), config=config, device="cpu")
    sizes = sum(DiagonalWeight.size(shape, config) for shape in SIZES.values()) + 96 + 64
    assert report.sltrain.parameter_count == sizes
    assert report.sltrain.largest["parameters"] == 4 * sizes
    assert report.sltrain.largest["optimizer state"] == 8 * sizes
    assert report.sltrain.largest["composed weights"] > 0
    assert report.low_rank == report.sltrain  # there is no sparse part to leave out
    assert report.dense.parameter_count == 2 * 64 * 96 + 96 + 64
    assert (report.settings["structure"], report.settings["rank"]) == ("diagonal", RANK)
    assert "density" not in report.settings


def trained(model: nn.Module, called: Callable[..., Tensor], rank: int = 0, world: int = 1) -> list[float]:
    """Three steps on a process's share of the batch; the mean of the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x, target = torch.randn(2, 8, 64, generator=generator, dtype=torch.float64)
        loss = F.mse_loss(called(x.chunk(world)[rank]), target.chunk(world)[rank])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / world)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_two_processes_train_as_one_does(kind, tmp_path):
    from tests.testing import on_processes  # of which the processes know nothing

    torch.manual_seed(0)
    model = slcompile.factorize_(Net().double(), SLConfig(**OPTIONS))
    expected = trained(model, torch.compile(model, backend="sltrain", options=LITE))
    first, second = on_processes(Path(__file__), tmp_path, kind)[kind]
    assert first["losses"] == second["losses"] == pytest.approx(expected, rel=1e-9)
    shards = {"d": [64, 32], "B": [96, 48], "A": [4, 2]} if kind == "fsdp" else {}  # half of the rows each
    assert first["shards"] == shards
    assert (first["B"] == second["B"]) == (kind == "ddp")


def on_each_process(kind: str) -> dict[str, Any]:
    register(DiagonalWeight)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank if kind == "ddp" else 0)  # DDP replaces what each process starts from
    model = slcompile.factorize_(Net().double(), SLConfig(**OPTIONS))
    wrapped: nn.Module = model
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        called = torch.compile(wrapped, backend="sltrain", options=LITE)
    else:
        for layer in model.children():
            layer.compile(backend="sltrain", options=LITE)
            fully_shard(layer)
        called = fully_shard(model)
    losses = trained(model, called, rank, world)
    parts = dict(model.up.weight_sl.named_parameters())
    shards = {name: [len(each), len(each.to_local())] for name, each in parts.items() if kind == "fsdp"}
    local = parts["B"].to_local() if kind == "fsdp" else parts["B"]
    return {"losses": losses, "shards": shards, "B": local.double().sum().item()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    _, folder, kind = sys.argv
    Path(folder, f"{kind}{dist.get_rank()}.json").write_text(json.dumps(on_each_process(kind)))
    dist.destroy_process_group()

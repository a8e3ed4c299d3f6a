"""The structures whose factors follow from parts: block-diagonal low rank, tensor train and CP, against their formulas.

What a structure is asked for is what ``test_toy_structure.py`` asks of one that the package does not know.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import slcompile
from slcompile.config import STRUCTURES, SLConfig
from slcompile.ops import BLOCK_LOW_RANK, CP, STRUCTURE_OPS, TENSOR_TRAIN
from slcompile.ops.quantized import dequantize
from slcompile.weight import BlockLowRankWeight, CPWeight, TensorTrainWeight
from slcompile.weight.structure import FactorizedWeight
from slcompile.weight.tensor_train import modes
from tests.testing import drawn, randomize, some_of, text_of
from tests.weight.test_toy_structure import SIZES, Net

RANK = 4
STRUCTURE = pytest.mark.parametrize("structure", ["block_low_rank", "tensor_train", "cp"])
BESIDE = [("block_low_rank", "frozen"), ("tensor_train", None), ("cp", "frozen")]
CASES = pytest.mark.parametrize(("structure", "base"), BESIDE)
TWO = pytest.mark.parametrize(("structure", "base"), some_of(BESIDE, BESIDE[:2]))
LOWERED = [(lowering, *each) for lowering in ("composed", "factored") for each in BESIDE]
BASE = pytest.mark.parametrize("base", [None, "frozen"])
SHAPES = {
    "block_low_rank": {"B": (4, 24, RANK), "A": (4, RANK, 16)},
    "tensor_train": {"G1": (16, RANK), "G2": (RANK, 6, RANK), "G3": (RANK, 4, RANK), "G4": (RANK, 16)},
    "cp": {"C": (8, RANK), "B": (12, RANK), "A": (RANK, 64)},
}
"""Of the parts of a weight 96 x 64."""


def by_formula(weight: Any) -> Tensor:
    """The weight as docs/structures.md writes it, in float64."""
    parts = [getattr(weight, name).detach().double() for name in weight.ops.parts]
    if isinstance(weight, BlockLowRankWeight):
        product = torch.block_diag(*(b @ a for b, a in zip(*parts, strict=True)))
    elif isinstance(weight, TensorTrainWeight):
        product = torch.einsum("ia,ajb,bkc,cl->ijkl", *parts)
    else:
        product = torch.einsum("hr,ir,rj->hij", *parts)
    added = weight.scale * product.reshape(weight.shape)
    if weight.base is None:
        return added
    packed = weight.base.dtype == torch.uint8
    return added + (dequantize(weight.base, weight.shape[1], torch.float64) if packed else weight.base.double())


def options(structure: str, base: str | None = None, **more: Any) -> dict[str, Any]:
    return {"structure": structure, "rank": RANK, "base": base, **more}


def factorized(structure: str, base: str | None = None, **more: Any) -> nn.Module:
    """With every trained part random."""
    return randomize(slcompile.factorize_(Net(), SLConfig(**options(structure, base, **more))), 0.3)


def weights(model: nn.Module) -> dict[str, Any]:
    return {f"{name}.weight": layer.weight_sl for name, layer in model.named_children()}


OPERANDS = {
    BLOCK_LOW_RANK: [(2, 3, 2), (2, 2, 4)],
    TENSOR_TRAIN: [(3, 2), (2, 2, 2), (2, 2, 2), (2, 4)],
    CP: [(2, 3), (3, 3), (3, 8)],
}
"""Parts of weights 6 x 8."""


@pytest.mark.slow
@pytest.mark.parametrize("ops", OPERANDS, ids=lambda ops: ops.compose.name())
def test_the_ops_are_registered_as_torch_asks(ops):
    *parts, base, grad = (each.requires_grad_() for each in drawn([*OPERANDS[ops], (6, 8), (6, 8)]))
    left, right = drawn([(5, 6), (5, 8)])
    for op, args in (
        (ops.compose, [*parts, 0.5]),
        (ops.compose, [*parts, 0.5, base]),
        (ops.backward, [grad, *parts, 0.5]),
        (ops.grads, [left, right, *(part.detach() for part in parts), 0.5]),
    ):
        torch.library.opcheck(op, args)
    assert torch.autograd.gradcheck(ops.compose, [*parts, 0.5, base])
    assert torch.autograd.gradgradcheck(ops.compose, [*parts, 0.5])
    assert {ops.compose, ops.backward, ops.grads} <= STRUCTURE_OPS.keys()


@pytest.mark.parametrize("ops", OPERANDS, ids=lambda ops: ops.compose.name())
def test_products_without_the_weight_are_those_with_it(ops):
    parts = drawn(OPERANDS[ops])
    left, right = drawn([(5, 6), (5, 8)])
    weight = ops.compose(*parts, 0.5)
    torch.testing.assert_close(ops.multiply(right, False, *parts, 0.5), right @ weight.t())
    torch.testing.assert_close(ops.multiply(left, True, *parts, 0.5), left @ weight)
    wanted = ops.backward(left.t() @ right, *parts, 0.5)
    for found in (ops.gradients(left, right, *parts, 0.5), ops.grads(left, right, *parts, 0.5)):
        torch.testing.assert_close(tuple(found), tuple(wanted))


@STRUCTURE
@BASE
def test_parts_and_size(structure, base):
    model = factorized(structure, base)
    weight = model.up.weight_sl
    assert type(weight) is STRUCTURES[structure]
    parts = {name: tuple(each.shape) for name, each in weight.named_parameters() if name != "base"}
    assert parts == SHAPES[structure]
    assert STRUCTURES[structure].size((96, 64), SLConfig(**options(structure, base))) == sum(
        map(math.prod, parts.values())
    )
    torch.testing.assert_close(weight().double(), by_formula(weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.reference(), weight())


@pytest.mark.slow
@TWO
def test_the_string_converts_and_trains(structure, base, aten_kernels):
    model = Net()
    dense = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compiled = torch.compile(model, backend="sltrain", options=options(structure, base))
    x = torch.randn(16, 64)
    target = factorized(structure)(x).detach()  # which is in its reach
    first = compiled(x)
    if base is not None:
        assert torch.equal(first, dense(x))  # the model's own weights, to the bit
    losses = [F.mse_loss(first, target)]
    for _ in range(40):
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(F.mse_loss(compiled(x), target))
    assert losses[-1] < 0.7 * losses[0]
    report = slcompile.last_report()
    assert report is not None
    assert [each.name for each in report.replaced] == list(SIZES)
    if base is not None:
        assert all(torch.equal(each.base, dense.get_parameter(name)) for name, each in weights(model).items())


@STRUCTURE
@pytest.mark.parametrize("input_dim", [0, 1])
def test_random_starts_have_the_variance_of_linear_layers(structure, input_dim):
    weight = STRUCTURES[structure]((96, 64), SLConfig(**options(structure)), input_dim=input_dim)
    squares = []
    for _ in range(50):
        weight.reset_parameters()
        composed = weight().detach()
        squares.append(composed[composed != 0].square().mean())  # where there are blocks
    assert torch.stack(squares).mean().item() == pytest.approx(1 / (3 * weight.inputs), rel=0.2)
    added = STRUCTURES[structure]((96, 64), SLConfig(**options(structure, "frozen")), input_dim=input_dim)
    nn.init.normal_(added.base)
    added.reset_parameters()
    assert torch.equal(added(), added.base)
    assert [name for name, part in added.named_parameters() if not part.any()] == [added.main[1 - input_dim]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lowering", "structure", "base"), some_of(LOWERED, [("composed", "tensor_train", None), *LOWERED[3:]])
)
def test_both_lowerings_are_as_exact_as_eager_mode(structure, base, lowering, assert_eager, aten_kernels):
    model = factorized(structure, base)
    asked = options(structure, base, lowering=lowering)
    compiled = torch.compile(model, backend="sltrain", options=asked)
    assert_eager(compiled, model, [torch.randn(16, 64)])
    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model.eval(), backend="sltrain")(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("structure", "base"),
    some_of(
        [("block_low_rank", "int8"), ("tensor_train", "nf4"), ("cp", "int8")],
        [("block_low_rank", "int8"), ("tensor_train", "nf4")],
    ),
)
def test_beside_a_base_of_few_bits(structure, base, tmp_path, assert_eager, aten_kernels):
    model = factorized(structure, base)
    weight = model.up.weight_sl
    assert (weight.base.dtype, weight.describe()["base"]) == (torch.uint8, base)
    torch.testing.assert_close(weight().double(), by_formula(weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.reference(), weight())
    for lowering in ("composed", "factored"):
        asked = options(structure, base, lowering=lowering)
        assert_eager(torch.compile(model, backend="sltrain", options=asked), model, [torch.randn(16, 64)])
        torch._dynamo.reset()
    assert set(slcompile.export_onnx(model, torch.randn(4, 64), tmp_path / "net.onnx").merged) == set(SIZES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lowering", "structure", "base"),
    some_of(LOWERED, [("composed", "cp", "frozen"), ("factored", "block_low_rank", "frozen")]),
)
def test_under_autocast_too(structure, base, lowering, assert_eager, aten_kernels):
    model = factorized(structure, base)
    compiled = torch.compile(model, backend="sltrain", options=options(structure, base, lowering=lowering))

    def cast(called: Any) -> Any:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return called(x).float()

        return run

    # Factored, the hidden matrices are rounded, and composed, the weight: each to 2**-9 of its entries.
    assert_eager(cast(compiled), model, [torch.randn(16, 64)], eps=2**-7, reference=cast(model))


@STRUCTURE
def test_the_formula_has_the_gradients(structure):
    model = factorized(structure, "frozen").double()
    x = torch.randn(16, 64, dtype=torch.float64)
    twin = copy.deepcopy(model)
    model(x).square().sum().backward()
    up, down = (weight.reference() for weight in weights(twin).values())
    hidden = torch.tanh(F.linear(x, up, twin.up.bias))
    F.linear(hidden, down, twin.down.bias).square().sum().backward()
    for (name, own), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (own.grad is None) == name.endswith("base")
        torch.testing.assert_close(own.grad, other.grad)


@pytest.mark.slow
@pytest.mark.parametrize("structure", some_of(SHAPES, ["block_low_rank", "tensor_train"]))
def test_what_the_factored_lowering_computes(structure):
    found = slcompile.explain(
        factorized(structure),
        (torch.randn(16, 64),),
        config=SLConfig(**options(structure, lowering="factored")),
    )
    assert {row.lowering for row in found.matmuls} == {"factored"}
    (joint,) = [each for each in found.passes if each.stage == "joint" and each.name == "choose_lowering"]
    assert (joint.replaced, joint.left) == (5, 0)  # two forward, one input's gradient, the gradients of two weights
    (graph,) = [each for each in found.graphs if each.name == "graph 0, joint"]
    assert sum("compose" in node.target for node in graph.before) == 4  # two weights, and their gradients
    assert not any("compose" in node.target for node in graph.after)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", some_of(["composed", "factored"], ["factored"]))
def test_generated_code_computes_the_same(lowering, assert_eager):
    model = nn.Sequential(
        *(slcompile.factorize_(nn.Sequential(nn.Linear(64, 64)), SLConfig(**options(name))) for name in SHAPES)
    )
    randomize(model, 0.3)
    compiled = torch.compile(model, backend="sltrain", options={"lowering": lowering})
    assert_eager(compiled, model, [torch.randn(16, 64)])


@pytest.mark.slow
@STRUCTURE
@BASE
def test_state_dicts_copies_and_merging(structure, base):
    model, other = factorized(structure, base), factorized(structure, base)
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 64)
    before = model(x)
    assert torch.equal(other(x), before)
    assert torch.equal(copy.deepcopy(model)(x), before)
    expected = {name: by_formula(weight) for name, weight in weights(model).items()}
    for found in (slcompile.merged_state_dict(model), slcompile.merge_(model).state_dict()):
        for name, want in expected.items():
            torch.testing.assert_close(found[name].double(), want, rtol=1e-6, atol=1e-6)
    assert type(model.up) is nn.Linear
    torch.testing.assert_close(model(x), before)
    with pytest.raises(RuntimeError, match=r"holds the factors of up\.weight and 1 more, dense in this Net"):
        Net().load_state_dict(other.state_dict(), strict=False)


@pytest.mark.slow
@TWO
def test_onnx(structure, base, tmp_path):
    model = factorized(structure, base)
    report = slcompile.export_onnx(model, torch.randn(4, 64), tmp_path / "net.onnx")
    assert set(report.merged) == set(SIZES)
    assert report.max_rel is not None
    assert report.max_rel < 1e-5
    stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(report.path).graph.initializer}
    for name, weight in weights(model).items():
        torch.testing.assert_close(torch.tensor(stored[name]).double(), by_formula(weight), rtol=1e-6, atol=1e-6)


@CASES
def test_checkpoints_of_transformers_models(structure, base, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = torch.arange(34).reshape(2, 17)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=64)).eval()
    randomize(slcompile.factorize_(model, SLConfig(**options(structure, base))))
    slcompile.save_factorized(model, tmp_path)
    loaded = slcompile.load_factorized(tmp_path).eval()
    layer = loaded.transformer.h[0].mlp.c_fc.weight_sl
    assert (type(layer), layer.shape, layer.input_dim) == (STRUCTURES[structure], (64, 256), 0)  # Conv1D: [in, out]
    assert layer.describe() == model.transformer.h[0].mlp.c_fc.weight_sl.describe()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    described = json.loads((tmp_path / "slcompile.json").read_text())
    described["weights"]["transformer.h.0.mlp.c_fc.weight"]["rank"] = 65
    (tmp_path / "slcompile.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"c_fc\.weight.* as .*rank=65 is above"):
        slcompile.load_factorized(tmp_path)


@pytest.mark.slow
@TWO
def test_explain_and_memory(structure, base):
    config = SLConfig(**options(structure, base))
    sizes = sum(STRUCTURES[structure].size(shape, config) for shape in SIZES.values())
    kept = 2 * 64 * 96 if base else 0
    found = slcompile.explain(Net(), (torch.randn(16, 64),), config=config)
    assert [(row.name, row.decision, row.rank) for row in found.matmuls] == [(n, "replaced", RANK) for n in SIZES]
    assert all(row.costs["factored"] > 0 and row.costs["composed"] > 0 for row in found.matmuls)
    assert found.summary.parameters.after == sizes + kept + 96 + 64
    again = slcompile.explain(factorized(structure, base), (torch.randn(16, 64),), config=config)
    assert [row.detail for row in again.matmuls] == ["factorized already"] * 2
    assert again.summary.parameters == found.summary.parameters
    report = slcompile.estimate_memory(
        Net(), (torch.randn(16, 64),), config=SLConfig(**options(structure, base, lowering="composed")), device="cpu"
    )
    assert report.sltrain.parameter_count == sizes + 96 + 64
    assert report.sltrain.largest["parameters"] == 4 * (sizes + kept + 96 + 64)
    assert report.sltrain.largest["optimizer state"] == 8 * (sizes + 96 + 64)
    assert report.sltrain.largest["composed weights"] >= 4 * 64 * 96
    assert report.settings["structure"] == structure


def best_of(structure: str, dense: Tensor) -> FactorizedWeight:
    weight = STRUCTURES[structure].from_dense(dense, SLConfig(**options(structure)), "spectral")
    torch.testing.assert_close(weight.merged().double(), by_formula(weight), rtol=1e-5, atol=1e-5)
    return weight


def test_blocks_are_approximated_each_by_its_best():
    (dense,) = drawn([(96, 64)], torch.float32)
    rest = dense - best_of("block_low_rank", dense).merged()
    for index in range(4):
        where = slice(24 * index, 24 * index + 24), slice(16 * index, 16 * index + 16)
        tail = torch.linalg.svdvals(dense[where])[RANK:].norm().item()
        assert rest[where].norm().item() == pytest.approx(tail, rel=1e-3)
        assert rest[where].norm() < dense[where].norm()


def test_a_train_is_approximated_within_the_bound_of_its_unfoldings():
    (dense,) = drawn([(96, 64)], torch.float32)
    rest = dense - best_of("tensor_train", dense).merged()
    tails = [torch.linalg.svdvals(dense.reshape(rows, -1))[RANK:].square().sum() for rows in (16, 96, 96 * 4)]
    # No train of these ranks is nearer than the largest of the three, and TT-SVD is not farther than their sum.
    assert max(tails).sqrt() <= rest.norm() <= sum(tails).sqrt()


def test_outer_products_are_approximated():
    (dense,) = drawn([(96, 64)], torch.float32)
    rest = dense - best_of("cp", dense).merged()
    low_rank = torch.linalg.svdvals(dense)[RANK:].norm()
    (U, s, _), share = torch.linalg.svd(dense, full_matrices=False), []
    for column, value in zip(U[:, :RANK].mT, s[:RANK], strict=True):
        share.append(value * torch.linalg.svdvals(column.view(8, 12))[0])
    start = (dense.square().sum() - torch.stack(share).square().sum()).sqrt()  # least squares only comes nearer
    assert low_rank <= rest.norm() <= start


@STRUCTURE
def test_a_weight_of_the_structure_is_found_again(structure):
    planted = factorized(structure).up.weight_sl
    dense = planted.merged()
    error = (best_of(structure, dense).merged() - dense).norm() / dense.norm()
    assert error < (0.05 if structure == "cp" else 1e-4)  # least squares alternates to a limit, the others are exact


@STRUCTURE
def test_transforms_see_the_formula(structure):
    weight = factorized(structure).up.weight_sl.double()  # sums of squares of some hundreds, in another order
    (x,) = drawn([(5, 64)], torch.float64)
    parts = dict(weight.named_parameters())

    def loss(parts: dict[str, Tensor]) -> Tensor:
        return F.linear(x, torch.func.functional_call(weight, parts)).square().sum()

    found = torch.func.grad(loss)(parts)
    loss(parts).backward()
    for name, part in parts.items():
        torch.testing.assert_close(found[name], part.grad)


def test_cores_are_cut_where_they_are_smallest():
    for size, rank in itertools.product((1, 7, 64, 96, 768), (1, 4, 32)):
        outer, inner = modes(size, rank)
        assert outer * inner == size
        cost = {each: min(rank, each) * (each + size // each * rank) for each in range(1, size + 1) if size % each == 0}
        assert cost[outer] == min(cost.values())


BAD = [
    ({"structure": "cp", "density": 0.1}, "density=0.1 means nothing for structure='cp', which has no sparse part"),
    ({"structure": "cp", "support": "uniform"}, "support='uniform' means nothing"),
    ({"structure": "tensor_train", "vector": 8}, "vector=8 means nothing"),
    ({"structure": "tensor_train", "blocks": 4}, "blocks=4 means nothing .*'tensor_train', which is not cut"),
    ({"blocks": 4}, "blocks=4 means nothing for structure='sparse_low_rank'"),
    ({"structure": "cp", "blocks": 1}, "blocks must be None or an int >= 2, got 1"),
    ({"structure": "cp", "blocks": 2.0}, "blocks must be None or an int >= 2, got 2.0"),
    ({"structure": "block_low_rank", "blocks": 5}, "fits no eligible weight: one has 96 rows and 64 columns, which"),
    ({"structure": "block_low_rank", "rank": 17}, "smaller side 16, which rank=17 is above"),
    ({"structure": "cp", "blocks": 7}, "one has 96 rows, which blocks=7 does not divide"),
    ({"structure": "tensor_train", "rank": 65}, "rank must be at most 64"),
    ({"structure": "block_low_rank", "rank": 16, "blocks": 2, "base": "frozen", "min_dim": 65}, "no eligible weight"),
    ({"structure": "tensor_train", "rank": 60, "base": "frozen"}, "rank=60 saves nothing beside base='frozen'"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("given", "error"), BAD, ids=[str(given) for given, _ in BAD])
def test_what_makes_no_sense_is_refused_before_anything_is_changed(given, error):
    model = Net()
    before = text_of(torch.fx.symbolic_trace(model)), list(map(id, model.parameters()))
    with pytest.raises(ValueError, match=error):
        slcompile.factorize_(model, SLConfig(**given))
    assert (text_of(torch.fx.symbolic_trace(model)), list(map(id, model.parameters()))) == before
    if "min_dim" not in given:  # of which the string only warns
        with pytest.raises(Exception, match=error):
            torch.compile(model, backend="sltrain", options=given)(torch.randn(2, 64))
        assert list(map(id, model.parameters())) == before[1]


def test_weights_that_cannot_be_cut_stay_dense():
    model = nn.Sequential(nn.Linear(64, 90), nn.Linear(90, 64), nn.Linear(64, 64))
    config = SLConfig(**options("block_low_rank"))
    slcompile.factorize_(model, config)
    assert list(slcompile.factors(model)) == ["2.weight"]
    report = slcompile.last_report()
    assert report is not None
    assert [(each.name, each.reason) for each in report.left] == [("0.weight", "shape"), ("1.weight", "shape")]
    assert "90 rows and 64 columns, which blocks=4 does not divide" in report.left[0].detail
    assert CPWeight.blocks_for((90, 64), SLConfig(structure="cp")) == 9

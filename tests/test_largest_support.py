"""A model whose non-zeros are where its weights are approximated worst: the choice, the state, what is refused."""

from __future__ import annotations

import copy
import pickle

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import slcompile
import slcompile.integrations.transformers
from slcompile.ops.support import groups_per_row, largest_offsets, offset_dtype, offset_index
from slcompile.weight.fit import ROUNDS, fit
from tests.testing import some_of

CONFIG = {"rank": 8, "density": 0.06, "support": "largest", "init": "spectral", "seed": 1}


def factorized(model: nn.Module, **options: object) -> nn.Module:
    return slcompile.factorize_(model, slcompile.SLConfig(**{**CONFIG, **options}))


def by_hand(gains: Tensor, groups: int) -> list[int]:
    """Flat positions of the largest entry in each group of each row, by looking at each."""
    rows, columns = gains.shape
    found = []
    for row in range(rows):
        for group in range(groups):
            inside = range(group * columns // groups, (group + 1) * columns // groups)
            found.append(row * columns + max(inside, key=lambda column: float(gains[row, column])))
    return found


@pytest.mark.parametrize(("rows", "columns", "groups"), [(7, 65, 9), (5, 64, 64), (3, 700, 2), (1, 9, 1)])
def test_the_largest_of_each_group_is_found_and_its_offset_says_where(rows, columns, groups):
    gains = torch.rand(rows, columns)
    offsets = largest_offsets(gains, groups)
    kind = offset_dtype(columns, groups)
    assert kind == (torch.uint16 if columns / groups > 256 else torch.uint8)
    index = offset_index(offsets.flatten().to(kind), rows, columns, groups)
    assert index.tolist() == by_hand(gains, groups)
    assert index.dtype == torch.int32
    assert offset_dtype(1 << 17, 1) == torch.int32


@pytest.mark.slow
def test_the_non_zeros_are_the_largest_residuals_of_the_low_rank_part():
    dense = torch.randn(48, 64) @ torch.diag(0.9 ** torch.arange(64.0))
    model = nn.Sequential(nn.Linear(64, 48))
    with torch.no_grad():
        model[0].weight.copy_(dense)
    factorized(model)
    parts = slcompile.factors(model)["0.weight"]
    assert parts.values.shape == (48 * groups_per_row(64, 0.06),)
    rest = dense - parts.scale * parts.B @ parts.A
    assert parts.index.tolist() == by_hand(rest.abs(), groups_per_row(64, 0.06))
    torch.testing.assert_close(parts.values, rest.flatten()[parts.index.long()], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.B.norm(dim=0), (parts.scale * parts.A).norm(dim=1))  # shared equally

    def error(support: str) -> float:
        other = nn.Sequential(nn.Linear(64, 48))
        with torch.no_grad():
            other[0].weight.copy_(dense)
        factorized(other, support=support)
        return float((other[0].weight.detach() - dense).norm())

    assert float((model[0].weight.detach() - dense).norm()) == pytest.approx(error("largest"), rel=1e-4)
    assert error("largest") < 0.9 * error("stratified")


@pytest.mark.parametrize("input_dim", [0, 1])
@pytest.mark.parametrize("where", ["chosen", "given"])
def test_with_inputs_nothing_near_fits_better(where, input_dim):
    torch.manual_seed(3)
    weight = torch.randn(20, 30, dtype=torch.float64)
    inputs = weight.shape[input_dim]
    x = torch.randn(400, inputs, dtype=torch.float64) @ torch.randn(inputs, inputs, dtype=torch.float64) * 3
    given = torch.randperm(600)[:90].sort().values
    B, A, positions, values = fit(weight, 3, 4 if where == "chosen" else given, x.t() @ x, None, input_dim)
    assert ROUNDS > 1
    if where == "given":
        assert torch.equal(positions, given)
    else:
        assert len(positions) == 20 * 4

    def oriented(matrix: Tensor) -> Tensor:
        return matrix if input_dim == 1 else matrix.t()

    low_rank = (B @ A).double()
    sparse = torch.zeros(600, dtype=torch.float64).index_add(0, positions, values.double()).view(weight.shape)
    found = (oriented(weight - low_rank - sparse) @ x.t()).square().sum()
    # For this low-rank part no values of this support are better ...
    exact = 0.0
    for rest, row in zip(oriented(weight - low_rank), oriented(sparse), strict=True):
        at = row.nonzero().squeeze(1)
        wanted = (x @ rest).unsqueeze(1)
        exact += float((wanted - x[:, at] @ torch.linalg.lstsq(x[:, at], wanted).solution).square().sum())
    assert exact <= float(found) * (1 + 1e-9) <= 1.01 * exact
    # ... and for these values hardly another low-rank part: it came before them.
    best = torch.linalg.svdvals(oriented(weight - sparse) @ x.t())[3:].square().sum()
    assert float(best) <= float(found) <= 1.05 * float(best)


def test_a_stack_is_fitted_matrix_by_matrix_and_what_no_input_reached_as_without():
    weight, x = torch.randn(3, 20, 30), torch.randn(200, 30)
    moments = torch.stack([x.t() @ x, torch.zeros(30, 30), 9 * x.t() @ x])
    torch.manual_seed(1)
    B, A, positions, values = fit(weight, 4, 5, moments)
    assert (B.shape, A.shape) == ((3, 20, 4), (3, 4, 30))

    def losses(B: Tensor, A: Tensor, positions: Tensor, values: Tensor) -> Tensor:
        fitted = (B @ A).flatten().index_add(0, positions, values).view(B.shape[:-1] + A.shape[-1:])
        rest = (weight if B.dim() == 3 else weight[which]) - fitted
        return (rest @ (torch.eye(30) if which == 1 else x.t())).square().sum((-2, -1))

    torch.manual_seed(1)  # the singular vectors are found from a random start
    for which, moment in enumerate((moments[0], None, moments[0])):
        alone = losses(*fit(weight[which], 4, 5, moment))
        torch.testing.assert_close(losses(B, A, positions, values)[which], alone, rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", some_of(["composed", "factored"], ["factored"]))
def test_training_and_inference_are_as_exact_as_eager(assert_eager, block, batch, lowering):
    options = {**CONFIG, "lowering": lowering}
    compiled = torch.compile(block, backend="sltrain", options=options)
    compiled(batch[0]).sum().backward()
    assert set(slcompile.factors(block)) == {"up.weight", "down.weight", "mix"}
    assert_eager(compiled, block, [batch[0]])
    with torch.no_grad():
        found, expected = compiled(batch[0][:3]), block(batch[0][:3])
        assert float((found - expected).norm()) <= 2**-20 * float(expected.norm())


def test_a_stack_of_matrices_trains(assert_eager):
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.up = nn.Linear(64, 64), nn.Parameter(torch.randn(3, 64, 48))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(self.first(x), self.up)

    model, x = Experts(), torch.randn(3, 5, 64)
    slcompile.factorize_(model, slcompile.SLConfig(**CONFIG), example_args=(x,))
    assert model.up_sl.offsets.shape == (3 * 64 * groups_per_row(48, 0.06),)
    assert_eager(torch.compile(model, backend="sltrain", options=CONFIG), model, [x])


def test_a_state_dict_holds_small_offsets_and_brings_the_positions(block_class):
    model, other = factorized(block_class()), factorized(block_class())
    state = model.state_dict()
    held = [name for name in state if name.startswith("up.weight_sl.")]
    assert [name.rpartition(".")[2] for name in held] == ["B", "A", "values", "seed", "offsets"]
    assert state["up.weight_sl.offsets"].dtype == torch.uint8
    assert not torch.equal(other.up.weight, model.up.weight)
    other.load_state_dict(state)
    assert torch.equal(other.up.weight, model.up.weight)
    with torch.device("meta"):
        fresh = block_class()
    slcompile.factorize_(fresh, slcompile.SLConfig(**{**CONFIG, "init": "auto"}))
    fresh.load_state_dict(state, assign=True)
    assert torch.equal(fresh.up.weight, model.up.weight)


def test_copies_pickles_and_checkpoints_keep_the_positions(block, tmp_path):
    weight = factorized(block).up.weight_sl
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert torch.equal(twin(), weight())
    again = type(weight).from_description(weight.shape, weight.describe(), name="", dtype=weight.dtype)
    again.load_state_dict(weight.state_dict())
    assert torch.equal(again(), weight())

    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=64)).eval()
    factorized(gpt2)
    slcompile.save_factorized(gpt2, tmp_path)
    ids = torch.arange(34).reshape(2, 17)
    for loaded in (slcompile.load_factorized(tmp_path), GPT2LMHeadModel.from_pretrained(tmp_path)):
        with torch.no_grad():
            assert torch.equal(loaded.eval()(ids).logits, gpt2(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("compact", [False, True])
def test_merging_and_onnx(block, batch, compact, tmp_path):
    factorized(block)
    report = slcompile.export_onnx(block, batch[0], tmp_path / "net.onnx", compact=compact)
    assert report.max_rel is not None
    assert report.max_rel < 1e-5
    stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(report.path).graph.initializer}
    assert ("up.weight_sl.index" in stored) == compact
    x = batch[0]
    before = block(x)
    slcompile.merge_(block)
    torch.testing.assert_close(block(x), before)


@pytest.mark.slow
def test_what_cannot_be_is_refused_before_anything_changes(block, batch):
    before = copy.deepcopy(block.state_dict())
    for options in ({"init": "kaiming"}, {"init": "auto", "base": "frozen"}):
        with pytest.raises(ValueError, match="support='largest' puts the non-zeros where the approximation"):
            slcompile.SLConfig(**{**CONFIG, **options})
    for convert in (
        lambda: factorized(block, init="auto"),
        lambda: torch.compile(block, backend="sltrain", options={**CONFIG, "init": "auto"})(batch[0]),
    ):
        with pytest.raises(ValueError, match=r"no weight looks trained \(up\.weight, \.\.\.\): take another support"):
            convert()
        assert type(block.up) is nn.Linear
        assert all(torch.equal(each, before[name]) for name, each in block.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_states_of_other_supports_and_broken_offsets_are_refused(block_class, strict):
    model, uniform = factorized(block_class()), factorized(block_class(), support="stratified")
    with pytest.raises(RuntimeError, match=r"values must have shape"):
        model.load_state_dict(uniform.state_dict(), strict=strict)
    state = model.state_dict()
    broken = {**state, "up.weight_sl.offsets": torch.full_like(state["up.weight_sl.offsets"], 200)}
    with pytest.raises(RuntimeError, match="offsets must lie in their groups of 16 columns"):
        model.load_state_dict(broken, strict=strict)
    del broken["up.weight_sl.offsets"]
    with pytest.raises(RuntimeError, match=r"values have no offsets; this weight has support='largest'"):
        model.load_state_dict(broken, strict=strict)


def test_overwritten_offsets_are_found_and_a_reset_mends_them(block):
    weight = factorized(block).up.weight_sl
    weight.offsets.fill_(250)
    with pytest.raises(RuntimeError, match="offsets no longer says where the non-zeros are"):
        weight.merged()
    weight.reset_parameters()
    columns = weight.index.long() % 64
    assert sorted(set(columns.tolist())) == [15, 31, 47, 63]  # the last of each group
    weight.merged()


@pytest.mark.slow
def test_the_estimator_knows_what_is_kept_of_a_support(block, batch):
    report = slcompile.estimate_memory(
        block, (batch[0],), config=slcompile.SLConfig(**CONFIG, lowering="composed"), device="cpu"
    )
    # A position and an offset for each non-zero: weights of 96, 64 and 64 rows with 4, 6 and 4 groups.
    assert report.sltrain.largest["indices"] == (4 + 1) * (96 * 4 + 64 * 6 + 64 * 4)

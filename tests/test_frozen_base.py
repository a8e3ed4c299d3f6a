"""``base="frozen"``: the model's own weights stay, and what is added to them is trained."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import pickle
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import slcompile
from slcompile.config import SLConfig
from slcompile.memory.graphs import capture
from slcompile.passes.graph import op_name
from slcompile.weight.sl_weight import SLWeight
from tests.testing import randomize, saved_for_backward, some_of, text_of

FROZEN: dict[str, Any] = {"base": "frozen", "rank": 4, "density": 0.05}
LORA: dict[str, Any] = {"base": "frozen", "rank": 4, "density": 0}
STRATIFIED = {**FROZEN, "support": "stratified"}
UNIFORM = {**FROZEN, "support": "uniform"}
BLOCKS = {"base": "frozen", "structure": "block_low_rank", "rank": 4}
EXPERTS = 4


class Spellings(nn.Module):
    """A weight for each way of writing a product, and one that is packed of two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 96)
        self.conv1d = nn.Parameter(torch.randn(96, 64) / 8)  # [in, out], as GPT-2 has it
        self.product = nn.Parameter(torch.randn(64, 64) / 8)
        self.packed = nn.Parameter(torch.randn(128, 64) / 8)
        self.experts = nn.Parameter(torch.randn(EXPERTS, 64, 64) / 8)
        self.left = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.linear(x))
        x = torch.tanh(torch.addmm(x[0, :64], x, self.conv1d))
        x = torch.einsum("td,od->to", x, self.product)
        first, second = self.packed.chunk(2)
        x = F.linear(x, first) * F.linear(x, second)
        x = torch.bmm(x.view(EXPERTS, -1, 64), self.experts).view(x.shape)
        return (self.left @ torch.tanh(x).t()).t()


WEIGHTS = ["linear.weight", "conv1d", "product", "packed", "experts", "left"]


def adapted(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    """With something added to every weight."""
    slcompile.factorize_(model, SLConfig(**options), example_args=(x,))
    randomize(model)
    return model


def weights(model: nn.Module) -> list[SLWeight]:
    return [each for each in model.modules() if isinstance(each, SLWeight)]


def by_name(model: nn.Module) -> dict[str, SLWeight]:
    named = model.named_modules()
    found = {name.removesuffix("_sl"): each for name, each in named if isinstance(each, SLWeight)}
    assert sorted(found) == sorted(WEIGHTS)
    return found


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [each for weight in weights(model) for each in weight.parameters() if each.requires_grad]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(32, 64)


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
@pytest.mark.parametrize("lowering", some_of(["eager", "composed", "factored"], ["eager", "factored"]))
def test_parameters_alone_may_be_of_lower_precision(lowering, x):
    # FSDP2's mixed precision casts them and no buffers, and the values of no sparse part are one.
    model = adapted(Spellings(), x, **LORA)
    whole = copy.deepcopy(model).bfloat16()
    for each in model.parameters():
        each.data = each.data.bfloat16()
    assert {each.values.dtype for each in weights(model)} == {torch.float32}
    options = {**LORA, "lowering": lowering}
    run = model if lowering == "eager" else torch.compile(model, backend="sltrain", options=options)
    expected = whole if lowering == "eager" else torch.compile(whole, backend="sltrain", options=options)
    results = [each(x.bfloat16()) for each in (run, expected)]
    assert torch.equal(*results)
    for each in results:
        each.sum().backward()
    for one, other in zip(trained(model), trained(whole), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
@pytest.mark.parametrize(
    ("lowering", "options"),
    some_of(
        itertools.product(("composed", "factored"), (FROZEN, LORA, STRATIFIED, UNIFORM)),
        [("composed", FROZEN), ("composed", UNIFORM), ("factored", LORA), ("factored", STRATIFIED)],
    ),
)
def test_step_0_is_the_model_bit_for_bit_and_training_leaves_its_weights(options, lowering, x):
    model = Spellings()
    dense = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compiled = torch.compile(model, backend="sltrain", options={**options, "lowering": lowering})
    with torch.no_grad():
        want = dense(x)
    assert torch.equal(compiled(x), want)
    assert torch.equal(model(x), want)
    assert sorted(slcompile.factors(model)) == sorted(WEIGHTS)
    # The optimizer that was made before holds what is trained, in the model's order, and no frozen weight.
    held = [each for group in optimizer.param_groups for each in group["params"]]
    assert [id(each) for each in held] == [id(each) for each in model.parameters() if each.requires_grad]
    assert {id(each) for each in trained(model)} <= {id(each) for each in held}
    losses = []
    for _ in range(8):
        loss = (compiled(x) - torch.roll(x, 1)).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    for name, weight in by_name(model).items():
        assert torch.equal(weight.base, dense.get_parameter(name)), name
        assert not torch.equal(weight(), weight.base), name


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
@pytest.mark.parametrize(
    ("lowering", "options"),
    some_of(
        itertools.product(("auto", "composed", "factored"), (FROZEN, LORA, STRATIFIED)),
        [("auto", FROZEN), ("composed", LORA), ("composed", STRATIFIED), ("factored", FROZEN), ("factored", LORA)],
    ),
)
def test_gradients_are_those_of_float64(options, lowering, x, assert_eager):
    model = adapted(Spellings(), x, **options)
    compiled = torch.compile(model, backend="sltrain", options={**options, "lowering": lowering})
    assert_eager(compiled, model, [x])


@pytest.mark.slow
@pytest.mark.parametrize("options", some_of([FROZEN, LORA], [FROZEN]))
def test_generated_code_computes_the_same(options, x, assert_eager):
    model = adapted(Spellings(), x, **options)
    assert_eager(torch.compile(model, backend="sltrain", options={**options, "lowering": "factored"}), model, [x])


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 512), nn.Linear(512, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [FROZEN, LORA])
def test_neither_a_composed_nor_a_cast_weight_is_kept_for_the_backward_pass(options, autocast):
    x = torch.randn(8, 256, requires_grad=True)
    for lowering in ("composed", "factored"):
        model = adapted(Wide(), x, **options)
        compiled = torch.compile(model, backend="sltrain", options={**options, "lowering": lowering})
        stored = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers()]}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, saved = saved_for_backward(lambda compiled=compiled: compiled(x).sum())
        made = [each for each in saved if each.untyped_storage().data_ptr() not in stored]
        assert max(each.numel() for each in made) <= 16 * 512  # activations, and values in bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("options", [FROZEN, LORA])
def test_the_factored_backward_pass_makes_no_dense_gradient(options):
    x = torch.randn(8, 256)
    found: dict[str, list[tuple[int, ...]]] = {}
    for lowering in ("composed", "factored"):
        model = adapted(Wide(), x, **options)
        graphs = capture(model, ((x,), {}), None, "cpu", SLConfig(**options, lowering=lowering))
        nodes = [*graphs.forward.nodes, *graphs.backward.nodes]
        products = [each for each in nodes if op_name(each) in ("mm", "addmm", "compose")]
        found[lowering] = [tuple(each.meta["val"].shape) for each in products]
    dense = {(512, 256), (256, 512)}
    assert len(dense & set(found["composed"])) == 2
    assert found["factored"]
    assert dense.isdisjoint(found["factored"])


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
def test_a_model_that_was_frozen_gets_factors_and_nothing_else_is_trained(x):
    model = Spellings().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="sltrain", options={**LORA})
    compiled(x).square().mean().backward()
    with_gradient = [name for name, each in model.named_parameters() if each.requires_grad]
    assert with_gradient == [f"{name}_sl.{part}" for name in by_name(model) for part in ("B", "A")]
    optimizer.step()
    assert all(weight.base.grad is None for weight in weights(model))
    # Without a base, what is frozen stays as it is.
    untouched = Spellings().requires_grad_(False)
    with pytest.raises(ValueError, match=r"no eligible weight.*frozen"):
        slcompile.factorize_(untouched, SLConfig(rank=4))


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
def test_a_base_that_is_unfrozen_gets_its_gradient(x, assert_eager):
    for options in (FROZEN, LORA):
        model = adapted(Spellings(), x, **options)
        for weight in weights(model):
            weight.base.requires_grad_()
        assert_eager(torch.compile(model, backend="sltrain", options={**options}), model, [x])
        model(x).sum().backward()
        gradients = [each.base.grad for each in weights(model)]
        assert all(each is not None and bool(each.any()) for each in gradients)


def test_what_is_told_and_that_memory_is_shared(x, caplog):
    model = Spellings()
    pointers = [model.get_parameter(name).data_ptr() for name in WEIGHTS]
    with caplog.at_level(logging.WARNING, "slcompile"):
        slcompile.factorize_(model, SLConfig(**LORA), example_args=(x,))
    assert [by_name(model)[name].base.data_ptr() for name in WEIGHTS] == pointers
    assert "+ linear.weight 96x64: stays, frozen; what is added to it is trained" in str(slcompile.last_report())
    size = sum(SLWeight.size(each.shape, SLConfig(**LORA)) for each in weights(model))
    assert f"-> {size:,} parameters in them, which begin at zero and are added to the weights" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("options", [FROZEN, LORA])
def test_state_dicts_copies_and_pickles(options, x):
    model, other = adapted(Spellings(), x, **options), Spellings()
    slcompile.factorize_(other, SLConfig(**options), example_args=(x,))
    state = model.state_dict()
    own = {"B", "A", "base"} | ({"values", "seed", "rows_of_block"} if options is FROZEN else set())
    assert {key.rpartition(".")[2] for key in state if key.startswith("linear.weight_sl.")} == own
    other.load_state_dict(state)
    for each in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(each(x), model(x))
        assert [each.requires_grad for each in each.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("options", some_of([FROZEN, LORA], [FROZEN]))
def test_merged_is_the_sum_rounded_once(options, x, tmp_path):
    model = adapted(Spellings(), x, **options)
    exact = {name: copy.deepcopy(weight).double()() for name, weight in by_name(model).items()}
    before = model(x)
    for found in (slcompile.merged_state_dict(model), slcompile.merge_(copy.deepcopy(model)).state_dict()):
        for name in WEIGHTS:
            torch.testing.assert_close(found[name].double(), exact[name], rtol=1e-6, atol=1e-7)
    for compact in (False, True):  # with a base, factors make no smaller file
        path = tmp_path / f"{compact}.onnx"
        report = slcompile.export_onnx(model, x, path, compact=compact)
        assert report.max_rel < 1e-4
        described = json.loads(report.metadata["factorization"])
        assert all(each["base"] == "frozen" for each in described)
        stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
        assert all(
            torch.equal(torch.tensor(stored[name]), slcompile.merged_state_dict(model)[name]) for name in WEIGHTS
        )
    slcompile.merge_(model)
    torch.testing.assert_close(model(x), before)
    assert set(model.state_dict()) == set(Spellings().state_dict())


@pytest.mark.parametrize("options", [FROZEN, LORA])
def test_checkpoints_of_transformers_models(options, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = torch.arange(34).reshape(2, 17)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=64)).eval()
    slcompile.factorize_(model, SLConfig(**options))
    randomize(model)
    slcompile.save_factorized(model, tmp_path / "factors")
    loaded = slcompile.load_factorized(tmp_path / "factors").eval()
    assert list(slcompile.factors(loaded)) == list(slcompile.factors(model))
    assert all(each.has_base and not each.base.requires_grad for each in weights(loaded))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    slcompile.save_merged(model, tmp_path / "merged")
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_graph_of_torch_fx_is_rewritten_and_merged(x):
    model = Wide()
    dense, x = copy.deepcopy(model), torch.randn(4, 256)
    gm = torch.fx.symbolic_trace(model)
    slcompile.rewrite(gm, SLConfig(**FROZEN))
    assert "up.weight_sl.base" in text_of(gm)
    assert torch.equal(gm(x), dense(x))
    slcompile.merge_(gm)
    assert torch.equal(gm(x), dense(x))
    assert "weight_sl" not in text_of(gm)


@pytest.mark.slow
def test_explain_counts_the_base_and_trains_the_factors_alone():
    model, x = Wide(), torch.randn(64, 256)
    found = slcompile.explain(model, (x,), config=SLConfig(**LORA, lowering="factored"))
    weight, added = 256 * 512, 4 * (256 + 512)
    assert found.summary.parameters.after == 2 * weight + 512 + 2 * added
    assert found.summary.bytes.after == 4 * (2 * weight + 4 * (512 + 2 * added)) + 2 * 8  # seeds
    rows = {row.name: row for row in found.matmuls}
    assert [row.lowering for row in rows.values()] == ["factored", "factored"]
    # Forward and the input's gradient are products with the base, too; the gradients go through the rank alone.
    assert rows["down.weight"].flops.after == 2 * 64 * (2 * weight + 3 * added)
    again = slcompile.explain(adapted(Wide(), x, **LORA), (x,), config=SLConfig(**LORA, lowering="factored"))
    assert again.summary.bytes.after == found.summary.bytes.after


def test_memory_counts_a_base_without_gradient_and_state():
    model, x = Wide(), torch.randn(64, 256)
    report = slcompile.estimate_memory(model, (x,), config=SLConfig(**LORA), device="cpu")
    weight, added = 256 * 512, 4 * (256 + 512)
    assert report.sltrain.parameter_count == 512 + 2 * added
    assert report.sltrain.largest["parameters"] == 4 * (2 * weight + 512 + 2 * added)
    assert report.sltrain.largest["optimizer state"] == 8 * (512 + 2 * added)
    assert report.settings["base"] == "frozen"


def test_torch_func_sees_the_base(x):
    model = adapted(Wide(), torch.randn(4, 256), **FROZEN)
    x = torch.randn(4, 256)
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}

    def loss(parameters: Any) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    found = torch.func.grad(loss)(parameters)
    model(x).square().mean().backward()
    for name, each in parameters.items():
        torch.testing.assert_close(found[name], each.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
def test_a_checked_model_is_right():
    report = slcompile.check(Wide(), (torch.randn(16, 256),), config=SLConfig(**FROZEN))
    assert report.is_healthy, str(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"^density must be a number in \(0, 1\], or 0 with base='frozen', got 0"),
        ({"base": "frozne"}, "^base got 'frozne', did you mean 'frozen'"),
        ({"base": "frozen", "init": "spectral"}, "^init='spectral' approximates the weight, which base='frozen' keeps"),
        ({"base": "frozen", "density": 0, "support": "uniform"}, "^support='uniform' needs a density above 0"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        SLConfig(**options)


def test_a_rank_that_saves_nothing_is_refused_before_anything_changes(x):
    model, config = Wide(), {"base": "frozen", "rank": 171, "density": 0}  # 171 * (256 + 512) > 256 * 512
    before = copy.deepcopy(model.state_dict())
    message = "rank=171 with density=0 saves nothing beside base='frozen': what is added takes 131328 parameters"
    with pytest.raises(ValueError, match=message):
        slcompile.factorize_(model, SLConfig(**config))
    with pytest.raises(Exception, match=message):
        torch.compile(model, backend="sltrain", options={**config})(torch.randn(4, 256))
    assert model.state_dict().keys() == before.keys()
    slcompile.factorize_(model, SLConfig(base="frozen", rank=170, density=0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lowering", "options"),
    some_of(
        itertools.product(("composed", "factored"), (LORA, FROZEN, BLOCKS)),
        [("composed", BLOCKS), ("factored", LORA), ("factored", FROZEN)],
    ),
)
def test_a_weight_that_lies_column_by_column(options, lowering):
    model = nn.Sequential(nn.Linear(64, 96, bias=False))
    model[0].weight = nn.Parameter(torch.randn(64, 96).t() / 8)
    x = torch.randn(8, 64)
    expected = model(x)
    compiled = torch.compile(model, backend="sltrain", options={**options, "lowering": lowering})
    torch.testing.assert_close(compiled(x), expected)  # step 0, which converts
    randomize(model)
    assert model[0].weight.is_contiguous()
    torch.testing.assert_close(compiled(x), model(x))


def test_factors_that_no_optimizer_holds_are_said(caplog):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3))
    model[:2].requires_grad_(False)
    head = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    slcompile.factorize_(copy.deepcopy(model), SLConfig(**LORA))
    assert "they stay zero" not in caplog.text  # of that copy no optimizer holds anything
    slcompile.factorize_(model, SLConfig(**LORA))
    assert "AdamW trains parameters of Sequential and none of the factors that were added" in caplog.text
    assert len(head.param_groups[0]["params"]) == 2


def test_factors_that_some_optimizer_holds_are_not(caplog):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
    optimizers = [torch.optim.SGD(each.parameters()) for each in model]
    slcompile.factorize_(model, SLConfig(**LORA))
    assert "they stay zero" not in caplog.text
    assert len(optimizers[0].param_groups[0]["params"]) == 3  # bias, B and A

"""``base="int8"`` and ``"nf4"``: the model's own weights stay, in 8 or 4 bits a number."""

from __future__ import annotations

import copy
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import slcompile
from slcompile.benchmark import peak_above
from slcompile.config import SLConfig
from slcompile.ops.quantized import BITS, BLOCK, dequantize, dequantize_reference, packed_shape, quantize
from slcompile.weight.sl_weight import SLWeight
from tests.test_frozen_base import WEIGHTS, Spellings, Wide, adapted, by_name, weights
from tests.testing import randomize, saved_for_backward, some_of

QLORA: dict[str, Any] = {"base": "nf4", "rank": 4, "density": 0}
INT8: dict[str, Any] = {"base": "int8", "rank": 4, "density": 0.05}
SHAPES = [(3, 128), (5, 65), (1, 1), (2, 3, 70)]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(32, 64)


class TestQuantize:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", BITS)
    def test_each_number_is_the_nearest_that_its_block_has(self, kind, dtype, shape):
        weight = torch.randn(shape).to(dtype)
        weight[0] = 0
        packed = quantize(weight, kind)
        assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, packed_shape(shape, kind))
        found = dequantize(packed, shape[-1], torch.float32)
        for own, each in zip(weight.float().split(BLOCK, -1), found.split(BLOCK, -1), strict=True):
            # Half the widest gap between levels: of nf4 that from -1 to -0.696.
            gap = 1 / 254 if kind == "int8" else (1 - 0.6961928) / 2
            assert bool(((own - each).abs() <= gap * 1.0001 * own.abs().amax(-1, keepdim=True)).all())
        assert not bool(found[0].any())
        assert torch.equal(quantize(found, kind), packed)

    def test_nf4_is_that_of_bitsandbytes(self):
        pytest.importorskip("bitsandbytes", exc_type=ImportError)
        weight = torch.randn(96, 128)
        codes, scale = torch.ops.bitsandbytes.quantize_4bit.default(weight, BLOCK, "nf4", torch.uint8)
        arguments = codes, scale, BLOCK, "nf4", weight.shape, torch.float32
        expected = torch.ops.bitsandbytes.dequantize_4bit.default(*arguments)
        torch.testing.assert_close(dequantize(quantize(weight, "nf4"), 128, torch.float32), expected)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", BITS)
    def test_the_op_gives_what_the_reference_gives(self, kind, dtype, shape):
        packed = quantize(torch.randn(shape), kind)
        assert torch.equal(dequantize(packed, shape[-1], dtype), dequantize_reference(packed, shape[-1], dtype))

    @pytest.mark.parametrize(("kind", "bytes_beside"), [("int8", 1), ("nf4", 2)])
    def test_the_op_allocates_little_beside_its_result(self, kind, bytes_beside):
        """Codes as int8, or two of nf4 as an int32; and float32 scales."""
        packed, numbers = quantize(torch.randn(256, 512), kind), 256 * 512
        peak = peak_above(lambda: dequantize(packed, 512, torch.float32), "cpu")
        assert peak <= (4 + bytes_beside + 4 / BLOCK) * numbers + 4096

    def test_opcheck(self):
        for kind in BITS:
            torch.library.opcheck(dequantize, (quantize(torch.randn(3, 70), kind), 70, torch.bfloat16))


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
@pytest.mark.parametrize("options", [QLORA, INT8])
@pytest.mark.parametrize("lowering", ["composed", "factored"])
def test_step_0_is_the_quantized_model_and_training_leaves_it(options, lowering, x):
    model = Spellings()
    dense = copy.deepcopy(model)
    for name in WEIGHTS:
        weight = dense.get_parameter(name).data
        weight.copy_(dequantize(quantize(weight, options["base"]), weight.shape[-1], weight.dtype))
    compiled = torch.compile(model, backend="sltrain", options={**options, "lowering": lowering})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.no_grad():
        want = dense(x)
    assert torch.equal(compiled(x), want)
    assert torch.equal(model(x), want)
    losses = []
    for _ in range(8):
        loss = (compiled(x) - torch.roll(x, 1)).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    for name, weight in by_name(model).items():
        assert (weight.base.dtype, weight.base_kind) == (torch.uint8, options["base"])
        assert torch.equal(weight.factors().base, dense.get_parameter(name)), name


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
@pytest.mark.parametrize("options", [QLORA, INT8])
@pytest.mark.parametrize("lowering", ["auto", "composed", "factored"])
def test_gradients_are_those_of_float64(options, lowering, x, assert_eager):
    model = adapted(Spellings(), x, **options)
    assert_eager(torch.compile(model, backend="sltrain", options={**options, "lowering": lowering}), model, [x])


@pytest.mark.slow
@pytest.mark.parametrize("options", some_of([QLORA, INT8], [QLORA]))
def test_generated_code_trains_and_infers_the_same(options, x, assert_eager):
    model = adapted(Spellings(), x, **options)
    compiled = torch.compile(model, backend="sltrain", options={**options, "lowering": "factored"})
    assert_eager(compiled, model, [x])
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
def test_no_unpacked_weight_is_kept_for_the_backward_pass():
    x = torch.randn(8, 256, requires_grad=True)
    for lowering in ("composed", "factored"):
        model = adapted(Wide(), x, **QLORA)
        compiled = torch.compile(model, backend="sltrain", options={**QLORA, "lowering": lowering})
        stored = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers()]}
        _, saved = saved_for_backward(lambda compiled=compiled: compiled(x).sum())
        made = [each for each in saved if each.untyped_storage().data_ptr() not in stored]
        assert max(each.numel() for each in made) <= 16 * 512


@pytest.mark.slow
@pytest.mark.parametrize("options", [QLORA, INT8])
def test_state_dicts_merging_and_export(options, x, tmp_path):
    model, other = adapted(Spellings(), x, **options), Spellings()
    slcompile.factorize_(other, SLConfig(**options), example_args=(x,))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    exact = {name: copy.deepcopy(weight).double()() for name, weight in by_name(model).items()}
    merged = slcompile.merged_state_dict(model)
    for name in WEIGHTS:
        torch.testing.assert_close(merged[name].double(), exact[name], rtol=1e-6, atol=1e-7)
    assert slcompile.export_onnx(model, x, tmp_path / "model.onnx").max_rel < 1e-4
    stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert all(torch.equal(torch.tensor(stored[name]), merged[name]) for name in WEIGHTS)
    torch.testing.assert_close(slcompile.merge_(other)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [QLORA, INT8])
def test_checkpoints_of_transformers_models(options, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = torch.arange(34).reshape(2, 17)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=64)).eval()
    slcompile.factorize_(model, SLConfig(**options))
    randomize(model)
    slcompile.save_factorized(model, tmp_path / "factors")
    loaded = slcompile.load_factorized(tmp_path / "factors").eval()
    assert all(each.base_kind == options["base"] and not each.base.requires_grad for each in weights(loaded))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_memory_explain_and_check_know_it():
    x = torch.randn(64, 256)
    weight, added = 256 * 512, 4 * (256 + 512)
    packed = sum(packed_shape(shape, "nf4")[0] * packed_shape(shape, "nf4")[1] for shape in ((512, 256), (256, 512)))
    assert packed == 2 * weight * 9 // 16  # 4.5 bits a number
    report = slcompile.estimate_memory(Wide(), (x,), config=SLConfig(**QLORA), device="cpu")
    assert report.sltrain.largest["parameters"] == packed + 4 * (512 + 2 * added)
    assert report.sltrain.parameter_count == 512 + 2 * added
    assert report.settings["base"] == "nf4"
    found = slcompile.explain(Wide(), (x,), config=SLConfig(**QLORA))
    assert found.summary.bytes.after == packed + 4 * 4 * (512 + 2 * added) + 2 * 8  # gradients and Adam; seeds
    numbers = slcompile.explain(Wide(), (x,), config=SLConfig(**{**QLORA, "base": "frozen"})).summary.parameters
    assert found.summary.parameters == numbers  # not those of the bytes that hold them
    again = slcompile.explain(adapted(Wide(), x, **QLORA), (x,), config=SLConfig(**QLORA)).summary.parameters
    assert again == numbers
    assert numbers.after == numbers.before + 2 * added
    checked = slcompile.check(Wide(), (torch.randn(16, 256),), config=SLConfig(**QLORA))
    assert checked.is_healthy, str(checked)


def test_a_model_in_lower_precision_keeps_its_codes(x):
    model = adapted(nn.Sequential(nn.Linear(64, 96, bias=False)), x, **QLORA)
    (weight,) = (each for each in model.modules() if isinstance(each, SLWeight))
    before = weight.base.clone()
    model.bfloat16()
    assert torch.equal(weight.base, before)
    assert model(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
@pytest.mark.parametrize("structure", ["block_low_rank", "tensor_train", "cp"])
def test_other_structures_are_added_to_it(structure, assert_eager):
    options = {"structure": structure, "base": "nf4", "rank": 4}
    model, x = Wide(), torch.randn(16, 256)
    slcompile.factorize_(model, SLConfig(**options))
    names = {name: each for name, each in model.named_modules() if name.endswith("_sl")}
    assert {each.base_kind for each in names.values()} == {"nf4"}
    held = dequantize(model.up.weight_sl.base, 256, torch.float32)
    assert torch.equal(model.up.weight_sl(), held)
    randomize(model)
    for lowering in ("composed", "factored"):
        assert_eager(torch.compile(model, backend="sltrain", options={**options, "lowering": lowering}), model, [x])

from __future__ import annotations

import builtins
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import slcompile

CONFIG = slcompile.SLConfig(rank=8, density=0.05)
IDS = torch.arange(34).reshape(2, 17)


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64, bos_token_id=0, eos_token_id=0)
    )


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=128,
            max_position_embeddings=64,
        )
    )  # fmt: skip


def trained(model: nn.Module, support: str = "stratified") -> nn.Module:
    """Factorized, and away from its start: B is zero there."""
    config = slcompile.SLConfig(rank=8, density=0.05, support=support)
    kwargs = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    slcompile.factorize_(model, config, example_args=(IDS,), example_kwargs=kwargs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(IDS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_the_file_is_ordinary_and_agrees_with_the_trained_model(make, tmp_path):
    model = trained(make())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kwargs = {} if make is bert else {"use_cache": False}
    report = slcompile.export_onnx(model, (IDS,), tmp_path / "model.onnx", kwargs=kwargs)
    # float32 keeps 24 bits; sums of up to 172 products in two layers, in another order.
    assert report.max_rel < 1e-5
    assert f"{report.max_rel:.2e} relative" in str(report)
    names = set(slcompile.factors(model))
    assert set(report.merged) == names
    assert report.absent == ()
    proto = onnx.load(report.path)
    onnx.checker.check_model(proto)
    assert {each.domain for each in proto.opset_import} == {""}
    assert {"MatMul", "Gemm"} & {node.op_type for node in proto.graph.node}
    stored = {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}
    for name in names:
        np.testing.assert_array_equal(stored[name], slcompile.merged_state_dict(model)[name].numpy())
    assert not [name for name in stored if "_sl" in name]
    assert str(Path.cwd()) not in str(proto)
    # The model is what it was.
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_dynamic_axes_run_at_other_shapes(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    layer = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    slcompile.factorize_(layer, CONFIG)
    batch = torch.export.Dim("batch")
    path = tmp_path / "layer.onnx"
    slcompile.export_onnx(layer, torch.randn(4, 64), path, input_names=["x"], dynamic_shapes=({0: batch},))
    x = torch.randn(7, 64)
    (got,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), layer(x).detach(), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_exported_in_float32(tmp_path):
    layer = slcompile.factorize_(nn.Sequential(nn.Linear(64, 64)).bfloat16(), CONFIG)
    report = slcompile.export_onnx(layer, torch.randn(4, 64), tmp_path / "layer.onnx")
    (weight,) = [each for each in onnx.load(report.path).graph.initializer if each.name == "0.weight"]
    assert weight.data_type == onnx.TensorProto.FLOAT
    assert layer[0].bias.dtype is torch.bfloat16


def test_a_difference_beyond_tolerance_is_an_error_and_leaves_the_old_file(tmp_path):
    class Drifting(nn.Module):
        """Gives another result each time that it runs: what the file holds cannot be what the model computes."""

        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(64, 64), 0

        def forward(self, x):
            self.calls += 1
            return self.layer(x) * self.calls

    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    model = slcompile.factorize_(Drifting(), CONFIG)
    with pytest.raises(ValueError, match=r"differs from the trained model by .* more than the tolerance"):
        slcompile.export_onnx(model, torch.randn(4, 64), path)
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_bad_paths_and_weights_are_refused_before_any_work(tmp_path, monkeypatch):
    model = slcompile.factorize_(nn.Sequential(nn.Linear(64, 64)), CONFIG)
    x = torch.randn(4, 64)
    with pytest.raises(ValueError, match="path must be a file, got the directory"):
        slcompile.export_onnx(model, x, tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        slcompile.export_onnx(model, x, tmp_path / "missing" / "model.onnx")
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
        with pytest.raises(ValueError, match="cannot be written"):
            slcompile.export_onnx(model, x, tmp_path / "model.onnx")
    with torch.no_grad():
        model[0].weight_sl.values[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"parameter 0\.weight_sl\.values contains NaN or Inf"):
        slcompile.export_onnx(model, x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_missing_libraries_are_named_with_the_command(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_onnxruntime(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ImportError("no module", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_onnxruntime)
    with pytest.raises(ImportError, match=r'exporting needs onnxruntime: pip install "slcompile\[onnx\]"'):
        slcompile.export_onnx(nn.Linear(2, 2), torch.randn(1, 2), tmp_path / "model.onnx")


def test_weights_that_the_graph_does_not_read_are_reported(tmp_path, caplog):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.used(x)

    caplog.set_level(logging.ERROR)
    report = slcompile.export_onnx(slcompile.factorize_(Unused(), CONFIG), torch.randn(2, 64), tmp_path / "m.onnx")
    assert (report.merged, report.absent) == (("used.weight",), ("spare.weight",))

from __future__ import annotations

import builtins
import json
import pickle
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import slcompile
from tests.testing import CONFIG, randomize
from tests.zoo import tiny

IDS = torch.arange(34).reshape(2, 17)


def factorized(model: nn.Module) -> nn.Module:
    """With every factor random."""
    return randomize(slcompile.factorize_(model, CONFIG)).eval()


def llama(**changes: Any) -> nn.Module:
    return factorized(tiny("llama", num_hidden_layers=2, **changes))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_ordinary_class_loads_it(kind, tmp_path):
    model = factorized(tiny(kind))
    assert slcompile.save_merged(model, tmp_path / "merged") == tmp_path / "merged"
    assert [each.name for each in tmp_path.iterdir()] == ["merged"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(loaded) is type(model)
    assert loaded.config.architectures == [type(loaded).__name__]
    state = slcompile.merged_state_dict(model)
    assert set(loaded.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        # The same weights and the same operators: not one bit differs.
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert slcompile.factors(model)  # left as it was


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_stored_once(tied, tmp_path):
    model = llama(tie_word_embeddings=tied)
    slcompile.save_merged(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert len({"model.embed_tokens.weight", "lm_head.weight"} & set(stored)) == (1 if tied else 2)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype(dtype, tmp_path):
    model = llama()
    slcompile.save_merged(model, tmp_path, dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {each.dtype for each in loaded.parameters()} == {dtype}
    merged = slcompile.merged_state_dict(model)
    assert all(torch.equal(value, merged[name].to(dtype)) for name, value in loaded.state_dict().items())
    assert {each.dtype for each in model.parameters()} == {torch.float32}


def test_bfloat16_weights_are_composed_in_float32_and_rounded_once(tmp_path):
    model = llama().bfloat16()
    slcompile.save_merged(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    wide = slcompile.merged_state_dict(factorized_copy_in_float32(model))
    assert {each.dtype for each in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(value, wide[name].bfloat16()) for name, value in stored.items())


def test_each_tensor_keeps_its_dtype(tmp_path):
    model = llama().bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name or "down_proj" in name:
            parameter.data = torch.rand(parameter.shape) + 1
    slcompile.save_merged(model, tmp_path)
    stored, merged = load_file(tmp_path / "model.safetensors"), slcompile.merged_state_dict(model)
    assert {each.dtype for each in stored.values()} == {torch.bfloat16, torch.float32}
    for name, value in stored.items():
        assert value.dtype == merged[name].dtype, name
        assert torch.equal(value, merged[name]), name
    slcompile.save_merged(model, tmp_path, dtype=torch.float32)
    assert {each.dtype for each in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


def factorized_copy_in_float32(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model)).float()


def test_shards_and_their_index(tmp_path):
    model = llama()
    slcompile.save_merged(model, tmp_path, shard_size=100_000)
    files = sorted(each.name for each in tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    merged = slcompile.merged_state_dict(model)
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in merged.values())
    for file in files:
        with safe_open(tmp_path / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {name: index["weight_map"][name] for name in opened.keys()} == dict.fromkeys(opened.keys(), file)  # noqa: SIM118, no dict
            assert sum(opened.get_tensor(name).nbytes for name in opened.keys()) <= 100_000  # noqa: SIM118
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, merged[name]) for name, value in loaded.state_dict().items())


@pytest.mark.slow
def test_saving_over_removes_stale_weights_and_nothing_else(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for seed, sizes in enumerate(({"shard_size": 50_000}, {"shard_size": 100_000}, {}, {"shard_size": 100_000})):
        torch.manual_seed(seed)
        model = llama()
        slcompile.save_merged(model, tmp_path, **sizes)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
        merged = slcompile.merged_state_dict(model)
        assert all(torch.equal(value, merged[name]) for name, value in loaded.state_dict().items())
        stored = [each.name for each in tmp_path.glob("model*")]
        assert ("model.safetensors" in stored) == (len(stored) == 1)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values(), "model.safetensors.index.json"} == set(stored)
    assert (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("save", [slcompile.save_merged, slcompile.save_factorized])
def test_other_models_in_the_directory_are_left_alone(save, tmp_path):
    others = [
        "model_best.safetensors",
        "model.fp16.safetensors",
        "model-ema.safetensors",
        "model_best.safetensors.index.json",
    ]
    stale = ["model-00001-of-00009.safetensors", "first_half.safetensors", "model.safetensors"]
    for name in [*others, *stale, "tokenizer.json"]:
        (tmp_path / name).write_bytes(b"of somebody")
    index = {
        "weight_map": {"a": "first_half.safetensors", "b": "../outside.safetensors", "c": "tokenizer.json", "d": 7}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save(llama(), tmp_path)
    stored = {each.name for each in tmp_path.iterdir()} - {"slcompile.json"}
    assert stored == {*others, "tokenizer.json", "model.safetensors", "config.json", "generation_config.json"}
    assert all((tmp_path / name).read_bytes() == b"of somebody" for name in others)


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": []}', '{"weight_map": {"a": {}}}'])
def test_an_old_index_that_cannot_be_read_names_nothing(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    slcompile.save_merged(factorized(nn.Sequential(nn.Linear(64, 64))), tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight_sl.A[0, 0] = value
    with pytest.raises(ValueError, match=r"parameter model\.layers\.1\.mlp\.up_proj\.weight_sl\.A contains NaN or Inf"):
        slcompile.save_merged(model, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_weights_beyond_the_range_of_float16_are_refused(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight_sl.values[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        slcompile.save_merged(model, tmp_path / "merged", dtype=torch.float16)


def test_a_model_that_is_not_of_transformers(tmp_path):
    model = factorized(nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 64)))
    slcompile.save_merged(model, tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]
    dense = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 64)).eval()
    dense.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    x = torch.randn(4, 64)
    assert torch.equal(dense(x), model(x))


def test_bad_arguments_are_named(tmp_path):
    model = factorized(nn.Sequential(nn.Linear(64, 64)))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="directory must be a directory, got the file"):
        slcompile.save_merged(model, tmp_path / "file")
    with pytest.raises(ValueError, match="does not exist"):
        slcompile.save_merged(model, tmp_path / "missing" / "merged")
    with pytest.raises(ValueError, match="shard_size must be an int >= 1, got 0"):
        slcompile.save_merged(model, tmp_path / "merged", shard_size=0)
    with pytest.raises(ValueError, match=r"dtype must be one of .* got torch\.int8"):
        slcompile.save_merged(model, tmp_path / "merged", dtype=torch.int8)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda directory: usage)
    with pytest.raises(OSError, match="1,000 are free"):
        slcompile.save_merged(factorized(nn.Sequential(nn.Linear(64, 64))), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["safetensors.torch", "huggingface_hub"])
def test_missing_libraries_are_named_with_the_command(missing, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == missing:
            raise ImportError("no module", name=name)
        return real(name, *args, **kwargs)

    model = factorized(nn.Sequential(nn.Linear(64, 64)))
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf'needs {missing}: pip install "slcompile\[safetensors\]"'):
        slcompile.save_merged(model, tmp_path / "merged")


def test_a_state_that_is_no_tensor_is_named(tmp_path):
    class Noted(nn.Linear):
        def get_extra_state(self):
            return {"steps": 3}

        def set_extra_state(self, state):
            pass

    with pytest.raises(
        ValueError, match="safetensors hold tensors alone, and _extra_state of the state dict is a dict"
    ):
        slcompile.save_merged(factorized(Noted(64, 64)), tmp_path / "dense")
    assert not list(tmp_path.iterdir())


def test_results_that_a_model_holds_are_not_in_the_way(tmp_path):
    class Auxiliary(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            self.losses = [y.square().mean()]
            return y

    model = factorized(Auxiliary(64, 64))
    model(torch.randn(4, 64))
    saved = load_file(slcompile.save_merged(model, tmp_path / "dense") / "model.safetensors")
    assert torch.equal(saved["weight"], model.weight)


def test_a_model_inside_of_a_parallel_wrapper_is_written_as_itself(tmp_path):
    model = llama()
    wrapped = nn.DataParallel(model)
    loaded = AutoModelForCausalLM.from_pretrained(slcompile.save_merged(wrapped, tmp_path / "dense"))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert slcompile.merged_state_dict(wrapped).keys() == loaded.state_dict().keys()
    assert slcompile.factors(wrapped).keys() == slcompile.factors(model).keys()
    factors = slcompile.load_factorized(slcompile.save_factorized(wrapped, tmp_path / "factors"))
    assert torch.equal(factors(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("sharded", ["down", "up"])
def test_sharded_factors_are_refused_before_their_numbers_are_looked_at(sharded, tmp_path, monkeypatch):
    """That would wait for the other processes, which do not save."""
    model = factorized(nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)}))

    def refuse():
        raise RuntimeError("the factors are sharded")

    monkeypatch.setattr(model[sharded].weight_sl, "check_whole", refuse)
    monkeypatch.setattr(torch, "isfinite", lambda tensor: pytest.fail("looked at"))
    with pytest.raises(RuntimeError, match="the factors are sharded"):
        slcompile.save_merged(model, tmp_path / "dense")

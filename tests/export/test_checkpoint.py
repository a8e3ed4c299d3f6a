from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slcompile
from slcompile.export.checkpoint import load_factorized, save_factorized
from tests.testing import SUPPORTS, randomize
from tests.zoo import tiny, tiny_config

IDS = torch.arange(34).reshape(2, 17)
RANK, ALPHA, DENSITY = 8, 12, 0.05


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
}


def factorized(model: nn.Module, **options: Any) -> nn.Module:
    """With every factor random."""
    config = slcompile.SLConfig(rank=RANK, density=DENSITY, alpha=ALPHA, **options)
    return randomize(slcompile.factorize_(model, config)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, support, tmp_path):
    kind, changes = MODELS[name]
    model = factorized(tiny(kind, **changes), support=support)
    assert save_factorized(model, tmp_path / "saved") == tmp_path / "saved"
    assert [each.name for each in tmp_path.iterdir()] == ["saved"]
    loaded = load_factorized(tmp_path / "saved").eval()
    assert type(loaded) is type(model)
    state, wanted = loaded.state_dict(), model.state_dict()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert {each.dtype for each in loaded.parameters()} == {torch.float32}
    want = slcompile.factors(model)
    for weight, got in slcompile.factors(loaded).items():
        assert (got.seed, got.scale) == (want[weight].seed, want[weight].scale), weight
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    if name == "tied":
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_scale_of_alpha_auto_is_kept_to_the_bit(tmp_path):
    model = tiny("llama")
    slcompile.factorize_(model, slcompile.SLConfig(rank=5, density=DENSITY, alpha="auto"))
    save_factorized(model, tmp_path)
    want, got = slcompile.factors(model), slcompile.factors(load_factorized(tmp_path))
    assert {each.scale for each in want.values()} != {16 / 5}
    assert {name: each.scale for name, each in got.items()} == {name: each.scale for name, each in want.items()}


def test_a_loaded_model_trains_on(tmp_path):
    save_factorized(factorized(tiny("llama")), tmp_path)
    loaded = load_factorized(tmp_path)
    before = slcompile.factors(loaded)["model.layers.0.mlp.up_proj.weight"].B.clone()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1.0)
    loaded(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(slcompile.factors(loaded)["model.layers.0.mlp.up_proj.weight"].B, before)


def test_dtype_and_shape_of_each_weight_are_kept(tmp_path):
    model = factorized(tiny("gpt2"), include="*mlp*").bfloat16()
    save_factorized(model, tmp_path)
    loaded = load_factorized(tmp_path)
    assert {each.dtype for each in loaded.parameters()} == {torch.bfloat16}
    assert set(slcompile.factors(loaded)) == {f"transformer.h.0.mlp.{name}.weight" for name in ("c_fc", "c_proj")}
    assert loaded.transformer.h[0].mlp.c_fc.weight_sl.input_dim == 0  # Conv1D stores [in, out]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_each_tensor_keeps_its_dtype(tmp_path):
    model = factorized(tiny("llama")).bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name or "down_proj" in name:
            parameter.data = torch.rand(parameter.shape) + 1
    save_factorized(model, tmp_path)
    loaded = load_factorized(tmp_path)
    state = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name], value), name
    assert loaded.model.rotary_emb.inv_freq.dtype is torch.float32  # which is computed, and in no file
    merged = slcompile.merged_state_dict(loaded)
    assert merged["model.layers.0.mlp.down_proj.weight"].dtype is torch.float32
    assert merged["model.layers.0.mlp.up_proj.weight"].dtype is torch.bfloat16


def test_parts_of_one_weight_are_of_the_dtype_that_holds_them_all(checkpoint):
    key = "model.layers.0.mlp.up_proj.sparse_value"
    rewrite(checkpoint, lambda state: state.update({key: state[key].double() / 3}))
    weight = slcompile.factors(load_factorized(checkpoint))["model.layers.0.mlp.up_proj.weight"]
    assert {each.dtype for each in (weight.B, weight.A, weight.values)} == {torch.float64}
    assert torch.equal(weight.values.flatten(), load_file(checkpoint / "model.safetensors")[key])


def test_the_settings_of_generation_are_kept(tmp_path):
    model = factorized(tiny("llama"))
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.37
    save_factorized(model, tmp_path)
    assert load_factorized(tmp_path).generation_config.temperature == 0.37
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        load_factorized(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert load_factorized(tmp_path).generation_config.temperature == tiny("llama").generation_config.temperature


def test_other_weights_in_the_directory_are_not_read(tmp_path):
    other, model = factorized(tiny("llama"), seed=1), factorized(tiny("llama"))
    save_factorized(other, tmp_path)
    for name in ("a_backup.safetensors", "old_backup.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes((tmp_path / "model.safetensors").read_bytes())
    save_factorized(model, tmp_path)
    state = load_factorized(tmp_path).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def sharded(directory: Path, file: str) -> None:
    """Cuts a checkpoint's weights in two files and an index, named as transformers names those of ``file``."""
    state = load_file(directory / "model.safetensors")
    names = sorted(state)
    stem, _, kind = file.rpartition(".")
    shards = {f"{stem}-{part}-of-2.{kind}": names[part - 1 :: 2] for part in (1, 2)}
    for shard, held in shards.items():
        part = {name: state[name] for name in held}
        torch.save(part, directory / shard) if kind == "bin" else save_file(part, directory / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (directory / f"{file}.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_those_of_the_index(file, checkpoint):
    wanted = load_factorized(checkpoint).state_dict()
    sharded(checkpoint, file)
    (checkpoint / "zzz.safetensors").write_bytes(b"a file that is not read")
    got = load_factorized(checkpoint).state_dict()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../model.safetensors", "weight_map must name files beside it, got '../model"),
        (7, "weight_map must name files beside it, got 7"),
        ("missing.safetensors", r"missing\.safetensors cannot be read"),
        ("again.safetensors", r"holds model\.norm\.weight, which another file of .* holds, too"),
    ],
)
def test_an_index_that_cannot_be_is_an_error(file, message, checkpoint):
    sharded(checkpoint, "model.safetensors")
    save_file({"model.norm.weight": torch.ones(64)}, checkpoint / "again.safetensors")
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight.again"] = file
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load_factorized(checkpoint)


def test_saving_over_an_old_one(tmp_path):
    for seed in range(2):
        torch.manual_seed(seed)
        model = factorized(tiny("llama"))
        save_factorized(model, tmp_path)
        state = load_factorized(tmp_path).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_models_that_cannot_be_saved_are_named(tmp_path):
    with pytest.raises(ValueError, match="model must have save_pretrained, as transformers' models do, got Linear"):
        save_factorized(nn.Linear(64, 64), tmp_path)
    with pytest.raises(ValueError, match="model has no factorized weight"):
        save_factorized(tiny("gpt2"), tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        save_factorized(factorized(tiny("gpt2")), tmp_path / "missing" / "saved")
    assert not list(tmp_path.iterdir())


def papers(directory: Path, dtype: torch.dtype, scaling: float | None = None, file: str = "pytorch_model.bin"):
    """A checkpoint as the paper's code writes it, and what each of its weights is, with the sum of the magnitudes."""
    config = tiny_config("llama")
    config.save_pretrained(directory)
    settings = {
        "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "sp_ratio": DENSITY, "target_modules": ["attn", "mlp"],
        "trainable_scaling": scaling is not None,
    }  # fmt: skip
    (directory / "splora_config.json").write_text(json.dumps(settings))
    state: dict[str, Tensor] = {}
    weights: dict[str, tuple[Tensor, Tensor]] = {}
    for name, value in tiny("llama").to(dtype).state_dict().items():
        owner = name.removesuffix(".weight")
        if not owner.endswith("_proj"):
            state[name] = value.clone()
            continue
        rows, columns = value.shape
        count = int(DENSITY * rows * columns)
        A, B = torch.randn(RANK, columns, dtype=dtype) / 8, torch.randn(rows, RANK, dtype=dtype) / 8
        index, values = torch.randperm(rows * columns)[:count].sort().values, torch.randn(count, dtype=dtype) / 8
        state |= {f"{owner}.lora_A": A, f"{owner}.lora_B": B}
        state |= {f"{owner}.sparse_index": index, f"{owner}.sparse_value": values}
        scale = ALPHA / RANK
        if scaling is not None:
            state[f"{owner}.scaling"] = torch.tensor([scaling], dtype=dtype)
            scale = state[f"{owner}.scaling"].double().tanh().item()
        S = torch.zeros(rows * columns, dtype=torch.float64).scatter(0, index, values.double()).view(rows, columns)
        magnitude = abs(scale) * B.double().abs() @ A.double().abs() + S.abs()
        weights[name] = scale * B.double() @ A.double() + S, magnitude
    if file.endswith(".bin"):
        torch.save(state, directory / file)
    else:
        save_file(state, directory / file)
    return state, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaling", [None, 0.7, -0.3])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_the_papers_checkpoint(file, scaling, dtype, tmp_path):
    state, weights = papers(tmp_path, dtype, scaling, file)
    model = load_factorized(tmp_path)
    assert set(slcompile.factors(model)) == set(weights)
    assert {each.dtype for each in model.parameters()} == {dtype}
    merged = slcompile.merged_state_dict(model)
    # Composed in float32: RANK products and their sums, the scale, the sparse value. Rounded to the dtype at the end
    # and, where the scale is trained, three times before: tanh, the quotient of the scales, and B by their product.
    unit = {torch.float32: 2**-24, torch.bfloat16: 2**-8}[dtype]
    roundings = 1 if scaling is None else 4
    for name, (wanted, magnitude) in weights.items():
        bound = ((RANK + 3) * 2**-24 + roundings * unit) * magnitude
        assert ((merged[name].double() - wanted).abs() <= bound).all(), name
    assert all(torch.equal(merged[name], value) for name, value in state.items() if name in merged)
    for name, each in slcompile.factors(model).items():
        assert each.index is not None
        assert torch.equal(each.index.long(), state[name.replace("weight", "sparse_index")])


@pytest.mark.slow
def test_the_papers_checkpoint_exports_and_is_saved_as_ours(tmp_path):
    (tmp_path / "papers").mkdir()
    _, weights = papers(tmp_path / "papers", torch.float32)
    model = load_factorized(tmp_path / "papers")
    report = slcompile.export_onnx(model, (IDS,), tmp_path / "model.onnx", kwargs={"use_cache": False})
    stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(report.path).graph.initializer}
    for name, (wanted, magnitude) in weights.items():
        assert (np.abs(stored[name] - wanted.numpy()) <= (RANK + 4) * 2**-24 * magnitude.numpy()).all(), name
    save_factorized(model, tmp_path / "ours")
    again = load_factorized(tmp_path / "ours")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.fixture
def checkpoint(tmp_path):
    papers(tmp_path, torch.float32, file="model.safetensors")
    return tmp_path


def test_a_directory_without_a_checkpoint_is_named(tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=rf"{directory} must hold config\.json and slcompile\.json .* or splora"):
            load_factorized(directory)


def test_missing_weights_are_named(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold model\.safetensors or .* or pytorch_model\.bin"):
        load_factorized(checkpoint)


def rewrite(checkpoint: Path, change) -> None:
    state = load_file(checkpoint / "model.safetensors")
    change(state)
    save_file(state, checkpoint / "model.safetensors")


def test_keys_that_do_not_fit_are_named(checkpoint):
    key = "model.layers.0.mlp.up_proj."
    rewrite(checkpoint, lambda state: state.update(spare=torch.ones(1), gone=state.pop(key + "sparse_value")))
    with pytest.raises(ValueError, match=r"does not fit LlamaForCausalLM: missing .*up_proj\.weight_sl\.values.*spare"):
        load_factorized(checkpoint)


def test_a_weight_that_the_model_lacks_is_named(checkpoint):
    rewrite(checkpoint, lambda state: state.update({"model.layers.7.mlp.up_proj.lora_B": torch.ones(4, RANK)}))
    with pytest.raises(
        ValueError, match=r"factorizes model\.layers\.7\.mlp\.up_proj\.weight, which the model does not"
    ):
        load_factorized(checkpoint)


def test_shapes_that_do_not_fit_are_an_error(checkpoint):
    key = "model.layers.0.mlp.up_proj.lora_A"
    rewrite(checkpoint, lambda state: state.update({key: state[key][:4].clone()}))
    with pytest.raises(ValueError, match=r"up_proj\.weight_sl\.A"):
        load_factorized(checkpoint)


def test_positions_outside_the_weight_are_an_error(checkpoint):
    key = "model.layers.0.mlp.up_proj.sparse_index"
    rewrite(checkpoint, lambda state: state.update({key: state[key] + 172 * 64}))
    with pytest.raises(ValueError, match="up_proj"):
        load_factorized(checkpoint)


def test_a_truncated_file_is_an_error(checkpoint):
    content = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_factorized(checkpoint)


@pytest.mark.parametrize("content", ["{}", '{"r": 8', "[]"])
def test_settings_that_are_not_complete_are_an_error(content, checkpoint):
    (checkpoint / "splora_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"splora_config\.json"):
        load_factorized(checkpoint)


def test_an_unknown_architecture_is_named(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(ValueError, match="NoSuchModel"):
        load_factorized(checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"hidden_size": 2**40}, "does not fit LlamaForCausalLM: .*"),
        ("config.json", {"num_hidden_layers": 2**31}, r"config\.json has 2147483648 layers, and the files \d+"),
        ("config.json", {"architectures": ["logging"]}, "architecture 'logging', which transformers does not have"),
        ("config.json", {"architectures": [7]}, "architecture "),
        ("config.json", {"model_type": "?"}, "holds no configuration that transformers can read"),
        ("config.json", {"num_attention_heads": 0}, "config"),
        ("slcompile.json", {"format": 2}, r"slcompile\.json: format must be 1, got 2"),
        ("slcompile.json", {"weights": []}, r"slcompile\.json: weights must be an object"),
        ("slcompile.json", {"weights": {"lm_head.weight": {"rank": 8}}}, r"holds lm_head\.weight as \{'rank': 8\}"),
        ("slcompile.json", {"weights": {"model.norm.weight": {"input_dim": 1}}}, r"its shape is \(64,\)"),
    ],
)
def test_sizes_and_settings_of_another_model_are_refused_before_they_are_allocated(file, change, message, tmp_path):
    save_factorized(factorized(tiny("llama")), tmp_path)
    settings = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**settings, **change}))
    with pytest.raises(ValueError, match=message):
        load_factorized(tmp_path)


@pytest.mark.parametrize(
    "change", [{"rank": 10**12}, {"rank": "8"}, {"structure": []}, {"unknown": 1}, {"input_dim": 7}]
)
def test_a_description_that_cannot_be_is_an_error(change, tmp_path):
    save_factorized(factorized(tiny("llama")), tmp_path)
    settings = json.loads((tmp_path / "slcompile.json").read_text())
    settings["weights"]["model.layers.0.mlp.up_proj.weight"].update(change)
    (tmp_path / "slcompile.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"the checkpoint holds model\.layers\.0\.mlp\.up_proj\.weight"):
        load_factorized(tmp_path)


def test_layers_that_torch_compile_wraps_are_saved_under_their_names(tmp_path):
    model = factorized(tiny("llama", num_hidden_layers=2))
    expected = model(IDS).logits
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend="eager")
    loaded = load_factorized(save_factorized(model, tmp_path / "factors")).eval()
    assert torch.equal(loaded(IDS).logits, expected)


def test_a_model_on_the_meta_device_is_not_saved(tmp_path):
    with torch.device("meta"):
        model = slcompile.factorize_(tiny("gpt2"), slcompile.SLConfig(rank=RANK))
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight is on the meta device and holds no numbers"):
        save_factorized(model, tmp_path / "factors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["vit", "mixtral"])
def test_names_are_the_models_own_where_published_ones_are_others(kind, tmp_path):
    """transformers 5 writes ViT's older names, and Mixtral's experts one by one."""
    model = factorized(tiny(kind))
    loaded = load_factorized(save_factorized(model, tmp_path / "factors"))
    merged = slcompile.merged_state_dict(model)
    for source in (loaded, type(model).from_pretrained(slcompile.save_merged(loaded, tmp_path / "dense"))):
        found = slcompile.merged_state_dict(source)
        assert all(torch.equal(found[name], value) for name, value in merged.items())

"""PEFT's LoRA files, read and written, against peft itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slcompile
from slcompile.config import SLConfig
from tests.testing import randomize

peft = pytest.importorskip("peft")

LORA: dict[str, Any] = {"base": "frozen", "density": 0}


class Layer(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(width, width), nn.ModuleList([Layer(width), Layer(width)])
        self.inner = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for layer in self.layers:
            x = layer(x)
        return self.inner(x)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.volume, self.plane = nn.Conv3d(2, 32, (1, 4, 4), padding=1), nn.Conv2d(32, 32, 2, padding=1)
        self.line, self.point = nn.Conv1d(32, 32, 3, stride=2), nn.Conv1d(32, 40, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.volume(x.view(2, 2, 4, 4, 8))).mean(2)
        x = torch.tanh(self.plane(x)).mean(2)
        return self.point(torch.tanh(self.line(x)))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=32)).eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        if "GPT2" in str(type(getattr(model, "base_model", model))) or hasattr(model, "transformer"):
            return model(torch.arange(32).view(2, 16)).logits
        return model(torch.linspace(-1, 1, 8 * 64).view(8, 64))


def adapter(model: nn.Module, folder: Path, **settings: Any) -> Tensor:
    """Writes an adapter with random factors by peft; returns what peft's model computes."""
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, each in adapted.named_parameters():
            if "lora_" in name:
                each.copy_(torch.randn(each.shape) * 0.1)
    adapted.save_pretrained(folder)
    return output(adapted.base_model.model)


def of_peft(model: nn.Module, folder: Path) -> Tensor:
    return output(peft.PeftModel.from_pretrained(model, folder).eval().base_model.model)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (Net, {"r": 4, "lora_alpha": 8, "target_modules": ["up", "down", "first"]}),
    "patterns": (
        Net,
        {"r": 4, "lora_alpha": 8, "target_modules": ["up", "down"], "rank_pattern": {"layers.1.up": 7, "down": 3},
         "alpha_pattern": {"up": 5}},
    ),
    "rank-stabilised": (Net, {"r": 4, "lora_alpha": 8, "target_modules": ["up"], "use_rslora": True}),
    "Conv1D": (gpt2, {"r": 6, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "convolutions": (
        Convolutions, {"r": 5, "lora_alpha": 8, "target_modules": ["volume", "plane", "line", "point"]}
    ),
    "saves nothing": (Net, {"r": 64, "lora_alpha": 8, "target_modules": ["first"]}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_computes_the_same_here_and_there_again(case, tmp_path):
    make, settings = CASES[case]
    model = make()
    expected = adapter(model, tmp_path / "theirs", **settings)
    dense = copy.deepcopy(model)
    assert not torch.allclose(output(dense), expected, atol=1e-3)
    assert slcompile.load_peft(model, tmp_path / "theirs") is model
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-5)
    assert slcompile.save_peft(model, tmp_path / "ours") == (tmp_path / "ours").absolute()
    torch.testing.assert_close(of_peft(copy.deepcopy(dense), tmp_path / "ours"), expected, rtol=1e-5, atol=1e-5)
    merged = slcompile.merge_(model)
    torch.testing.assert_close(output(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", [Net, gpt2, Convolutions])
@pytest.mark.parametrize("config", [{"rank": 0.1}, {"rank": 5, "alpha": 10}])
def test_what_is_trained_here_peft_reads(make, config, tmp_path):
    model = make()
    dense = copy.deepcopy(model)
    randomize(slcompile.factorize_(model, SLConfig(**LORA, **config)), 0.1)
    slcompile.save_peft(model, tmp_path)
    torch.testing.assert_close(of_peft(dense, tmp_path), output(model), rtol=1e-4, atol=1e-5)
    again = slcompile.load_peft(make(), tmp_path)
    assert slcompile.factors(again).keys() == slcompile.factors(model).keys()


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False))
    model[2].weight = model[0].weight
    return model


def test_a_weight_of_two_layers_has_no_place_in_these_files(tmp_path):
    model = slcompile.factorize_(tied(), SLConfig(**LORA, rank=4))
    with pytest.raises(ValueError, match=r"0\.weight, 2\.weight are one weight, and these files adapt each layer"):
        slcompile.save_peft(model, tmp_path)
    assert not list(tmp_path.iterdir())
    adapter(nn.Sequential(*map(copy.deepcopy, tied())), tmp_path, r=4, target_modules=["0", "2"])
    with pytest.raises(ValueError, match="has no place here: its weight is that of another layer, too"):
        slcompile.load_peft(tied(), tmp_path)


def test_broken_files_are_named(tmp_path):
    adapter(Net(), tmp_path, r=4, lora_alpha=8, target_modules=["up"])
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read"):
        slcompile.load_peft(Net(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is no JSON"):
        slcompile.load_peft(Net(), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda each: each.fill_(float("nan")), "contains NaN or Inf"),
        (lambda each: each.fill_(float("inf")), "contains NaN or Inf"),
        (lambda each: each.to(torch.int32), r"must be floating-point, got torch\.int32"),
    ],
)
@pytest.mark.parametrize("factor", ["A", "B"])
def test_factors_that_are_no_finite_numbers_are_refused(factor, change, message, tmp_path):
    model = Net()
    adapter(model, tmp_path, r=4, lora_alpha=8, target_modules=["up", "down"])
    key, file = f"base_model.model.layers.1.up.lora_{factor}.weight", tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    state[key] = change(state[key])
    save_file(state, file)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: {key} {message}"):
        slcompile.load_peft(model, tmp_path)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_name_that_ends_another_ones_is_the_only_one_adapted(tmp_path):
    model = nn.ModuleDict({"up": nn.Linear(64, 64), "block": nn.ModuleDict({"up": nn.Linear(64, 64)})})
    slcompile.factorize_(model, SLConfig(**LORA, rank=4, include=("up.*",)))
    dense = nn.ModuleDict({"up": nn.Linear(64, 64), "block": nn.ModuleDict({"up": nn.Linear(64, 64)})})
    slcompile.save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(dense, tmp_path)
    assert [name for name, _ in loaded.named_parameters() if "lora_A" in name] == [
        "base_model.model.up.lora_A.default.weight"
    ]


@pytest.mark.slow
def test_a_loaded_adapter_trains_on_and_the_rest_stays(tmp_path):
    model = Net()
    adapter(model, tmp_path, **CASES["linear"][1])
    optimizer = torch.optim.AdamW(model.requires_grad_(False).parameters(), lr=1e-2)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    slcompile.load_peft(model, tmp_path)
    compiled = torch.compile(model.train(), backend="sltrain")
    x = torch.randn(8, 64)
    losses = []
    for _ in range(5):
        losses.append((compiled(x) - x).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    state = model.state_dict()
    for name, each in before.items():
        assert torch.equal(state.get(name, state.get(f"{name}_sl.base")), each), name


@pytest.mark.slow
@pytest.mark.usefixtures("aten_kernels")
@pytest.mark.parametrize("lowering", ["composed", "factored"])
def test_it_trains_as_peft_does_from_the_same_start(lowering, tmp_path):
    model = Net()
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down", "first"])
    )
    theirs.save_pretrained(tmp_path)  # B is zero
    slcompile.load_peft(model.requires_grad_(False), tmp_path)
    compiled = torch.compile(model, backend="sltrain", options={"lowering": lowering})
    x, target = torch.randn(32, 64), torch.randn(32, 64)
    losses = []
    for run in (compiled, theirs):
        trained = [each for each in (theirs if run is theirs else model).parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses.append([])
        for _ in range(8):
            loss = (run(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.05
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def write(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


UNREADABLE: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "has use_dora=True, which is no plain LoRA"),
    "bias": ({"bias": "lora_only"}, "has bias='lora_only': biases were trained with it"),
    "modules": ({"modules_to_save": ["inner"]}, r"has modules_to_save=\['inner'\]"),
    "kind": ({"peft_type": "IA3"}, "must have peft_type 'LORA', got 'IA3'"),
    "no scale": ({"lora_alpha": None}, "adapter_config.json: lora_alpha must be a number, got None"),
    "rank": ({"r": 5}, "gives layers.0.down the rank 5, adapter_model.safetensors has 4"),
}


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_beside_weights_that_peft_changed_is_refused(start, tmp_path):
    model = Net()
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["up"], "init_lora_weights": start}
    theirs = adapter(model, tmp_path, **settings)
    changed = (
        model.layers[0].up.weight
        - peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
        .base_model.model.layers[0]
        .up.base_layer.weight
    )
    assert changed.abs().max() > 0.01
    torch.testing.assert_close(of_peft(copy.deepcopy(model), tmp_path), theirs)
    with pytest.raises(ValueError, match=f"has init_lora_weights='{start}', which changed the weights"):
        slcompile.load_peft(model, tmp_path)
    assert not slcompile.factors(model)


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_no_plain_adapter_is_refused_and_the_model_is_as_it_was(case, tmp_path):
    model = Net()
    adapter(model, tmp_path, r=4, lora_alpha=8, target_modules=["down"])
    changes, message = UNREADABLE[case]
    write(tmp_path, **changes)
    before = model.state_dict()
    with pytest.raises(ValueError, match=message):
        slcompile.load_peft(model, tmp_path)
    assert model.state_dict().keys() == before.keys()


def test_an_adapter_of_another_model_is_refused(tmp_path):
    adapter(Net(), tmp_path, r=4, lora_alpha=8, target_modules=["up"])
    with pytest.raises(
        ValueError, match=r"of another model: it is of layers\.0\.up, which is no layer of this Layer with a matrix"
    ):
        slcompile.load_peft(Layer(), tmp_path)
    with pytest.raises(
        ValueError, match=r"of layers\.0\.up, \[64, 32\], it has lora_A \[4, 64\] and lora_B \[128, 4\]"
    ):
        slcompile.load_peft(Net(32), tmp_path)
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        slcompile.load_peft(Net(), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="model must be dense"):
        slcompile.load_peft(slcompile.factorize_(Net(), SLConfig(rank=4)), tmp_path)


def test_embeddings_in_an_adapter_are_refused(tmp_path):
    model = gpt2()
    adapter(model, tmp_path, r=4, target_modules=["wte", "c_attn"])
    with pytest.raises(ValueError, match="lora_embedding_A', which is no factor of a linear layer"):
        slcompile.load_peft(model, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 4}, "must be factorized with base='frozen' and density=0 for PEFT"),
        ({"rank": 4, "base": "frozen"}, "must be factorized with base='frozen' and density=0 for PEFT"),
        (None, "model must have factorized weights, got Net without one"),
    ],
)
def test_what_these_files_cannot_hold_is_refused(config, message, tmp_path):
    model = Net()
    if config:
        slcompile.factorize_(model, SLConfig(**config))
    with pytest.raises(ValueError, match=message):
        slcompile.save_peft(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_no_finite_numbers_are_not_written(value, tmp_path):
    model = slcompile.factorize_(Net(), SLConfig(**LORA, rank=4))
    with torch.no_grad():
        model.first.weight_sl.A[0, 0] = value
    with pytest.raises(ValueError, match=r"parameter first\.weight_sl\.A contains NaN or Inf"):
        slcompile.save_peft(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_weight_of_no_linear_layer_is_refused(tmp_path):
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.mix

    model = slcompile.factorize_(Bare(), SLConfig(**LORA, rank=4), example_args=(torch.randn(2, 64),))
    with pytest.raises(ValueError, match=r"mix is no weight of nn\.Linear, Conv1D or a conv"):
        slcompile.save_peft(model, tmp_path)

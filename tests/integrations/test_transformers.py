"""transformers: factors by ``from_pretrained``, and one callback for Trainer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.data import Dataset

import slcompile
from slcompile.integrations.transformers import FactorizeCallback, FactorsConfig
from tests.testing import LITE, randomize
from tests.zoo import tiny

CONFIG = slcompile.SLConfig(rank=8, density=0.05, seed=3)
IDS = torch.arange(24).reshape(2, 12)


def model_of(kind: str, config: slcompile.SLConfig = CONFIG):
    torch.manual_seed(0)
    model = tiny(kind, tie_word_embeddings=True) if kind == "llama" else tiny(kind)
    return randomize(slcompile.factorize_(model, config, example_kwargs={"input_ids": IDS})).eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("support", ["stratified", "vector", "uniform"])
def test_factors_are_read_by_from_pretrained(tmp_path, kind, support):
    config = slcompile.SLConfig(rank=8, density=0.05, seed=3, support=support)
    model = model_of(kind, config)
    slcompile.save_factorized(model, tmp_path)
    torch.manual_seed(5)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(slcompile.factors(loaded)) == list(slcompile.factors(model))  # which checks seeds, too
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {each.dtype for each in half.parameters()} == {torch.bfloat16}
    assert list(slcompile.factors(half)) == list(slcompile.factors(model))


@pytest.mark.parametrize("base", ["frozen", "int8"])
def test_a_base_is_frozen_after_from_pretrained_too(base, tmp_path):
    model = model_of("llama", slcompile.SLConfig(rank=8, density=0.05, seed=3, base=base))
    slcompile.save_factorized(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert {name for name, each in loaded.named_parameters() if each.requires_grad} == trained
    assert any(name.endswith("_sl.base") for name, _ in loaded.named_parameters())


def test_a_loaded_model_is_saved_trained_and_merged_as_any_other(tmp_path):
    model = model_of("llama")
    slcompile.save_factorized(model, tmp_path / "first")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    # Both ways of reading read what save_factorized wrote.
    ours = slcompile.load_factorized(tmp_path / "first")
    assert torch.equal(ours(input_ids=IDS).logits, model(input_ids=IDS).logits)
    again.train()
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    before = again.state_dict()["model.layers.0.mlp.up_proj.weight_sl.values"].clone()
    again(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(again.state_dict()["model.layers.0.mlp.up_proj.weight_sl.values"], before)
    slcompile.merge_(again)
    assert not hasattr(again.config, "quantization_config")  # it would ask for factors
    assert type(again.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_a_dense_model_is_not_factorized_by_loading(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"reads factors that were saved; to factorize a dense model, call slcompile"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FactorsConfig({}))


def test_a_checkpoint_that_does_not_fit_its_model_is_refused(tmp_path):
    slcompile.save_factorized(model_of("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["weights"]["model.layers.7.mlp.up_proj.weight"] = {"rank": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"factorizes model\.layers\.7\.mlp\.up_proj\.weight, which the model does not"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.slow
def test_without_the_plugin_transformers_names_the_method(tmp_path):
    slcompile.save_factorized(model_of("llama"), tmp_path)
    program = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "Unknown quantization type, got slcompile" in done.stderr


class Counting(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (index + torch.arange(12)) % 64
        return {"input_ids": ids, "labels": ids}


def trainer_of(model, folder, callback, model_init=None, **more: bool) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )
    return transformers.Trainer(model, arguments, train_dataset=Counting(), callbacks=[callback], model_init=model_init)


@pytest.mark.slow
def test_one_callback_factorizes_trains_and_writes_checkpoints_to_load(tmp_path):
    torch.manual_seed(0)
    callback = FactorizeCallback(CONFIG, options=LITE)
    trainer = trainer_of(tiny("llama"), tmp_path / "run", callback)
    assert len(slcompile.factors(trainer.model)) == 7
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    again = trainer_of(loaded, tmp_path / "again", callback)  # factorized already
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_model_that_trainer_makes_anew_is_factorized_too(tmp_path):
    callback = FactorizeCallback(CONFIG, compile=False)
    trainer = trainer_of(None, tmp_path, callback, model_init=lambda: tiny("llama"))
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert len(slcompile.factors(trainer.model)) == 7
    assert trainer.model.model.layers[0].mlp.up_proj.weight_sl.B.any()  # it began as zero
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_another_compilation_around_this_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"torch_compile of TrainingArguments must be False.* compile=False"):
        trainer_of(tiny("llama"), tmp_path, FactorizeCallback(CONFIG), torch_compile=True)
    trainer = trainer_of(tiny("llama"), tmp_path, FactorizeCallback(CONFIG, compile=False), torch_compile=True)
    assert len(slcompile.factors(trainer.model)) == 7


def test_a_module_that_is_not_of_transformers_is_trained_and_saved(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 64)

        def forward(self, input_ids, labels=None):
            return {"loss": self.layer(input_ids.float()[:, :1].expand(-1, 64)).square().mean()}

    trainer = trainer_of(Plain(), tmp_path, FactorizeCallback(CONFIG, compile=False))
    trainer.train()
    fresh = slcompile.factorize_(Plain(), CONFIG)
    fresh.load_state_dict(load_file(tmp_path / "checkpoint-4" / "model.safetensors"))
    assert torch.equal(fresh.layer.weight, trainer.model.layer.weight)

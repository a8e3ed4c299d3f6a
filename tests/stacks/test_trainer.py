"""Hugging Face's Trainer: ``model.compile(backend="sltrain")`` before it is made."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import slcompile
from tests.zoo import tiny

pytestmark = pytest.mark.slow


class Counting(Dataset):
    """Sequences in which each token is the one before plus a step of its own: what there is to learn."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (index + (1 + index % 3) * torch.arange(16)) % 64
        return {"input_ids": ids, "labels": ids}


def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return tiny("llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2)


def trainer_of(model: LlamaForCausalLM, folder, steps: int = 8) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=Counting())


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_train_save_resume_merge_and_generate(tmp_path, light):
    model = dense()
    model.compile(backend="sltrain", options=light)
    trainer = trainer_of(model, tmp_path / "run")
    trainer.create_optimizer()  # as Trainer does itself before the first step: of dense weights
    trainer.train()
    assert len(slcompile.factors(model)) == 7
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    groups = {id(each) for group in trainer.optimizer.param_groups for each in group["params"]}
    assert groups == {id(each) for each in model.parameters()}

    checkpoint = tmp_path / "run" / "checkpoint-4"
    resumed = slcompile.factorize_(dense(), config_of(light))
    resumed.compile(backend="sltrain", options=light)
    again = trainer_of(resumed, tmp_path / "again")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again) == losses(trainer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name

    slcompile.save_merged(model, tmp_path / "dense")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    ids = torch.arange(0, 16, 2)[None]
    model.eval()
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-5)
    compiled = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert compiled.shape == (1, 12)
    assert torch.equal(compiled, merged.generate(ids, max_new_tokens=4, do_sample=False))


def test_a_checkpoint_of_factors_is_not_resumed_by_a_dense_model(tmp_path, light):
    trainer_of(slcompile.factorize_(dense(), config_of(light)), tmp_path, steps=4).train()
    model = dense()
    model.compile(backend="sltrain", options=light)
    with pytest.raises(RuntimeError, match=r"holds the factors of .*q_proj\.weight and 6 more, dense in this Llama"):
        trainer_of(model, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def config_of(options: dict) -> slcompile.SLConfig:
    return slcompile.SLConfig.from_options(options)[0]

"""torchtitan with factorized weights: a converter of its models, and jobs for the paper's LLaMA 1B and 7B.

    torchrun --nproc-per-node 8 -m torchtitan.train --module examples.torchtitan.sltrain --config llama_7b \\
        --hf_assets_path FOLDER_OF_A_TOKENIZER

in a clone of this repository, with ``pip install torchtitan==0.3.0``, whose converters change the configuration of a
model before it is built. Any model of torchtitan takes the converter::

    model_registry("8B", converters=[SLTrainConverter.Config(rank=512)])

Layers are compiled by ``backend="sltrain"`` where a job's ``model_spec`` is made by ``compiled``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from torch import nn
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import (
    decoder_vocab_size,
    get_attention_config,
    make_ffn_config,
    make_gqa_config,
)
from torchtitan.models.llama3 import Llama3Model, parallelize_llama
from torchtitan.models.llama3.model import Llama3TransformerBlock
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.module import Module
from torchtitan.trainer import Trainer

import slcompile
from slcompile.models import LLAMAS


class Weight(slcompile.SLWeight, Module):
    """A factorized weight as torchtitan wants its modules; ``init_states`` calls ``reset_parameters``."""


class SLTrainConverter(ModelConfigConverter):
    """Lets a model be factorized when it is built, which torchtitan does on the meta device.

    FSDP2, DDP and pipelines take the factors as other parameters. Tensor parallelism is refused: torchtitan writes the
    placement of each weight into its configuration, where factors have none; see ``slcompile.parallelize``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        """The options of ``slcompile.SLConfig`` that the jobs set."""

        rank: int | float = 0.25
        density: float = 0.03
        seed: int = 0

    def __init__(self, config: Config) -> None:
        self.options = slcompile.SLConfig(rank=config.rank, density=config.density, seed=config.seed)

    def convert(self, model_config: Module.Config) -> Module.Config:
        given = {each.name: getattr(model_config, each.name) for each in fields(model_config) if each.init}
        return factorized(type(model_config), self.options)(**given)


def factorized(config_class: type, options: slcompile.SLConfig) -> type:
    """The configuration of the same model with factorized weights."""

    class Factorized(config_class):
        def build(self, **kwargs: Any) -> nn.Module:
            model = config_class.build(self, **kwargs)
            slcompile.factorize_(model, options)
            for module in model.modules():
                if isinstance(module, slcompile.SLWeight):
                    module.__class__ = Weight
            return model

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            parallelism = config.parallelism
            if parallelism.tensor_parallel_degree > 1 or parallelism.spmd_backend != "partial_dtensor":
                raise ValueError(
                    "factorized weights need parallelism.tensor_parallel_degree=1 and spmd_backend='partial_dtensor', "
                    f"got {parallelism.tensor_parallel_degree} and {parallelism.spmd_backend!r}"
                )
            config_class.update_from_config(self, config=config, **kwargs)

    return Factorized


def compiled(parallelize: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A model's ``parallelize_fn`` that compiles each layer by ``backend="sltrain"`` if the job asks for compilation.

    torchtitan's own compiles models with FlexAttention by no other backend than Inductor, which ours ends in.
    """

    def parallelized(model: nn.Module, *, compile_config: CompileConfig, **kwargs: Any) -> nn.Module:
        if compile_config.enable and "model" in compile_config.components:
            for layer in model.layers.values():
                layer.compile(backend="sltrain", fullgraph=True)
            compile_config = replace(
                compile_config, components=[each for each in compile_config.components if each != "model"]
            )
        return parallelize(model, compile_config=compile_config, **kwargs)

    return parallelized


def llama(name: str, attention: str = "flex") -> Llama3Model.Config:
    """The configuration of one of the paper's models: the first LLaMA, with a vocabulary of 32000."""
    dim, hidden, layers, heads = LLAMAS[name]
    normal = {"weight": partial(nn.init.trunc_normal_, std=0.02), "bias": nn.init.zeros_}
    norm = RMSNorm.Config(normalized_shape=dim, param_init={"weight": nn.init.ones_})
    rope = ComplexRoPE.Config(dim=dim // heads, max_seq_len=2048, theta=10000)
    block = Llama3TransformerBlock.Config(
        attention_norm=norm,
        ffn_norm=norm,
        attention=make_gqa_config(
            dim=dim,
            n_heads=heads,
            wqkv_param_init=normal,
            wo_param_init=normal,
            inner_attention=get_attention_config(attention),
            rope=rope,
        ),
        feed_forward=make_ffn_config(dim=dim, hidden_dim=hidden, w1_param_init=normal, w2w3_param_init=normal),
    )
    return Llama3Model.Config(
        dim=dim,
        vocab_size=32000,
        tok_embeddings=Embedding.Config(num_embeddings=32000, embedding_dim=dim, param_init=normal),
        norm=norm,
        lm_head=Linear.Config(in_features=dim, out_features=32000, param_init=normal),
        layers=[replace(block) for _ in range(layers)],
    )


def job(name: str, rate: float, batch: int, **factors: Any) -> Trainer.Config:
    """Trains one of the paper's models on C4, its layers compiled, its factors sharded by FSDP2."""
    converter = SLTrainConverter.Config(**factors).build()
    spec = ModelSpec(
        name="llama",
        flavor=name,
        model=converter.convert(llama(name)),
        parallelize_fn=compiled(parallelize_llama),
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )
    loss = CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))
    return Trainer.Config(
        loss=ChunkedLossWrapper.Config(loss_fn=loss),
        model_spec=spec,
        optimizer=default_adamw(lr=rate),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=1000, decay_type="cosine", min_lr_factor=0.1),
        training=TrainingConfig(local_batch_size=batch, seq_len=256, steps=100_000),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4"),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        compile=CompileConfig(enable=True, components=["model"]),
        checkpoint=CheckpointManager.Config(interval=1000),
        metrics=MetricsProcessor.Config(log_freq=10),
    )


def llama_1b() -> Trainer.Config:
    """The paper's: rank 512, density 0.03."""
    return job("llama-1b", rate=3e-3, batch=64, rank=512, density=0.03)


def llama_7b() -> Trainer.Config:
    """The paper's: rank 1024, density 0.05."""
    return job("llama-7b", rate=5e-4, batch=16, rank=1024, density=0.05)

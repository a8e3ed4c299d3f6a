"""Small models of transformers, of random weights and a fraction of a second to run."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
T5 = {
    "d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 1, "vocab_size": 128,
    "decoder_start_token_id": 0,
}  # fmt: skip
VIT = {**_SIZES, "image_size": 32, "patch_size": 8, "num_labels": 10}
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", {**_SIZES, "vocab_size": 128, "max_position_embeddings": 64}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 128, "n_positions": 64, "bos_token_id": 0,
         "eos_token_id": 0},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**_SIZES, "head_dim": 16, "num_key_value_heads": 2, "vocab_size": 128, "num_local_experts": 4,
         "num_experts_per_tok": 2},
    ),
    "llama": (
        "LlamaForCausalLM",
        {**_SIZES, "intermediate_size": 172, "vocab_size": 128, "tie_word_embeddings": False},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {**_SIZES, "num_key_value_heads": 2, "vocab_size": 128, "num_local_experts": 4},
    ),
    "t5": ("T5ForConditionalGeneration", T5),
    "vit": ("ViTForImageClassification", VIT),
}  # fmt: skip


def tiny_config(kind: str, **changes: Any) -> Any:
    """The configuration of ``tiny``, which names its class."""
    name, settings = _KINDS[kind]
    config_class = getattr(transformers, name).config_class
    return config_class(**{**settings, "architectures": [name], **changes})


def tiny(kind: str, **changes: Any) -> nn.Module:
    """A model of one layer.

    Args:
        kind: bert, gpt2, gpt_oss, llama, mixtral, t5 or vit.
        changes: Fields of its configuration that are to be others.
    """
    return getattr(transformers, _KINDS[kind][0])(tiny_config(kind, **changes))

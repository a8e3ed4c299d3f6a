"""Small random models of many architectures, from configurations alone, and what each is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

import slcompile
from tests import zoo

CONFIG = slcompile.SLConfig(rank=8, density=0.05, seed=1)
BATCH, LENGTH, VOCABULARY, IMAGE, SAMPLES = 2, 16, 128, 32, 1600

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "use_cache": False,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
# The names that an older configuration has for the same, some of which its attribute map translates.
GPT = {
    "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
    "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
    "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
}
T5 = {**zoo.T5, "vocab_size": VOCABULARY, "use_cache": False}
VIT = {**zoo.VIT, "image_size": IMAGE}
STAGES = {"depths": [1, 1], "num_labels": 10, "image_size": IMAGE}
SPEECH = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 4, "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip
Inputs = Callable[[nn.Module], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """A model of transformers.

    Attributes:
        family: decoder, encoder, encoder-decoder, moe, state-space, vision, audio, multimodal or series.
        model_class: Name of the class in transformers.
        config: Of the configuration, on top of which every dropout is 0.
        options: Of the conversion.
        exports: Whether it is exported to ONNX.
        inputs: What the model is called with.
    """

    family: str
    model_class: str
    inputs: Inputs
    config: dict[str, Any]
    options: slcompile.SLConfig = CONFIG
    exports: bool = True

    def make(self) -> nn.Module:
        """The model, in float32 and in training mode, its weights drawn from torch's default generator."""
        model_class = getattr(transformers, self.model_class)
        config = model_class.config_class(**self.config)
        return model_class._from_config(without_dropout(config)).float().train()


def without_dropout(config: Any) -> Any:
    """The configuration and those inside it with every dropout, layer drop and jitter set to 0."""
    for name, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            without_dropout(value)
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, 0.0)
    return config


def ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length))


def text(model: nn.Module) -> dict[str, Any]:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[-1, LENGTH - 3 :] = 0  # the last text is shorter
    return {"input_ids": ids(), "attention_mask": mask}


def causal(model: nn.Module) -> dict[str, Any]:
    tokens = ids()
    return {"input_ids": tokens, "labels": tokens}


def tokens(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": ids()}


def two_texts(model: nn.Module) -> dict[str, Any]:
    return {**text(model), "labels": ids()}


def image(model: nn.Module) -> dict[str, Any]:
    return {"pixel_values": torch.randn(BATCH, 3, IMAGE, IMAGE)}


def sound(model: nn.Module) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, SAMPLES)}


def decoder(name: str, config: dict[str, Any] | None = None, family: str = "decoder", **more: Any) -> Architecture:
    return Architecture(family, name, causal, {**(GROUPED if config is None else config), **more})


def moe(name: str, **more: Any) -> Architecture:
    return decoder(name, family="moe", **more)


def encoder(name: str, inputs: Inputs = text, config: dict[str, Any] = SIZES, **more: Any) -> Architecture:
    return Architecture("encoder", name, inputs, {**config, **more})


def seq2seq(name: str, config: dict[str, Any] = BART, **more: Any) -> Architecture:
    return Architecture("encoder-decoder", name, two_texts, {**config, **more})


def vision(name: str, config: dict[str, Any] = VIT, inputs: Inputs = image, **more: Any) -> Architecture:
    return Architecture("vision", name, inputs, {**config, **more})


def audio(name: str, inputs: Inputs = sound, config: dict[str, Any] = SPEECH, **more: Any) -> Architecture:
    return Architecture("audio", name, inputs, {**config, **more})


ARCHITECTURES: dict[str, Architecture] = {
    # Decoders.
    "llama": decoder("LlamaForCausalLM", num_hidden_layers=2),
    "mistral": decoder("MistralForCausalLM", sliding_window=8, num_hidden_layers=2),
    "qwen2": decoder("Qwen2ForCausalLM"),
    "qwen3": decoder("Qwen3ForCausalLM", head_dim=16),
    "gemma": decoder("GemmaForCausalLM", head_dim=16),
    "gemma2": decoder("Gemma2ForCausalLM", head_dim=16, sliding_window=8, num_hidden_layers=2),
    "gemma3": decoder("Gemma3ForCausalLM", head_dim=16, sliding_window=8, num_hidden_layers=2),
    "phi": decoder("PhiForCausalLM"),
    "phi3": decoder("Phi3ForCausalLM"),
    "gpt2": decoder("GPT2LMHeadModel", GPT),
    "gpt_neo": decoder(
        "GPTNeoForCausalLM", SIZES, num_hidden_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    "gpt_neox": decoder("GPTNeoXForCausalLM"),
    "gptj": decoder("GPTJForCausalLM", GPT, rotary_dim=8),
    "gpt_bigcode": decoder("GPTBigCodeForCausalLM", GPT),
    "codegen": decoder("CodeGenForCausalLM", GPT, rotary_dim=8),
    "opt": decoder("OPTForCausalLM", ffn_dim=128, word_embed_proj_dim=64),
    "bloom": decoder("BloomForCausalLM", n_layer=1, n_head=4),
    "falcon": decoder("FalconForCausalLM"),
    "mpt": decoder(
        "MptForCausalLM", {}, d_model=64, n_heads=4, n_layers=1, vocab_size=VOCABULARY, max_seq_len=64, use_cache=False
    ),
    "stablelm": decoder("StableLmForCausalLM"),
    "olmo2": decoder("Olmo2ForCausalLM"),
    "cohere": decoder("CohereForCausalLM"),
    "starcoder2": decoder("Starcoder2ForCausalLM"),
    "nemotron": decoder("NemotronForCausalLM"),
    "glm": decoder("GlmForCausalLM", head_dim=16),
    "granite": decoder("GraniteForCausalLM"),
    "xglm": decoder(
        "XGLMForCausalLM",
        {},
        vocab_size=VOCABULARY,
        d_model=64,
        ffn_dim=128,
        num_layers=1,
        attention_heads=4,
        max_position_embeddings=64,
        use_cache=False,
    ),
    "biogpt": decoder("BioGptForCausalLM"),
    # Mixtures of experts.
    "mixtral": moe("MixtralForCausalLM", num_local_experts=4),
    "qwen2_moe": moe(
        "Qwen2MoeForCausalLM",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    ),
    "qwen3_moe": moe(
        "Qwen3MoeForCausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16
    ),
    "olmoe": moe("OlmoeForCausalLM", num_experts=4, num_experts_per_tok=2),
    "deepseek_v2": moe("DeepseekV2ForCausalLM", **DEEPSEEK),
    "deepseek_v3": moe("DeepseekV3ForCausalLM", **DEEPSEEK),
    "gpt_oss": moe("GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2, head_dim=16, num_hidden_layers=2),
    "granitemoe": moe("GraniteMoeForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "phimoe": moe("PhimoeForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "jetmoe": moe("JetMoeForCausalLM", num_local_experts=4, num_experts_per_tok=2, kv_channels=16),
    "llama4": moe(
        "Llama4ForCausalLM",
        num_local_experts=4,
        num_experts_per_tok=1,
        head_dim=16,
        intermediate_size_mlp=128,
        num_hidden_layers=2,
    ),
    "switch_transformers": Architecture(
        "moe",
        "SwitchTransformersForConditionalGeneration",
        two_texts,
        {
            **T5,
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_decoder_layers": 1,
            "expert_capacity": 64,
        },
    ),
    # State-space and recurrent models.
    "mamba": decoder("MambaForCausalLM", SIZES, family="state-space", state_size=8, time_step_rank=8),
    "mamba2": decoder(
        "Mamba2ForCausalLM",
        SIZES,
        family="state-space",
        state_size=8,
        num_heads=8,
        head_dim=16,
        expand=2,
        n_groups=1,
        chunk_size=8,
    ),
    "falcon_mamba": decoder("FalconMambaForCausalLM", SIZES, family="state-space", state_size=8, time_step_rank=8),
    "jamba": decoder(
        "JambaForCausalLM",
        family="state-space",
        num_experts=2,
        num_experts_per_tok=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
        num_hidden_layers=2,
    ),
    "zamba2": decoder(
        "Zamba2ForCausalLM",
        family="state-space",
        mamba_d_state=8,
        mamba_headdim=16,
        mamba_ngroups=1,
        n_mamba_heads=8,
        num_mem_blocks=1,
        layers_block_type=["mamba", "hybrid"],
        chunk_size=8,
        use_mamba_kernels=False,
        use_mem_rope=False,
        num_hidden_layers=2,
    ),
    "recurrent_gemma": decoder(
        "RecurrentGemmaForCausalLM",
        family="state-space",
        lru_width=64,
        attention_window_size=8,
        block_types=["recurrent", "attention"],
        num_hidden_layers=2,
    ),
    "rwkv": decoder(
        "RwkvForCausalLM", SIZES, num_hidden_layers=2, family="state-space", attention_hidden_size=64, context_length=64
    ),
    "lfm2": decoder(
        "Lfm2ForCausalLM", family="state-space", layer_types=["conv", "full_attention"], num_hidden_layers=2
    ),
    "qwen3_next": decoder(
        "Qwen3NextForCausalLM",
        family="state-space",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        num_hidden_layers=2,
    ),
    "bamba": decoder(
        "BambaForCausalLM",
        family="state-space",
        attn_layer_indices=[1],
        mamba_d_state=8,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_chunk_size=8,
        num_hidden_layers=2,
    ),
    # Encoders.
    "bert": encoder("BertForSequenceClassification"),
    "roberta": encoder("RobertaForMaskedLM", max_position_embeddings=66),
    "albert": encoder("AlbertForMaskedLM", embedding_size=32),
    "distilbert": encoder("DistilBertForMaskedLM", dim=64, hidden_dim=128, n_heads=4, n_layers=1),
    "electra": encoder("ElectraForPreTraining", embedding_size=32),
    "deberta_v2": encoder(
        "DebertaV2ForMaskedLM",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        pooler_hidden_size=64,
    ),
    "mpnet": encoder("MPNetForMaskedLM", max_position_embeddings=66),
    "modernbert": encoder(
        "ModernBertForMaskedLM",
        local_attention=8,
        global_attn_every_n_layers=2,
        cls_token_id=1,
        sep_token_id=2,
        num_hidden_layers=2,
    ),
    "longformer": encoder("LongformerForMaskedLM", attention_window=8, max_position_embeddings=66),
    "big_bird": encoder("BigBirdForMaskedLM", attention_type="original_full"),
    "convbert": encoder("ConvBertForMaskedLM", embedding_size=32, head_ratio=2),
    "fnet": encoder("FNetForMaskedLM", tokens, use_tpu_fourier_optimizations=False),
    "mobilebert": encoder(
        "MobileBertForMaskedLM",
        embedding_size=32,
        intra_bottleneck_size=32,
        true_hidden_size=32,
        num_feedforward_networks=1,
    ),
    "squeezebert": encoder("SqueezeBertForMaskedLM", embedding_size=64),
    "rembert": encoder("RemBertForMaskedLM", input_embedding_size=32, output_embedding_size=48),
    "roformer": encoder("RoFormerForMaskedLM", embedding_size=64),
    "esm": encoder("EsmForMaskedLM", mask_token_id=3, position_embedding_type="rotary"),
    "funnel": encoder(
        "FunnelForMaskedLM",
        config={"vocab_size": VOCABULARY},
        d_model=64,
        n_head=4,
        d_head=16,
        d_inner=128,
        block_sizes=[1, 1],
        num_decoder_layers=1,
    ),
    "xlnet": encoder(
        "XLNetLMHeadModel",
        config={"vocab_size": VOCABULARY},
        d_model=64,
        n_head=4,
        d_inner=128,
        n_layer=1,
        use_mems_eval=False,
        use_mems_train=False,
    ),
    # Encoders with decoders.
    "t5": seq2seq("T5ForConditionalGeneration", T5),
    "mt5": seq2seq("MT5ForConditionalGeneration", T5, feed_forward_proj="gated-gelu"),
    "longt5": seq2seq(
        "LongT5ForConditionalGeneration",
        T5,
        local_radius=4,
        encoder_attention_type="transient-global",
        global_block_size=4,
    ),
    "bart": seq2seq("BartForConditionalGeneration"),
    "mbart": seq2seq("MBartForConditionalGeneration"),
    "pegasus": seq2seq("PegasusForConditionalGeneration"),
    "marian": seq2seq("MarianMTModel"),
    "m2m_100": seq2seq("M2M100ForConditionalGeneration"),
    "blenderbot": seq2seq("BlenderbotForConditionalGeneration"),
    "prophetnet": seq2seq(
        "ProphetNetForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "max_position_embeddings": 64,
            "use_cache": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
    ),
    "led": seq2seq(
        "LEDForConditionalGeneration",
        {**BART},
        attention_window=[8],
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    # Vision.
    "vit": vision("ViTForImageClassification"),
    "deit": vision("DeiTForImageClassification"),
    "beit": vision("BeitForImageClassification", use_relative_position_bias=True),
    "dinov2": vision("Dinov2ForImageClassification", mlp_ratio=2),
    "dinov2_registers": vision("Dinov2WithRegistersForImageClassification", mlp_ratio=2),
    "swin": vision("SwinForImageClassification", STAGES, embed_dim=32, num_heads=[2, 4], patch_size=4, window_size=4),
    "swinv2": vision(
        "Swinv2ForImageClassification", STAGES, embed_dim=32, num_heads=[2, 4], patch_size=4, window_size=4
    ),
    "convnext": vision("ConvNextForImageClassification", STAGES, hidden_sizes=[32, 64], num_stages=2),
    "convnextv2": vision("ConvNextV2ForImageClassification", STAGES, hidden_sizes=[32, 64], num_stages=2),
    "resnet": vision(
        "ResNetForImageClassification", {}, embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], num_labels=40
    ),
    "regnet": vision(
        "RegNetForImageClassification",
        {},
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        groups_width=16,
        num_labels=40,
    ),
    "segformer": vision(
        "SegformerForSemanticSegmentation",
        {},
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[32, 64],
        num_attention_heads=[1, 2],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=64,
        num_labels=10,
    ),
    "mobilevit": vision(
        "MobileViTForImageClassification",
        {},
        hidden_sizes=[32, 48, 64],
        neck_hidden_sizes=[16, 16, 32, 32, 48, 64, 64],
        image_size=64,
        num_labels=40,
        num_attention_heads=4,
    ),
    "mobilenet_v2": vision("MobileNetV2ForImageClassification", {}, depth_multiplier=0.25, min_depth=8, num_labels=40),
    "poolformer": vision(
        "PoolFormerForImageClassification", {}, depths=[1, 1, 1, 1], hidden_sizes=[32, 32, 64, 64], num_labels=40
    ),
    "pvt": vision(
        "PvtForImageClassification",
        {},
        image_size=IMAGE,
        depths=[1, 1, 1, 1],
        hidden_sizes=[32, 32, 64, 64],
        num_attention_heads=[1, 2, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
        sequence_reduction_ratios=[2, 1, 1, 1],
        num_labels=10,
    ),
    "focalnet": vision(
        "FocalNetForImageClassification",
        STAGES,
        embed_dim=32,
        hidden_sizes=[32, 64],
        focal_levels=[1, 1],
        focal_windows=[3, 3],
    ),
    "hiera": vision(
        "HieraForImageClassification",
        {},
        image_size=[IMAGE, IMAGE],
        embed_dim=32,
        depths=[1, 1],
        num_heads=[1, 2],
        masked_unit_size=[4, 4],
        query_stride=[2, 2],
        num_query_pool=1,
        num_labels=10,
    ),
    "yolos": vision("YolosForObjectDetection", image_size=[IMAGE, IMAGE], num_detection_tokens=8),
    "vit_mae": vision(
        "ViTMAEForPreTraining",
        inputs=lambda model: {**image(model), "noise": torch.rand(BATCH, 16)},
        decoder_hidden_size=32,
        decoder_intermediate_size=64,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
    ),
    "dpt": vision(
        "DPTForDepthEstimation",
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=32,
        is_hybrid=False,
        reassemble_factors=[4, 2, 1, 0.5],
    ),
    # Audio.
    "wav2vec2": audio("Wav2Vec2ForCTC"),
    "hubert": audio("HubertForCTC"),
    "wavlm": audio("WavLMForCTC", num_buckets=16, max_bucket_distance=32),
    "sew": audio("SEWForCTC", squeeze_factor=2),
    "whisper": audio(
        "WhisperForConditionalGeneration",
        lambda model: {"input_features": torch.randn(BATCH, 16, 64), "labels": ids()},
        BART,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=64,
    ),
    "audio_spectrogram_transformer": audio(
        "ASTForAudioClassification",
        lambda model: {"input_values": torch.randn(BATCH, 48, 32)},
        VIT,
        num_mel_bins=32,
        max_length=48,
        frequency_stride=8,
        time_stride=8,
    ),
    "speech_to_text": audio(
        "Speech2TextForConditionalGeneration",
        lambda model: {"input_features": torch.randn(BATCH, 32, 16), "labels": ids()},
        BART,
        input_feat_per_channel=16,
        input_channels=1,
        num_conv_layers=2,
        conv_kernel_sizes=[3, 3],
        conv_channels=32,
        max_source_positions=64,
        max_target_positions=64,
    ),
    "wav2vec2_bert": audio(
        "Wav2Vec2BertForCTC",
        lambda model: {"input_features": torch.randn(BATCH, LENGTH, 32)},
        SPEECH,
        feature_projection_input_dim=32,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=8,
        right_max_position_embeddings=4,
        conv_depthwise_kernel_size=7,
    ),
    "moonshine": audio(
        "MoonshineForConditionalGeneration",
        lambda model: {"input_values": torch.randn(BATCH, 4000), "labels": ids()},
        GROUPED,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        encoder_num_key_value_heads=4,
        decoder_num_key_value_heads=4,
        decoder_start_token_id=1,
    ),
    # Several kinds of input.
    "clip": Architecture(
        "multimodal",
        "CLIPModel",
        lambda model: {**text(model), **image(model)},
        {"text_config": SIZES, "vision_config": VIT, "projection_dim": 48},
    ),
    "siglip": Architecture(
        "multimodal",
        "SiglipModel",
        lambda model: {**text(model), **image(model)},
        {"text_config": SIZES, "vision_config": VIT},
    ),
    "blip": Architecture(
        "multimodal",
        "BlipForConditionalGeneration",
        lambda model: {**text(model), **image(model)},
        {"text_config": {**SIZES, "encoder_hidden_size": 64}, "vision_config": VIT, "projection_dim": 48},
    ),
    "vilt": Architecture(
        "multimodal",
        "ViltModel",
        lambda model: {
            **text(model),
            "token_type_ids": torch.zeros(BATCH, LENGTH, dtype=torch.long),
            **image(model),
            "pixel_mask": torch.ones(BATCH, IMAGE, IMAGE, dtype=torch.long),
        },
        {**SIZES, **VIT},
    ),
    "llava": Architecture(
        "multimodal",
        "LlavaForConditionalGeneration",
        lambda model: {"input_ids": torch.cat([torch.full((BATCH, 16), 5), 6 + ids(8) % 100], 1), **image(model)},
        {
            "text_config": {**GROUPED, "model_type": "llama"},
            "vision_config": {**VIT, "num_hidden_layers": 2, "model_type": "clip_vision_model"},
            "image_token_index": 5,
            "image_token_id": 5,
        },
    ),
    "git": Architecture(
        "multimodal", "GitForCausalLM", lambda model: {**text(model), **image(model)}, {**SIZES, "vision_config": VIT}
    ),
    "visual_bert": Architecture(
        "multimodal",
        "VisualBertForPreTraining",
        lambda model: {**text(model), "visual_embeds": torch.randn(BATCH, 4, 48)},
        {**SIZES, "visual_embedding_dim": 48},
    ),
    "flava": Architecture(
        "multimodal",
        "FlavaModel",
        lambda model: {**text(model), **image(model)},
        {
            "text_config": SIZES,
            "image_config": VIT,
            "multimodal_config": {k: v for k, v in VIT.items() if k != "num_labels"},
            "hidden_size": 64,
        },
    ),
    "lxmert": Architecture(
        "multimodal",
        "LxmertModel",
        lambda model: {**text(model), "visual_feats": torch.randn(BATCH, 4, 48), "visual_pos": torch.rand(BATCH, 4, 4)},
        {**SIZES, "visual_feat_dim": 48, "l_layers": 1, "x_layers": 1, "r_layers": 1},
    ),
    # Series of numbers.
    "patchtst": Architecture(
        "series",
        "PatchTSTForPrediction",
        lambda model: {"past_values": torch.randn(BATCH, 32, 2), "future_values": torch.randn(BATCH, 8, 2)},
        {
            "num_input_channels": 2,
            "context_length": 32,
            "prediction_length": 8,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": 64,
            "ffn_dim": 128,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "loss": "mse",
        },
    ),
    "decision_transformer": Architecture(
        "series",
        "DecisionTransformerModel",
        lambda model: {
            "states": torch.randn(BATCH, 8, 40),
            "actions": torch.randn(BATCH, 8, 36),
            "rewards": torch.randn(BATCH, 8, 1),
            "returns_to_go": torch.randn(BATCH, 8, 1),
            "timesteps": torch.arange(8).repeat(BATCH, 1),
            "attention_mask": torch.ones(BATCH, 8),
        },
        {**GPT, "hidden_size": 64, "state_dim": 40, "act_dim": 36, "max_ep_len": 64},
    ),
}

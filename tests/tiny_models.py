"""Tiny models of many architectures, built from configurations: no downloads, a few thousand parameters each.

``tiny_model("gpt2")`` trains on a CPU in milliseconds; ``tiny_model("gpt2", device="meta")`` costs no memory.
"""

from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 96
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_DECODER = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_ENCODER = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_T5 = {
    **_TOKENS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_GPT2 = {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_SEQ2SEQ = {
    **_TOKENS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}

# name -> (class of the model, arguments of its configuration)
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "gpt2_untied": ("GPT2LMHeadModel", {**_GPT2, "tie_word_embeddings": False}),
    "gpt2_classifier": ("GPT2ForSequenceClassification", {**_GPT2, "num_labels": 3}),
    "gpt2_cross_attention": ("GPT2LMHeadModel", {**_GPT2, "add_cross_attention": True, "is_decoder": True}),
    "qwen2": ("Qwen2ForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
    "qwen2_untied": ("Qwen2ForCausalLM", {**_DECODER, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3ForCausalLM", {**_DECODER, "head_dim": 8}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {
            **_DECODER,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**_DECODER, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "mixtral": ("MixtralForCausalLM", {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**_DECODER, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **_DECODER,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
    ),
    "llama4": (
        "Llama4ForCausalLM",
        {
            **_DECODER,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
        },
    ),
    "llama": ("LlamaForCausalLM", _DECODER),
    "gemma": ("GemmaForCausalLM", {**_DECODER, "head_dim": 8}),
    "phi3": ("Phi3ForCausalLM", {**_DECODER}),
    "glm4": ("Glm4ForCausalLM", {**_DECODER, "head_dim": 8}),
    "starcoder2": ("Starcoder2ForCausalLM", _DECODER),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {**_GPT2, "multi_query": True}),
    "gpt_neox": ("GPTNeoXForCausalLM", _ENCODER),
    "falcon": ("FalconForCausalLM", {**_ENCODER, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": ("BloomForCausalLM", {**_TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptForCausalLM", {**_TOKENS, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "dbrx": (
        "DbrxForCausalLM",
        {
            **_TOKENS,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "jetmoe": (
        "JetMoeForCausalLM",
        {**_DECODER, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "openai_gpt": ("OpenAIGPTLMHeadModel", _GPT2),
    "opt": (
        "OPTForCausalLM",
        {
            **{key: value for key, value in _ENCODER.items() if key != "intermediate_size"},
            "ffn_dim": 48,
            "word_embed_proj_dim": 24,
        },
    ),
    "gptj": ("GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "mamba": (
        "MambaForCausalLM",
        {**_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
    ),
    "bert": ("BertForMaskedLM", _ENCODER),
    "bert_classifier": ("BertForSequenceClassification", {**_ENCODER, "num_labels": 3}),
    "roberta": ("RobertaForMaskedLM", _ENCODER),
    "roberta_classifier": ("RobertaForSequenceClassification", {**_ENCODER, "num_labels": 3}),
    "modernbert": ("ModernBertForMaskedLM", {**_ENCODER, "global_attn_every_n_layers": 2}),
    "distilbert": (
        "DistilBertForMaskedLM",
        {
            **_TOKENS,
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "deberta": (
        "DebertaForSequenceClassification",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "num_labels": 3},
    ),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16},
    ),
    "esm": (
        "EsmForMaskedLM",
        {
            **_ENCODER,
            "pad_token_id": 1,
            "mask_token_id": 2,
            "position_embedding_type": "rotary",
            "token_dropout": True,
        },
    ),
    "t5": ("T5ForConditionalGeneration", _T5),
    "t5_gated": (
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu"},
    ),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        {
            **_T5,
            "num_decoder_layers": 2,
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
        },
    ),
    "bart": ("BartForConditionalGeneration", {**_SEQ2SEQ, "max_position_embeddings": 64}),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**_SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32},
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        {
            **_ENCODER,
            "conv_dim": (16, 16),
            "conv_stride": (2, 2),
            "conv_kernel": (3, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
    "vit": ("ViTForImageClassification", {**_VISION, "num_labels": 3}),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2, "num_labels": 3},
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 1], "layer_type": "basic", "num_labels": 3},
    ),
    "regnet": (
        "RegNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8, "num_labels": 3},
    ),
    "clip_classifier": ("CLIPForImageClassification", {"vision_config": _VISION, "num_labels": 3}),
    "siglip": ("SiglipModel", {"text_config": {**_ENCODER, "projection_size": 32}, "vision_config": _VISION}),
    "clip": (
        "CLIPModel",
        {
            "text_config": {**_ENCODER, "projection_dim": 24},
            "vision_config": {**_VISION, "projection_dim": 24},
            "projection_dim": 24,
        },
    ),
}


def tiny_model(name: str, *, seed: int = 0, device: str = "cpu", **configuration: Any) -> nn.Module:
    """Build a tiny model with random weights.

    Args:
        name: a key of ``CONFIGURATIONS``.
        seed: of the weights; the global random state is left as it was.
        device: "meta" builds shapes only.
        configuration: further arguments of the configuration, stronger than those of the table.

    Returns:
        The model, in float32 and training mode.
    """
    class_name, arguments = CONFIGURATIONS[name]
    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model: nn.Module = model_class(model_class.config_class(**{**arguments, **configuration}))
    return model.train()


def tiny_lora_model(name: str = "qwen2", *, device: str = "cpu", seed: int = 0, **lora: Any) -> nn.Module:
    """Build a tiny model with LoRA adapters of rank 4.

    Args:
        name: a key of ``CONFIGURATIONS``.
        device: "meta" builds shapes only.
        seed: of the weights.
        lora: arguments of ``peft.LoraConfig``; its targets are q_proj and v_proj unless given.

    Returns:
        The ``peft.PeftModel``; only what PEFT trains requires gradients.
    """
    import peft

    model = tiny_model(name, seed=seed, device=device)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **lora})
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def random_tokens(batch: int = 2, length: int = 7, *, seed: int = 1) -> torch.Tensor:
    """Return (batch, length) token numbers of ``VOCABULARY`` without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))

"""Pretrain Qwen2.5 from scratch.

    python recipes/qwen2_5.py --preset tiny --optim adamuon
    torchrun --nproc_per_node 8 recipes/qwen2_5.py --preset 1.5b --optim adamuon

``0.5b`` and ``1.5b`` have the published configurations of Qwen2.5 (technical report and config.json). The training of
``1.5b`` is the AdaMuon paper's (100 B tokens, sequence length 8192, learning rate 6e-4) where the paper says it; its
batch of 1 M tokens, schedule and corpus are ours, as is all about the training of ``0.5b`` and ``tiny``.
"""

import sys
from pathlib import Path
from typing import Any

from pretrain import main
from recipe_arguments import Preset
from transformers import Qwen2Config
from transformers.utils import is_torch_bf16_gpu_available

import hf_matrix_optim  # noqa: F401  makes --optim muon, adamuon, adamuon_v1 and mud known to TrainingArguments

DATA = Path(__file__).parent / "data"
ROTARY = {"rope_type": "default", "rope_theta": 1_000_000.0}

ADAMW_AND_CLIP: dict[str, Any] = {
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "logging_nan_inf_filter": False,
}

LARGE_RUN: dict[str, Any] = {
    **ADAMW_AND_CLIP,
    "tokenizer": "Qwen/Qwen2.5-0.5B",
    "dataset_name": "HuggingFaceFW/fineweb-edu",
    "validation_fraction": 0.0005,
    "bf16": is_torch_bf16_gpu_available(),
    "learning_rate": 6e-4,
    "warmup_steps": 2000,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 1000,
    "save_steps": 1000,
    "save_total_limit": 2,
    "dataloader_num_workers": 2,
}

PRESETS = {
    "tiny": Preset(
        config_class=Qwen2Config,
        model={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": ROTARY,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
        },
        defaults={
            **ADAMW_AND_CLIP,
            "tokenizer": str(DATA / "tokenizer"),
            "train_data": [str(DATA / "novels" / "train")],
            "validation_data": [str(DATA / "novels" / "validation")],
            "block_size": 128,
            "tokens_per_step": 1024,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 32,
            "num_train_epochs": 2,
            "learning_rate": 4e-3,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "warmup_steps": 0.3,  # of the run: with less, AdamW ends higher here; the matrix optimizers do not mind
            "logging_steps": 10,
            "eval_strategy": "steps",
            "eval_steps": 50,
            "save_steps": 100,
            "save_total_limit": 2,
        },
    ),
    "0.5b": Preset(
        config_class=Qwen2Config,
        model={
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "rope_parameters": ROTARY,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "bos_token_id": 151643,
            "eos_token_id": 151643,
        },
        defaults={
            **LARGE_RUN,
            "dataset_config": "sample-10BT",
            "block_size": 4096,
            "tokens_per_step": 524_288,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_tokens": 10e9,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        },
    ),
    "1.5b": Preset(
        config_class=Qwen2Config,
        model={
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "rope_parameters": ROTARY,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "bos_token_id": 151643,
            "eos_token_id": 151643,
        },
        defaults={
            **LARGE_RUN,
            "dataset_config": "sample-100BT",
            "block_size": 8192,
            "tokens_per_step": 1_048_576,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "max_tokens": 100e9,
            "lr_scheduler_type": "constant_with_warmup",
        },
    ),
}

if __name__ == "__main__":
    sys.exit(main("qwen2_5", PRESETS))

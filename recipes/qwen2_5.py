"""Pretrain Qwen2.5 from scratch.

    python recipes/qwen2_5.py --preset tiny --optim adamuon
    torchrun --nproc_per_node 8 recipes/qwen2_5.py --preset 1.5b --optim adamuon

All but ``tiny`` have the published configurations of Qwen2.5 (technical report and config.json). The training of
``1.5b`` is the AdaMuon paper's (100 B tokens, sequence length 8192, learning rate 6e-4) where the paper says it; its
batch of 1 M tokens, schedule and corpus are ours, as is all about the training of the others.
"""

import sys
from pathlib import Path
from typing import Any

from pretrain import main
from recipe_arguments import Preset
from run_defaults import ADAMW_AND_CLIP, LARGE_RUN
from transformers import Qwen2Config

import hf_matrix_optim  # noqa: F401  makes --optim muon, adamuon, adamuon_v1 and mud known to TrainingArguments

DATA = Path(__file__).parent / "data"
ROTARY = {"rope_type": "default", "rope_theta": 1_000_000.0}

FINEWEB_RUN: dict[str, Any] = {
    **LARGE_RUN,
    "tokenizer": "Qwen/Qwen2.5-0.5B",
    "dataset_name": "HuggingFaceFW/fineweb-edu",
    "validation_fraction": 0.0005,
    "learning_rate": 6e-4,
    "warmup_steps": 2000,
}


def qwen2_5(**model: Any) -> dict[str, Any]:
    """Configuration of a published size; ``model`` has what the sizes differ in."""
    return {
        "vocab_size": 151936,
        "rope_parameters": ROTARY,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "max_window_layers": model["num_hidden_layers"],
        **model,
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
            "schedule": "cosine",
            "floor": 0.1,
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
        model=qwen2_5(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            max_position_embeddings=32768,
        ),
        defaults={
            **FINEWEB_RUN,
            "dataset_config": "sample-10BT",
            "block_size": 4096,
            "tokens_per_step": 524_288,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_tokens": 10e9,
            "schedule": "cosine",
            "floor": 0.1,
        },
    ),
    "1.5b": Preset(
        config_class=Qwen2Config,
        model=qwen2_5(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            max_position_embeddings=131072,
        ),
        defaults={
            **FINEWEB_RUN,
            "dataset_config": "sample-100BT",
            "block_size": 8192,
            "tokens_per_step": 1_048_576,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "max_tokens": 100e9,
            "schedule": "warmup_stable",
        },
    ),
    "3b": Preset(
        config_class=Qwen2Config,
        model=qwen2_5(
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            max_position_embeddings=32768,
        ),
        defaults={
            **FINEWEB_RUN,
            "dataset_config": "sample-100BT",
            "block_size": 4096,
            "tokens_per_step": 2_097_152,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_checkpointing": True,
            "max_tokens": 60e9,
            "learning_rate": 4e-4,
            "schedule": "warmup_stable",
        },
    ),
    "7b": Preset(
        config_class=Qwen2Config,
        model=qwen2_5(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_position_embeddings=131072,
            tie_word_embeddings=False,
        ),
        defaults={
            **FINEWEB_RUN,
            "dataset_config": "sample-350BT",
            "block_size": 4096,
            "tokens_per_step": 4_194_304,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_checkpointing": True,
            "max_tokens": 150e9,
            "learning_rate": 3e-4,
            "schedule": "warmup_stable",
        },
    ),
}

if __name__ == "__main__":
    sys.exit(main("qwen2_5", PRESETS))

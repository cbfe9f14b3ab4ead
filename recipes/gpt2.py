"""Pretrain GPT-2 from scratch, in the form of the Muon papers.

    python recipes/gpt2.py --preset tiny --optim mud
    torchrun --nproc_per_node 8 recipes/gpt2.py --preset small --optim adamuon

``tiny`` to ``xl`` are GPT-2 with rotary positions and without biases in its linear layers, which transformers has as
``Starcoder2Config(use_bias=False, hidden_act="gelu")``; layer norms keep theirs. Query, key and value are three
matrices here, where nanoGPT, on which the papers build, stores one: a matrix optimizer then updates the same three.
``hf-small`` is the original: learned positions, biases, matrices stored (in, out), query, key and value in one.

``small`` to ``xl`` train as in the AdaMuon paper: OpenWebText, blocks of 1,024, 491,520 tokens a step, 100 K steps, 2
K of warm-up and then a constant learning rate (6e-4; the paper also has 1e-3), AdamW's betas 0.9 and 0.95, decay 0.1,
clipping at 1. The ``mud-`` presets train as in the MUD paper: its batches of blocks, a linear warm-up and a cosine to
a floor. Their peak learning rate, warm-up, floor and number of steps are ours, as is all about ``tiny`` and
``hf-small``'s dropout of 0.
"""

import sys
from pathlib import Path
from typing import Any

from pretrain import main
from recipe_arguments import Preset
from run_defaults import ADAMW_AND_CLIP, LARGE_RUN
from transformers import GPT2Config, Starcoder2Config

import hf_matrix_optim  # noqa: F401  makes --optim muon, adamuon, adamuon_v1 and mud known to TrainingArguments

DATA = Path(__file__).parent / "data"
VOCABULARY = 50304  # GPT-2's 50,257 words, rounded up to a multiple of 64

ADAMUON_RUN: dict[str, Any] = {
    **LARGE_RUN,
    "tokenizer": "gpt2",
    "dataset_name": "Skylion007/openwebtext",
    "validation_fraction": 0.0005,
    "block_size": 1024,
    "tokens_per_step": 480 * 1024,
    "max_steps": 100_000,
    "learning_rate": 6e-4,
    "schedule": "warmup_stable",
    "warmup_steps": 2000,
}

MUD_RUN: dict[str, Any] = {
    **LARGE_RUN,
    "tokenizer": "gpt2",
    "dataset_name": "Skylion007/openwebtext",
    "validation_fraction": 0.0005,
    "max_steps": 10_000,
    "learning_rate": 6e-4,
    "schedule": "cosine",
    "floor": 0.1,
    "warmup_steps": 0.05,
    "eval_steps": 250,
}


def gpt2(layers: int, heads: int, width: int, positions: int = 1024) -> dict[str, Any]:
    """Configuration of the papers' form, by its three sizes."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": "gelu",
        "max_position_embeddings": positions,
        "initializer_range": 0.02,
        "norm_epsilon": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "use_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    }


def preset(model: dict[str, Any], run: dict[str, Any], **defaults: Any) -> Preset:
    """Preset of the papers' form."""
    return Preset(Starcoder2Config, model, {**run, **defaults}, scale_residual_init=True)


TINY = {name: value for name, value in gpt2(layers=4, heads=4, width=128).items() if name != "vocab_size"}

PRESETS = {
    "tiny": preset(
        TINY,
        ADAMW_AND_CLIP,
        tokenizer=str(DATA / "tokenizer"),
        train_data=[str(DATA / "novels" / "train")],
        validation_data=[str(DATA / "novels" / "validation")],
        block_size=128,
        tokens_per_step=1024,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=32,
        num_train_epochs=2,
        learning_rate=4e-3,
        schedule="warmup_stable",
        warmup_steps=0.3,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=50,
        save_steps=100,
        save_total_limit=2,
    ),
    "small": preset(gpt2(12, 12, 768), ADAMUON_RUN, per_device_train_batch_size=32, per_device_eval_batch_size=32),
    "medium": preset(gpt2(24, 16, 1024), ADAMUON_RUN, per_device_train_batch_size=16, per_device_eval_batch_size=16),
    "large": preset(gpt2(36, 20, 1280), ADAMUON_RUN, per_device_train_batch_size=10, per_device_eval_batch_size=10),
    "xl": preset(gpt2(48, 25, 1600), ADAMUON_RUN, per_device_train_batch_size=5, per_device_eval_batch_size=5),
    "mud-small": preset(
        gpt2(12, 12, 768, 4096),
        MUD_RUN,
        block_size=4096,
        tokens_per_step=24 * 4096,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
    ),
    "mud-medium": preset(
        gpt2(24, 16, 1024, 4096),
        MUD_RUN,
        block_size=2048,
        tokens_per_step=12 * 2048,
        per_device_train_batch_size=12,
        per_device_eval_batch_size=12,
    ),
    "mud-large": preset(
        gpt2(36, 20, 1280, 2048),
        MUD_RUN,
        block_size=2048,
        tokens_per_step=8 * 2048,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
    ),
    "hf-small": Preset(
        config_class=GPT2Config,
        model={
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        defaults={**ADAMUON_RUN, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 32},
    ),
}

if __name__ == "__main__":
    sys.exit(main("gpt2", PRESETS))

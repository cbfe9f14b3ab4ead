"""Pretrain ESM-2 from scratch: masked language modelling of proteins.

    python recipes/esm2.py --preset tiny --optim mud
    torchrun --nproc_per_node 8 recipes/esm2.py --preset 150m --optim mud

All but ``tiny`` have the published configurations of ESM-2. ``150m`` trains as in the MUD paper: OMG_prot50, sequences
of 512, batches of 8, 5,000 steps, 500 of warm-up, a cosine to a floor, clipping at 1, validation on 2,500 sequences
drawn once. Its learning rate and floor are ours, as is all about the training of the others. A run so short is the
beginning of a
training: the paper's perplexities of 17.2 to 16.8 are little below the 18 of the residues' frequencies alone.

The contact head is frozen: no loss here reaches it. Tokens are counted with padding.
"""

import sys
from pathlib import Path
from typing import Any

from pretrain import main
from recipe_arguments import Preset
from run_defaults import ADAMW_AND_CLIP, LARGE_RUN
from transformers import EsmConfig

import hf_matrix_optim  # noqa: F401  makes --optim muon, adamuon, adamuon_v1 and mud known to TrainingArguments

DATA = Path(__file__).parent / "data" / "proteins"

OMG_RUN: dict[str, Any] = {
    **LARGE_RUN,
    "dataset_name": "tattabio/OMG_prot50",
    "validation_fraction": 0.001,
    "validation_samples": 2500,
    "block_size": 512,
    "learning_rate": 4e-4,
    "schedule": "cosine",
    "floor": 0.1,
    "warmup_steps": 0.1,
}


def esm2(layers: int, width: int, heads: int = 20) -> dict[str, Any]:
    """Configuration of ESM-2, by its sizes."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "vocab_size": 33,
        "mask_token_id": 32,
        "pad_token_id": 1,
        "max_position_embeddings": 1026,
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "emb_layer_norm_before": False,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }


def preset(model: dict[str, Any], run: dict[str, Any], **defaults: Any) -> Preset:
    """Preset of a masked language model."""
    return Preset(EsmConfig, model, {**run, **defaults}, task="masked_lm")


PRESETS = {
    "tiny": preset(
        esm2(layers=4, width=128, heads=4),
        ADAMW_AND_CLIP,
        train_data=[str(DATA / "train.fasta.gz")],
        validation_data=[str(DATA / "validation.fasta.gz")],
        block_size=128,
        tokens_per_step=16 * 128,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        max_steps=500,
        learning_rate=1e-3,
        schedule="cosine",
        floor=0.1,
        warmup_steps=0.1,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=50,
        save_steps=100,
        save_total_limit=2,
    ),
    "8m": preset(
        esm2(6, 320),
        OMG_RUN,
        tokens_per_step=64 * 512,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        max_steps=20_000,
        learning_rate=1e-3,
    ),
    "35m": preset(
        esm2(12, 480),
        OMG_RUN,
        tokens_per_step=64 * 512,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        max_steps=20_000,
        learning_rate=6e-4,
    ),
    "150m": preset(
        esm2(30, 640),
        OMG_RUN,
        tokens_per_step=8 * 512,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        max_steps=5000,
        warmup_steps=500,
        eval_steps=250,
    ),
    "650m": preset(
        esm2(33, 1280),
        OMG_RUN,
        tokens_per_step=1024 * 512,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        max_steps=50_000,
        warmup_steps=2000,
    ),
}

if __name__ == "__main__":
    sys.exit(main("esm2", PRESETS))

"""Defaults that recipes share, as literals."""

from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available

ADAMW_AND_CLIP: dict[str, Any] = {
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "logging_nan_inf_filter": False,  # it waits for the GPU at each micro-batch, and hides a NaN
}

# For runs of hours to weeks on GPUs; on a CPU the same run works, slowly.
LARGE_RUN: dict[str, Any] = {
    **ADAMW_AND_CLIP,
    "bf16": is_torch_bf16_gpu_available(),
    "torch_compile": torch.cuda.is_available(),
    "ddp_find_unused_parameters": False,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 1000,
    "save_steps": 1000,
    "save_total_limit": 2,
    "dataloader_num_workers": 2,
}

"""The AdamW groups of a matrix optimizer, by torch's own functional AdamW."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hf_matrix_optim.sharding.shard_layout import in_placements_of, is_sharded, local_of

#: Device types for which torch has a fused AdamW.
FUSED_ADAMW_DEVICES = ("cpu", "cuda", "xpu", "mps")


def can_be_fused(params: list[Tensor]) -> bool:
    """Whether torch has a fused AdamW for all of these."""
    return all(p.is_floating_point() and p.device.type in FUSED_ADAMW_DEVICES for p in params)


def step_adamw_group(group: dict[str, Any], state_of: dict[Tensor, Any]) -> None:
    """One step of a group by torch's AdamW; ``state_of`` is the optimizer's, and gets what is not there yet."""
    params = [p for p in group["params"] if p.grad is not None]
    for p in params:
        state = state_of[p]
        if not state:
            # As torch.optim.AdamW: the counter lives on the device only for the fused kernel.
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    if not params:
        return
    grads = [p.grad for p in params if p.grad is not None]
    averages = [state_of[p]["exp_avg"] for p in params]
    squares = [state_of[p]["exp_avg_sq"] for p in params]
    steps = [state_of[p]["step"] for p in params]
    if any(map(is_sharded, params)):
        # Elementwise, so each rank steps its shards. torch takes a group as one list, and refuses DTensors beside
        # plain tensors, such as the norms of a tensor parallel model, and DTensors of several meshes.
        grads = [
            local_of(in_placements_of(p, grad)) if is_sharded(p) else grad
            for p, grad in zip(params, grads, strict=True)
        ]
        params, averages, squares = (list(map(local_of, each)) for each in (params, averages, squares))
    beta1, beta2 = group["betas"]
    adamw(
        params,
        grads,
        averages,
        squares,
        [],
        steps,
        fused=group["fused"],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["adamw_eps"],
        maximize=group["maximize"],
    )

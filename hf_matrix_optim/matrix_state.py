"""The state of one parameter that is stepped as matrices: new, and out of a checkpoint."""

from typing import Any

import torch
from torch import Tensor

from hf_matrix_optim import int8_momentum
from hf_matrix_optim.group_check import parameter_name
from hf_matrix_optim.int8_momentum import INT8
from hf_matrix_optim.matrix_layout import MatrixLayout
from hf_matrix_optim.plain_step import state_dtype
from hf_matrix_optim.sharding.shard_layout import is_sharded


def new_state(p: Tensor, layout: MatrixLayout, group: dict[str, Any], *, has_second_moment: bool) -> dict[str, Any]:
    """State before the first step, laid out like the parameter.

    Raises:
        RuntimeError: if the group asks for int8 momentum and the parameter is in shards.
    """
    state: dict[str, Any] = {"step": torch.tensor(0.0, dtype=torch.float32), **_zero_momentum(p, group)}
    if has_second_moment:
        state["exp_avg_sq"] = torch.zeros_like(p, dtype=state_dtype(p), memory_format=torch.preserve_format)
    matrices = layout.matrix_count(tuple(p.shape))
    state["skipped"] = torch.zeros(matrices, dtype=torch.int64, device=p.device)
    return state


def restore(state: dict[str, Any], saved: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
    """Bring a state that torch has loaded, and cast to the parameter's dtype, to the dtypes and form of this run.

    Args:
        state: changed in place.
        saved: of the checkpoint; no tensor of it is shared.
        p: the parameter.
        group: of the parameter.
    """
    for key in state.keys() - {"momentum_buffer", "momentum_scale"}:
        device = torch.device("cpu") if key == "step" else p.device
        dtype = state_dtype(p) if key == "exp_avg_sq" else saved[key].dtype
        state[key] = saved[key].to(device=device, dtype=dtype, copy=True)
    state.pop("momentum_scale", None)
    is_int8 = group["momentum_dtype"] == INT8
    state.update(int8_momentum.from_checkpoint(saved, p, momentum_dtype(p, group), as_int8=is_int8))


def momentum_dtype(p: Tensor, group: dict[str, Any]) -> torch.dtype:
    """Of a parameter's momentum, if it is not kept in int8."""
    return torch.bfloat16 if group["momentum_dtype"] == "bfloat16" else state_dtype(p)


def _zero_momentum(p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    if group["momentum_dtype"] == INT8:
        if is_sharded(p):
            name = parameter_name(group, [own is p for own in group["params"]].index(True))
            raise RuntimeError(
                f"momentum_dtype='{INT8}' was asked for, but parameter {name} is in shards: use "
                "momentum_dtype='bfloat16', or DDP"
            )
        if int8_momentum.takes(p):
            return int8_momentum.zeros_for(p)
    zeros = torch.zeros_like(p, dtype=momentum_dtype(p, group), memory_format=torch.preserve_format)
    return {"momentum_buffer": zeros}

"""MUD: momentum decorrelated by triangular solves with its Gram matrix."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_matrix_optim.decorrelate import decorrelate
from hf_matrix_optim.kernels.stack_step import KernelRule
from hf_matrix_optim.matrix_optimizer import MatrixOptimizer


class MUD(MatrixOptimizer):
    """MUD (momentum decorrelation) for the matrix groups, AdamW for the others, in one optimizer.

    ::

        M = beta M + G                        (heavy ball)
        U = G + beta M if nesterov else M
        Q = decorrelate(U, passes)            (along the shorter side)
        s = 0.2 sqrt(max(fan_out, fan_in))
        W = W - lr (s Q + weight_decay W)

    Args:
        params: groups of ``param_groups_for(model)``, or any torch param groups with a ``role``.
        lr: learning rate, at least 0; a float or a 1-element tensor. A group may carry its own.
        weight_decay: decoupled decay per unit of learning rate, at least 0.
        momentum: beta, in [0, 1).
        nesterov: decorrelate the lookahead instead of the momentum.
        passes: passes of the map, at least 1.
        update_scale: "match_rms_adamw" or "jordan".
        update_rms: root mean square of the update per unit of learning rate, above 0.
        betas: of the AdamW groups, each in [0, 1).
        adamw_eps: of the AdamW groups, at least 0.
        adamw_fused: torch's fused AdamW kernel; None uses it where the device has one.
        maximize: step along the gradient.
        map_dtype: precision of the plain path's Gram products: "auto" (that of the state), or a dtype's name.
        kernels: "triton" for the GPU kernels, whose products are in float16 with float32 sums; "torch" for the plain
            path; "auto" takes the kernels where they apply: linear layers with float32 or bfloat16 parameters on a
            CUDA GPU with Triton, ``map_dtype="auto"``.
        cuda_graph: replay the kernels' step as one CUDA graph, or a graph a map where ranks share the matrices; graphs
            hold on to their workspace between steps, in the latter case beside ``max_workspace_bytes``.
        momentum_dtype: "auto" (float32 for parameters of 32 bits or less), "bfloat16", which halves its memory, or
            "int8", a quarter of it: blocks with a scale, float32 while a step works on them (not for shards).
        max_workspace_bytes: bound of the temporary stacks of a step, in bytes.
        distribute: "auto" maps each matrix on one rank where several hold it or its shards (DDP, FSDP2, HSDP, tensor
            parallel); "off" maps every matrix on every rank.

    Raises:
        ValueError: for a value out of range, naming it, and for a matrix group with a parameter that is no matrix.

    Source: MUD (arXiv 2603.17970). Differs: as ``decorrelate`` says.
    """

    algorithm = "mud"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        passes: int = 1,
        update_scale: str = "match_rms_adamw",
        update_rms: float = 0.2,
        betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_fused: bool | None = None,
        maximize: bool = False,
        map_dtype: str = "auto",
        kernels: str = "auto",
        cuda_graph: bool = False,
        momentum_dtype: str = "auto",
        max_workspace_bytes: int = 2**30,
        distribute: str = "auto",
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "passes": passes,
                "update_scale": update_scale,
                "update_rms": update_rms,
                "betas": betas,
                "adamw_eps": adamw_eps,
                "fused": adamw_fused,
                "maximize": maximize,
                "map_dtype": map_dtype,
                "kernels": kernels,
                "cuda_graph": cuda_graph,
                "momentum_dtype": momentum_dtype,
                "max_workspace_bytes": max_workspace_bytes,
                "distribute": distribute,
            },
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not isinstance(group["passes"], int) or group["passes"] < 1:
            raise ValueError(f"passes={group['passes']!r} is not allowed: it must be an integer, at least 1")

    def _kernel_rule(self, group: dict[str, Any]) -> KernelRule:
        return replace(
            super()._kernel_rule(group),
            passes=group["passes"],
        )

    def _map_dtype(self, dtype: torch.dtype, device: torch.device, group: dict[str, Any]) -> torch.dtype:
        # A bfloat16 Gram matrix costs 20 % relative error on correlated rows, so "auto" keeps the state's precision.
        return dtype if group["map_dtype"] == "auto" else super()._map_dtype(dtype, device, group)

    def wire_dtypes(
        self, group: dict[str, Any], dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.dtype, torch.dtype]:
        return dtype, dtype  # the solve is in float32, whatever the products are in

    def _operations(self, fan_out: int, fan_in: int, group: dict[str, Any]) -> float:
        k, d = sorted((fan_out, fan_in))
        passes: int = group["passes"]
        return passes * (2.0 * k * k * d + k**3)  # half of a Gram matrix, half of a triangle times the matrix

    def map_lookahead(self, x: Tensor, group: dict[str, Any]) -> Tensor:
        return decorrelate(x, passes=group["passes"], map_dtype=self._map_dtype(x.dtype, x.device, group))

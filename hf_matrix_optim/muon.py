"""Muon: momentum orthogonalized by a Newton-Schulz iteration."""

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_matrix_optim.kernels.stack_step import KernelRule
from hf_matrix_optim.matrix_optimizer import MatrixOptimizer
from hf_matrix_optim.newton_schulz import coefficients_for, newton_schulz, newton_schulz_operations


class Muon(MatrixOptimizer):
    """Muon for the matrix groups, AdamW for the others, in one optimizer.

    ::

        M = beta M + G                        (heavy ball)
        U = G + beta M if nesterov else M
        O = newton_schulz(U)
        s = 0.2 sqrt(max(fan_out, fan_in))    (update_scale="jordan": sqrt(max(1, fan_out / fan_in)))
        W = W - lr (s O + weight_decay W)

    Args:
        params: groups of ``param_groups_for(model)``, or any torch param groups with a ``role``.
        lr: learning rate, at least 0; a float or a 1-element tensor. A group may carry its own.
        weight_decay: decoupled decay per unit of learning rate, at least 0.
        momentum: beta, in [0, 1).
        nesterov: orthogonalize the lookahead instead of the momentum.
        ns_coefficients: a name in ``newton_schulz.NS_COEFFICIENTS``.
        ns_steps: Newton-Schulz iterations, at least 1.
        update_scale: "match_rms_adamw" or "jordan".
        update_rms: root mean square of the update per unit of learning rate, above 0.
        betas: of the AdamW groups, each in [0, 1).
        adamw_eps: of the AdamW groups, at least 0.
        adamw_fused: torch's fused AdamW kernel; None uses it where the device has one.
        maximize: step along the gradient.
        map_dtype: precision of the iteration: a dtype's name, or "auto": bfloat16 where the device has native products
            in it (GPUs, CPUs with AVX512-BF16 or AMX), else that of the state.
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

    Source: K. Jordan, Muon (2024); scale: Moonlight (arXiv 2502.16982).
    """

    algorithm = "muon"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        ns_coefficients: str = "jordan",
        ns_steps: int = 5,
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
                "ns_coefficients": ns_coefficients,
                "ns_steps": ns_steps,
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
        coefficients_for(group["ns_coefficients"], group["ns_steps"])

    def _kernel_rule(self, group: dict[str, Any]) -> KernelRule:
        return replace(
            super()._kernel_rule(group),
            coefficients=coefficients_for(group["ns_coefficients"], group["ns_steps"]),
        )

    def _operations(self, fan_out: int, fan_in: int, group: dict[str, Any]) -> float:
        return newton_schulz_operations(fan_out, fan_in, group["ns_steps"])

    def map_lookahead(self, x: Tensor, group: dict[str, Any]) -> Tensor:
        return newton_schulz(
            x,
            ns_coefficients=group["ns_coefficients"],
            ns_steps=group["ns_steps"],
            map_dtype=self._map_dtype(x.dtype, x.device, group),
        )

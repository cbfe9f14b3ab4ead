"""AdaMuon: an orthogonalized update divided by the root of its own second moment, in both published forms."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_matrix_optim.kernels.stack_step import KernelRule
from hf_matrix_optim.matrix_optimizer import MatrixOptimizer
from hf_matrix_optim.newton_schulz import coefficients_for, newton_schulz, newton_schulz_operations

VARIANTS = ("v1", "v2")


class AdaMuon(MatrixOptimizer):
    """AdaMuon for the matrix groups, AdamW for the others, in one optimizer.

    ``variant="v2"``, the second version of the paper::

        M = beta M + G                                 (heavy ball)
        O = newton_schulz(sign(M))                     (nesterov: sign(G + beta M), the authors' released form)
        V = beta V + (1 - beta) O * O                  (no bias correction)
        D = O / (sqrt(V) + eps)
        W = W - lr (0.2 D / RMS(D) + weight_decay W)   (0.2 sqrt(fan_out fan_in) / ||D||_F, per matrix)

    ``variant="v1"``, the first version::

        M = beta M + (1 - beta) G                      (average)
        O = newton_schulz(M)
        V = beta2 V + (1 - beta2) O * O,  V^ = V / (1 - beta2^t)
        D = O / (sqrt(V^) + eps)
        W = W - lr (0.2 D / (RMS(D) + eps) + weight_decay W)

    Args:
        params: groups of ``param_groups_for(model)``, or any torch param groups with a ``role``.
        lr: learning rate, at least 0; a float or a 1-element tensor. A group may carry its own.
        weight_decay: decoupled decay per unit of learning rate, at least 0.
        momentum: beta, in [0, 1).
        nesterov: take the lookahead instead of the momentum; not in the paper's equations.
        variant: "v2" or "v1".
        beta2: of the second moment, in [0, 1); v1 alone has one (None: 0.999), v2 uses ``momentum``.
        eps: at least 0, in units of an orthonormal matrix's elements.
        ns_coefficients: a name in ``newton_schulz.NS_COEFFICIENTS``.
        ns_steps: Newton-Schulz iterations, at least 1.
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

    Source: AdaMuon (arXiv 2507.11005), algorithm 1 of its third revision for v2, of its first for v1. Differs: in
    v2, where the paper divides by a norm of 0 (a zero gradient from the start), the update is 0.
    """

    has_second_moment = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = False,
        *,
        variant: str = "v2",
        beta2: float | None = None,
        eps: float = 1e-8,
        ns_coefficients: str = "jordan",
        ns_steps: int = 5,
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
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is not one of {', '.join(VARIANTS)}")
        if variant == "v2" and beta2 is not None:
            raise ValueError(
                f"beta2={beta2} is for variant='v1': the second version of the paper has one beta, momentum, for both "
                "moments"
            )
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "variant": variant,
                "beta2": 0.999 if variant == "v1" and beta2 is None else beta2,
                "eps": eps,
                "ns_coefficients": ns_coefficients,
                "ns_steps": ns_steps,
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

    @property
    def algorithm(self) -> str:  # type: ignore[override]
        return "adamuon_v1" if self.defaults["variant"] == "v1" else "adamuon"

    @property
    def momentum_is_average(self) -> bool:  # type: ignore[override]
        return bool(self.defaults["variant"] == "v1")

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        coefficients_for(group["ns_coefficients"], group["ns_steps"])
        if not group["eps"] >= 0:
            raise ValueError(f"eps={group['eps']!r} is not allowed: it must be at least 0")
        if group["beta2"] is not None and not 0 <= group["beta2"] < 1:
            raise ValueError(f"beta2={group['beta2']!r} is not allowed: it must be at least 0 and below 1")

    def _scale(self, fan_out: int, fan_in: int, group: dict[str, Any]) -> float:
        return float(group["update_rms"])  # the direction has root mean square 1

    def _kernel_rule(self, group: dict[str, Any]) -> KernelRule:
        is_v1 = group["variant"] == "v1"
        return replace(
            super()._kernel_rule(group),
            coefficients=coefficients_for(group["ns_coefficients"], group["ns_steps"]),
            takes_sign=not is_v1,
            beta2=group["beta2"] if is_v1 else group["momentum"],
            eps=group["eps"],
            rms_eps=group["eps"] if is_v1 else 0.0,
        )

    def _root(self, group: dict[str, Any], step: float) -> float:
        return math.sqrt(1 - group["beta2"] ** step) if group["variant"] == "v1" else 1.0

    def map_input(self, lookahead: Tensor, group: dict[str, Any]) -> Tensor:
        return lookahead if group["variant"] == "v1" else torch.sign(lookahead)

    def wire_dtypes(
        self, group: dict[str, Any], dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.dtype, torch.dtype]:
        return dtype if group["variant"] == "v1" else torch.int8, self._map_dtype(dtype, device, group)

    def _operations(self, fan_out: int, fan_in: int, group: dict[str, Any]) -> float:
        return newton_schulz_operations(fan_out, fan_in, group["ns_steps"])

    def map_lookahead(self, x: Tensor, group: dict[str, Any]) -> Tensor:
        return newton_schulz(
            x,
            ns_coefficients=group["ns_coefficients"],
            ns_steps=group["ns_steps"],
            map_dtype=self._map_dtype(x.dtype, x.device, group),
        )

    def adapt(self, direction: Tensor, second_moment: Tensor, group: dict[str, Any], root: float | Tensor) -> Tensor:
        is_v1 = group["variant"] == "v1"
        beta2 = group["beta2"] if is_v1 else group["momentum"]
        second_moment.mul_(beta2).addcmul_(direction, direction, value=1 - beta2)
        deviation = second_moment.sqrt()
        if is_v1:
            deviation.div_(root)
        if group["eps"] > 0:
            deviation.add_(group["eps"])
        else:
            deviation.clamp_(min=torch.finfo(deviation.dtype).tiny)  # 0 / 0 is 0
        return direction.div_(deviation)

    def rms_divisor(self, rms: Tensor, group: dict[str, Any]) -> Tensor:
        return rms + group["eps"] if group["variant"] == "v1" else torch.where(rms > 0, rms, 1)

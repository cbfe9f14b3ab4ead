"""MUD: momentum decorrelated by triangular solves with its Gram matrix."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_matrix_optim.decorrelate import decorrelate
from hf_matrix_optim.kernels.mud_step import (
    StackPlan,
    can_take,
    can_take_gradient,
    matrices_of,
    mud_step,
    why_not,
    workspace_bytes,
)
from hf_matrix_optim.matrix_layout import MatrixLayout, to_matrices
from hf_matrix_optim.matrix_optimizer import MatrixOptimizer
from hf_matrix_optim.stacks import Matrices, present

KERNELS = ("auto", "torch", "triton")
MOST_PLANS = 64


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
            path; "auto" takes the kernels where they apply: float32 or bfloat16 parameters on a CUDA GPU with Triton,
            one pass, ``map_dtype="auto"``, a float learning rate.
        max_workspace_bytes: bound of the temporary stacks of a step, in bytes.

    Raises:
        ValueError: for a value out of range, naming it, and for a matrix group with a parameter that is no matrix.

    Source: MUD (arXiv 2603.17970). Differs: as ``decorrelate`` says.
    """

    algorithm = "mud"
    has_kernels = True

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
        max_workspace_bytes: int = 2**30,
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
                "max_workspace_bytes": max_workspace_bytes,
            },
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["kernels"] not in KERNELS:
            raise ValueError(f"kernels={group['kernels']!r} is not one of {', '.join(KERNELS)}")
        if group["kernels"] == "triton" and (group["passes"] != 1 or group["map_dtype"] != "auto"):
            raise ValueError(
                f"kernels='triton' is for passes=1 and map_dtype='auto', not passes={group['passes']} and "
                f"map_dtype={group['map_dtype']!r}: use kernels='auto'"
            )
        if group["passes"] < 1:
            raise ValueError(f"passes={group['passes']!r} is not allowed: it must be at least 1")

    def _step_entries(self, entries: list[Matrices], layout: MatrixLayout, group: dict[str, Any], step: float) -> None:
        reason = self._why_not_kernels(entries[0].param.device, layout, group)
        stacks, rest = ([], entries) if reason else self._plan(entries, layout, group)
        if rest and group["kernels"] == "triton":
            reason = (
                reason or f"a parameter of shape {tuple(rest[0].param.shape)} is too small or not laid out for them"
            )
            raise RuntimeError(f"kernels='triton' was asked for, but {reason}; or use kernels='auto'")
        grad_starts = [entry.grad.data_ptr() for entry in entries]
        for stack in stacks:
            mud_step(
                stack,
                grad_starts,
                beta=group["momentum"],
                nesterov=group["nesterov"],
                keep=1 - group["lr"] * group["weight_decay"],
                rate=group["lr"] * stack.scale,
                maximize=group["maximize"],
            )
        if rest:
            super()._step_entries(rest, layout, group, step)

    def _why_not_kernels(self, device: torch.device, layout: MatrixLayout, group: dict[str, Any]) -> str:
        """Why a whole group goes the plain path; "" if the kernels may take it."""
        if group["kernels"] == "torch":
            return "kernels='torch'"
        if group["passes"] != 1 or group["map_dtype"] != "auto" or isinstance(group["lr"], Tensor) or layout.flatten:
            return "they are for linear layers, one pass, map_dtype='auto' and a float learning rate"
        return why_not(device)

    def _plan(
        self, entries: list[Matrices], layout: MatrixLayout, group: dict[str, Any]
    ) -> tuple[list[StackPlan], list[Matrices]]:
        """Stacks for the kernels, and the entries they cannot take; kept while the tensors stay where they are."""
        places = tuple((id(e.param), e.param.data_ptr(), e.momentum.data_ptr()) for e in entries)
        key = (places, layout, group["update_scale"], group["update_rms"], group["max_workspace_bytes"])
        plans: dict[int, tuple[Any, list[StackPlan], list[int]]] = self.__dict__.setdefault("_stack_plans", {})
        known = plans.get(id(entries[0].param))
        if known is None or known[0] != key or not all(can_take_gradient(e.param, e.grad) for e in entries):
            if len(plans) >= MOST_PLANS:  # parameters that are gathered anew in every step never come back
                plans.clear()
            known = (key, *self._new_plan(entries, layout, group))
            plans[id(entries[0].param)] = known
        return known[1], [entries[i] for i in known[2]]

    def _new_plan(
        self, entries: list[Matrices], layout: MatrixLayout, group: dict[str, Any]
    ) -> tuple[list[StackPlan], list[int]]:
        rest: list[int] = []
        stacks: list[StackPlan] = []
        filling: dict[Any, StackPlan] = {}
        for owner, entry in enumerate(entries):
            parts = list(entry.parts(layout))
            if not all(can_take(part.param, part.grad, part.momentum) for part in parts):
                rest.append(owner)
                continue
            for part in parts:
                rows, columns = part.param.shape[-2:]
                fan_out, fan_in = to_matrices(part.param, layout).shape[-2:]
                shape = (rows, columns, part.param.stride(-2), part.param.dtype)
                most = max(1, group["max_workspace_bytes"] // workspace_bytes(rows, columns))
                matrices = zip(
                    matrices_of(part.param),
                    matrices_of(part.momentum),
                    present(part.lookahead_scale).unbind(),
                    part.skipped.unbind(),
                    strict=True,
                )
                for tensors in matrices:
                    if shape not in filling or len(filling[shape].owners) == most:
                        filling[shape] = StackPlan(
                            rows=rows,
                            columns=columns,
                            stride=part.param.stride(-2),
                            along_columns=rows > columns or (rows == columns and layout.output_axis == 1),
                            scale=self._scale(fan_out, fan_in, group),
                            dtype=part.param.dtype,
                            device=part.param.device,
                        )
                        stacks.append(filling[shape])
                    filling[shape].add(owner, entry.param.data_ptr(), tensors)
        return stacks, rest

    def _map_dtype(self, lookahead: Tensor, group: dict[str, Any]) -> torch.dtype:
        # A bfloat16 Gram matrix costs 20 % relative error on correlated rows, so "auto" keeps the state's precision.
        return lookahead.dtype if group["map_dtype"] == "auto" else super()._map_dtype(lookahead, group)

    def _direction(
        self, lookahead: Tensor, second_moment: Tensor | None, group: dict[str, Any], step: float
    ) -> Tensor:
        return decorrelate(lookahead, passes=group["passes"], map_dtype=self._map_dtype(lookahead, group))

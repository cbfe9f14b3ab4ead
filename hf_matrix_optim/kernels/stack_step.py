"""The whole step of a stack of equal matrices by Triton kernels; the plain path in matrix_optimizer.py defines it.

Momentum and lookahead in one pass (14 bytes an element, float32), the map on the float16 stack (half_maps.py), for
AdaMuon the second moment and the division in one more (12), decay and update in the last (10); AdamW moves 28. Nothing
here waits for the device, and every sum is taken in a fixed order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_matrix_optim.kernels.half_maps import (
    DECORRELATE_TOP,
    Sides,
    decorrelate_bytes,
    decorrelate_half,
    newton_schulz_bytes,
    newton_schulz_half,
    newton_schulz_top,
)
from hf_matrix_optim.kernels.launch import launch
from hf_matrix_optim.kernels.stack_plan import StackPlan
from hf_matrix_optim.newton_schulz import Coefficients

BLOCK = 2048  # elements a program of an elementwise kernel
REPAIR_PROGRAMS = 64  # a matrix, where nearly always nothing is to be done


@dataclass(frozen=True)
class KernelRule:
    """What the kernels need to know of an optimizer and a param group, beside the learning rate.

    Attributes:
        beta, nesterov, weight_decay: of the group.
        weight: of the gradient in the momentum, with the sign of ``maximize``.
        passes: of MUD's map; 0 for Newton-Schulz.
        coefficients: of Newton-Schulz; empty for MUD.
        takes_sign: orthogonalize the sign of the lookahead.
        beta2: of the second moment; None without one.
        eps: of the second moment's division.
        rms_eps: added to the root mean square that the direction is divided by.
    """

    beta: float
    nesterov: bool
    weight_decay: float
    weight: float
    passes: int = 0
    coefficients: Coefficients = ()
    takes_sign: bool = False
    beta2: float | None = None
    eps: float = 0.0
    rms_eps: float = 0.0


class StepScalars:
    """What changes from step to step of all stacks alike, on a device.

    Attributes:
        tensor: (2,) float32, see ``apply_direction``; graphs read it, so it stays where it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros(2, dtype=torch.float32, device=device)
        self._values = [0.0, 0.0]

    def fill(self, lr: float | Tensor, correction: float) -> Tensor:
        """Bring learning rate and bias correction to the device, where they have changed; nothing waits for it."""
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            self.tensor[0:1].copy_(lr.view(1))
            self._values[0] = float("nan")
        elif self._values[0] != float(lr):
            self._values[0] = float(lr)
            self.tensor[0:1].fill_(self._values[0])
        if self._values[1] != correction:
            self._values[1] = correction
            self.tensor[1:2].fill_(correction)
        return self.tensor


def workspace_bytes(sides: Sides, rule: KernelRule) -> int:
    """Bytes that ``step_stack`` needs for one matrix."""
    elements = sides.rows * sides.columns
    of_map = decorrelate_bytes(sides) if rule.passes else newton_schulz_bytes(sides)
    return 2 * elements + of_map + (4 * -(-elements // BLOCK) if rule.beta2 is not None else 0) + 64


@dataclass
class Lookahead:
    """The lookahead of a stack: (b, rows, columns) float16 up to a power of two for each matrix.

    ``largest_bits``, (b,) int32, are those of the largest magnitude of each matrix; 0x7F800000 or above if one is not
    finite. Where a matrix lies on several ranks, it must be the largest of all before ``repair``.
    """

    x: Tensor
    largest_bits: Tensor


def look_ahead(plan: StackPlan, rule: KernelRule) -> Lookahead:
    """Momentum and lookahead, by the scale of the last step; the plan is pointed to this step's gradients."""
    from hf_matrix_optim.kernels import elementwise_triton as kernels

    sides, count = plan.sides, len(plan.owners)
    x = torch.empty(count, sides.rows, sides.columns, dtype=torch.float16, device=plan.device)
    found = Lookahead(x, torch.zeros(count, dtype=torch.int32, device=plan.device))
    if x.numel():
        grid = (-(-sides.rows * sides.columns // BLOCK), count)
        launch(kernels.momentum_kernel, grid, *_arguments(plan, rule, found), **_constants(plan, rule))
    return found


def repair(plan: StackPlan, rule: KernelRule, found: Lookahead, top: int) -> None:
    """Redo the lookaheads that the last step's scale did not fit, and make 0 of those that are not finite."""
    from hf_matrix_optim.kernels import elementwise_triton as kernels

    if found.x.numel():
        grid = (REPAIR_PROGRAMS, len(plan.owners))
        launch(kernels.repair_kernel, grid, *_arguments(plan, rule, found), **_constants(plan, rule), TOP=top)


def top_of(sides: Sides, rule: KernelRule) -> int:
    """Exponent below which the map of whole matrices wants its input."""
    return DECORRELATE_TOP if rule.passes else newton_schulz_top(sides.rows, sides.columns)


def map_half(x: Tensor, sides: Sides, rule: KernelRule, spare: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Direction of whole matrices, (b, rows, columns) float16, and its factors: (b,), or (b, k) for MUD."""
    if rule.passes:
        return decorrelate_half(x, sides, rule.passes, spare)
    return newton_schulz_half(x, sides, rule.coefficients, spare)


def whole_direction(x: Tensor, sides: Sides, rule: KernelRule, spare: Tensor | None = None) -> Tensor:
    """As ``map_half``, with the factors multiplied in: in ``x``, or ``spare``, which is as large."""
    x, factors = map_half(x, sides, rule, spare)
    if factors.ndim == 1:
        return x.mul_(factors.view(-1, 1, 1))
    return x.mul_(factors.unsqueeze(1) if sides.along_columns else factors.unsqueeze(2))


def apply_direction(
    plan: StackPlan,
    rule: KernelRule,
    scalars: Tensor,
    direction: Tensor,
    factors: Tensor,
    largest_bits: Tensor,
    *,
    top: int,
    inverse_rms: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Second moment, decay and update of a stack, all in place; ``direction`` is overwritten.

    Args:
        plan: the stack.
        rule: the optimizer's.
        scalars: (2,) or (1 + b,) float32 on the device: the learning rate, and the factor 1 / sqrt(1 - beta2^t) (1
            without it), one for all matrices or one for each.
        direction, factors: of ``map_half``.
        largest_bits: of ``Lookahead``.
        top: of ``top_of``.
        inverse_rms: from the sums of squares of each block, (b, blocks), to the factors (b,), where a matrix does not
            lie here as a whole.
    """
    from hf_matrix_optim.kernels import elementwise_triton as kernels

    sides, count = plan.sides, len(plan.owners)
    n = sides.rows * sides.columns
    _, params, _, second_moments, scales, skipped = plan.addresses()
    packed = plan.stride == sides.columns
    blocks = -(-n // BLOCK)
    grid = (blocks, count)
    if rule.beta2 is not None:
        squares = torch.zeros(count, blocks, dtype=torch.float32, device=plan.device)
        if direction.numel():
            launch(
                kernels.second_moment_kernel, grid,
                second_moments, direction, factors, largest_bits, squares, scalars, sides.columns, plan.stride, n,
                rule.beta2, rule.eps, PACKED=packed, EACH=scalars.numel() > 2, BLOCK=BLOCK,
            )  # fmt: skip
        if inverse_rms is not None:
            factors = inverse_rms(squares)
        else:
            launch(kernels.inverse_rms_kernel, (count,), squares, factors, blocks, n, rule.rms_eps, BLOCK=1024)
    if direction.numel():
        launch(
            kernels.update_kernel, grid,
            params, direction, factors, largest_bits, scales, skipped, scalars, sides.columns, plan.stride, n,
            sides.k, plan.scale, rule.weight_decay, PER_VECTOR=factors.ndim == 2, ALONG_COLUMNS=sides.along_columns,
            PACKED=packed, TOP=top, PARAM=kernels.TYPES[plan.dtype], BLOCK=BLOCK,
        )  # fmt: skip


def step_stack(plan: StackPlan, rule: KernelRule, scalars: Tensor) -> None:
    """One step of a stack, all in place; arguments as in ``apply_direction``."""
    top = top_of(plan.sides, rule)
    found = look_ahead(plan, rule)
    repair(plan, rule, found, top)
    direction, factors = map_half(found.x, plan.sides, rule)
    apply_direction(plan, rule, scalars, direction, factors, found.largest_bits, top=top)


def _arguments(plan: StackPlan, rule: KernelRule, found: Lookahead) -> tuple[Any, ...]:
    grads, _, momenta, _, scales, _ = plan.addresses()
    sides = plan.sides
    n = sides.rows * sides.columns
    shape = (sides.columns, plan.stride, n)
    return grads, momenta, found.x, found.largest_bits, scales, *shape, rule.beta, rule.weight


def _constants(plan: StackPlan, rule: KernelRule) -> dict[str, Any]:
    from hf_matrix_optim.kernels import elementwise_triton as kernels

    return {
        "NESTEROV": rule.nesterov,
        "SIGN": rule.takes_sign,
        "PACKED": plan.stride == plan.sides.columns,
        "GRAD": kernels.TYPES[plan.dtype],
        "MOMENTUM": kernels.TYPES[plan.momentum_dtype],
        "BLOCK": BLOCK,
    }

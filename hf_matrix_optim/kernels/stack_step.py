"""The whole step of a stack of equal matrices by Triton kernels; the plain path in matrix_optimizer.py defines it.

Momentum and lookahead in one pass (14 bytes an element, float32), the map on the float16 stack (half_maps.py), for
AdaMuon the second moment and the division in one more (12), decay and update in the last (10); AdamW moves 28. Nothing
here waits for the device, and every sum is taken in a fixed order.
"""

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


def workspace_bytes(sides: Sides, rule: KernelRule) -> int:
    """Bytes that ``step_stack`` needs for one matrix."""
    elements = sides.rows * sides.columns
    of_map = decorrelate_bytes(sides) if rule.passes else newton_schulz_bytes(sides)
    return 2 * elements + of_map + (4 * -(-elements // BLOCK) if rule.beta2 is not None else 0) + 64


def step_stack(plan: StackPlan, rule: KernelRule, scalars: Tensor) -> None:
    """One step of a stack, all in place.

    Args:
        plan: the stack, pointed to this step's gradients.
        rule: the optimizer's.
        scalars: (2,) float32 on the device: the learning rate, and the factor 1 / sqrt(1 - beta2^t) (1 without it).
    """
    from hf_matrix_optim.kernels import elementwise_triton as kernels

    sides, count, device = plan.sides, len(plan.owners), plan.device
    n = sides.rows * sides.columns
    grads, params, momenta, second_moments, scales, skipped = plan.addresses()
    top = DECORRELATE_TOP if rule.passes else newton_schulz_top(sides.rows, sides.columns)
    packed = plan.stride == sides.columns
    blocks = -(-n // BLOCK)
    grid: Any = (blocks, count)

    x = torch.empty(count, sides.rows, sides.columns, dtype=torch.float16, device=device)
    largest_bits = torch.zeros(count, dtype=torch.int32, device=device)
    arguments = (grads, momenta, x, largest_bits, scales, sides.columns, plan.stride, n, rule.beta, rule.weight)
    constants = {
        "NESTEROV": rule.nesterov,
        "SIGN": rule.takes_sign,
        "PACKED": packed,
        "GRAD": kernels.TYPES[plan.dtype],
        "MOMENTUM": kernels.TYPES[plan.momentum_dtype],
        "BLOCK": BLOCK,
    }
    kernels.momentum_kernel[grid](*arguments, **constants)
    kernels.repair_kernel[REPAIR_PROGRAMS, count](*arguments, **constants, TOP=top)

    if rule.passes:
        direction, factors = decorrelate_half(x, sides, rule.passes)
    else:
        direction, factors = newton_schulz_half(x, sides, rule.coefficients)

    if rule.beta2 is not None:
        squares = torch.zeros(count, blocks, dtype=torch.float32, device=device)
        kernels.second_moment_kernel[grid](
            second_moments, direction, factors, largest_bits, squares, scalars, sides.columns, plan.stride, n,
            rule.beta2, rule.eps, PACKED=packed, BLOCK=BLOCK,
        )  # fmt: skip
        kernels.inverse_rms_kernel[(count,)](squares, factors, blocks, n, rule.rms_eps, BLOCK=1024)

    kernels.update_kernel[grid](
        params, direction, factors, largest_bits, scales, skipped, scalars, sides.columns, plan.stride, n, sides.k,
        plan.scale, rule.weight_decay, PER_VECTOR=rule.passes > 0, ALONG_COLUMNS=sides.along_columns, PACKED=packed,
        TOP=top, PARAM=kernels.TYPES[plan.dtype], BLOCK=BLOCK,
    )  # fmt: skip

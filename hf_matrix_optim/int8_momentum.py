"""Momentum that is kept in 8 bits between steps, and is float32 while a step works on it.

Blocks of 256 elements share a scale s, their largest magnitude, and an element x is kept as round(127 sign(x)
sqrt(|x| / s)), so that levels are dense near zero. The state holds plain tensors: ``momentum_buffer``, int8 in the
parameter's shape, and ``momentum_scale``, (elements / 256,) float32. What was read and not changed is written back as
it was. On GPUs kernels/int8_plan.py does for many momenta at once what ``in_float`` and ``quantize_into`` define.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022). Differs: a square root for their table.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from hf_matrix_optim.kernels.int8_plan import Int8Plans
from hf_matrix_optim.stacks import MatrixLists

INT8 = "int8"
BLOCK = 256
LEVELS = 127
#: Smaller parameters keep float32 momentum: nothing is to be saved.
SMALLEST = 4096
#: Elements that are quantised at a time, which takes about 16 bytes for each.
SLICE = 2**24

State = dict[str, Any]


def takes(p: Tensor) -> bool:
    """Whether the momentum of a parameter is kept in int8: large, of whole blocks, and float32 in a step."""
    return p.numel() >= SMALLEST and p.numel() % BLOCK == 0 and p.dtype != torch.float64


def zeros_for(p: Tensor) -> State:
    """State of a momentum of zeros for a parameter."""
    return {
        "momentum_buffer": torch.zeros(p.shape, dtype=torch.int8, device=p.device),
        "momentum_scale": torch.zeros(p.numel() // BLOCK, dtype=torch.float32, device=p.device),
    }


def in_float(state: State) -> Tensor:
    """The momentum of a parameter's state: a new float32 tensor where it is in int8, else the tensor itself."""
    momentum: Tensor = state["momentum_buffer"]
    if momentum.dtype != torch.int8:
        return momentum
    levels = momentum.reshape(-1, BLOCK).to(torch.float32)
    # A product, for that is what a GPU makes of a division by a number: the same bits everywhere.
    values = levels.mul_(levels.abs()).mul_(1 / LEVELS**2).mul_(state["momentum_scale"].unsqueeze(1))
    return values.view(momentum.shape)


def quantize_into(state: State, values: Tensor) -> None:
    """Write values, finite and of the parameter's shape, into a state in int8."""
    pieces = zip(
        torch.split(values.reshape(-1), SLICE),
        torch.split(state["momentum_buffer"].view(-1), SLICE),
        torch.split(state["momentum_scale"], SLICE // BLOCK),
        strict=True,
    )
    for piece, levels, scale in pieces:
        blocks = piece.view(-1, BLOCK)
        magnitudes = blocks.abs()
        torch.amax(magnitudes, 1, out=scale)
        magnitudes.div_(torch.where(scale > 0, scale, 1).unsqueeze(1)).sqrt_().mul_(LEVELS).round_()
        levels.view(-1, BLOCK).copy_(magnitudes.copysign_(blocks))


def from_checkpoint(saved: State, p: Tensor, dtype: torch.dtype, *, as_int8: bool) -> State:
    """A momentum that was saved in any form, in the form that this run keeps; new tensors on the parameter's device.

    Args:
        saved: the parameter's state.
        p: the parameter.
        dtype: of the momentum, if it is not kept in int8.
        as_int8: whether it is, where the parameter allows.
    """
    if not (as_int8 and takes(p)):
        return {"momentum_buffer": in_float(saved).to(device=p.device, dtype=dtype, copy=True)}
    if saved["momentum_buffer"].dtype == torch.int8:
        return {key: saved[key].to(device=p.device, copy=True) for key in ("momentum_buffer", "momentum_scale")}
    state = zeros_for(p)
    quantize_into(state, saved["momentum_buffer"].to(device=p.device, dtype=torch.float32))
    return state


def in_float_by_parts(
    lists: MatrixLists, states: list[State], max_bytes: int, plans: Int8Plans | None = None
) -> Iterator[MatrixLists]:
    """The parameters of a step with their momenta in float32, some at a time, written back after each part.

    Args:
        lists: of the step.
        states: of its parameters.
        max_bytes: of the float32 momenta of one part; a part has one parameter at least.
        plans: of the optimizer, where the GPU kernels may be used.
    """
    starts, filled = [0], 0
    for i, p in enumerate(lists.params):
        filled += p.numel() * torch.float32.itemsize
        if filled > max_bytes and i > starts[-1]:
            starts.append(i)
            filled = p.numel() * torch.float32.itemsize
    for start, stop in zip(starts, [*starts[1:], len(states)], strict=True):
        part = MatrixLists(*(getattr(lists, field.name)[start:stop] for field in fields(lists)))
        of_part = states[start:stop]
        in_int8 = [state for state in of_part if "momentum_scale" in state]
        plan = None
        if plans is not None:
            levels, scales = ([state[key] for state in in_int8] for key in ("momentum_buffer", "momentum_scale"))
            plan = plans.of(levels, scales, LEVELS, part.params[0])
        if plan is None:
            part.momenta = [in_float(state) for state in of_part]
            yield part
            for i, state in enumerate(of_part):
                if "momentum_scale" in state:
                    quantize_into(state, part.momenta[i])
        else:
            values = plan.in_float()
            views = iter(plan.views(values))
            part.momenta = [next(views) if "momentum_scale" in s else s["momentum_buffer"] for s in of_part]
            yield part
            plan.quantize(values)
            del values, views
        part.momenta = []  # who still holds the part must not hold their memory

"""Momentum that is kept in 8 bits between steps, by torchao's functions, and is float32 while a step works on it.

Blocks of 256 elements share a scale, and each element is one of 256 levels, dense near zero (Dettmers et al., "8-bit
Optimizers via Block-wise Quantization", 2022). The state holds plain tensors: ``momentum_buffer``, levels, uint8 in
the parameter's shape, and ``momentum_scale``, (elements / 256,) float32.
"""

import functools
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from hf_matrix_optim.stacks import MatrixLists

EIGHT_BIT = "8bit"
BLOCK = 256
#: Smaller parameters keep float32 momentum: nothing is to be saved.
SMALLEST = 4096
#: Elements that are quantised at a time; torchao's way takes about 40 bytes for each.
SLICE = 2**22

State = dict[str, Any]


@functools.cache
def quantization() -> Any:
    """torchao's functions.

    Raises:
        ImportError: without torchao, with the remedy.
    """
    try:
        from torchao.optim import quant_utils
    except ImportError as error:
        raise ImportError(
            f"momentum_dtype='{EIGHT_BIT}' needs torchao ({error}): pip install torchao, or use "
            "momentum_dtype='bfloat16'"
        ) from error
    return quant_utils


def takes(p: Tensor) -> bool:
    """Whether the momentum of a parameter is kept in 8 bits: large, of whole blocks, and float32 in a step."""
    return p.numel() >= SMALLEST and p.numel() % BLOCK == 0 and p.dtype != torch.float64


def zeros_for(p: Tensor) -> State:
    """State of a momentum of zeros for a parameter."""
    state = {
        "momentum_buffer": torch.empty(p.shape, dtype=torch.uint8, device=p.device),
        "momentum_scale": torch.empty(p.numel() // BLOCK, dtype=torch.float32, device=p.device),
    }
    quantize_into(state, torch.zeros(p.shape, dtype=torch.float32, device=p.device))
    return state


def in_float(state: State) -> Tensor:
    """The momentum of a parameter's state: a new float32 tensor where it is in 8 bits, else the tensor itself."""
    momentum: Tensor = state["momentum_buffer"]
    if momentum.dtype != torch.uint8:
        return momentum
    values: Tensor = quantization().dequant_with_qmap(momentum, _levels(momentum.device), state["momentum_scale"])
    return values


def quantize_into(state: State, values: Tensor) -> None:
    """Write values, of the parameter's shape, into a state in 8 bits."""
    levels = _levels(values.device)
    pieces = zip(
        torch.split(values.reshape(-1), SLICE),
        torch.split(state["momentum_buffer"].view(-1), SLICE),
        torch.split(state["momentum_scale"], SLICE // BLOCK),
        strict=True,
    )
    for piece, codes, scale in pieces:
        scaled, found = quantization().scale_tensor(piece, BLOCK)
        codes.copy_(quantization().quantize_8bit_with_qmap(scaled, levels))
        scale.copy_(found)


def from_checkpoint(saved: State, p: Tensor, dtype: torch.dtype, *, as_eight_bit: bool) -> State:
    """A momentum that was saved in any form, in the form that this run keeps; new tensors on the parameter's device.

    Args:
        saved: the parameter's state.
        p: the parameter.
        dtype: of the momentum, if it is not kept in 8 bits.
        as_eight_bit: whether it is, where the parameter allows.
    """
    is_eight_bit = saved["momentum_buffer"].dtype == torch.uint8
    if as_eight_bit and takes(p):
        if is_eight_bit:
            return {key: saved[key].to(device=p.device, copy=True) for key in ("momentum_buffer", "momentum_scale")}
        state = zeros_for(p)
        quantize_into(state, saved["momentum_buffer"].to(device=p.device, dtype=torch.float32))
        return state
    return {"momentum_buffer": in_float(saved).to(device=p.device, dtype=dtype, copy=True)}


def in_float_by_parts(lists: MatrixLists, states: list[State], max_bytes: int) -> Iterator[MatrixLists]:
    """The parameters of a step with their momenta in float32, some at a time, written back after each part.

    Args:
        lists: of the step.
        states: of its parameters.
        max_bytes: of the float32 momenta of one part; a part has one parameter at least.
    """
    starts, filled = [0], 0
    for i, p in enumerate(lists.params):
        filled += p.numel() * torch.float32.itemsize
        if filled > max_bytes and i > starts[-1]:
            starts.append(i)
            filled = p.numel() * torch.float32.itemsize
    for start, stop in zip(starts, [*starts[1:], len(states)], strict=True):
        part = MatrixLists(*(getattr(lists, field.name)[start:stop] for field in fields(lists)))
        part.momenta = [in_float(state) for state in states[start:stop]]
        yield part
        for state, values in zip(states[start:stop], part.momenta, strict=True):
            if "momentum_scale" in state:
                quantize_into(state, values)


@functools.cache
def _levels(device: torch.device) -> Tensor:
    """(256,) float32, ascending in [-1, 1]."""
    return torch.tensor(quantization().create_dynamic_map(signed=True), dtype=torch.float32, device=device)

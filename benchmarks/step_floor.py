"""What a step must move and compute, and how fast the device could do that."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from contenders import Contender, Groups
from device_timing import release_memory, timed
from torch import Tensor

from hf_matrix_optim.matrix_layout import MatrixLayout, split_parts, to_matrices


def matrix_shapes(groups: Groups, *, split: bool) -> list[tuple[int, int]]:
    """(short side, long side) of every matrix of the matrix groups; with ``split``, fused ones part by part."""
    shapes: list[tuple[int, int]] = []
    for group in groups:
        if group["role"] != "matrix":
            continue
        layout = MatrixLayout.from_group(group)
        for p in group["params"]:
            for part in split_parts(p.detach(), layout) if split else [p.detach()]:
                count, fan_out, fan_in = to_matrices(part, layout).shape
                shapes += [(min(fan_out, fan_in), max(fan_out, fan_in))] * count
    return shapes


def step_bytes(rule: str, elements: int, parameter_bytes: int, state_bytes: int) -> int:
    """Bytes that a step over ``elements`` numbers must move.

    The gradient is read, the parameter and the state are read and written, and what passes from one kernel to the next
    in half precision is written and read: the lookahead, and AdaMuon's quotient, whose norm decides the update. In
    float32 that is 28 bytes an element for AdamW, 24 for Muon and MUD, 36 for AdaMuon.

    Args:
        parameter_bytes: of all parameters.
        state_bytes: of all state.
    """
    in_half_precision = {"adamw": 0, "muon": 1, "mud": 1, "adamuon": 2}[rule]
    return 3 * parameter_bytes + 2 * state_bytes + 2 * 2 * in_half_precision * elements


def step_flops(rule: str, short: int, long: int, passes: int = 1) -> float:
    """Operations of a rule's map on one matrix in the cheapest known form.

    Products with a symmetric or triangular result or factor are at half price. MUD, a pass: k^2 d (Gram matrix)
    + k^3 / 3 (triangular inverse) + k^2 d (apply). Muon and AdaMuon, five Newton-Schulz steps on the Gram matrix:
    k^2 d (Gram matrix) + 17 k^3 (steps) + 2 k^2 d (apply). AdamW has no products: 0.

    Args:
        short, long: k and d, the sides of the matrix.
        passes: of MUD's map.
    """
    if rule == "adamw":
        return 0.0
    if rule == "mud":
        return passes * (2 * short**2 * long + short**3 / 3)
    return 3 * short**2 * long + 17 * short**3


def state_bytes_of(optimizer: Any, parameters: Iterable[Tensor]) -> int:
    """Bytes of the state tensors that are as large as their parameter."""
    return sum(
        value.numel() * value.element_size()
        for p in parameters
        for value in optimizer.state[p].values()
        if isinstance(value, Tensor) and value.numel() == p.numel() > 1
    )


def step_counts(contender: Contender, optimizer: Any, groups: Groups) -> dict[str, float]:
    """``bytes`` and ``flops`` of one step of an optimizer that has stepped before."""
    total_bytes = 0
    for group in groups:
        rule = contender.rule if group["role"] == "matrix" else "adamw"
        parameters = group["params"]
        total_bytes += step_bytes(
            rule,
            sum(p.numel() for p in parameters),
            sum(p.numel() * p.element_size() for p in parameters),
            state_bytes_of(optimizer, parameters),
        )
    shapes = matrix_shapes(groups, split=contender.splits)
    return {
        "bytes": total_bytes,
        "flops": sum(step_flops(contender.rule, *shape, contender.passes) for shape in shapes),
    }


@dataclass(frozen=True)
class Peaks:
    """What the device reaches: bytes read and written per second by a large copy, operations per second by a product.

    ``product`` says which product was the fastest.
    """

    copy_bytes_per_second: float
    product_flops_per_second: float
    product: str

    def floor_milliseconds(self, counts: dict[str, float]) -> float:
        return 1e3 * (counts["bytes"] / self.copy_bytes_per_second + counts["flops"] / self.product_flops_per_second)


def measure_peaks(device: torch.device) -> Peaks:
    """Measure a large copy, and large products in the precisions that maps are computed in; the best of ten each."""
    on_gpu = device.type == "cuda"
    sizes, dtypes = ((4096, 8192), (torch.float16,)) if on_gpu else ((1024,), (torch.float32, torch.bfloat16))
    peaks = Peaks(
        copy_bytes_per_second(device),
        *max(
            (_product_flops_per_second(size, dtype, device), f"{str(dtype).removeprefix('torch.')} {size}^3")
            for size in sizes
            for dtype in dtypes
        ),
    )
    release_memory(device)
    return peaks


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written by a copy of 1 GiB (CPU: 64 MiB); the best of ten."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _best_seconds(lambda: target.copy_(source), device)


def _product_flops_per_second(size: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right, out=out), device)


def _best_seconds(call: Callable[[], Any], device: torch.device) -> float:
    for _ in range(3):
        call()
    return min(timed(call, device)[0] for _ in range(10)) / 1e3

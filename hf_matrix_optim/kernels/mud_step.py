"""MUD's whole step on a stack of equal matrices by Triton kernels: definition beside it, ``MUD`` in plain torch.

Bytes a matrix element: 14 for momentum and lookahead, 2 for the Gram matrix, 4 for the solve, 10 for the update; AdamW
moves 28. Products are in float16 with float32 sums. Nothing here waits for the device.
"""

import functools
import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PANEL = 256  # vectors that are solved for in one product
LEAF = 32  # size up to which a diagonal block is inverted by substitution
GAIN = 64.0  # keeps short vectors out of float16's subnormal numbers; the norm divides it out
BLOCK = 4096  # elements a program of an elementwise kernel
TILE = 128
SMALLEST = 64  # shorter sides are left to the plain path
DEPTH = 64


def workspace_bytes(rows: int, columns: int) -> int:
    """Bytes that ``mud_step`` needs for one matrix of this shape."""
    k = min(rows, columns)
    panel, blocks, padded = _panels(k)
    return 2 * rows * columns + 4 * k * k + 2 * padded * padded + 4 * blocks * panel * panel + 4 * k + 64


@functools.cache
def why_not(device: torch.device) -> str:
    """Why MUD's kernels cannot run on a device, with the remedy; "" if they can."""
    if device.type != "cuda":
        return f"the parameters are on {device.type}, and the kernels are for CUDA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: it comes with torch's GPU builds for Linux, or pip install triton"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return ""


def can_take(param: Tensor, grad: Tensor, momentum: Tensor) -> bool:
    """Whether the kernels read these, ([b,] rows, columns), as they are: large, unit stride, one layout, aligned."""
    return (
        param.dtype in (torch.float32, torch.bfloat16)
        and momentum.dtype == torch.float32
        and min(param.shape[-2:]) >= SMALLEST
        and param.stride(-1) == 1
        and param.stride(-2) % 8 == 0
        and param.data_ptr() % 16 == momentum.data_ptr() % 16 == 0
        and param.stride() == momentum.stride()
        and can_take_gradient(param, grad)
    )


def can_take_gradient(param: Tensor, grad: Tensor) -> bool:
    """The part of ``can_take`` that may change from step to step."""
    return grad.dtype == param.dtype and grad.stride() == param.stride() and grad.data_ptr() % 16 == 0


def matrices_of(tensor: Tensor) -> list[Tensor]:
    """Views of a (rows, columns) or (b, rows, columns) tensor, one for each matrix."""
    return [tensor] if tensor.ndim == 2 else list(torch.unbind(tensor))


@dataclass
class StackPlan:
    """What does not change from step to step of one stack: shapes, and where its matrices lie.

    Attributes:
        rows, columns, stride: of each matrix as it lies in memory, in elements.
        along_columns: decorrelate the columns (a tall weight) instead of the rows.
        scale: factor from direction to update.
        dtype: of the parameters and their gradients.
        device: of all tensors.
        owners: for each matrix, the position of its parameter in the list that the step is given.
        offsets: for each matrix, bytes from the start of its parameter, and of that parameter's gradient.
        fixed: addresses of parameters, momenta, lookahead scales and counts of skipped steps, each (matrices,).
    """

    rows: int
    columns: int
    stride: int
    along_columns: bool
    scale: float
    dtype: torch.dtype
    device: torch.device
    owners: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    fixed: tuple[list[int], list[int], list[int], list[int]] = field(default_factory=lambda: ([], [], [], []))
    _grads: list[int] = field(default_factory=list)
    _table: Tensor | None = None

    def add(self, owner: int, start: int, tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        """Add a matrix: its parameter's position and address, and (parameter, momentum, scale, skipped) of it."""
        self.owners.append(owner)
        self.offsets.append(tensors[0].data_ptr() - start)
        for addresses, tensor in zip(self.fixed, tensors, strict=True):
            addresses.append(tensor.data_ptr())

    def addresses(self, grad_starts: list[int]) -> Tensor:
        """(5, matrices) int64 on the device: gradients, parameters, momenta, scales, counts; sent without waiting."""
        grads = [grad_starts[owner] + offset for owner, offset in zip(self.owners, self.offsets, strict=True)]
        if self._table is None or grads != self._grads:
            table = torch.tensor([grads, *self.fixed], dtype=torch.int64)
            self._table, self._grads = table.pin_memory().to(self.device, non_blocking=True), grads
        return self._table


def _panels(k: int) -> tuple[int, int, int]:
    panel = min(PANEL, max(64, 1 << (k - 1).bit_length()))
    blocks = -(-k // panel)
    return panel, blocks, blocks * panel


def mud_step(
    plan: StackPlan,
    grad_starts: list[int],
    *,
    beta: float,
    nesterov: bool,
    keep: float,
    rate: float,
    maximize: bool,
) -> None:
    """One step of MUD with one pass: momentum, direction, decay and update, all in place.

    Args:
        plan: the stack.
        grad_starts: address of each parameter's gradient, by position; laid out as the parameter.
        beta: of the momentum, in [0, 1).
        nesterov: decorrelate the lookahead instead of the momentum.
        keep: factor of the old weight, 1 - lr * weight_decay.
        rate: factor of the direction, lr * scale.
        maximize: step along the gradient.
    """
    from hf_matrix_optim.kernels import mud_triton as kernels_of

    count, rows, columns, stride, along_columns = (
        len(plan.owners),
        plan.rows,
        plan.columns,
        plan.stride,
        plan.along_columns,
    )
    n = rows * columns
    k, d = (columns, rows) if along_columns else (rows, columns)
    panel, blocks, padded = _panels(k)
    device = plan.device
    grads, params, momenta, scales, skipped = plan.addresses(grad_starts).unbind()
    x = torch.empty(count, rows, columns, dtype=torch.float16, device=device)
    gram = torch.empty(count, k, k, dtype=torch.float32, device=device)
    inverses = torch.zeros(count, blocks, panel, panel, dtype=torch.float32, device=device)
    solve = torch.empty(count, padded, padded, dtype=torch.float16, device=device)
    squares = torch.zeros(count, k, dtype=torch.float32, device=device)
    largest_bits = torch.zeros(count, dtype=torch.int32, device=device)
    even = k % TILE == 0 and d % TILE == 0 and k % panel == 0
    elementwise: Any = (-(-n // BLOCK), count)

    sign = -1.0 if maximize else 1.0
    momentum_arguments = (grads, momenta, x, largest_bits, scales, columns, stride, n, beta, sign)
    constants = {"NESTEROV": nesterov, "GRAD": kernels_of.TYPES[plan.dtype], "BLOCK": BLOCK, "num_warps": 8}
    kernels_of.momentum_kernel[elementwise](*momentum_arguments, **constants)
    kernels_of.repair_kernel[elementwise](*momentum_arguments, **constants)

    tiles = -(-k // TILE)
    kernels_of.gram_kernel[tiles * (tiles + 1) // 2, count](
        x, gram, k, d, ALONG_COLUMNS=along_columns, EVEN=even, BLOCK=TILE, DEPTH=DEPTH, num_warps=4, num_stages=3
    )
    kernels_of.leaf_kernel[padded // LEAF, count](gram, inverses, k, blocks, PANEL=panel, LEAF=LEAF, num_warps=1)
    size = LEAF
    while size < panel:
        kernels_of.merge_kernel[padded // (2 * size), count](
            gram, inverses, k, blocks, PANEL=panel, SIZE=size, num_warps=4 if size < 128 else 8
        )
        size *= 2
    kernels_of.panel_kernel[padded // 64, blocks, count](
        gram, inverses, solve, k, padded, blocks, GAIN=GAIN, PANEL=panel, WIDTH=64, num_warps=8
    )
    for block in range(blocks):
        kernels_of.apply_kernel[-(-d // TILE), count](
            solve, x, squares, k, d, padded, block,
            ALONG_COLUMNS=along_columns, EVEN=even, PANEL=panel, WIDTH=TILE, DEPTH=DEPTH, num_warps=8, num_stages=4,
        )  # fmt: skip
    kernels_of.update_kernel[elementwise](
        params, x, squares, largest_bits, scales, skipped, columns, stride, n, k, keep, rate,
        ALONG_COLUMNS=along_columns, PARAM=kernels_of.TYPES[plan.dtype], BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip

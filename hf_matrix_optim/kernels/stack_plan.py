"""What does not change from step to step of a stack of equal matrices, and whether the kernels can take a matrix."""

import functools
import importlib.util
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_matrix_optim.kernels.half_maps import Sides

SMALLEST = 64  # shorter sides are left to the plain path
SHARED_MEMORY = 128 * 1024  # what merge_kernel takes; GPUs for the desktop have 99 KiB
MOST_ELEMENTS = 2**31 - 2**13  # of one matrix: offsets in it are 32-bit
STATE_DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def why_not(device: torch.device) -> str:
    """Why the kernels cannot run on a device, with the remedy; "" if they can."""
    if device.type != "cuda":
        return f"the parameters are on {device.type}, and the kernels are for CUDA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: it comes with torch's GPU builds for Linux, or pip install triton"
    if torch.version.hip is not None:
        return "the kernels were written for and tried on NVIDIA GPUs alone"
    name = torch.cuda.get_device_name(device)
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{name} is older than compute capability 8.0"
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", SHARED_MEMORY)
    if shared < SHARED_MEMORY:
        return f"{name} has {shared // 1024} KiB of shared memory a block; the kernels need {SHARED_MEMORY // 1024}"
    return ""


def can_take(param: Tensor, grad: Tensor, momentum: Tensor, second_moment: Tensor | None) -> bool:
    """Whether the kernels read these, ([b,] rows, columns), as they are: large, unit stride, one layout, aligned."""
    return (
        param.dtype in (torch.float32, torch.bfloat16)
        and momentum.dtype in STATE_DTYPES
        and min(param.shape[-2:]) >= SMALLEST
        and param.size(-2) * param.stride(-2) <= MOST_ELEMENTS
        and param.size(-1) % 8 == 0
        and param.stride(-1) == 1
        and param.stride(-2) % 8 == 0
        and param.data_ptr() % 16 == momentum.data_ptr() % 16 == 0
        and param.stride() == momentum.stride()
        and (
            second_moment is None
            or (
                second_moment.dtype == torch.float32
                and second_moment.stride() == param.stride()
                and second_moment.data_ptr() % 16 == 0
            )
        )
        and grad.dtype == param.dtype
        and grad.stride() == param.stride()
        and grad.data_ptr() % 16 == 0
    )


def matrices_of(tensor: Tensor) -> list[Tensor]:
    """Views of a (rows, columns) or (b, rows, columns) tensor, one for each matrix."""
    return [tensor] if tensor.ndim == 2 else list(torch.unbind(tensor))


@dataclass
class StackPlan:
    """A stack of equal matrices: shapes, and where its matrices lie.

    Attributes:
        sides: shape of one matrix as it lies in memory.
        stride: of its rows there, in elements.
        scale: factor from direction to update.
        dtype, momentum_dtype: of the parameters and their gradients, and of the momentum.
        device: of all tensors.
        owners: for each matrix, the position of its parameter in the list that the step is given.
        offsets: for each matrix, bytes from the start of its parameter, and of that parameter's gradient.
        momentum_offsets: likewise, from the start of its parameter's momentum.
        fixed: addresses of parameters, momenta, second moments, lookahead scales, skip counts, each (matrices,).
    """

    sides: Sides
    stride: int
    scale: float
    dtype: torch.dtype
    momentum_dtype: torch.dtype
    device: torch.device
    owners: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    momentum_offsets: list[int] = field(default_factory=list)
    fixed: tuple[list[int], ...] = field(default_factory=lambda: ([], [], [], [], []))
    _grads: list[int] = field(default_factory=list)
    _table: Tensor | None = None

    def add(self, owner: int, starts: tuple[int, int], tensors: tuple[Tensor | None, ...]) -> None:
        """Add a matrix: position of its parameter, addresses of that and its momentum, tensors as in ``fixed``."""
        param, momentum = tensors[:2]
        assert param is not None
        assert momentum is not None
        self.owners.append(owner)
        self.offsets.append(param.data_ptr() - starts[0])
        self.momentum_offsets.append(momentum.data_ptr() - starts[1])
        for addresses, tensor in zip(self.fixed, tensors, strict=True):
            addresses.append(0 if tensor is None else tensor.data_ptr())

    def move_momenta(self, momentum_starts: list[int]) -> None:
        """The momenta lie elsewhere, as new ones of int8 do in every step; for the next ``point_to``."""
        moved = zip(self.owners, self.momentum_offsets, strict=True)
        self.fixed[1][:] = [momentum_starts[owner] + offset for owner, offset in moved]
        self._grads = []

    def point_to(self, grad_starts: list[int]) -> None:
        """Bring the table of addresses up to date, where it lies, without waiting for the device."""
        grads = [grad_starts[owner] + offset for owner, offset in zip(self.owners, self.offsets, strict=True)]
        if self._table is None:
            self._table = torch.empty(6, len(self.owners), dtype=torch.int64, device=self.device)
        elif grads == self._grads:
            return
        table = torch.tensor([grads, *self.fixed], dtype=torch.int64, device="cpu")
        self._table.copy_(table.pin_memory(), non_blocking=True)
        self._grads = grads

    def addresses(self) -> tuple[Tensor, ...]:
        """(matrices,) int64 each: gradients, parameters, momenta, second moments, lookahead scales, skip counts."""
        assert self._table is not None
        return self._table.unbind()

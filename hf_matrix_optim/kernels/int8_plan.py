"""Momenta in int8 blocks to one flat float32 tensor and back: one launch each way, by a table that stays.

Plain torch takes thirteen passes over each momentum by itself; this moves 5 bytes an element each way.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hf_matrix_optim.kernels.launch import launch

ROWS = 16  # blocks a program
MOST_PLANS = 256


class Int8Plan:
    """Momenta of one device, in their order, and where their blocks lie.

    Args:
        levels: int8 tensors of whole blocks, contiguous.
        scales: (blocks,) float32 of each.
        most: the largest level.
    """

    def __init__(self, levels: list[Tensor], scales: list[Tensor], most: int) -> None:
        self.places = _places(levels, scales)
        self.shapes = [tensor.shape for tensor in levels]
        self.device = levels[0].device
        self.most = most
        self.block = levels[0].numel() // scales[0].numel()
        blocks = [scale.numel() for scale in scales]
        programs = [-(-number // ROWS) for number in blocks]
        self.sizes = [number * self.block for number in blocks]
        self.programs = sum(programs)
        starts = [[0, *accumulate(numbers)][:-1] for numbers in (programs, blocks)]
        addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in (levels, scales)]
        rows = torch.tensor([*addresses, starts[0], blocks, starts[1]], dtype=torch.int64, device="cpu")
        positions = torch.arange(len(levels), dtype=torch.int32, device="cpu")
        owners = positions.repeat_interleave(torch.tensor(programs, dtype=torch.int64, device="cpu"))
        #: (5, momenta): addresses of levels and scales, first program, number of blocks, first of all blocks
        self.table = rows.pin_memory().to(self.device, non_blocking=True)
        #: (programs,): the momentum that a program works on
        self.owners = owners.pin_memory().to(self.device, non_blocking=True)

    def in_float(self) -> Tensor:
        """All momenta one after the other, (elements,) float32, new; nothing waits for the device."""
        from hf_matrix_optim.kernels import int8_triton as kernels

        values = torch.empty(sum(self.sizes), dtype=torch.float32, device=self.device)
        self._launch(kernels.dequantize_kernel, values, 1 / self.most**2)
        return values

    def views(self, values: Tensor) -> list[Tensor]:
        """Of ``in_float``'s tensor, one in the shape of each momentum; aligned to a block of float32."""
        return [part.view(shape) for part, shape in zip(torch.split(values, self.sizes), self.shapes, strict=True)]

    def quantize(self, values: Tensor) -> None:
        """Write finite values, as ``in_float`` gave them, back into levels and scales; nothing waits for it."""
        from hf_matrix_optim.kernels import int8_triton as kernels

        self._launch(kernels.quantize_kernel, values, LEVELS=self.most)

    def _launch(self, kernel: Any, values: Tensor, *numbers: float, **constants: int) -> None:
        with torch.cuda.device(self.device):
            launch(
                kernel, (self.programs,), self.owners, self.table, values, len(self.sizes), *numbers, **constants,
                BLOCK=self.block, ROWS=ROWS, enable_fp_fusion=False, num_warps=8,
            )  # fmt: skip


class Int8Plans:
    """The plans of one optimizer, kept while the momenta stay where they are."""

    def __init__(self) -> None:
        self.plans: dict[int, Int8Plan] = {}

    def of(self, levels: list[Tensor], scales: list[Tensor], most: int, owner: object) -> Int8Plan | None:
        """The plan of these momenta; None where they do not lie as the kernels read them.

        Args:
            levels, scales, most: see ``Int8Plan``; all on one device.
            owner: in whose place a plan is kept.
        """
        known = self.plans.get(id(owner))
        if known is None or known.places != _places(levels, scales):
            if not levels or not all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (*levels, *scales)):
                return None
            if known is None and len(self.plans) >= MOST_PLANS:
                del self.plans[next(iter(self.plans))]
            known = self.plans[id(owner)] = Int8Plan(levels, scales, most)
        return known


def _places(levels: list[Tensor], scales: list[Tensor]) -> list[Any]:
    return [
        [tensor.data_ptr() for tensor in levels],
        [tensor.data_ptr() for tensor in scales],
        [tensor.shape for tensor in levels],
    ]

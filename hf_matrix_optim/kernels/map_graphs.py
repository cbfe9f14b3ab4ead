"""Maps as CUDA graphs: one launch for the 20 to 30 kernels of a round's map, whose messages no graph can hold."""

from collections import Counter
from typing import TypeAlias

import torch
from torch import Tensor

from hf_matrix_optim.kernels.graph_capture import captured
from hf_matrix_optim.kernels.half_maps import Sides
from hf_matrix_optim.kernels.stack_step import KernelRule, whole_direction
from hf_matrix_optim.newton_schulz import Coefficients

#: Matrices of a stack, their sides, and what a map depends on: passes and coefficients.
Key: TypeAlias = tuple[int, Sides, int, Coefficients]
WITHOUT_GRAPH = 2  # times a stack is mapped by launches first: kernels are compiled, and libraries set up, by these


class MapGraphs:
    """The graphs of one optimizer's maps on one device.

    Graphs are replayed one after the other, so all of them read and write the same two stacks, as large as the largest
    that has been asked for, and share the rest of their workspace. All of it is held as long as this is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graphs: dict[Key, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._times: Counter[Key] = Counter()
        self._most = 0  # elements
        self._stacks = torch.empty(2, 0, dtype=torch.float16, device=device)

    def input_of(self, count: int, sides: Sides, rule: KernelRule) -> Tensor | None:
        """(count, rows, columns) float16, where ``replay`` reads; None if this map is still to be launched."""
        key = _key(count, sides, rule)
        self._times[key] += 1
        elements = count * sides.rows * sides.columns
        self._most = max(self._most, elements)
        if self._times[key] <= WITHOUT_GRAPH:
            return None
        if self._stacks.size(1) < self._most:
            self.graphs.clear()  # they know the old addresses
            self._stacks = torch.empty(2, 0, dtype=torch.float16, device=self.device)  # the old ones are let go first
            self._stacks = torch.empty(2, self._most, dtype=torch.float16, device=self.device)
        return self._views(count, sides)[0]

    def replay(self, count: int, sides: Sides, rule: KernelRule) -> Tensor:
        """Direction of what is in ``input_of``; overwritten by the next call for any stack."""
        key = _key(count, sides, rule)
        if key not in self.graphs:
            x, spare = self._views(count, sides)
            earlier = (graph for graph, _ in self.graphs.values())
            self.graphs[key] = captured(lambda: whole_direction(x, sides, rule, spare), self.device, earlier)
        graph, direction = self.graphs[key]
        graph.replay()
        return direction

    def _views(self, count: int, sides: Sides) -> tuple[Tensor, ...]:
        elements = count * sides.rows * sides.columns
        return self._stacks[:, :elements].view(2, count, sides.rows, sides.columns).unbind()


def _key(count: int, sides: Sides, rule: KernelRule) -> Key:
    return count, sides, rule.passes, rule.coefficients

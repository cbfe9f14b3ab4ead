"""Where the matrices of an optimizer lie in its parameters, and reading them, whatever they are kept as."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_matrix_optim.int8_momentum import in_float
from hf_matrix_optim.matrix_layout import MatrixLayout, split_parts
from hf_matrix_optim.sharding.full_tensor import whole_of
from hf_matrix_optim.sharding.shard_layout import is_sharded


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix of a parameter: its group, its parameter there, its part and its place in a stack of matrices.

    It is read as it is stored, (fan_in, fan_out) with ``output_axis=1``: a transpose measures the same.
    """

    group: int
    index: int
    part: int
    element: int
    stored: tuple[int, int]

    def view_in(self, tensor: Tensor, layout: MatrixLayout) -> Tensor:
        """The matrix in its whole parameter, or in a tensor of that shape; of shape ``stored``."""
        part = split_parts(tensor, layout)[self.part]
        if layout.flatten:
            part = part.flatten(1)
        return part[self.element] if part.ndim == 3 else part

    def name(self, group: dict[str, Any]) -> str:
        """Of its parameter, and its part there, in a param group."""
        names = group.get("param_names")
        name = names[self.index] if names else f"group_{self.group}.param_{self.index}"
        return f"{name}.part_{self.part}" if group.get("split_sizes") else str(name)


def stored_matrices(groups: list[dict[str, Any]]) -> list[StoredMatrix]:
    """All matrices of the matrix groups, in the order of groups and parameters."""
    matrices = []
    for g, group in enumerate(groups):
        if group["role"] == "matrix":
            layout = MatrixLayout.from_group(group)
            for i, p in enumerate(group["params"]):
                matrices += [StoredMatrix(g, i, *place) for place in _places(tuple(p.shape), layout)]
    return matrices


@lru_cache(maxsize=4096)
def _places(shape: tuple[int, ...], layout: MatrixLayout) -> list[tuple[int, int, tuple[int, int]]]:
    """(part, element, shape as stored) of all matrices of a parameter."""
    parts = split_parts(torch.empty(shape, device="meta"), layout)
    if layout.flatten:
        parts = [part.flatten(1) for part in parts]
    return [
        (i, element, (part.size(-2), part.size(-1)))
        for i, part in enumerate(parts)
        for element in range(part.size(0) if part.ndim == 3 else 1)
    ]


def empty_stack(matrices: list[StoredMatrix], groups: list[dict[str, Any]]) -> Tensor:
    """An uninitialised stack (b, *stored) for equal matrices, of the dtype and device of their parameters."""
    like = groups[matrices[0].group]["params"][matrices[0].index]
    return torch.empty(len(matrices), *matrices[0].stored, dtype=like.dtype, device=like.device)


class WholeTensors:
    """Reads matrices out of parameters and their state: DTensors whole, int8 momenta in float32."""

    def __init__(self, groups: list[dict[str, Any]], state: Any = None) -> None:
        self.groups, self.state = groups, state
        self._layouts = [MatrixLayout.from_group(group) if group["role"] == "matrix" else None for group in groups]
        self._last: tuple[Any, Tensor] | None = None

    def into(self, stack: Tensor, matrices: list[StoredMatrix], what: str) -> Tensor:
        """Fill a stack (b, *stored) from the parameters, "param", or from tensors of their state, 0 for none."""
        found = [(matrix, self._tensor(matrix, what)) for matrix in matrices]
        plain = [self._view(m, tensor) for m, tensor in found if tensor is not None and not _is_packed(tensor)]
        if len(plain) == len(matrices):
            return torch.stack(plain, out=stack)
        for place, (matrix, tensor) in zip(stack, found, strict=True):
            if tensor is None:
                place.zero_()
            else:
                place.copy_(self._view(matrix, self._whole(matrix, tensor, what)))
        return stack

    def _tensor(self, matrix: StoredMatrix, what: str) -> Tensor | None:
        param: Tensor = self.groups[matrix.group]["params"][matrix.index]
        return param if what == "param" else self.state.get(param, {}).get(what)

    def _view(self, matrix: StoredMatrix, tensor: Tensor) -> Tensor:
        layout = self._layouts[matrix.group]
        assert layout is not None
        return matrix.view_in(tensor, layout)

    def _whole(self, matrix: StoredMatrix, tensor: Tensor, what: str) -> Tensor:
        """All elements as a plain floating tensor, kept for the next matrix of the same parameter."""
        if not _is_packed(tensor):
            return tensor
        key = (matrix.group, matrix.index, what)
        if self._last is None or self._last[0] != key:
            self._last = None
            param = self.groups[matrix.group]["params"][matrix.index]
            self._last = (key, whole_of(tensor) if is_sharded(tensor) else in_float(self.state[param]))
        return self._last[1]


def _is_packed(tensor: Tensor) -> bool:
    """Whether its elements have to be gathered or converted, into a temporary tensor."""
    return tensor.dtype == torch.int8 or is_sharded(tensor)

"""How the elements of a parameter are read as matrices (fan_out, fan_in)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_matrix_optim.flattening import DEEPSPEED_REMEDY, uses_deepspeed


@dataclass(frozen=True)
class MatrixLayout:
    """How one parameter is read as matrices; the four fields are keys of a param group.

    Attributes:
        output_axis: 0 if the last two axes are (fan_out, fan_in), as ``nn.Linear`` stores them; 1 if they are
            (fan_in, fan_out), as GPT-2's ``Conv1D`` and some expert stacks do.
        flatten: True for a convolution (out, in, *kernel), read as (out, in * prod(kernel)).
        split_sizes: sizes along fan_out of matrices that are stored as one (fused QKV, gate and up); None for one.
        interleaved: True if slice i of n is every n-th row of fan_out from row i on, False if slices are contiguous.
    """

    output_axis: int = 0
    flatten: bool = False
    split_sizes: tuple[int, ...] | None = None
    interleaved: bool = False

    @classmethod
    def from_group(cls, group: dict[str, Any]) -> "MatrixLayout":
        """The layout in a param group; absent keys take the defaults."""
        sizes = group.get("split_sizes")
        return cls(
            output_axis=group.get("output_axis", 0),
            flatten=group.get("flatten", False),
            split_sizes=None if sizes is None else tuple(sizes),
            interleaved=group.get("interleaved", False),
        )

    def fan_out_axis(self, ndim: int) -> int:
        """Axis of a parameter with ``ndim`` axes along which fan_out runs."""
        return 0 if self.flatten else ndim - 2 + self.output_axis

    def check(self, shape: tuple[int, ...], name: str) -> None:
        """Raise ValueError, naming the parameter, if a tensor of ``shape`` cannot be read this way."""
        if len(shape) < 2:
            raise ValueError(
                f"parameter {name} of shape {shape} is not a matrix and cannot be in a matrix group: give its group "
                "role='adamw', or build the groups with param_groups_for(model). A flat parameter here usually means "
                f"FSDP1 or DeepSpeed ZeRO, which hand over flat shards: {DEEPSPEED_REMEDY}"
            )
        if uses_deepspeed():  # whole for now; with ZeRO-Offload accelerate would even put Adam in our place
            raise ValueError(
                f"parameter {name} cannot be in a matrix group: accelerate runs this process under DeepSpeed, which "
                f"will flatten it: {DEEPSPEED_REMEDY}"
            )
        if math.prod(shape) == 0:
            raise ValueError(f"parameter {name} of shape {shape} has no elements: leave it out of the matrix group")
        if self.output_axis not in (0, 1):
            raise ValueError(f"output_axis={self.output_axis} of parameter {name} must be 0 or 1")
        if self.flatten and self.output_axis != 0:
            raise ValueError(f"parameter {name}: flatten=True is for (out, in, *kernel) and needs output_axis=0")
        if not self.flatten and len(shape) > 3:
            raise ValueError(
                f"parameter {name} of shape {shape}: more than three axes are read as matrices only with flatten=True "
                "(a convolution, (out, in, *kernel))"
            )
        if self.split_sizes is not None:
            fan_out = shape[self.fan_out_axis(len(shape))]
            if sum(self.split_sizes) != fan_out or min(self.split_sizes) < 1:
                raise ValueError(
                    f"split_sizes={self.split_sizes} of parameter {name} must be positive and add up to its "
                    f"fan_out={fan_out}"
                )
            if self.interleaved and len(set(self.split_sizes)) != 1:
                raise ValueError(f"split_sizes={self.split_sizes} of parameter {name}: interleaved slices are equal")

    def matrix_count(self, shape: tuple[int, ...]) -> int:
        """Number of matrices that a parameter of ``shape`` is read as.

        Raises:
            ValueError: if it has fewer than two axes.
        """
        if len(shape) < 2:  # checked once more: engines put flat pieces into the groups of a finished optimizer
            raise ValueError(
                f"a parameter of a matrix group has become flat, of shape {shape}, as DeepSpeed ZeRO and FSDP1 make "
                f"it: {DEEPSPEED_REMEDY}"
            )
        stacked = 1 if self.flatten else math.prod(shape[:-2])
        return stacked * len(self.split_sizes or (1,))


def split_parts(tensor: Tensor, layout: MatrixLayout) -> list[Tensor]:
    """Views of ``tensor``, one for each of ``layout.split_sizes``, with the axes that the parameter has."""
    if layout.split_sizes is None:
        return [tensor]
    axis = layout.fan_out_axis(tensor.ndim)
    if layout.interleaved:
        count = len(layout.split_sizes)
        every = [[slice(None)] * axis + [slice(i, None, count)] for i in range(count)]
        return [tensor[tuple(index)] for index in every]
    return list(torch.split(tensor, list(layout.split_sizes), dim=axis))


def to_matrices(part: Tensor, layout: MatrixLayout) -> Tensor:
    """Read a part as a batch of matrices (b, fan_out, fan_in); a view unless a convolution's strides forbid it."""
    if layout.flatten:
        part = part.flatten(1)
    if part.ndim == 2:
        part = part.unsqueeze(0)
    return part.mT if layout.output_axis == 1 else part


def from_matrices(matrices: Tensor, layout: MatrixLayout, shape: tuple[int, ...]) -> Tensor:
    """The inverse of ``to_matrices``: (b, fan_out, fan_in) with the axes of a part of ``shape``."""
    return (matrices.mT if layout.output_axis == 1 else matrices).reshape(shape)

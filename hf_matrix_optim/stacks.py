"""The tensors of matrices that are stepped together, gathered into one stack and written back."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hf_matrix_optim.matrix_layout import MatrixLayout, from_matrices, split_parts, to_matrices


@dataclass(slots=True)
class Matrices:
    """The tensors of one parameter, or of a slice of it, that a step reads and writes; all of the same shape.

    ``skipped`` is (matrices,) int64: how often each matrix was left alone because its gradient was not finite.
    ``lookahead_scale`` is (matrices,) float32, of the GPU fast paths alone.
    """

    param: Tensor
    grad: Tensor
    momentum: Tensor
    second_moment: Tensor | None
    skipped: Tensor
    lookahead_scale: Tensor | None = None

    def parts(self, layout: MatrixLayout) -> Iterator["Matrices"]:
        """One entry for each matrix, or contiguous stack of matrices, that the parameter is read as."""
        split = [split_parts(tensor, layout) for tensor in (self.param, self.grad, self.momentum)]
        second = [None] * len(split[0]) if self.second_moment is None else split_parts(self.second_moment, layout)
        skipped = self.skipped.chunk(len(split[0]))
        scale = [None] * len(split[0]) if self.lookahead_scale is None else self.lookahead_scale.chunk(len(split[0]))
        yield from (Matrices(*tensors) for tensors in zip(*split, second, skipped, scale, strict=True))

    def stacked_slices(self, count: int) -> Iterator["Matrices"]:
        """Slices of at most ``count`` matrices of a (b, m, n) stack; anything else comes back whole."""
        if self.param.ndim != 3 or self.skipped.numel() <= count:
            yield self
            return
        for start in range(0, self.param.size(0), count):
            stop = start + count
            cut: list[Any] = [t if t is None else t[start:stop] for t in (getattr(self, f.name) for f in fields(self))]
            yield Matrices(*cut)


@dataclass(slots=True)
class MatrixLists:
    """The tensors of several parameters, a list of each kind: what the host looks at in every step."""

    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    second_moments: list[Tensor | None]
    skipped: list[Tensor]
    lookahead_scales: list[Tensor | None]

    @classmethod
    def of(cls, entries: list[Matrices]) -> "MatrixLists":
        return cls(*([getattr(entry, f.name) for entry in entries] for f in fields(Matrices)))

    def entry(self, i: int) -> Matrices:
        return Matrices(*(getattr(self, f.name)[i] for f in fields(self)))


def chunks(parts: Iterable[Matrices], count: int) -> Iterator[list[Matrices]]:
    """``parts`` in order, cut into lists of at most ``count`` matrices."""
    chunk: list[Matrices] = []
    filled = 0
    for part in parts:
        for piece in part.stacked_slices(count):
            if chunk and filled + piece.skipped.numel() > count:
                yield chunk
                chunk, filled = [], 0
            chunk.append(piece)
            filled += piece.skipped.numel()
    if chunk:
        yield chunk


def gather(parts: list[Tensor], layout: MatrixLayout) -> Tensor:
    """A new stack (b, fan_out, fan_in) of the matrices in ``parts``."""
    return torch.cat([to_matrices(part, layout) for part in parts])


def scatter(stack: Tensor, parts: list[Tensor], layout: MatrixLayout) -> None:
    """Write a stack that ``gather`` made back into ``parts``."""
    pieces = torch.split(stack, [to_matrices(part, layout).size(0) for part in parts])
    torch._foreach_copy_(
        parts, [from_matrices(piece, layout, part.shape) for piece, part in zip(pieces, parts, strict=True)]
    )


def present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise RuntimeError("a matrix parameter has no second moment in its state")
    return tensor

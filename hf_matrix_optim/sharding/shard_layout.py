"""Where the elements of a DTensor lie: FSDP2, HSDP, and tensor parallel along one axis."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_matrix_optim.matrix_layout import MatrixLayout


@dataclass(frozen=True)
class Ranks:
    """Ranks that do something together, in order, and this rank's place among them; a single one has no group."""

    members: tuple[int, ...] = (0,)
    place: int = 0
    group: Any = None

    @property
    def size(self) -> int:
        return len(self.members)


ALONE = Ranks()


@dataclass(frozen=True)
class ShardLayout:
    """How a tensor of a whole ``shape`` is cut and copied.

    Attributes:
        shape: of the whole tensor.
        axis: along which it is cut; None if every rank holds all of it.
        shards: ranks with the shards of one copy, in order.
        replicas: ranks with copies of this rank's shard.
    """

    shape: tuple[int, ...]
    axis: int | None
    shards: Ranks
    replicas: Ranks

    @property
    def extents(self) -> tuple[int, ...]:
        """Length of each shard along ``axis``, as ``torch.chunk`` cuts: the last ones may be shorter or empty."""
        if self.axis is None:
            return ()
        length, size = self.shape[self.axis], self.shards.size
        step = -(-length // size)
        return tuple(max(0, min(step, length - step * i)) for i in range(size))

    @property
    def is_on_one_rank(self) -> bool:
        """Whether a single rank has all of it, and no other a copy."""
        return self.shards.size * self.replicas.size == 1

    def has_whole_matrices(self, layout: MatrixLayout) -> bool:
        """Whether a stack (matrices, rows, columns) is cut between matrices, as experts are."""
        return self.axis == 0 and len(self.shape) == 3 and not layout.flatten


def many_ranks() -> bool:
    """Whether this process is one of several that talk to each other."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor: FSDP2, HSDP or tensor parallel."""
    return hasattr(tensor, "placements") and hasattr(tensor, "full_tensor")


def local_of(tensor: Tensor) -> Tensor:
    """This rank's elements, sharing memory; of a plain tensor itself. Much cheaper than ``to_local`` in a loop."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def in_placements_of(param: Tensor, grad: Tensor) -> Tensor:
    """A gradient laid out as its parameter; a collective where it is not, as for one that is still a partial sum."""
    if is_sharded(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        return grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined,no-any-return]
    return grad


def layout_of(tensor: Tensor) -> ShardLayout | None:
    """The layout of a DTensor that is cut along one axis over one mesh dimension, and copied over at most one.

    Returns:
        None for any other: cut along two mesh dimensions (FSDP with tensor parallel), strided, or partial sums.
    """
    from torch.distributed import get_process_group_ranks
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    axis, shards, replicas = None, ALONE, ALONE
    for dimension, placement in enumerate(tensor.placements):
        if mesh.size(dimension) == 1 and not placement.is_partial():
            continue
        group = mesh.get_group(dimension)
        ranks = Ranks(tuple(get_process_group_ranks(group)), mesh.get_local_rank(dimension), group)
        if type(placement) is Shard and axis is None:
            axis, shards = placement.dim % tensor.ndim, ranks
        elif type(placement) is Replicate and replicas is ALONE:
            replicas = ranks
        else:
            return None
    return ShardLayout(tuple(tensor.shape), axis, shards, replicas)


@dataclass(frozen=True)
class MatrixPiece:
    """Where one matrix of a parameter lies on this rank, and how its shape is cut over all.

    Attributes:
        part: position among ``MatrixLayout.split_sizes``.
        element: position in a stack of matrices.
        fans: (fan_out, fan_in) of the whole matrix.
        axis: of (fan_out, fan_in) that is cut; None if it is not.
        extents: length of each shard along it.
    """

    part: int
    element: int
    fans: tuple[int, int]
    axis: int | None
    extents: tuple[int, ...]


def pieces_of(layout: MatrixLayout, shards: ShardLayout) -> list[MatrixPiece]:
    """All matrices of a parameter in the order of its ``skipped`` counts; not for ``has_whole_matrices``.

    Returns:
        [] if a matrix cannot be put together from its shards along one axis (a convolution cut in its kernel).
    """
    shape = shards.shape
    out_axis = layout.fan_out_axis(len(shape))
    in_axes = range(1, len(shape)) if layout.flatten else [len(shape) - 1 - layout.output_axis]
    fan_in = 1
    for axis in in_axes:
        fan_in *= shape[axis]
    if shards.axis is not None and shards.axis not in (out_axis, *list(in_axes)[:1]):
        return []
    cuts_rows = shards.axis == out_axis
    inner = fan_in // shape[shards.axis] if shards.axis is not None and not cuts_rows else 1
    elements = 1 if layout.flatten or len(shape) == 2 else shape[0]
    sizes = layout.split_sizes or (shape[out_axis],)
    pieces = []
    for part, size in enumerate(sizes):
        if cuts_rows:
            extents = tuple(len(rows) for rows in _rows_of_part(layout, part, shards))
        else:
            extents = tuple(extent * inner for extent in shards.extents)
        cut = None if shards.axis is None else 0 if cuts_rows else 1
        pieces += [MatrixPiece(part, element, (size, fan_in), cut, extents) for element in range(elements)]
    return pieces


def _rows_of_part(layout: MatrixLayout, part: int, shards: ShardLayout) -> list[range]:
    """Rows of a part on each shard, counted from the shard's first row, when shards cut along fan_out."""
    rows, start = [], 0
    sizes = layout.split_sizes
    for extent in shards.extents:
        if sizes is None:
            rows.append(range(extent))
        elif layout.interleaved:
            rows.append(range((part - start) % len(sizes), extent, len(sizes)))
        else:
            first = sum(sizes[:part])
            low = min(max(first - start, 0), extent)
            rows.append(range(low, max(low, min(first + sizes[part] - start, extent))))
        start += extent
    return rows


def views_of(local: Tensor, layout: MatrixLayout, shards: ShardLayout) -> list[Tensor]:
    """Views of this rank's elements of each matrix, in the order of ``pieces_of``."""
    if layout.split_sizes is None and (layout.flatten or local.ndim == 2):
        return [local]
    axis = layout.fan_out_axis(len(shards.shape))
    if shards.axis != axis:
        shards = ShardLayout(shards.shape, axis, ALONE, ALONE)  # along fan_out nothing is cut
    rows = [_rows_of_part(layout, i, shards)[shards.shards.place] for i in range(len(layout.split_sizes or (1,)))]
    views: list[Tensor] = []
    for part in rows:
        index = [slice(None)] * axis + [slice(part.start, part.stop, part.step)]
        view = local[tuple(index)]
        views += [view] if layout.flatten or view.ndim == 2 else list(view.unbind())
    return views

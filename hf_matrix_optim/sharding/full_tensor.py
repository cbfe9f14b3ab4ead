"""DTensors whose matrices are not shared out: stacks of whole matrices stay, all others are gathered on every rank."""

from dataclasses import replace

from torch import Tensor

from hf_matrix_optim.matrix_layout import MatrixLayout
from hf_matrix_optim.sharding.shard_layout import in_placements_of, is_sharded, layout_of, local_of
from hf_matrix_optim.stacks import Matrices

Written = list[tuple[Tensor, Tensor]]


def local_or_whole(entry: Matrices, layout: MatrixLayout) -> tuple[Matrices, Written]:
    """Plain tensors to step in place of DTensors, and what is to be written back with ``write_shard``.

    Experts that are cut between matrices are stepped where they are, and so is what a single rank has. Any other
    parameter is gathered, a collective in its mesh, and each rank keeps its shard of the result.
    """
    shards = layout_of(entry.param)
    if shards is not None and shards.is_on_one_rank:
        return _local(entry, entry.skipped, entry.lookahead_scale), []
    if shards is None or not shards.has_whole_matrices(layout):
        whole = replace(
            entry,
            param=_whole(entry.param),
            grad=_whole(entry.grad),
            momentum=_whole(entry.momentum),
            second_moment=None if entry.second_moment is None else _whole(entry.second_moment),
        )
        written: Written = [(entry.param, whole.param), (entry.momentum, whole.momentum)]
        if entry.second_moment is not None and whole.second_moment is not None:
            written.append((entry.second_moment, whole.second_moment))
        return whole, written
    parts = len(layout.split_sizes or (1,))
    start, count = sum(shards.extents[: shards.shards.place]), shards.extents[shards.shards.place]
    # (parts * matrices,), of which this rank has some of each part
    skipped = entry.skipped.view(parts, -1)[:, start : start + count]
    scale = None if entry.lookahead_scale is None else entry.lookahead_scale.view(parts, -1)[:, start : start + count]
    local = _local(entry, skipped.flatten(), None if scale is None else scale.flatten())
    written = []
    if parts > 1:  # else the flattened ones share their memory
        written.append((skipped, local.skipped.view(parts, -1)))
    if parts > 1 and scale is not None and local.lookahead_scale is not None:
        written.append((scale, local.lookahead_scale.view(parts, -1)))
    return local, written


def _local(entry: Matrices, skipped: Tensor, lookahead_scale: Tensor | None) -> Matrices:
    """This rank's elements, which share the memory of the DTensors."""
    return Matrices(
        local_of(entry.param),
        local_of(in_placements_of(entry.param, entry.grad)),
        local_of(entry.momentum),
        None if entry.second_moment is None else local_of(entry.second_moment),
        skipped,
        lookahead_scale,
    )


def _whole(tensor: Tensor) -> Tensor:
    """A new plain tensor with every shard of a DTensor; a collective in its mesh."""
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return tensor.full_tensor().clone()


def write_shard(destination: Tensor, source: Tensor) -> None:
    """Copy into a DTensor this rank's shard of ``source``, which every rank holds whole; into a plain tensor, all.

    No bytes are exchanged: each rank cuts its own shard.
    """
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(destination, DTensor):
        destination.copy_(source)
        return
    mesh = destination.device_mesh
    replicated = DTensor.from_local(source, mesh, [Replicate()] * mesh.ndim, run_check=False)
    destination.to_local().copy_(replicated.redistribute(mesh, destination.placements).to_local())


def whole_of(tensor: Tensor) -> Tensor:
    """Every element of a DTensor as a plain tensor, a collective in its mesh; a plain tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def over_shards(values: Tensor, tensor: Tensor, reduction: str) -> Tensor:
    """Reduce numbers that each rank took from its shard of ``tensor``; a collective in its mesh, none for a plain one.

    Args:
        values: any shape, the same on all ranks.
        tensor: where they are from.
        reduction: "sum" or "max" over the shards, each counted once whatever copies of it there are.
    """
    if not is_sharded(tensor):
        return values
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    placements = [
        Replicate() if placement.is_replicate() else Partial(reduction)
        for placement in tensor.placements  # type: ignore[attr-defined]
    ]
    reduced: Tensor = DTensor.from_local(values, mesh, placements, run_check=False).full_tensor()
    return reduced

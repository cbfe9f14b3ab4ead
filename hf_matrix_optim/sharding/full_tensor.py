"""Sharded parameters by the plainest exact scheme: every rank gathers the whole matrix and keeps its own shard."""

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor: FSDP2, HSDP or tensor parallel."""
    return hasattr(tensor, "placements") and hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A new plain tensor with every shard of a DTensor; a collective in its mesh."""
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return tensor.full_tensor().clone()


def write_shard(destination: Tensor, source: Tensor) -> None:
    """Copy this rank's shard of ``source``, which every rank holds whole, into the DTensor ``destination``.

    No bytes are exchanged: each rank cuts its own shard.
    """
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(destination, DTensor)
    mesh = destination.device_mesh
    replicated = DTensor.from_local(source, mesh, [Replicate()] * mesh.ndim, run_check=False)
    local = replicated.redistribute(mesh, destination.placements).to_local()
    destination.to_local().copy_(local)

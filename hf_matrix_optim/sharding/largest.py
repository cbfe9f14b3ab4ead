"""The largest values over data-parallel ranks, and rows of weights scaled where they lie."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_matrix_optim.sharding.guard import ranks_of_ddp
from hf_matrix_optim.sharding.shard_layout import is_sharded


def data_parallel_groups(parameters: Sequence[Tensor]) -> list[Any]:
    """Process groups whose ranks train these parameters together on different data, each once.

    DistributedDataParallel's for plain tensors, those of each dimension of the mesh for DTensors.
    """
    groups: dict[int, Any] = {}
    for parameter in parameters:
        if is_sharded(parameter):
            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            groups |= {id(group): group for group in map(mesh.get_group, range(mesh.ndim))}
    plain = [parameter for parameter in parameters if not is_sharded(parameter)]
    groups |= {id(ranks.group): ranks.group for ranks in ranks_of_ddp(plain) if ranks is not None}
    return list(groups.values())


def refuse_tensor_parallel(weight: Tensor, name: str) -> None:
    """Raise NotImplementedError for a DTensor that tensor parallelism cuts: ranks have different heads."""
    mesh = getattr(weight, "device_mesh", None)
    names = () if mesh is None else mesh.mesh_dim_names or ()
    if "tp" in names:
        raise NotImplementedError(
            f"qk_clip does not run under tensor parallelism, and {name} is cut over the device mesh {names}: use "
            "FSDP2 or DDP, or leave qk_clip out"
        )


def largest_over(values: Tensor, groups: Sequence[Any]) -> Tensor:
    """Replace ``values`` in place by their largest over the ranks of every group; a collective in each."""
    from torch import distributed

    for group in groups:
        distributed.all_reduce(values, op=distributed.ReduceOp.MAX, group=group)
    return values


@torch.no_grad()
def scale_rows(parameter: Tensor, factors: Tensor, axis: int) -> None:
    """Multiply in place the slices of a parameter along an axis; of a DTensor each rank its shard, without messages.

    Args:
        parameter: a plain tensor or a DTensor.
        factors: (length of the axis,), the same on every rank, on the parameter's device.
        axis: of the parameter.
    """
    factors = factors.view([-1 if i == axis else 1 for i in range(parameter.ndim)])
    if is_sharded(parameter):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        factors = DTensor.from_local(factors, mesh, [Replicate()] * mesh.ndim, run_check=False)
    parameter.mul_(factors)

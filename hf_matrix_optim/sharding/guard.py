"""That all ranks are about to do the same: an error on every one of them instead of a hang or a silent difference."""

import gc
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hf_matrix_optim.sharding.exchange import all_gather
from hf_matrix_optim.sharding.shard_layout import Ranks


def ranks_of_ddp(params: Sequence[Tensor]) -> list[Ranks | None]:
    """For each plain parameter, the ranks among which a DistributedDataParallel module averages its gradients.

    Parameters do not say so themselves, so the living modules are looked through, once for a plan.
    """
    found: dict[int, Ranks] = {}
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for module in gc.get_objects():
            if DistributedDataParallel not in type(module).__mro__:  # much faster than issubclass of an abstract class
                continue
            group = module.process_group
            members = tuple(dist.get_process_group_ranks(group))
            if len(members) > 1:
                ranks = Ranks(members, dist.get_rank(group), group)
                ignored = set(getattr(module, "parameters_to_ignore", ()))
                found |= {id(p): ranks for name, p in module.module.named_parameters() if name not in ignored}
    return [found.get(id(p)) for p in params]


def is_in_one_host(ranks: Ranks) -> bool:
    """Whether all ranks are on this host, by what torchrun and accelerate tell each of them; True if they do not."""
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    return len({member // on_host for member in ranks.members}) == 1


def check_same(lines: Sequence[str], ranks: Ranks, device: torch.device) -> None:
    """Compare a description over ranks.

    Raises:
        RuntimeError: on every rank, with the first line that differs, if they do not all give the same lines.
    """
    if ranks.size == 1:
        return
    if _all_equal(_digest("\n".join(lines), device), ranks):
        return
    every: list[Any] = [None] * ranks.size
    dist.all_gather_object(every, list(lines), group=ranks.group)
    own, other = next((a, b) for a in every for b in every if a != b)
    for i in range(max(len(own), len(other))):
        first, second = (each[i] if i < len(each) else "nothing" for each in (own, other))
        if first != second:
            break
    raise RuntimeError(
        f"the ranks {', '.join(map(str, ranks.members))} do not step the same matrices: one has {first}, another "
        f"{second}. Build the same model and optimizer on all of them, or set distribute='off'"
    )


def are_equal(tensors: Sequence[Tensor | None], ranks: Ranks, device: torch.device) -> bool:
    """Whether tensors, such as gradients that DDP has averaged, have the same bits on all ranks, or lack on all."""
    sums = [torch.zeros((), dtype=torch.int64, device=device)]
    for tensor in tensors:
        if tensor is not None:
            bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
            sums.append(tensor.detach().contiguous().view(bits).sum(dtype=torch.int64).to(device))
    found = [[tensor is None for tensor in tensors], torch.stack(sums).tolist()]
    return _all_equal(_digest(str(found), device), ranks)


def _digest(text: str, device: torch.device) -> Tensor:
    """(32,) bytes, whatever the length of the text: collectives of other lengths would hang or abort."""
    return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8, device=device)


def _all_equal(own: Tensor, ranks: Ranks) -> bool:
    """For tensors of one length on all ranks; waits for the device."""
    gathered = own.new_empty(ranks.size, own.numel())
    all_gather(gathered.view(-1), own, ranks.group)
    return bool((gathered == gathered[0]).all())

"""Cases that go wrong, for the test of ``gloo_ranks``."""

import time
from pathlib import Path

import torch
import torch.distributed as dist


def passes(folder: Path) -> None:
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size()


def fails_on_rank_1(folder: Path) -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("planted")
    dist.all_reduce(torch.ones(1))


def hangs(folder: Path) -> None:
    time.sleep(3600)


CASES = {"passes": passes, "fails_on_rank_1": fails_on_rank_1, "hangs": hangs}

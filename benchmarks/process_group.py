"""The processes that torchrun has started for a benchmark: one group, results that each of them sees, one voice."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from communication import OneLineParser
from device_timing import check_device, first_line
from torch.distributed.rendezvous import rendezvous

#: NVLink multicast stays off: where GPUs are shared, a program that uses it can put them out of service for others.
WITHOUT_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


class FailedOnAllRanksError(RuntimeError):
    """All ranks have failed alike."""


class OutOfStepError(RuntimeError):
    """The ranks are no longer at the same point, so nothing can be run after it.

    Attributes:
        is_known_to_all: whether it is raised on all ranks.
    """

    def __init__(self, message: str, *, is_known_to_all: bool) -> None:
        super().__init__(message)
        self.is_known_to_all = is_known_to_all


@dataclass
class Processes:
    """This process among all.

    Attributes:
        rank, size: its number, and how many there are.
        device: what it works on.
        store: what they write results into.
    """

    rank: int
    size: int
    device: torch.device
    store: Any
    _count: int = field(default=0, repr=False)

    def say(self, text: str) -> None:
        """Tell the user, once."""
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """Do the same on all ranks; returns what each has returned (plain data), in order, on each of them.

        No collective is used for it, so it also works after one has failed.

        Raises:
            FailedOnAllRanksError: if it failed on all of them, for the same reason up to numbers.
            OutOfStepError: if it failed on some, or one has not answered in the time of the store.
        """
        self._count += 1
        try:
            own = {"result": work()}
        except Exception as error:  # to be told to the others
            own = {"error": f"{type(error).__name__}: {first_line(error)}"}
        self.store.set(f"{self._count}/{self.rank}", json.dumps(own))
        every = []
        for rank in range(self.size):
            try:
                every.append(json.loads(self.store.get(f"{self._count}/{rank}")))
            except RuntimeError:
                reason = f"; here: {own['error']}" if "error" in own else ""
                message = f"rank {rank} has not answered rank {self.rank} in time{reason}"
                raise OutOfStepError(message, is_known_to_all=False) from None
        errors = {rank: each["error"] for rank, each in enumerate(every) if "error" in each}
        if len(errors) == self.size and len({re.sub("[0-9.]+", "", error)[:100] for error in errors.values()}) == 1:
            raise FailedOnAllRanksError(errors[0])
        if errors:
            message = "; ".join(f"rank {rank}: {error}" for rank, error in errors.items())
            raise OutOfStepError(message, is_known_to_all=True)
        return [each["result"] for each in every]


class RanksParser(OneLineParser):
    """All ranks stop at a wrong argument, and the first one says why."""

    def exit(self, status: int = 0, message: str | None = None) -> Any:
        super().exit(status, message if os.environ.get("RANK", "0") == "0" else None)

    def print_help(self, file: Any = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            super().print_help(file)


def check_ranks(parser: argparse.ArgumentParser, device: str) -> tuple[int, torch.device]:
    """This rank and its device, made current; stops the program if torchrun has not started it, or has too often."""
    wanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if name not in os.environ]
    if missing:
        parser.error(f"{', '.join(missing)} not set: start it by torchrun --nproc_per_node N benchmarks/{parser.prog}")
    if device == "cpu":
        return int(os.environ["RANK"]), check_device(parser, "cpu")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if here > torch.cuda.device_count():
        parser.error(
            f"--device cuda: {here} processes and {torch.cuda.device_count()} GPUs; use --nproc_per_node "
            f"{torch.cuda.device_count()} or --device cpu"
        )
    return int(os.environ["RANK"]), check_device(parser, f"cuda:{os.environ['LOCAL_RANK']}")


@contextmanager
def processes(device: torch.device, timeout_seconds: float) -> Iterator[Processes]:
    """The group of all processes: NCCL for GPUs, gloo for CPUs; destroyed at the end, however it comes.

    Args:
        device: of this rank.
        timeout_seconds: after which a collective that some rank has not joined is an error.
    """
    os.environ.update(WITHOUT_MULTICAST)
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        results = dist.PrefixStore("results", store)
        results.set_timeout(timedelta(seconds=timeout_seconds + 10))  # a collective that waits ends before
        yield Processes(rank, size, device, results)
        dist.barrier()  # the first rank may keep the store
    finally:
        dist.destroy_process_group()

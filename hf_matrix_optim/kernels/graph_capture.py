"""CUDA graphs of launches, over one workspace."""

import functools
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def captured(
    work: Callable[[], Result], device: torch.device, earlier: Iterable[torch.cuda.CUDAGraph]
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture what is launched; returns the graph, and what ``work`` returns.

    Args:
        work: launches kernels that have been compiled, with libraries that have been set up; it may not wait.
        device: of all of them.
        earlier: graphs that are never replayed at the same time, whose workspace this one shares; a pool dies with
            its last graph.
    """
    graph, pool = torch.cuda.CUDAGraph(), next((other.pool() for other in earlier), None)
    with torch.cuda.graph(graph, pool=pool, stream=_stream_on(device), capture_error_mode="thread_local"):
        result = work()
    return graph, result


@functools.cache
def _stream_on(device: torch.device) -> torch.cuda.Stream:
    """To capture on: torch's own belongs to the device that captured first."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

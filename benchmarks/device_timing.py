"""What the benchmarks share: the device, its clock and its memory."""

import argparse
import gc
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Give back the memory of what is no longer referenced."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def graph_pool_bytes(device: torch.device) -> int:
    """Bytes that CUDA graphs keep to work in: they belong to no tensor, so the allocator counts them as free."""
    segments = [segment for segment in torch.cuda.memory_snapshot() if segment["device"] == device.index]
    private = [segment for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in private)


def first_line(error: Exception) -> str:
    """What an exception says, without the lines below it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def timed(step: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Milliseconds of one call on an idle device: until the device has finished, and until the call returned."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        begin = time.perf_counter()
        step()
        host = 1e3 * (time.perf_counter() - begin)
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)), host
    begin = time.perf_counter()
    step()
    milliseconds = 1e3 * (time.perf_counter() - begin)
    return milliseconds, milliseconds


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on beside the program: device, threads, versions, day."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "date": date.today().isoformat(),
    }


def check_device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device that ``--device`` names, made current; stops the program if there is none such."""
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device {name} is no device: use cpu, cuda or cuda:1")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {name}: times are taken on cpu and cuda alone")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error(f"--device {name}: this torch sees no GPU; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            parser.error(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def check_output(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """Stop the program before the run if what ``--json`` names cannot be written after it."""
    if path is not None and (not path.parent.is_dir() or path.is_dir()):
        parser.error(f"--json {path}: name a file in a folder that exists")

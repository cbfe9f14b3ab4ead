"""Runs programs that a model wrote, within limits: time, memory, file size, an empty environment, a folder of its own.

It limits accidents. It is no sandbox: such a program can read what the user can read and use the network.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

WALL_SECONDS = 15.0
CPU_SECONDS = 5
MEMORY_BYTES = 2**30
FILE_BYTES = 2**20

# A process that sets its own limits and then becomes the program: limits outlive execv, and nothing of ours runs
# between fork and exec, where torch's threads could hold a lock.
LIMITS = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({CPU_SECONDS}, {CPU_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({FILE_BYTES}, {FILE_BYTES}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
os.execv(sys.executable, [sys.executable, "-I", "-B", "program.py"])
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: it reached its last line.
        reason: "passed", "failed", "timeout" (wall clock) or "killed by signal N" (CPU time among them).
    """

    passed: bool
    reason: str


def run_program(source: str, *, wall_seconds: float = WALL_SECONDS) -> Outcome:
    """Run a Python program in a fresh interpreter.

    It gets no environment variables, no input, a temporary folder that is removed afterwards, ``CPU_SECONDS`` of CPU
    time, ``MEMORY_BYTES`` of address space, files of ``FILE_BYTES``; its whole process group is killed at the end.

    Args:
        source: the program; it passes if it runs to its end. Leaving early with status 0 is no pass.
        wall_seconds: wall-clock limit, in seconds.
    """
    token = secrets.token_hex(16)
    ending = f"\nwith __import__('builtins').open('reached-the-end', 'w') as _file:\n    _file.write('{token}')\n"
    with tempfile.TemporaryDirectory(prefix="mbpp-", ignore_cleanup_errors=True) as folder:
        Path(folder, "program.py").write_text(source + ending, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", LIMITS],
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(wall_seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, "timeout")
        finally:
            kill_group(process)
        reached = Path(folder, "reached-the-end")
        if code == 0 and reached.is_file() and reached.read_text(encoding="utf-8") == token:
            return Outcome(True, "passed")
        return Outcome(False, f"killed by signal {-code}" if code < 0 else "failed")


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and all it started in its group, and wait for it."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_programs(sources: Sequence[str]) -> list[Outcome]:
    """Run programs side by side, on at most four processors, with a progress bar."""
    workers = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(run_program, sources), total=len(sources), desc="Running programs", leave=False))

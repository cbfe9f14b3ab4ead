"""Runs test cases on several gloo (or NCCL) processes: one process group for many cases, and a hang is a failure.

``run_cases("rank_cases", 2, folder)`` starts ``python gloo_ranks.py rank_cases ...`` twice. Each process calls the
functions of the module's ``CASES`` in turn, with the folder, and writes down how each went.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

#: Longest time without news of a case, the start of the processes included.
TIMEOUT_SECONDS = 60
#: After so many failures the remaining cases are not tried.
MOST_FAILURES = 4


def run_cases(module: str, world_size: int, folder: Path, names: list[str], backend: str = "gloo") -> dict[str, str]:
    """Run cases on ``world_size`` processes.

    Args:
        module: name of a module beside this file with ``CASES``, a dict of functions of a folder.
        world_size: number of processes.
        folder: where the cases may leave files.
        names: keys of ``CASES``.
        backend: "gloo", or "nccl" with a GPU for each process.

    Returns:
        For each case an empty text, or what went wrong on which rank. After a failure the processes are started anew
        with the cases that are left, up to ``MOST_FAILURES`` times.
    """
    outcomes: dict[str, str] = {}
    for _ in range(MOST_FAILURES):
        left = [name for name in names if name not in outcomes]
        if left:
            outcomes.update(_run_until_failure(module, world_size, folder, left, backend))
    return dict.fromkeys(names, "not run: other cases failed before") | outcomes


def _run_until_failure(module: str, world_size: int, folder: Path, names: list[str], backend: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as meeting_folder:
        meeting = Path(meeting_folder)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size)}
        environment |= {"RANKS_BACKEND": backend, "NCCL_NVLS_ENABLE": "0"}
        environment |= {"MASTER_ADDR": "127.0.0.1"}  # accelerate asks for it; the processes meet in a file
        processes = []
        for rank in range(world_size):
            with open(meeting / f"output_{rank}", "w") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, __file__, module, str(meeting), str(folder), *names],
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        problem = _wait(processes, meeting)
        for process in processes:
            process.kill()
            process.wait()
        reports = [_report(meeting, rank) for rank in range(world_size)]
        outputs = [(meeting / f"output_{rank}").read_text()[-3000:] for rank in range(world_size)]
    outcomes = {}
    for name in names:
        errors = [f"rank {rank}: {report[name]}" for rank, report in enumerate(reports) if report.get(name)]
        if not errors and all(name in report for report in reports):
            outcomes[name] = ""
            continue
        errors += [f"rank {rank}: no news of it" for rank, report in enumerate(reports) if name not in report]
        outcomes[name] = "\n".join([problem, *errors, *outputs])
        return outcomes
    return outcomes


def _wait(processes: list[subprocess.Popen], meeting: Path) -> str:
    """Wait until all processes are done, one fails, or nothing is heard of them; returns what went wrong."""
    heard, last_news = 0, time.monotonic()
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            return "a process failed"
        size = sum(path.stat().st_size for path in meeting.glob("report_*"))
        if size != heard:
            heard, last_news = size, time.monotonic()
        if time.monotonic() - last_news > TIMEOUT_SECONDS:
            return f"no news for {TIMEOUT_SECONDS} seconds"
        time.sleep(0.05)
    return "a process failed" if any(process.poll() for process in processes) else ""


def _report(meeting: Path, rank: int) -> dict[str, str]:
    path = meeting / f"report_{rank}"
    return dict(json.loads(line) for line in path.read_text().splitlines()) if path.exists() else {}


def _main(module: str, meeting: str, folder: str, *names: str) -> None:
    import torch.distributed as dist

    backend = os.environ["RANKS_BACKEND"]
    if backend == "nccl":
        import torch

        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        backend,
        init_method=f"file://{meeting}/store",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    cases = importlib.import_module(module).CASES
    gc.freeze()  # each Trainer collects garbage, and what is imported by now is none
    with open(Path(meeting) / f"report_{dist.get_rank()}", "w", buffering=1) as report:
        for name in names:
            try:
                cases[name](Path(folder))
            except BaseException:
                report.write(json.dumps([name, traceback.format_exc()]) + "\n")
                raise
            report.write(json.dumps([name, ""]) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])

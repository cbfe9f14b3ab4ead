"""How the runs of a study are made: one after the other, or several at a time with a GPU each."""

import os
import queue
import shlex
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from recipe_error import RecipeError

Item = TypeVar("Item")
Result = TypeVar("Result")


class StudyRunner:
    """Starts processes and waits for them.

    Args:
        gpus: numbers of GPUs, each for one run at a time; none: one run at a time, on all there are.
    """

    def __init__(self, gpus: Sequence[int] = ()) -> None:
        self.gpus = gpus
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for gpu in gpus:
            self._free.put(gpu)
        self._is_stopping = False

    def each(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Call a function for each item, at once if there are GPUs to run on; results in the order of the items.

        What a call raises ends the others: none of them starts another run.
        """
        if not self.gpus:
            return [function(item) for item in items]
        with ThreadPoolExecutor(max(1, len(items))) as pool:
            calls = [pool.submit(function, item) for item in items]
            try:
                return [call.result() for call in calls]
            except BaseException:
                self._is_stopping = True
                raise

    def run(self, command: Sequence[str], name: str, log: Path) -> int:
        """Run a command to its end, and say so; returns its exit status.

        Args:
            command: with its arguments.
            name: of the run.
            log: gets what the command prints where several run at a time.

        Raises:
            RecipeError: if another call of ``each`` has failed meanwhile.
        """
        if not self.gpus:
            print(f"[{name}] {shlex.join(command)}", flush=True)
            return subprocess.run(command).returncode
        gpu = self._free.get()
        try:
            if self._is_stopping:
                raise RecipeError(f"{name} was not started, because another run failed")
            print(f"[{name}] on GPU {gpu}, prints to {log}: {shlex.join(command)}", flush=True)
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
                status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
            print(f"[{name}] ended" + (f" with exit status {status}, see {log}" if status else ""), flush=True)
            return status
        finally:
            self._free.put(gpu)


def parse_gpus(text: str | None) -> list[int]:
    """Parse ``0,1,2``; nothing is no GPU.

    Raises:
        RecipeError: for what is no number of a GPU of this machine, or is named twice.
    """
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    count = torch.cuda.device_count()
    for part in parts:
        if not part.isdecimal() or int(part) >= count:
            known = f"there are {count}, from 0 on" if count else "there is none here: leave --gpus out"
            raise RecipeError(f"--gpus {text}: {part!r} is no number of a GPU; {known}")
    if len(set(map(int, parts))) < len(parts):
        raise RecipeError(f"--gpus {text} names a GPU twice")
    return [int(part) for part in parts]

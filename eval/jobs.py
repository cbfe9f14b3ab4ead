"""The work of a run: each (checkpoint, benchmark) is a job, done in this process or by one process a GPU.

Jobs, not documents, are shared out: the harness draws solved examples from one stream a task and rank, and two ranks
would see other prompts than one.
"""

import multiprocessing
import os
import platform
import queue
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from checkpoints import Checkpoint, load_model, load_tokenizer
from eval_error import EvalError
from offline_data import DataFolder
from result_files import write_result
from suite import Benchmark

PACKAGES = ("lm_eval", "torch", "transformers", "datasets", "tokenizers", "peft")


@dataclass(frozen=True)
class Settings:
    """What all jobs of a run share; the fields are the flags of ``run``."""

    data_dir: Path | None = None
    tokenizer: Path | None = None
    shots: int | None = None
    limit: int | None = None
    max_length: int | None = None
    batch_size: int = 8
    dtype: str = "auto"
    allow_code: bool = False
    traceback: bool = False


@dataclass(frozen=True)
class Job:
    """A benchmark to run on a checkpoint; ``key`` says what its result depends on."""

    checkpoint: Checkpoint
    benchmark: Benchmark
    path: Path
    key: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.checkpoint.label} {self.benchmark.title}"


@dataclass(frozen=True)
class Report:
    """How a job ended: with a result, or with an error in one line."""

    job: Job
    result: dict[str, Any] | None
    error: str | None = None


class Evaluator:
    """Does jobs one after the other; keeps the last model and the tasks.

    Args:
        settings: of the run.
        device: "cpu", "cuda", "cuda:1", ...
    """

    def __init__(self, settings: Settings, device: str) -> None:
        self.settings = settings
        self.device = device
        self.data = DataFolder(settings.data_dir) if settings.data_dir else None
        self.loaded: dict[str, Any] = {}
        self.checkpoint: Checkpoint | None = None
        self.lm: Any = None

    def do(self, job: Job) -> Report:
        """Run a job and write its result; an error becomes part of the report."""
        try:
            return Report(job, self._result(job))
        except EvalError as error:
            return Report(job, None, str(error))
        except Exception as error:  # whatever a model or a task may raise: the other jobs go on
            if self.settings.traceback:
                traceback.print_exc()
            text = (str(error).strip() or "no message").splitlines()[0]
            hint = "; lower --batch-size" if type(error).__name__ == "OutOfMemoryError" else ""
            hint = hint or ("" if self.settings.traceback else "; --traceback shows where")
            return Report(job, None, f"{type(error).__name__}: {text}{hint}")

    def _result(self, job: Job) -> dict[str, Any]:
        from scoring import score
        from task_loading import load_benchmark

        benchmark = job.benchmark
        if benchmark.name not in self.loaded:
            self.loaded[benchmark.name] = load_benchmark(benchmark, self.data)
        if self.checkpoint != job.checkpoint:
            self._load(job.checkpoint)
        scores = score(
            self.lm,
            benchmark,
            self.loaded[benchmark.name],
            shots=self.settings.shots,
            limit=self.settings.limit,
            allow_code=self.settings.allow_code,
        )
        result = {
            "key": job.key,
            "benchmark": benchmark.name,
            "title": benchmark.title,
            "metric": benchmark.metric,
            "chance": benchmark.chance,
            "shots": job.key["shots"],
            "documents_published": benchmark.documents,
            "checkpoint": {
                "name": job.checkpoint.name,
                "label": job.checkpoint.label,
                "file_stem": job.checkpoint.file_stem,
            },
            "max_length": self.lm.max_length,
            "batch_size": self.settings.batch_size,
            "model_dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "device": device_name(self.device),
            "versions": versions(),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **scores.to_json(),
        }
        write_result(job.path, result)
        return result

    def _load(self, checkpoint: Checkpoint) -> None:
        from loaded_lm import LoadedLM
        from task_loading import quiet

        self.lm, self.checkpoint = None, None  # the last model's memory goes first
        tokenizer = load_tokenizer(checkpoint, self.settings.tokenizer)
        with quiet():
            model = load_model(checkpoint, tokens=len(tokenizer), dtype=self.settings.dtype, device=self.device)
            self.lm = LoadedLM(
                model, tokenizer, batch_size=self.settings.batch_size, max_length=self.settings.max_length
            )
        self.checkpoint = checkpoint


def device_name(device: str) -> str:
    """Return the name of the processor, such as "NVIDIA H100 80GB HBM3"."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Return the versions that a result depends on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def run_jobs(
    jobs: Sequence[Job], settings: Settings, devices: Sequence[str], work: Callable[..., None] | None = None
) -> Iterator[Report]:
    """Run jobs and yield each one's report as it ends.

    Args:
        jobs: in the order to be begun.
        settings: of the run.
        devices: with one, jobs run in this process; with more, in a process for each.
        work: what such a process runs, with the arguments of ``serve``.
    """
    if len(devices) == 1:
        evaluator = Evaluator(settings, devices[0])
        for job in jobs:
            yield evaluator.do(job)
        return
    context = multiprocessing.get_context("spawn")
    tasks, reports = context.Queue(), context.Queue()
    for index in range(len(jobs)):
        tasks.put(index)
    for _ in devices:
        tasks.put(None)
    processes = [
        context.Process(target=work or serve, args=(jobs, settings, device, tasks, reports), daemon=False)
        for device in devices
    ]
    begun: dict[int, int] = {}  # process -> its job
    open_jobs = set(range(len(jobs)))
    try:
        for process in processes:
            process.start()
        while open_jobs:
            ended = [process for process in processes if not process.is_alive()]  # before the queue is read
            try:
                sender, index, report = reports.get(timeout=1.0)
            except queue.Empty:
                for process in ended:
                    lost = begun.pop(process.pid or 0, None)
                    if lost in open_jobs:
                        open_jobs.discard(lost)
                        yield Report(jobs[lost], None, f"its process ended with exit code {process.exitcode}")
                if len(ended) == len(processes):
                    for index in sorted(open_jobs):
                        yield Report(jobs[index], None, "not run: no worker process is left")
                    return
                continue
            if report is None:
                begun[sender] = index
            elif index in open_jobs:
                begun.pop(sender, None)
                open_jobs.discard(index)
                yield report
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()


def serve(jobs: Sequence[Job], settings: Settings, device: str, tasks: Any, reports: Any) -> None:
    """Do jobs from the queue on a device until there are none; what a process of ``run_jobs`` runs."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.set_device(device)
    evaluator = Evaluator(settings, device)
    while (index := tasks.get()) is not None:
        reports.put((os.getpid(), index, None))
        reports.put((os.getpid(), index, evaluator.do(jobs[index])))

"""Benchmarks during training, logged like every other metric, without a trace in the training."""

import contextlib
import copy
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from eval_error import EvalError
from loaded_lm import LoadedLM
from offline_data import DataFolder
from scoring import score
from suite import select
from task_loading import load_benchmark, missing_data
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LMEvalCallback(TrainerCallback):  # type: ignore[misc]
    """Score benchmarks every N optimizer steps and at the end; log ``eval_NAME_METRIC`` through ``report_to``.

    Random states, train/eval modes and generation settings are put back: a run with the callback equals one without,
    bit for bit. Where several processes train with DDP the first one evaluates and the others wait.

    Example:
        ``trainer.add_callback(LMEvalCallback(trainer, ["hellaswag", "piqa"], every_steps=500, limit=200))``

    Args:
        trainer: the trainer that it is added to.
        tasks: names of benchmarks of the suite.
        every_steps: optimizer steps between two evaluations.
        tokenizer: of the model; None for the trainer's ``processing_class``.
        data_dir: folder of the data; None for the Hub.
        limit: questions of each leaf task; None for all.
        shots: solved examples; None for each benchmark's own.
        batch_size: sequences in a batch; None for ``per_device_eval_batch_size``.
        max_length: context, in tokens; None for the model's own.
        allow_code: run the programs that the model writes for MBPP.

    Raises:
        EvalError: for an unknown benchmark, data that is not there, no tokenizer, or parameters in shards
            (FSDP, DeepSpeed ZeRO): evaluate saved checkpoints there.
        ValueError: if ``every_steps`` is below 1.
    """

    def __init__(
        self,
        trainer: Trainer,
        tasks: Sequence[str],
        every_steps: int,
        *,
        tokenizer: Any = None,
        data_dir: str | Path | None = None,
        limit: int | None = None,
        shots: int | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
        allow_code: bool = False,
    ) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps is {every_steps}, must be at least 1")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise EvalError("parameters are in shards: evaluate saved checkpoints with eval/run.py instead")
        tokenizer = tokenizer or trainer.processing_class
        if tokenizer is None:
            raise EvalError("the trainer has no processing_class: give tokenizer=")
        self.trainer = trainer
        self.every_steps = every_steps
        self.tokenizer = copy.deepcopy(tokenizer)  # it gets a padding token
        self.benchmarks = select(tasks)
        for benchmark in self.benchmarks:
            if benchmark.runs_code and not allow_code:
                raise EvalError(f"{benchmark.title} runs programs that the model writes: give allow_code=True")
        self.shots, self.limit, self.allow_code = shots, limit, allow_code
        self.batch_size = batch_size or trainer.args.per_device_eval_batch_size
        self.max_length = max_length
        data = DataFolder(Path(data_dir)) if data_dir is not None else None
        if lines := missing_data(self.benchmarks, data):
            raise EvalError("; ".join(lines))
        with unchanged(trainer.model):
            self.loaded = {benchmark.name: load_benchmark(benchmark, data) for benchmark in self.benchmarks}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Evaluate when the step is one of those asked for, or the last."""
        if state.global_step % self.every_steps and state.global_step < state.max_steps:
            return control
        if state.is_world_process_zero:
            with unchanged(self.trainer.model):
                metrics = self.evaluate(self.trainer.model)
            should_log = control.should_log  # Trainer.log would take this step's loss from the log
            self.trainer.log(metrics)
            control.should_log = should_log
        self.trainer.accelerator.wait_for_everyone()
        return control

    def evaluate(self, model: Any) -> dict[str, float]:
        """Return ``eval_NAME_METRIC`` and ``..._stderr`` of each benchmark, in [0, 1]."""
        lm = LoadedLM(model, self.tokenizer, batch_size=self.batch_size, max_length=self.max_length)
        metrics = {}
        for benchmark in self.benchmarks:
            scores = score(
                lm,
                benchmark,
                self.loaded[benchmark.name],
                shots=self.shots,
                limit=self.limit,
                allow_code=self.allow_code,
            )
            name = f"eval_{benchmark.name}_{benchmark.metric.split(',')[0]}"
            metrics[name] = scores.score
            metrics[f"{name}_stderr"] = scores.standard_error
        return metrics


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Put back the random states and each module's train or eval mode, which the harness changes."""
    modes = {module: module.training for module in model.modules()}
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)

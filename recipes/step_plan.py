"""From tokens and batch sizes to steps."""

import math
from dataclasses import dataclass

import torch
from recipe_arguments import RecipeArguments
from recipe_error import RecipeError
from transformers import TrainingArguments


@dataclass(frozen=True)
class Plan:
    """How a run is cut into steps."""

    tokens_per_step: int  # or images
    sequences_per_step: int
    sequences_per_device: int
    gradient_accumulation_steps: int
    steps: int
    steps_per_pass: int | None  # None where the data is not read or has no end


def plan_steps(
    arguments: RecipeArguments, training: TrainingArguments, given: frozenset[str], blocks: int | None
) -> Plan:
    """Work out the batch and the number of steps.

    Args:
        arguments: ours.
        training: Trainer's; not modified.
        given: flags of the command line; a batch size not typed there may be lowered to fit ``tokens_per_step``.
        blocks: training samples in a pass; None for a stream, and if the data was not read.

    Raises:
        RecipeError: if ``tokens_per_step`` cannot be divided so, there is no whole step in ``max_tokens``, or nothing
            says how long a stream is to be read.
    """
    devices = training.world_size * max(1, training.n_gpu)
    per_device, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if arguments.tokens_per_step is not None:
        sequences, left_over = divmod(arguments.tokens_per_step, arguments.block_size * devices)
        if left_over or sequences == 0:
            raise RecipeError(
                f"--tokens_per_step is {arguments.tokens_per_step:,}, no multiple of {devices} devices x a block of "
                f"{arguments.block_size:,} tokens"
            )
        if "per_device_train_batch_size" not in given:
            per_device = max(size for size in range(1, min(per_device, sequences) + 1) if sequences % size == 0)
        accumulation, left_over = divmod(sequences, per_device)
        if left_over:
            raise RecipeError(
                f"--tokens_per_step is {arguments.tokens_per_step:,}: the {sequences} sequences a device are no "
                f"multiple of --per_device_train_batch_size {per_device}"
            )
    sequences_per_step = per_device * devices * accumulation
    tokens_per_step = sequences_per_step * arguments.block_size
    steps_per_pass = None if blocks is None else max(1, blocks // sequences_per_step)
    if training.max_steps > 0:
        steps = training.max_steps
    elif arguments.max_tokens is not None:
        steps = int(arguments.max_tokens // tokens_per_step)
        if steps == 0:
            raise RecipeError(f"--max_tokens {arguments.max_tokens:,.0f} is less than one step of {tokens_per_step:,}")
    elif blocks is None:
        raise RecipeError("--streaming has no end: give --max_steps or --max_tokens")
    else:
        steps = max(1, math.floor(training.num_train_epochs * blocks / sequences_per_step))
    return Plan(tokens_per_step, sequences_per_step, per_device, accumulation, steps, steps_per_pass)


def apply_schedule(arguments: RecipeArguments, training: TrainingArguments, steps: int) -> None:
    """Write ``--schedule``, ``--decay`` and ``--floor`` into Trainer's arguments; without a schedule those stay.

    Raises:
        RecipeError: if warm-up and decay are longer than the run.
    """
    if arguments.schedule is None:
        return
    decay = round(arguments.decay * steps) if arguments.decay < 1 else int(arguments.decay)
    has_horizon = decay > 0 or arguments.schedule == "cosine"
    if has_horizon and (warmup := training.get_warmup_steps(steps)) + decay > steps:
        raise RecipeError(
            f"a warm-up of {warmup:,} steps and a decay of {decay:,} do not fit in {steps:,} steps: lower "
            "--warmup_steps or --decay, which are fractions of the run below 1"
        )
    name, kwargs = "constant_with_warmup", {}
    if arguments.schedule == "cosine":
        # with min_lr the floor would be read from the optimizer's defaults
        name, kwargs = "cosine_with_min_lr", {"min_lr_rate": arguments.floor}
    elif decay:
        name = "warmup_stable_decay"
        kwargs = {"num_decay_steps": decay, "decay_type": "linear", "min_lr_ratio": arguments.floor}
    training.lr_scheduler_type = type(training.lr_scheduler_type)(name)
    training.lr_scheduler_kwargs = kwargs


def apply_plan(
    plan: Plan, training: TrainingArguments, *, has_validation: bool, is_stream: bool, given: frozenset[str]
) -> None:
    """Write the plan into Trainer's arguments; "epoch" in a strategy means each pass over the data.

    Raises:
        RecipeError: for a sampling strategy of its own, an evaluation that was asked for without validation data, or
            workers for a stream.
    """
    if "train_sampling_strategy" in given and training.train_sampling_strategy != "sequential":
        raise RecipeError("--train_sampling_strategy: the order is fixed here, a function of the seed alone")
    training.train_sampling_strategy = "sequential"
    training.remove_unused_columns = False
    training.dataloader_pin_memory = training.dataloader_pin_memory and torch.accelerator.is_available()
    training.accelerator_config.non_blocking = training.dataloader_pin_memory  # else each batch waits for the GPU
    if is_stream and training.dataloader_num_workers:
        if "dataloader_num_workers" in given:
            raise RecipeError("--dataloader_num_workers: a stream keeps its place in the main process; leave it at 0")
        training.dataloader_num_workers = 0
        training.dataloader_prefetch_factor = None
    training.per_device_train_batch_size = plan.sequences_per_device
    training.gradient_accumulation_steps = plan.gradient_accumulation_steps
    training.max_steps = plan.steps
    if not has_validation:
        if "eval_strategy" in given and training.eval_strategy != "no":
            raise RecipeError(f"--eval_strategy {training.eval_strategy.value}: there is nothing to validate on")
        if training.load_best_model_at_end:
            raise RecipeError("--load_best_model_at_end: there is nothing to validate on; leave it out")
        training.eval_strategy = type(training.eval_strategy)("no")
    for name in ("eval", "save", "logging"):
        strategy = getattr(training, f"{name}_strategy")
        if strategy == "epoch" and plan.steps_per_pass is not None:
            setattr(training, f"{name}_strategy", type(strategy)("steps"))
            setattr(training, f"{name}_steps", plan.steps_per_pass)

"""The one training program: train a model from scratch with the Hugging Face Trainer.

A recipe such as ``qwen2_5.py`` holds presets and calls `main`. The output folder gets the model and its tokenizer, the
Trainer's checkpoints and state (``trainer_state.json``), ``run.json`` (the resolved settings, versions, hardware,
hashes of the initial weights and of the first batch, and at the end the results) and ``log.jsonl``, the curves of the
run.
"""

import json
import logging
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from document_tokens import tokenizer_fingerprint
from model_flops import peak_flops
from recipe_arguments import Preset, RecipeArguments, parse_arguments
from recipe_error import RecipeError
from recipe_trainer import PretrainingTrainer, stream_state_file
from run_folder import (
    AUTO,
    check_output_folder,
    check_same_run,
    checkpoint_to_resume,
    clear_partial_checkpoints,
    clear_run,
    commit,
    hardware,
    is_finished,
    package_versions,
    read_run,
    weights_hash,
    write_run,
)
from run_log import LOG_FILE, RunLog, finite_or_null
from step_plan import Plan, apply_plan, apply_schedule, plan_steps
from tasks import TASK_CLASSES, Task, TrainingData, initial_model
from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from hf_matrix_optim.options import split_optim_args
from hf_matrix_optim.partition import explain
from hf_matrix_optim.registry import (
    OPTIMIZER_NAMES,
    create_optimizer,
    options_with_target_modules,
    parse_options,
    partition_options_of,
)

TARGET_MFU = 0.4
H100 = "H100"


class RunFlow(TrainerCallback):
    """Stops a run early where told, and logs whatever a checkpoint would otherwise lose.

    Trainer averages the loss since its last log. A checkpoint between two logs would drop what has been summed so far,
    and the log of a resumed run would differ from that of an uninterrupted one.
    """

    def __init__(self, stop_after: int | None) -> None:
        self.stop_after = stop_after

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stop_after is not None and self.stop_after <= state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True
        if control.should_save or control.should_evaluate:
            control.should_log = True


def optimizer_name(training: TrainingArguments) -> str:
    """Return the value of ``--optim`` as a plain string."""
    return str(getattr(training.optim, "value", training.optim))


def schedule_identity(training: TrainingArguments, plan: Plan) -> dict[str, Any]:
    """What decides the learning rate of each step; the length of the run only where the schedule depends on it."""
    name = str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type))
    has_horizon = name not in ("constant", "constant_with_warmup", "inverse_sqrt")
    return {
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": training.lr_scheduler_kwargs or {},
        "warmup_steps": training.get_warmup_steps(plan.steps),
        "steps": plan.steps if has_horizon else None,
    }


def describe(
    recipe: str,
    arguments: RecipeArguments,
    training: TrainingArguments,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: Plan,
    data: TrainingData | None,
    flops_per_token: float,
) -> dict[str, Any]:
    """Collect what ``run.json`` says about a run before it starts; ``identity`` is what a resumed run must share."""
    precision = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    return {
        "identity": {
            "recipe": recipe,
            "preset": arguments.preset,
            "model": config.to_dict(),
            "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
            "data": None if data is None else data.fingerprint,
            "block_size": arguments.block_size,
            "tokens_per_step": plan.tokens_per_step,
            "seed": training.seed,
            "data_seed": training.data_seed,
            "optim": optimizer_name(training),
            "optim_args": training.optim_args,
            "learning_rate": training.learning_rate,
            "schedule": schedule_identity(training, plan),
            "weight_decay": training.weight_decay,
            "adam": [training.adam_beta1, training.adam_beta2, training.adam_epsilon],
            "max_grad_norm": training.max_grad_norm,
            "label_smoothing_factor": training.label_smoothing_factor,
            "precision": precision,
        },
        "plan": asdict(plan),
        "flops_per_token": flops_per_token,
        "recipe_arguments": asdict(arguments),
        "training_arguments": training.to_dict(),
        "world_size": training.world_size,
        "versions": package_versions(),
        "hardware": hardware(),
        "commit": commit(),
    }


def explain_partition(task: Task, config: PretrainedConfig, training: TrainingArguments) -> str:
    """Try the optimizer on the model without allocating a weight; returns the table of what it does with parameters.

    For an optimizer that is not one of ours, the table shows what ours would do.

    Raises:
        RecipeError: if the optimizer refuses its options, its values or the model.
    """
    with torch.device("meta"):
        model = task.new_model(config, None)
    name = optimizer_name(training)
    if name not in OPTIMIZER_NAMES:
        return explain(model)
    try:
        options = parse_options(name, split_optim_args(training.optim_args))
        options = options_with_target_modules(options, training)
        create_optimizer(
            name,
            model,
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            options=options,
        )
        return explain(model, partition_options_of(options))
    except ValueError as error:
        raise RecipeError(f"--optim {name}: {error}") from error


def check_attention(task: Task, config: PretrainedConfig, attention: str | None) -> None:
    """Refuse an attention implementation that there is not, or not for this model.

    Raises:
        RecipeError: naming it.
    """
    try:
        with torch.device("meta"):
            task.new_model(config, attention)
    except (ValueError, ImportError) as error:
        raise RecipeError(f"--attention {attention}: {error}") from error


def show_dry_run(run: Mapping[str, Any], partition: str, task: Task, config: PretrainedConfig) -> None:
    """Print the resolved settings, how each parameter would be updated, the steps and what they cost."""
    with torch.device("meta"):
        parameters = task.new_model(config, None).num_parameters()
    plan = run["plan"]
    total = plan["steps"] * plan["tokens_per_step"]
    flops = total * run["flops_per_token"]
    peak = peak_flops(H100)
    assert peak is not None
    print(json.dumps(run, indent=2, sort_keys=True, default=str))
    print(f"\n{partition}\n")
    print(
        f"{parameters:,} parameters; {plan['steps']:,} steps of {plan['tokens_per_step']:,} {task.unit} = "
        f"{total:,} {task.unit}"
        + (f", {plan['steps_per_pass']:,} steps a pass over the data" if plan["steps_per_pass"] else "")
    )
    print(
        f"{run['flops_per_token']:.3g} FLOPs for one of the {task.unit}, {flops:.3g} in all: "
        f"{flops / (TARGET_MFU * peak) / 3600:.3g} hours of one H100 at {TARGET_MFU:.0%} of its peak in bfloat16"
    )


def total_peak_flops(training: TrainingArguments) -> float | None:
    """Peak of all devices of the run together in bfloat16; None without a known GPU."""
    if training.device.type != "cuda" or not training.bf16:
        return None
    peak = peak_flops(torch.cuda.get_device_name(training.device))
    return None if peak is None else peak * training.world_size * max(1, training.n_gpu)


def pretrain(
    recipe: str,
    preset: Preset,
    arguments: RecipeArguments,
    training: TrainingArguments,
    given: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Run one training, or its dry run, and return the contents of its ``run.json``.

    Everything that can be refused is refused before the output folder is touched.

    Raises:
        RecipeError: for what cannot be done as asked.
    """
    if training.disable_tqdm:
        disable_progress_bar()
    if training.n_gpu > 1 and not arguments.dry_run:
        raise RecipeError(
            f"one process sees {training.n_gpu} GPUs: start one for each (torchrun --nproc_per_node {training.n_gpu} "
            "recipes/...), or set CUDA_VISIBLE_DEVICES=0"
        )
    task = TASK_CLASSES[preset.task]()
    folder = Path(training.output_dir)
    is_auto = str(training.resume_from_checkpoint).lower() == AUTO
    starts_over = arguments.overwrite_output_dir
    checkpoint = checkpoint_to_resume(folder, training.resume_from_checkpoint)
    if is_auto and checkpoint is None and folder.is_dir() and read_run(folder) is not None:
        starts_over = not is_finished(folder)
    if not (is_auto and is_finished(folder)):
        check_output_folder(folder, resume=checkpoint is not None, overwrite=starts_over)

    needs_data = not arguments.dry_run or (training.max_steps <= 0 and arguments.max_tokens is None)
    try:
        tokenizer = task.load_tokenizer(arguments)
    except RecipeError as error:
        if needs_data or "vocab_size" not in preset.model:
            raise
        print(f"without a tokenizer, which a dry run can do without: {error}", file=sys.stderr)
        tokenizer = None
    config = task.build_config(preset, tokenizer, arguments)
    task.loss(training)
    check_attention(task, config, arguments.attention)
    partition = explain_partition(task, config, training)
    flops_per_token = task.flops_per_token(config, arguments.block_size)

    data = None
    if needs_data:
        data = task.prepare(arguments, training, tokenizer, config)
    plan = plan_steps(arguments, training, given, None if data is None else data.samples_a_pass)
    apply_schedule(arguments, training, plan.steps)
    is_stream = arguments.streaming
    has_validation = data is None or data.validation is not None
    apply_plan(plan, training, has_validation=has_validation, is_stream=is_stream, given=given)
    run = describe(recipe, arguments, training, config, tokenizer, plan, data, flops_per_token)
    earlier = None if checkpoint is None else read_run(Path(checkpoint).parent)
    if is_auto and is_finished(folder):
        earlier = read_run(folder)
    if earlier is not None and data is not None:
        check_same_run(earlier, run["identity"])
    if arguments.dry_run or data is None:
        if training.process_index == 0:
            show_dry_run(run, partition, task, config)
        return run
    if is_auto and earlier is not None and "results" in earlier and earlier["results"]["steps"] >= plan.steps:
        print(f"{folder} holds this run, finished: nothing is left to do")
        return earlier
    run["data"] = dict(data.facts)
    run["unit"] = task.unit
    return train(run, task, preset, arguments, config, tokenizer, data, plan, training, checkpoint)


def train(
    run: dict[str, Any],
    task: Task,
    preset: Preset,
    arguments: RecipeArguments,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    data: TrainingData,
    plan: Plan,
    training: TrainingArguments,
    checkpoint: str | None,
) -> dict[str, Any]:
    """Train, evaluate and save a run that has been checked; returns ``run`` with its results."""
    folder = Path(training.output_dir)
    order_seed = training.seed if training.data_seed is None else training.data_seed
    model = initial_model(task, preset, config, training.seed, arguments.attention or task.attention)
    task.initialise(model, data)
    run["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    run["initial_weights_sha256"] = weights_hash(model)
    first_samples = plan.sequences_per_step // (training.world_size if data.is_stream else 1)
    run["first_batch_sha256"] = data.first_batch_hash(order_seed, first_samples)
    run["samples"] = {
        "a_pass": data.samples_a_pass,
        "validation": None if data.validation is None else len(data.validation),
    }
    run["resumed_from"] = checkpoint
    samples = data.training(order_seed, plan.steps * plan.sequences_per_step)
    log = RunLog(folder)
    trainer = PretrainingTrainer(
        model=model,
        args=training,
        train_dataset=samples,
        eval_dataset=data.validation,
        data_collator=data.collate,
        processing_class=tokenizer,
        compute_loss_func=task.loss(training),
        callbacks=[RunFlow(arguments.stop_after)],
        tokens_per_step=plan.tokens_per_step,
        tokens_per_sample=arguments.block_size,
        flops_per_token=run["flops_per_token"],
        peak_flops=total_peak_flops(training),
        has_perplexity=task.has_perplexity,
        log_record=log.append,
        stream_state=stream_place(samples, plan, training) if data.is_stream else None,
    )
    resumed_step = 0
    if checkpoint is not None:
        resumed_step = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")).global_step
        trainer.clock.load(Path(checkpoint))
        if data.is_stream:
            find_place(samples, Path(checkpoint), training)
    if trainer.is_world_process_zero():
        if checkpoint is None:
            clear_run(folder)
        else:
            clear_partial_checkpoints(folder)
        write_run(folder, run)
        if checkpoint is not None and Path(checkpoint).resolve().parent != folder.resolve():
            shutil.copy(Path(checkpoint).parent / LOG_FILE, folder)
        log.truncate(resumed_step)
        print(
            f"{run['parameters']:,} parameters, {plan.steps:,} steps of {plan.tokens_per_step:,} {task.unit}, "
            f"{run['identity']['optim']} at learning rate {training.learning_rate:g} -> {folder}"
            + (f", from step {resumed_step:,} on" if resumed_step else "")
        )
    trainer.accelerator.wait_for_everyone()
    if training.log_level == "passive":  # as it is by default: then the one line about the partition is shown too
        logging.getLogger("transformers.hf_matrix_optim").setLevel(logging.INFO)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < plan.steps:
        if trainer.is_world_process_zero():
            print(
                f"stopped after step {trainer.state.global_step:,} of {plan.steps:,}; --resume_from_checkpoint true "
                "goes on"
            )
        return run
    finish(run, trainer, task, plan, data, outcome.metrics)
    return run


def finish(
    run: dict[str, Any],
    trainer: PretrainingTrainer,
    task: Task,
    plan: Plan,
    data: TrainingData,
    metrics: dict[str, float],
) -> None:
    """Evaluate and save a run that has come to its end, and write its results into ``run`` and ``run.json``."""
    trainer.save_metrics("train", metrics)
    clock = trainer.clock
    speed = trainer.tokens_per_second()
    results: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * plan.tokens_per_step,
        "train_loss": last_training_loss(trainer),
        "train_seconds": clock.train_seconds,
        "timed_steps": clock.timed_steps,
        "first_step_seconds": clock.first_step_seconds,
        "optimizer_seconds": clock.optimizer_seconds,
        "tokens_per_second": speed,
        "mfu": trainer.mfu(speed),
    }
    evaluation: dict[str, float] = {}
    if data.validation is not None:
        evaluation = final_evaluation(trainer)
        trainer.save_metrics("eval", evaluation)
        names = ("eval_loss", "eval_perplexity", "eval_accuracy")
        results |= {name: evaluation[name] for name in names if name in evaluation}
    run["results"] = {name: finite_or_null(value) for name, value in results.items()}
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_run(Path(trainer.args.output_dir), run)
        if evaluation:
            unit = task.unit.removesuffix("s")
            print(
                f"validation loss {evaluation['eval_loss']:.4f} nats {'an' if unit == 'image' else 'a'} {unit}, "
                + (f"perplexity {evaluation['eval_perplexity']:.2f}, " if task.has_perplexity else "")
                + f"accuracy {evaluation['eval_accuracy']:.2%}"
            )


def last_training_loss(trainer: Trainer) -> float:
    """Return the last logged mean of the training loss; NaN if there is none."""
    return next((float(log["loss"]) for log in trainer.state.log_history[::-1] if "loss" in log), math.nan)


def final_evaluation(trainer: Trainer) -> dict[str, float]:
    """Return the evaluation of the final weights, from the log if it was just made."""
    if not trainer.args.load_best_model_at_end:
        for log in trainer.state.log_history[::-1]:
            if log["step"] != trainer.state.global_step:
                break
            if "eval_loss" in log:
                return {name: value for name, value in log.items() if name.startswith("eval_")}
    metrics: dict[str, float] = trainer.evaluate()
    return metrics


def stream_place(samples: Any, plan: Plan, training: TrainingArguments) -> Any:
    """Return the function that gives a stream's place after so many steps, for a checkpoint."""
    return lambda steps: samples.state_dict(steps * plan.sequences_per_step // training.world_size)


def find_place(samples: Any, checkpoint: Path, training: TrainingArguments) -> None:
    """Put a stream where a checkpoint left it.

    Raises:
        RecipeError: if the checkpoint was written by another number of ranks.
    """
    files = list(checkpoint.glob("stream_rank*.json"))
    if len(files) != training.world_size:
        raise RecipeError(
            f"{checkpoint} is of a stream on {len(files)} ranks, this run has {training.world_size}: a stream goes on "
            "with the number it was started with"
        )
    place = stream_state_file(checkpoint, training.process_index)
    samples.load_state_dict(json.loads(place.read_text(encoding="utf-8")))
    training.ignore_data_skip = True


def main(recipe: str, presets: Mapping[str, Preset], argv: Sequence[str] | None = None) -> int:
    """Run a recipe's command line; returns the exit status, 2 for what was refused."""
    try:
        pretrain(recipe, *parse_arguments(recipe, presets, argv))
    except RecipeError as error:
        print("error:", *str(error).split(), file=sys.stderr)  # on one line
        return 2
    return 0

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flag_checks import check_one_gpu, exit_status
from recipe_arguments import Preset, RecipeArguments, parse_arguments
from recipe_error import REFUSALS, RecipeError
from recipe_trainer import ClippingPretrainingTrainer, PretrainingTrainer, stream_state_file
from run_description import check_attention, describe, explain_partition, show_dry_run, total_peak_flops
from run_folder import (
    check_output_folder,
    check_same_run,
    clear_partial_checkpoints,
    clear_run,
    is_checkpoint_of,
    look_into,
    read_run,
    weights_hash,
    write_run,
)
from run_log import LOG_FILE, RunLog, finite_or_null
from step_plan import Plan, apply_plan, apply_schedule, plan_steps
from task import Task, TrainingData, initial_model
from tasks import TASK_CLASSES
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
    if not arguments.dry_run:
        check_one_gpu(training, "recipes/...")
    task = TASK_CLASSES[preset.task]()
    folder = Path(training.output_dir)
    checkpoint, finished, _ = look_into(
        folder, training.resume_from_checkpoint, overwrite=arguments.overwrite_output_dir
    )

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
    earlier = finished or (None if checkpoint is None else read_run(Path(checkpoint).parent))
    if earlier is not None and data is not None:
        check_same_run(earlier, run["identity"])
    if arguments.dry_run or data is None:
        if training.process_index == 0:
            show_dry_run(run, partition, task, config)
        return run
    if finished is not None:
        if finished["results"]["steps"] >= plan.steps:
            print(f"{folder} holds this run, finished: nothing is left to do")
            return finished
        is_own = is_checkpoint_of(folder, checkpoint)
        check_output_folder(folder, resume=is_own, overwrite=arguments.overwrite_output_dir)
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
    clipping = partial(ClippingPretrainingTrainer, clip=arguments.clip)
    make_trainer = partial(
        PretrainingTrainer if arguments.clip == "all" else clipping,
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
    trainer = accepted_trainer(make_trainer, folder)
    resumed_step = resume_clock(trainer, checkpoint)
    if checkpoint is not None and data.is_stream:
        find_place(samples, Path(checkpoint), training)
    if trainer.is_world_process_zero():
        enter_folder(folder, run, checkpoint, log, resumed_step)
        print(
            f"{run['parameters']:,} parameters, {plan.steps:,} steps of {plan.tokens_per_step:,} {task.unit}, "
            f"{run['identity']['optim']} at learning rate {training.learning_rate:g} -> {folder}"
            + (f", from step {resumed_step:,} on" if resumed_step else "")
        )
    trainer.accelerator.wait_for_everyone()
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < plan.steps:
        say_stopped(trainer, plan)
        return run
    finish(run, trainer, task, plan, data, outcome.metrics)
    return run


def accepted_trainer(make_trainer: Callable[[], PretrainingTrainer], folder: Path) -> PretrainingTrainer:
    """Make the trainer, and what it would first make in ``train``, while an earlier run still stands in the folder.

    Raises:
        RecipeError: for what Trainer, torch or the optimizer refuses.
    """
    is_new = not folder.exists()
    try:
        trainer = make_trainer()
        if trainer.args.log_level == "passive":  # as it is by default: the one line about the partition is shown too
            logging.getLogger("transformers.hf_matrix_optim").setLevel(logging.INFO)
        with torch.random.fork_rng(devices=[]):  # a loader may draw its seed
            trainer.get_train_dataloader()
            if trainer.eval_dataset is not None:
                trainer.get_eval_dataloader()
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # those make it of the sharded model
            trainer.create_optimizer()
    except REFUSALS as error:
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # which Trainer has made
        raise RecipeError(str(error)) from error
    return trainer


def resume_clock(trainer: PretrainingTrainer, checkpoint: str | None) -> int:
    """Set the clock to a checkpoint's; returns the checkpoint's step, 0 without one."""
    if checkpoint is None:
        return 0
    trainer.clock.load(Path(checkpoint))
    return int(TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")).global_step)


def enter_folder(folder: Path, run: Mapping[str, Any], checkpoint: str | None, log: RunLog, resumed_step: int) -> None:
    """Make the output folder that of ``run``: what an overwritten run left goes, the log ends at the checkpoint."""
    is_own = is_checkpoint_of(folder, checkpoint)
    if is_own:
        clear_partial_checkpoints(folder)
    else:
        clear_run(folder)
    write_run(folder, run)
    if checkpoint is not None and not is_own:
        shutil.copy(Path(checkpoint).parent / LOG_FILE, folder)
    log.truncate(resumed_step)


def say_stopped(trainer: PretrainingTrainer, plan: Plan) -> None:
    """Say that a run has stopped before its end, and how it goes on."""
    if trainer.is_world_process_zero():
        print(
            f"stopped after step {trainer.state.global_step:,} of {plan.steps:,}; --resume_from_checkpoint true "
            "goes on"
        )


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
        "peak_memory_bytes": trainer.memory.peak,
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
    return exit_status(lambda: pretrain(recipe, *parse_arguments(recipe, presets, argv)))

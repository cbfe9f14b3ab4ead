"""The one training program: pretrain a causal language model from scratch with the Hugging Face Trainer.

A recipe such as ``qwen2_5.py`` holds presets and calls `main`. The output folder gets the model and its tokenizer, the
Trainer's checkpoints and log (``trainer_state.json``), and ``run.json``: the resolved settings, versions, hardware,
hashes of the initial weights and of the first batch, and the results.
"""

import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from packed_text import (
    OrderedBlocks,
    PackedText,
    TextSource,
    collate_blocks,
    find_text_files,
    packed_text,
    tokenizer_fingerprint,
)
from recipe_arguments import Preset, RecipeArguments, parse_arguments
from recipe_error import RecipeError
from run_folder import (
    check_output_folder,
    check_same_run,
    checkpoint_to_resume,
    clear_run,
    commit,
    hardware,
    package_versions,
    read_run,
    weights_hash,
    write_run,
)
from step_plan import Plan, apply_plan, plan_steps
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from hf_matrix_optim.options import split_optim_args
from hf_matrix_optim.partition import explain
from hf_matrix_optim.registry import (
    OPTIMIZER_NAMES,
    create_optimizer,
    options_with_target_modules,
    parse_options,
    partition_options_of,
)


class TrainingClock(TrainerCallback):
    """Seconds spent in training steps and waiting for their data, without evaluation and saving; a resume goes on."""

    def __init__(self) -> None:
        self.train_seconds = 0.0
        self._mark = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.train_seconds = next(
            (log["train_seconds"] for log in state.log_history[::-1] if "train_seconds" in log), 0.0
        )
        self._mark = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.perf_counter()
        self.train_seconds += now - self._mark
        self._mark = now

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._mark = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._mark = time.perf_counter()


class PretrainingTrainer(Trainer):
    """Trainer whose log also has ``train_seconds``, and the perplexity beside each evaluation loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock = TrainingClock()
        self.add_callback(self.clock)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))
        logs["train_seconds"] = round(self.clock.train_seconds, 3)
        super().log(logs, start_time)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can close documents.

    Raises:
        RecipeError: if it cannot be loaded or has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise RecipeError(f"--tokenizer {name} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise RecipeError(f"--tokenizer {name} has no eos token, which closes each document")
    return tokenizer


def build_config(preset: Preset, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PretrainedConfig:
    """Build the model configuration; without a ``vocab_size`` of its own it takes the tokenizer's, rounded up to 64.

    Raises:
        RecipeError: if the tokenizer has more words than the model, or a block more positions.
    """
    values = dict(preset.model)
    values.setdefault("vocab_size", -(-len(tokenizer) // 64) * 64)
    values["bos_token_id"] = values["eos_token_id"] = tokenizer.eos_token_id
    config = preset.config_class(**values)
    if len(tokenizer) > config.vocab_size:
        raise RecipeError(
            f"the tokenizer has {len(tokenizer):,} words, the model of this preset {config.vocab_size:,}"
        )
    if block_size > config.max_position_embeddings:
        raise RecipeError(
            f"--block_size is {block_size:,}; this model has {config.max_position_embeddings:,} positions, "
            "so it can be no larger"
        )
    return config


def build_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """Build the model in float32 with initial weights that depend on the seed alone."""
    set_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def optimizer_name(training: TrainingArguments) -> str:
    """Return the value of ``--optim`` as a plain string."""
    return str(getattr(training.optim, "value", training.optim))


def text_sources(arguments: RecipeArguments) -> tuple[TextSource, TextSource | None]:
    """Resolve the files or the Hub name of the training and the validation text.

    Raises:
        RecipeError: for files that are missing, empty, of an unknown kind, or in both.
    """
    train = TextSource(
        find_text_files(arguments.train_data or ()),
        arguments.dataset_name,
        arguments.dataset_config,
        arguments.dataset_split,
        arguments.text_column,
    )
    if arguments.validation_data is None:
        return train, None
    validation = TextSource(find_text_files(arguments.validation_data), text_column=arguments.text_column)
    if both := set(train.files) & set(validation.files):
        raise RecipeError(f"{min(both)} is in --train_data and in --validation_data")
    return train, validation


def describe(
    recipe: str,
    arguments: RecipeArguments,
    training: TrainingArguments,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    data: PackedText | None,
) -> dict[str, Any]:
    """Collect what ``run.json`` says about a run before it starts; ``identity`` is what a resumed run must share."""
    return {
        "identity": {
            "recipe": recipe,
            "preset": arguments.preset,
            "model": config.to_dict(),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "data": None if data is None else data.fingerprint,
            "block_size": arguments.block_size,
            "tokens_per_step": plan.tokens_per_step,
            "seed": training.seed,
            "data_seed": training.data_seed,
            "optim": optimizer_name(training),
            "optim_args": training.optim_args,
        },
        "plan": asdict(plan),
        "recipe_arguments": asdict(arguments),
        "training_arguments": training.to_dict(),
        "world_size": training.world_size,
        "versions": package_versions(),
        "hardware": hardware(),
        "commit": commit(),
    }


def explain_partition(config: PretrainedConfig, training: TrainingArguments) -> str:
    """Try the optimizer on the model without allocating a weight; returns the table of what it does with parameters.

    For an optimizer that is not one of ours, the table shows what ours would do.

    Raises:
        RecipeError: if the optimizer refuses its options, its values or the model.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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


def show_dry_run(run: Mapping[str, Any], partition: str, config: PretrainedConfig) -> None:
    """Print the resolved settings, how each parameter would be updated, and the steps."""
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    plan = run["plan"]
    print(json.dumps(run, indent=2, sort_keys=True, default=str))
    print(f"\n{partition}\n")
    print(
        f"{parameters:,} parameters; {plan['steps']:,} steps of {plan['tokens_per_step']:,} tokens = "
        f"{plan['steps'] * plan['tokens_per_step']:,} tokens"
        + (f", {plan['steps_per_pass']:,} steps a pass over the text" if plan["steps_per_pass"] else "")
    )


def pretrain(
    recipe: str,
    preset: Preset,
    arguments: RecipeArguments,
    training: TrainingArguments,
    given: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Run one pretraining, or its dry run, and return the contents of its ``run.json``.

    Everything that can be refused is refused before the output folder is touched.

    Raises:
        RecipeError: for what cannot be done as asked.
    """
    folder = Path(training.output_dir)
    if training.disable_tqdm:
        datasets.disable_progress_bars()
    checkpoint = checkpoint_to_resume(folder, training.resume_from_checkpoint)
    check_output_folder(folder, resume=checkpoint is not None, overwrite=arguments.overwrite_output_dir)
    train_source, validation_source = text_sources(arguments)
    tokenizer = load_tokenizer(str(arguments.tokenizer))
    config = build_config(preset, tokenizer, arguments.block_size)
    partition = explain_partition(config, training)

    data = None
    needs_data = not arguments.dry_run or (training.max_steps <= 0 and arguments.max_tokens is None)
    if needs_data:
        with training.main_process_first(desc="preparing the text"):
            data = packed_text(
                train_source,
                validation_source,
                tokenizer,
                arguments.block_size,
                arguments.validation_fraction,
                workers=arguments.preprocessing_workers,
                cache_dir=arguments.cache_dir,
            )
    plan = plan_steps(arguments, training, given, None if data is None else len(data.train))
    apply_plan(plan, training, has_validation=data is None or data.validation is not None, given=given)
    run = describe(recipe, arguments, training, config, tokenizer, plan, data)
    earlier = None if checkpoint is None else read_run(Path(checkpoint).parent)
    if earlier is not None and data is not None:
        check_same_run(earlier, run["identity"])
    if arguments.dry_run or data is None:
        if training.process_index == 0:
            show_dry_run(run, partition, config)
        return run
    return train(run, config, tokenizer, data, plan, training, checkpoint)


def train(
    run: dict[str, Any],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: PackedText,
    plan: Plan,
    training: TrainingArguments,
    checkpoint: str | None,
) -> dict[str, Any]:
    """Train, evaluate and save a run that has been checked; returns ``run`` with its results."""
    folder = Path(training.output_dir)
    order_seed = training.seed if training.data_seed is None else training.data_seed
    model = build_model(config, training.seed)
    samples = OrderedBlocks(data.train, order_seed, plan.steps * plan.sequences_per_step)
    trainer = PretrainingTrainer(
        model=model,
        args=training,
        train_dataset=samples,
        eval_dataset=data.validation,
        data_collator=collate_blocks,
        processing_class=tokenizer,
    )
    first_batch = collate_blocks([samples[index] for index in range(plan.sequences_per_step)])["input_ids"]
    run["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    run["initial_weights_sha256"] = weights_hash(model)
    run["first_batch_sha256"] = hashlib.sha256(first_batch.numpy().tobytes()).hexdigest()
    run["blocks"] = {"train": len(data.train), "validation": len(data.validation) if data.validation else 0}
    run["resumed_from"] = checkpoint
    if trainer.is_world_process_zero():
        if checkpoint is None:
            clear_run(folder)
        write_run(folder, run)
        print(
            f"{run['parameters']:,} parameters, {plan.steps:,} steps of {plan.tokens_per_step:,} tokens, "
            f"{run['identity']['optim']} at learning rate {training.learning_rate:g} -> {folder}"
        )
    if training.log_level == "passive":  # as it is by default: then the one line about the partition is shown too
        logging.getLogger("transformers.hf_matrix_optim").setLevel(logging.INFO)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_metrics("train", outcome.metrics)
    seconds = trainer.clock.train_seconds
    tokens = trainer.state.global_step * plan.tokens_per_step
    run["results"] = {
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "train_loss": outcome.training_loss,
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
    }
    if data.validation is not None:
        metrics = final_evaluation(trainer)
        trainer.save_metrics("eval", metrics)
        run["results"] |= {name: metrics[name] for name in ("eval_loss", "eval_perplexity")}
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_run(folder, run)
        if data.validation is not None:
            print(
                f"validation loss {metrics['eval_loss']:.4f} nats a token, perplexity {metrics['eval_perplexity']:.2f}"
            )
    return run


def final_evaluation(trainer: Trainer) -> dict[str, float]:
    """Return the evaluation at the last step, from the log if it was just made."""
    for log in trainer.state.log_history[::-1]:
        if log["step"] != trainer.state.global_step:
            break
        if "eval_loss" in log:
            return {name: value for name, value in log.items() if name.startswith("eval_")}
    metrics: dict[str, float] = trainer.evaluate()
    return metrics


def main(recipe: str, presets: Mapping[str, Preset], argv: Sequence[str] | None = None) -> int:
    """Run a recipe's command line; returns the exit status, 2 for what was refused."""
    try:
        pretrain(recipe, *parse_arguments(recipe, presets, argv))
    except RecipeError as error:
        print("error:", *str(error).split(), file=sys.stderr)  # on one line
        return 2
    return 0

"""Fine-tune a causal language model on a text or on conversations: all of its weights, or LoRA adapters by PEFT.

    python recipes/finetune.py --model out/tiny --train_data my.txt --optim adamuon --output_dir out/ft
    python recipes/finetune.py --model Qwen/Qwen2.5-0.5B --train_data chats.jsonl --optim muon --merge
    python recipes/finetune.py --model out/tiny --train_data my.txt --lora_rank 0 --optim muon --learning_rate 1e-3

The model is a folder (a run of these recipes, one of its checkpoints, any other) or a name on the Hub. Text is joined
and cut into blocks as in pretraining; of conversations (``chat_rows.py``) the model learns what the assistant says.
The output folder gets the adapter, or the model, with its tokenizer; with ``--merge`` also ``merged/``, a model of its
own. ``run.json`` has the validation loss before and after.
"""

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from base_model import (
    base_config,
    base_place,
    check_adapters,
    empty_model,
    is_merged,
    load_base,
    save_merged,
    with_adapters,
)
from document_sources import check_block
from document_tokens import saved_tokenizer, tokenizer_fingerprint
from finetune_arguments import FineTuningArguments, parse
from finetune_data import plan_steps, read_data
from flag_checks import check_one_gpu, exit_status
from pretrain import RunFlow, accepted_trainer, enter_folder, finish, resume_clock, say_stopped
from recipe_error import REFUSALS, RecipeError
from recipe_trainer import PretrainingTrainer, token_loss
from run_description import explain_model_partition, optimizer_name, run_facts, training_identity
from run_folder import (
    MERGED,
    check_same_run,
    look_into,
    read_run,
    weights_hash,
    write_run,
)
from run_log import RunLog, finite_or_null
from step_plan import Plan, apply_plan
from task import TrainingData
from tasks import CausalLanguageModeling
from transformers import PretrainedConfig, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar


class FineTuningTrainer(PretrainingTrainer):
    """The recipes' Trainer; adapters are loaded as stock Trainer loads them."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        has_adapters = hasattr(self.model, "peft_config")
        method = Trainer._load_from_checkpoint if has_adapters else PretrainingTrainer._load_from_checkpoint
        method(self, resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        has_adapters = hasattr(self.model, "peft_config")
        (Trainer if has_adapters else PretrainingTrainer)._load_best_model(self)


def finetune(
    arguments: FineTuningArguments, training: TrainingArguments, given: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Run one fine-tuning, or its dry run, and return the contents of its ``run.json``.

    Everything that can be refused is refused before the output folder is touched.

    Raises:
        RecipeError: for what cannot be done as asked.
    """
    if training.disable_tqdm:
        disable_progress_bar()
    if not arguments.dry_run:
        check_one_gpu(training, "recipes/finetune.py")
    folder = Path(training.output_dir)
    place = base_place(arguments.model)
    if Path(place).is_dir() and folder.resolve() in (Path(place), *Path(place).parents):
        raise RecipeError(f"--output_dir {folder} holds the model to start from, {place}: give another folder")
    checkpoint, finished, begun = look_into(
        folder, training.resume_from_checkpoint, overwrite=arguments.overwrite_output_dir
    )
    config = base_config(place)
    tokenizer = saved_tokenizer(place, "--model")
    check_block(arguments.block_size, config, getattr(config, "max_position_embeddings", arguments.block_size))
    with torch.device("meta"):
        base = empty_model(config)
        check_adapters(base, arguments)
        shapes = with_adapters(base, arguments)
    try:
        partition = explain_model_partition(shapes, training)
    except REFUSALS as error:
        raise RecipeError(str(error)) from error
    data = read_data(arguments, training, tokenizer, config)
    plan = plan_steps(arguments, training, data)
    has_validation = data.validation is not None
    apply_plan(plan, training, has_validation=has_validation, is_stream=False, given=given)
    run = describe(arguments, training, place, config, tokenizer, plan, data, shapes)
    earlier = finished or (None if checkpoint is None else read_run(Path(checkpoint).parent))
    if earlier is None and begun is not None and begun["identity"] and not arguments.overwrite_output_dir:
        earlier = begun
    if earlier is not None:
        check_same_run(earlier, run["identity"])
    is_first = training.process_index == 0
    note = optimizer_note(run["pretrained_with"], optimizer_name(training), full=arguments.lora_rank == 0)
    if note and is_first:
        print(note)
    if arguments.dry_run:
        if is_first:
            print(json.dumps(run, indent=2, sort_keys=True, default=str))
            print(f"\n{partition}\n\n{plan.steps:,} steps of {plan.sequences_per_step:,} blocks or rows")
        return run
    if finished is not None:
        wants_merged = arguments.merge and not is_merged(folder)
        if wants_merged and is_first:
            save_merged(arguments, place, folder, tokenizer)
        if is_first:
            left = f"its adapter is now merged in {folder / MERGED}" if wants_merged else "nothing is left to do"
            print(f"{folder} holds this run, finished: {left}")
        return finished
    return train(run, arguments, training, place, tokenizer, data, plan, checkpoint)


def describe(
    arguments: FineTuningArguments,
    training: TrainingArguments,
    place: str,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    data: TrainingData,
    shapes: Any,
) -> dict[str, Any]:
    """Collect what ``run.json`` says before the run starts; ``identity`` is what a resumed run must share."""
    ours = asdict(arguments)
    adapters = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "dora", "rslora", "modules_to_save")
    settings = ("block_size", "dtype", "load_in_4bit")
    # A frozen weight has no gradient of its own, a third of the work. Attention is not counted.
    per_weight = 6 if arguments.lora_rank == 0 else 4
    return {
        "identity": {
            "recipe": "finetune",
            "preset": "lora" if arguments.lora_rank else "full",
            "base": place,
            "model": config.to_dict(),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "data": data.fingerprint,
            **{name: ours[name] for name in (*settings, *adapters)},
            **training_identity(training, plan),
        },
        "pretrained_with": pretrained_with(place),
        "flops_per_token": float(per_weight * shapes.num_parameters(exclude_embeddings=True)),
        "recipe_arguments": ours,
        "data": dict(data.facts),
        "unit": CausalLanguageModeling.unit,
        **run_facts(training, plan),
    }


def pretrained_with(place: str) -> str | None:
    """Return the value of ``--optim`` that a run of these recipes recorded beside a model; None if none did."""
    for folder in (Path(place), Path(place).parent):
        try:
            run = read_run(folder)
        except RecipeError:
            continue
        if run is not None:
            return run["identity"].get("optim")
    return None


def optimizer_note(before: str | None, now: str, *, full: bool) -> str | None:
    """Return one line on what to expect where the optimizer is of another family than that of pretraining."""
    if before is None or not full or before.startswith("adamw") == now.startswith("adamw"):
        return None
    return (
        f"note: pretrained with {before}, now {now}: in a study of a tiny model such a change cost 0.01 nats a token "
        "at most, each at its best learning rate (recipes/results/finetune.md); sweep --learning_rate anew"
    )


def train(
    run: dict[str, Any],
    arguments: FineTuningArguments,
    training: TrainingArguments,
    place: str,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    plan: Plan,
    checkpoint: str | None,
) -> dict[str, Any]:
    """Load, train, evaluate and save what has been checked; returns ``run`` with its results."""
    folder = Path(training.output_dir)
    set_seed(training.seed)
    model = with_adapters(load_base(arguments, place), arguments)
    run["parameters"] = model.num_parameters()
    run["trainable_parameters"] = model.num_parameters(only_trainable=True)
    run["initial_weights_sha256"] = weights_hash(model)
    run["resumed_from"] = checkpoint
    earlier = None if checkpoint is None else read_run(Path(checkpoint).parent)
    if earlier is not None and earlier["initial_weights_sha256"] != run["initial_weights_sha256"]:
        raise RecipeError(f"the weights of {place} are not those that the run to resume was started from")
    order_seed = training.seed if training.data_seed is None else training.data_seed
    run["first_batch_sha256"] = data.first_batch_hash(order_seed, plan.sequences_per_step)
    if training.gradient_checkpointing and arguments.lora_rank:
        model.enable_input_require_grads()
    training.label_names = ["labels"]
    log = RunLog(folder)
    make_trainer = functools.partial(
        FineTuningTrainer,
        model=model,
        args=training,
        train_dataset=data.training(order_seed, plan.steps * plan.sequences_per_step),
        eval_dataset=data.validation,
        data_collator=data.collate,
        processing_class=tokenizer,
        compute_loss_func=functools.partial(token_loss, label_smoothing=training.label_smoothing_factor),
        callbacks=[RunFlow(arguments.stop_after)],
        tokens_per_step=plan.tokens_per_step,
        tokens_per_sample=plan.tokens_per_step // plan.sequences_per_step,
        flops_per_token=run["flops_per_token"],
        log_record=log.append,
    )
    trainer = accepted_trainer(make_trainer, folder)
    resumed_step = resume_clock(trainer, checkpoint)
    if trainer.is_world_process_zero():
        enter_folder(folder, run, checkpoint, log, resumed_step)
        print(
            f"{run['trainable_parameters']:,} of {run['parameters']:,} parameters, {plan.steps:,} steps, "
            f"{run['identity']['optim']} at learning rate {training.learning_rate:g} -> {folder}"
            + (f", from step {resumed_step:,} on" if resumed_step else "")
        )
    if earlier is not None:
        run["before"] = earlier.get("before")
    elif data.validation is not None:
        run["before"] = {name: finite_or_null(value) for name, value in losses(trainer.evaluate()).items()}
    if trainer.is_world_process_zero():
        write_run(folder, run)
    trainer.accelerator.wait_for_everyone()
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < plan.steps:
        say_stopped(trainer, plan)
        return run
    if run.get("before") and trainer.is_world_process_zero():
        print(f"validation loss before {run['before']['eval_loss']:.4f}")
    if arguments.merge and trainer.is_world_process_zero():  # before run.json has results: it says that all is there
        trainer.save_model()
        save_merged(arguments, place, folder, tokenizer)
    finish(run, trainer, CausalLanguageModeling(), plan, data, outcome.metrics)
    return run


def losses(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return what of an evaluation is about the model."""
    names = ("eval_loss", "eval_perplexity", "eval_accuracy")
    return {name: metrics[name] for name in names if name in metrics}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for what was refused."""
    return exit_status(lambda: finetune(*parse(argv, __doc__)))


if __name__ == "__main__":
    sys.exit(main())

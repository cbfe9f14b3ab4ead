"""What is said of a run before it starts: its record, its partition, its cost."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from block_attention import FULL_BLOCK, PADDED_BLOCK
from document_tokens import tokenizer_fingerprint
from model_flops import peak_flops
from recipe_arguments import RecipeArguments
from recipe_error import RecipeError
from run_folder import commit, hardware, package_versions
from step_plan import Plan
from task import Task, TrainingData
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from hf_matrix_optim.kernels.stack_plan import why_not
from hf_matrix_optim.options import split_optim_args
from hf_matrix_optim.partition import explain
from hf_matrix_optim.registry import (
    OPTIMIZER_NAMES,
    optimizer_class_and_kwargs,
    options_with_target_modules,
    parse_options,
    partition_options_of,
)

TARGET_MFU = 0.4
H100 = "H100"


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
    return {
        "identity": {
            "recipe": recipe,
            "preset": arguments.preset,
            "model": config.to_dict(),
            "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
            "data": None if data is None else data.fingerprint,
            "block_size": arguments.block_size,
            "clip": None if arguments.clip == "all" else arguments.clip,
            **training_identity(training, plan),
        },
        "flops_per_token": flops_per_token,
        "recipe_arguments": asdict(arguments),
        **run_facts(training, plan),
    }


def training_identity(training: TrainingArguments, plan: Plan) -> dict[str, Any]:
    """What of Trainer's arguments decides the weights of a run, for its identity."""
    return {
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
        "precision": "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32",
    }


def run_facts(training: TrainingArguments, plan: Plan) -> dict[str, Any]:
    """What ``run.json`` says about a run beside its identity: steps, all of Trainer's arguments, where it ran."""
    return {
        "plan": asdict(plan),
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
        return explain_model_partition(task.new_model(config, None), training)


def explain_model_partition(model: nn.Module, training: TrainingArguments) -> str:
    """`explain_partition` of a model that is built already, best on the meta device."""
    name = optimizer_name(training)
    if name not in OPTIMIZER_NAMES:
        return explain(model)
    try:
        options = parse_options(name, split_optim_args(training.optim_args))
        options = options_with_target_modules(options, training)
        if options.kernels == "triton" or options.cuda_graph:
            asked = "kernels=triton" if options.kernels == "triton" else "cuda_graph=true"
            if reason := why_not(training.device):
                raise ValueError(f"{asked} was asked for, but {reason}; or leave it out")
        optimizer_class, kwargs = optimizer_class_and_kwargs(
            name,
            model,
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            options=options,
        )
        optimizer_class(**kwargs)
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
        own = f"the recipes' own are {FULL_BLOCK} and {PADDED_BLOCK}"
        raise RecipeError(f"--attention {attention}: {error}; {own}") from error


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

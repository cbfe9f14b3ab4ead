"""The command line of a recipe: a preset's literals under the flags of ``TrainingArguments`` and a few of ours."""

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from flag_checks import check_length_and_seeds, check_optim_args, given_flags, nearest
from recipe_error import REFUSALS, RecipeError
from transformers import HfArgumentParser, PretrainedConfig, TrainingArguments

from hf_matrix_optim.options import OPTIMIZER_NAMES
from hf_matrix_optim.trainer import ClipPolicy

# Flags of which a person gives one; it then replaces whatever the preset says in its row.
ONE_OF = (
    ("max_steps", "max_tokens", "num_train_epochs"),
    ("tokens_per_step", "gradient_accumulation_steps"),
    ("train_data", "dataset_name"),
    ("validation_data", "validation_fraction"),
    ("schedule", "lr_scheduler_type"),
)
SOURCE_KEYS = ("train_data", "validation_data", "dataset_name", "dataset_config", "dataset_split", "text_column")
SCHEDULE_KEYS = ("schedule", "decay", "floor", "lr_scheduler_kwargs")
SCHEDULES = ("warmup_stable", "cosine")
TASKS = ("causal_lm", "masked_lm", "image_classification")
AT_LEAST_ONE = (
    "max_tokens",
    "tokens_per_step",
    "preprocessing_workers",
    "max_prepared_tokens",
    "validation_samples",
    "stop_after",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
AT_LEAST_ZERO = ("shuffle_buffer", "learning_rate", "weight_decay", "dataloader_num_workers")


@dataclass(frozen=True)
class Preset:
    """A model from scratch and the defaults of its training run, as literals.

    Attributes:
        config_class: configuration class of the model.
        model: its keywords. Without ``vocab_size`` a language model follows the tokenizer.
        defaults: values for flags of the command line, by name; what is typed there goes before them.
        task: one of ``TASKS``: what the model learns, and from what.
        scale_residual_init: draw the matrices that write into the residual stream with the standard deviation
            initializer_range / sqrt(2 layers), as GPT-2 does.
    """

    config_class: type[PretrainedConfig]
    model: Mapping[str, Any]
    defaults: Mapping[str, Any]
    task: str = "causal_lm"
    scale_residual_init: bool = False


@dataclass
class RecipeArguments:
    """What to train on, and for how long; everything else is a flag of ``TrainingArguments``."""

    preset: str = field(metadata={"help": "Name of a preset of the recipe."})
    train_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files, folders or globs to train on: .txt .jsonl .json .parquet .csv, for proteins also .fasta "
            ".fa .faa, each also .gz .xz .bz2; prepared tokens: .bin, or the folder they are in."
        },
    )
    validation_data: list[str] | None = field(
        default=None, metadata={"help": "The same for validation, instead of --validation_fraction."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set on the Hub, instead of --train_data."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_split: str | None = field(default=None, metadata={"help": "Its split to train on; default: train."})
    text_column: str | None = field(
        default=None, metadata={"help": "The column with the text or the sequence; default: text or sequence."}
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Part of the documents that is held out, by a fixed hash of each; 0 for none."}
    )
    validation_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on so many fixed blocks or sequences instead of all."}
    )
    max_prepared_tokens: float | None = field(
        default=None, metadata={"help": "Prepare only so many tokens (residues) of the training data, such as 1e9."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read and tokenize while training, instead of once before; needs --max_steps or --max_tokens."
        },
    )
    shuffle_buffer: int = field(
        default=0,
        metadata={
            "help": "Documents of a stream to shuffle among; 0 keeps its order. With a buffer a resumed run is not "
            "the uninterrupted one bit for bit: the buffer is filled anew."
        },
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or Hub name of a tokenizer."})
    block_size: int = field(default=1024, metadata={"help": "Sequence length, in tokens."})
    tokens_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Tokens (images) in one optimizer step over all devices; sets the accumulation (and the "
            "batch of a preset)."
        },
    )
    max_tokens: float | None = field(
        default=None, metadata={"help": "Train on at most so many tokens (images), such as 1e9."}
    )
    schedule: str | None = field(
        default=None,
        metadata={
            "help": "warmup_stable: linear warm-up over --warmup_steps, then constant, then --decay if any; cosine: "
            "after the warm-up down to --floor at the last step. Instead of --lr_scheduler_type."
        },
    )
    decay: float = field(
        default=0.0,
        metadata={
            "help": "With warmup_stable: the last steps, in which the learning rate falls linearly to --floor; below "
            "1 a fraction of all steps, 0 for none."
        },
    )
    floor: float = field(
        default=0.0, metadata={"help": "Lowest learning rate after the warm-up, as a fraction of --learning_rate."}
    )
    clip: str = field(
        default="all",
        metadata={
            "help": "Whose gradients --max_grad_norm bounds: all, or adamw_only, which leaves those of the matrices "
            "as they are."
        },
    )
    attention: str | None = field(
        default=None,
        metadata={
            "help": "Attention implementation: full_block (no mask: the default where no row is padded), "
            "padded_block, or one of transformers: sdpa, eager, flash_attention_2, flex_attention."
        },
    )
    stop_after: int | None = field(
        default=None,
        metadata={
            "help": "Stop at this step with a checkpoint, as if interrupted; the schedule stays that of the whole run."
        },
    )
    preprocessing_workers: int = field(default=1, metadata={"help": "Processes that tokenize."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for prepared data; default: ~/.cache/hf-matrix-optim."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run that is in --output_dir."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Show the resolved settings, the partition, the steps and the FLOPs; train nothing."},
    )


def check_preset(name: str, preset: Preset, flags: Collection[str]) -> None:
    """Refuse keys that no flag or configuration field has; both would otherwise be accepted without effect.

    Raises:
        RecipeError: naming the key and the nearest known one.
    """
    for key in preset.defaults:
        if key not in flags or key == "preset":
            raise RecipeError(f"preset {name}: there is no flag {key}{nearest(key, flags)}")
    config_fields = {config_field.name for config_field in fields(preset.config_class)}  # type: ignore[arg-type]
    if preset.task not in TASKS:
        raise RecipeError(f"preset {name}: there is no task {preset.task}{nearest(preset.task, TASKS)}")
    for key in preset.model:
        if key not in config_fields:
            config = preset.config_class.__name__
            raise RecipeError(f"preset {name}: {config} has no field {key}{nearest(key, config_fields)}")


def preset_defaults(preset: Preset, given: Collection[str]) -> dict[str, Any]:
    """Return the preset's defaults without those that the given flags replace.

    Raises:
        RecipeError: if two flags are given of which only one can be.
    """
    dropped: set[str] = set()
    for alternatives in ONE_OF:
        chosen = [key for key in alternatives if key in given]
        if len(chosen) > 1:
            raise RecipeError("give only one of " + ", ".join(f"--{key}" for key in chosen))
        if chosen:
            dropped.update(alternatives)
    if "train_data" in given or "dataset_name" in given:
        dropped.update(SOURCE_KEYS)
    if {"schedule", "lr_scheduler_type"} & set(given):
        dropped.update(SCHEDULE_KEYS)
    return {key: value for key, value in preset.defaults.items() if key not in dropped}


def parse_arguments(
    recipe: str, presets: Mapping[str, Preset], argv: Sequence[str] | None = None
) -> tuple[Preset, RecipeArguments, TrainingArguments, frozenset[str]]:
    """Parse a command line over the defaults of the preset it names.

    Returns:
        The preset, our arguments, Trainer's, and the names of the flags that were given.

    Raises:
        RecipeError: as `check_command_line`, and for what Trainer's arguments refuse.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    preset, parser, given = check_command_line(recipe, presets, argv)
    try:
        recipe_arguments, training_arguments = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except REFUSALS as error:
        raise RecipeError(str(error)) from error
    return preset, recipe_arguments, training_arguments, given


def check_command_line(
    recipe: str, presets: Mapping[str, Preset], argv: Sequence[str]
) -> tuple[Preset, HfArgumentParser, frozenset[str]]:
    """Check the flags of a command line and their values; makes no ``TrainingArguments``, which would claim a device.

    Returns:
        The preset, the parser with its defaults, and the names of the flags that were given.

    Raises:
        RecipeError: for an unknown preset, flag or preset key, flags that exclude each other, and bad values.
    """
    arguments = (RecipeArguments, TrainingArguments)
    flags = {flag.name for dataclass_type in arguments for flag in fields(dataclass_type) if flag.init}
    options: dict[str, Any] = {
        "usage": "%(prog)s --preset NAME [--FLAG VALUE ...]",
        "description": f"Pretrain {recipe} from scratch. Presets: {', '.join(presets)}.",
        "allow_abbrev": False,
        "exit_on_error": False,
    }
    parser = HfArgumentParser(arguments, **options)
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    known, given = given_flags(arguments, argv)
    preset = presets.get(known.preset)
    if preset is None:
        choices = ", ".join(presets)
        raise RecipeError(
            f"{recipe} has no preset {known.preset}{nearest(known.preset, presets)} (there are {choices})"
        )
    check_preset(known.preset, preset, flags)
    defaults = preset_defaults(preset, given)
    optimizer = known.optim if "optim" in given else defaults.get("optim", parser.get_default("optim"))
    seed = known.seed if "seed" in given else defaults.get("seed", parser.get_default("seed"))
    name = f"{recipe}-{known.preset}-{optimizer}-seed{seed}"
    parser.set_defaults(**{"output_dir": f"out/{name}", "run_name": name, **defaults})
    check_values(parser.parse_args(argv), preset.task, given)
    return preset, parser, given


def check_values(arguments: argparse.Namespace, task: str, given: Collection[str]) -> None:
    """Refuse values out of range.

    Raises:
        RecipeError: naming the flag and its range.
    """
    if arguments.train_data is None and arguments.dataset_name is None:
        raise RecipeError("nothing to train on: give --train_data or --dataset_name")
    if task == "causal_lm" and arguments.tokenizer is None:
        raise RecipeError("no tokenizer: give --tokenizer")
    if not 0 <= arguments.validation_fraction < 1:
        raise RecipeError(f"--validation_fraction is {arguments.validation_fraction}; it must be in [0, 1)")
    if task == "image_classification":
        if arguments.block_size != 1:
            raise RecipeError(f"--block_size is {arguments.block_size}; of images it is 1")
    elif arguments.block_size < 2:
        raise RecipeError(f"--block_size is {arguments.block_size}; it must be at least 2")
    for lowest, names in ((1, AT_LEAST_ONE), (0, AT_LEAST_ZERO)):
        for name in names:
            value = getattr(arguments, name)
            if value is not None and not lowest <= value < float("inf"):
                raise RecipeError(f"--{name} is {value}; it must be at least {lowest} and finite")
    check_length_and_seeds(arguments, given)
    check_optim_args(arguments.optim, arguments.optim_args)
    check_clip(arguments)
    check_schedule(arguments)


def check_clip(arguments: argparse.Namespace) -> None:
    """Refuse a clipping that there is not, or not for the optimizer.

    Raises:
        RecipeError: naming the flag.
    """
    policies = get_args(ClipPolicy)
    if arguments.clip not in policies:
        raise RecipeError(f"--clip {arguments.clip}: it is one of {', '.join(policies)}")
    if arguments.clip != "all" and arguments.optim not in OPTIMIZER_NAMES:
        raise RecipeError(
            f"--clip {arguments.clip}: --optim {arguments.optim} has no matrices; choose one of "
            f"{', '.join(OPTIMIZER_NAMES)}, or leave --clip out"
        )
    if arguments.clip != "all" and not arguments.max_grad_norm > 0:
        raise RecipeError(f"--clip {arguments.clip} has no effect with --max_grad_norm {arguments.max_grad_norm:g}")


def check_schedule(arguments: argparse.Namespace) -> None:
    """Refuse a schedule that there is not, and values it does not use.

    Raises:
        RecipeError: naming the flag.
    """
    if arguments.schedule is not None and arguments.schedule not in SCHEDULES:
        raise RecipeError(
            f"--schedule {arguments.schedule}: it is one of {', '.join(SCHEDULES)}"
            f"{nearest(arguments.schedule, SCHEDULES)}"
        )
    if not 0 <= arguments.floor < 1:
        raise RecipeError(f"--floor is {arguments.floor}; it must be in [0, 1)")
    if not arguments.decay >= 0:
        raise RecipeError(f"--decay is {arguments.decay}; it must be at least 0")
    if arguments.decay and arguments.schedule != "warmup_stable":
        raise RecipeError("--decay belongs to --schedule warmup_stable")
    if arguments.floor and arguments.schedule is None:
        raise RecipeError("--floor belongs to --schedule")
    if arguments.floor and arguments.schedule == "warmup_stable" and not arguments.decay:
        raise RecipeError("--floor has no effect on --schedule warmup_stable without --decay")

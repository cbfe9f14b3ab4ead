"""The command line of a recipe: a preset's literals under the flags of ``TrainingArguments`` and a few of ours."""

import difflib
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from recipe_error import RecipeError
from transformers import HfArgumentParser, PretrainedConfig, TrainingArguments

# Flags of which a person gives one; it then replaces whatever the preset says in its row.
ONE_OF = (
    ("max_steps", "max_tokens", "num_train_epochs"),
    ("tokens_per_step", "gradient_accumulation_steps"),
    ("train_data", "dataset_name"),
    ("validation_data", "validation_fraction"),
)
SOURCE_KEYS = ("train_data", "validation_data", "dataset_name", "dataset_config", "dataset_split", "text_column")
NOT_GIVEN = object()


@dataclass(frozen=True)
class Preset:
    """A model from scratch and the defaults of its training run, as literals.

    Attributes:
        config_class: configuration class of the model.
        model: its keywords. Without ``vocab_size`` the model follows the tokenizer.
        defaults: values for flags of the command line, by name; what is typed there goes before them.
    """

    config_class: type[PretrainedConfig]
    model: Mapping[str, Any]
    defaults: Mapping[str, Any]


@dataclass
class RecipeArguments:
    """What to train on, and for how long; everything else is a flag of ``TrainingArguments``."""

    preset: str = field(metadata={"help": "Name of a preset of the recipe."})
    train_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files (.txt .jsonl .json .parquet .csv, also .gz .xz .bz2), folders or globs of training text."
        },
    )
    validation_data: list[str] | None = field(
        default=None, metadata={"help": "The same for validation text, instead of --validation_fraction."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set on the Hub, instead of --train_data."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_split: str = field(default="train", metadata={"help": "Its split to train on."})
    text_column: str = field(default="text", metadata={"help": "The column with the text, in all but .txt files."})
    validation_fraction: float = field(
        default=0.05,
        metadata={
            "help": "Part of the documents, of .txt files of sections of 8,192 characters, held out by a hash of each."
        },
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or Hub name of a tokenizer."})
    block_size: int = field(default=1024, metadata={"help": "Sequence length, in tokens."})
    tokens_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Tokens in one optimizer step over all devices; sets the accumulation (and a preset's batch)."
        },
    )
    max_tokens: float | None = field(default=None, metadata={"help": "Train on at most so many tokens, such as 1e9."})
    preprocessing_workers: int = field(default=1, metadata={"help": "Processes that tokenize."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for prepared data; default: of `datasets`."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run that is in --output_dir."})
    dry_run: bool = field(
        default=False, metadata={"help": "Show the resolved settings, the partition and the steps; train nothing."}
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean ...?"`` with the known word most like ``word``, or nothing if none is."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def check_preset(name: str, preset: Preset, flags: Collection[str]) -> None:
    """Refuse keys that no flag or configuration field has; both would otherwise be accepted without effect.

    Raises:
        RecipeError: naming the key and the nearest known one.
    """
    for key in preset.defaults:
        if key not in flags or key == "preset":
            raise RecipeError(f"preset {name}: there is no flag {key}{nearest(key, flags)}")
    config_fields = {config_field.name for config_field in fields(preset.config_class)}  # type: ignore[arg-type]
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
    return {key: value for key, value in preset.defaults.items() if key not in dropped}


def parse_arguments(
    recipe: str, presets: Mapping[str, Preset], argv: Sequence[str] | None = None
) -> tuple[Preset, RecipeArguments, TrainingArguments, frozenset[str]]:
    """Parse a command line over the defaults of the preset it names.

    Returns:
        The preset, our arguments, Trainer's, and the names of the flags that were given.

    Raises:
        RecipeError: for an unknown preset, flag or preset key, and for flags that exclude each other.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = (RecipeArguments, TrainingArguments)
    flags = {flag.name for dataclass_type in arguments for flag in fields(dataclass_type) if flag.init}
    options: dict[str, Any] = {
        "usage": "%(prog)s --preset NAME [--FLAG VALUE ...]",
        "description": f"Pretrain {recipe} from scratch. Presets: {', '.join(presets)}.",
        "allow_abbrev": False,
    }
    parser = HfArgumentParser(arguments, **options)
    scan = HfArgumentParser(arguments, add_help=False, **options)
    scan.set_defaults(**dict.fromkeys(flags, NOT_GIVEN))
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    known, unknown = scan.parse_known_args(argv)
    given = frozenset(name for name, value in vars(known).items() if value is not NOT_GIVEN)
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise RecipeError(f"unknown argument {flag}{nearest(flag, [f'--{name}' for name in flags])}")
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
    parser.set_defaults(**{"output_dir": f"out/{recipe}-{known.preset}-{optimizer}-seed{seed}", **defaults})
    recipe_arguments, training_arguments = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    check_values(recipe_arguments)
    return preset, recipe_arguments, training_arguments, given


def check_values(arguments: RecipeArguments) -> None:
    """Refuse values out of range.

    Raises:
        RecipeError: naming the flag and its range.
    """
    if arguments.train_data is None and arguments.dataset_name is None:
        raise RecipeError("no training text: give --train_data or --dataset_name")
    if arguments.tokenizer is None:
        raise RecipeError("no tokenizer: give --tokenizer")
    if not 0 <= arguments.validation_fraction < 1:
        raise RecipeError(f"--validation_fraction is {arguments.validation_fraction}; it must be in [0, 1)")
    if arguments.block_size < 2:
        raise RecipeError(f"--block_size is {arguments.block_size}; it must be at least 2")
    for name in ("max_tokens", "tokens_per_step", "preprocessing_workers"):
        value = getattr(arguments, name)
        if value is not None and not value >= 1:
            raise RecipeError(f"--{name} is {value}; it must be at least 1")

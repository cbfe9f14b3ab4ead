"""The command line of fine-tuning: flags of ours and of ``TrainingArguments``, and what is refused of them."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flag_checks import check_length_and_seeds, check_optim_args, given_flags
from recipe_error import REFUSALS, RecipeError
from run_folder import MERGED
from transformers import HfArgumentParser, TrainingArguments

import hf_matrix_optim  # noqa: F401  makes --optim muon, adamuon, adamuon_v1 and mud known to TrainingArguments

DTYPES = ("float32", "bfloat16", "float16")
DEFAULTS: dict[str, Any] = {
    "output_dir": "out/finetune",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
}
LEARNING_RATES = {True: 2e-4, False: 2e-5}  # with and without adapters
OF_ADAPTERS = ("lora_alpha", "lora_dropout", "lora_target_modules", "dora", "rslora", "modules_to_save", "merge")


@dataclass
class FineTuningArguments:
    """What to fine-tune, and on what; everything else is a flag of ``TrainingArguments``."""

    model: str = field(metadata={"help": "Folder of a model, or its name on the Hub."})
    train_data: list[str] = field(
        metadata={
            "aliases": ["--train_file"],
            "help": "Files, folders or globs: .txt, and .jsonl .json .parquet .csv with a column of texts; or "
            "conversations (.jsonl .json .parquet): messages, or prompt and completion.",
        }
    )
    validation_data: list[str] | None = field(
        default=None,
        metadata={"aliases": ["--validation_file"], "help": "The same for validation, not --validation_fraction."},
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Part of the documents or rows held out, by a fixed hash of each; 0 for none."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column with the text; default: text."})
    block_size: int = field(default=1024, metadata={"help": "Tokens in a block of text; of a conversation, at most."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters; 0 trains all weights instead."})
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "Their scale is alpha / rank, of rsLoRA alpha / sqrt(rank); default: 2 x rank."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before an adapter, in [0, 1)."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Layers that get adapters, by the ends of their names; all-linear: all but the output."},
    )
    dora: bool = field(default=False, metadata={"help": "DoRA: the length of each row is trained apart, by AdamW."})
    rslora: bool = field(default=False, metadata={"help": "rsLoRA: a scale that does not fall with the rank."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained whole beside the adapters, such as embed_tokens."}
    )
    merge: bool = field(
        default=False, metadata={"help": f"Also save {MERGED}/, the model with its adapter merged in."}
    )
    dtype: str = field(default="float32", metadata={"help": f"Type of the model's weights: {', '.join(DTYPES)}."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Keep the base model in 4-bit NF4; needs bitsandbytes, and adapters."}
    )
    stop_after: int | None = field(
        default=None, metadata={"help": "Stop at this step with a checkpoint, as if interrupted."}
    )
    preprocessing_workers: int = field(default=1, metadata={"help": "Processes that tokenize text."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for prepared text; default: ~/.cache/hf-matrix-optim."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run that is in --output_dir."})
    dry_run: bool = field(
        default=False, metadata={"help": "Show settings, partition and steps; read no weight, train nothing."}
    )


def parse(
    argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[FineTuningArguments, TrainingArguments, frozenset[str]]:
    """Parse a command line; returns our arguments, Trainer's, and the names of the flags that were given.

    Raises:
        RecipeError: for unknown flags, bad values, and flags that exclude each other.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    dataclasses = (FineTuningArguments, TrainingArguments)
    options: dict[str, Any] = {
        "usage": "%(prog)s --model MODEL --train_data FILE [FILE ...] [--FLAG VALUE ...]",
        "allow_abbrev": False,
        "exit_on_error": False,
    }
    parser = HfArgumentParser(
        dataclasses, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options
    )
    parser.set_defaults(**DEFAULTS)
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    _, given = given_flags(dataclasses, argv)
    values = parser.parse_args(argv)
    check_values(values, given)
    parser.set_defaults(learning_rate=LEARNING_RATES[values.lora_rank > 0])
    try:
        arguments, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except REFUSALS as error:
        raise RecipeError(str(error)) from error
    return arguments, training, given


def check_values(arguments: argparse.Namespace, given: frozenset[str]) -> None:
    """Refuse values out of range, and flags that have no effect.

    Raises:
        RecipeError: naming the flag and what to do.
    """
    ranges = (
        *(
            (name, 0, float("inf"))
            for name in ("lora_rank", "learning_rate", "weight_decay", "dataloader_num_workers")
        ),
        *((name, 0, 1) for name in ("validation_fraction", "lora_dropout")),
        *((name, 1, float("inf")) for name in ("preprocessing_workers", "stop_after", "gradient_accumulation_steps")),
        *((f"per_device_{side}_batch_size", 1, float("inf")) for side in ("train", "eval")),
        ("block_size", 2, float("inf")),
    )
    for name, lowest, end in ranges:
        value = getattr(arguments, name)
        if value is not None and not lowest <= value < end:
            raise RecipeError(f"--{name} is {value}; it must be at least {lowest} and below {end}")
    if arguments.lora_alpha is not None and not 0 < arguments.lora_alpha < float("inf"):
        raise RecipeError(f"--lora_alpha is {arguments.lora_alpha}; it must be above 0 and finite")
    if arguments.dtype not in DTYPES:
        raise RecipeError(f"--dtype {arguments.dtype}: it is one of {', '.join(DTYPES)}")
    if arguments.lora_rank == 0:
        if idle := [name for name in OF_ADAPTERS if name in given and getattr(arguments, name) is not False]:
            raise RecipeError(f"--{idle[0]} is of adapters: leave it out, or give --lora_rank of at least 1")
        if arguments.load_in_4bit:
            raise RecipeError("--load_in_4bit: quantised weights cannot be trained; give --lora_rank of at least 1")
    if arguments.merge and arguments.load_in_4bit:
        raise RecipeError(
            "--merge: an adapter is not merged into 4-bit weights, which would round it; leave one of the two out, "
            "and load the adapter on the full model (peft.PeftModel.from_pretrained(model, folder).merge_and_unload())"
        )
    check_length_and_seeds(arguments, given)
    check_optim_args(arguments.optim, arguments.optim_args)

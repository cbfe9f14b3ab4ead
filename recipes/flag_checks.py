"""What the command lines of pretraining and fine-tuning share: which flags were given, and what is refused of them."""

import argparse
import difflib
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from recipe_error import RecipeError
from transformers import HfArgumentParser, TrainingArguments

from hf_matrix_optim.options import OPTIMIZER_NAMES, parse_options, split_optim_args

NOT_GIVEN = object()
# Trainer accepts --optim_args beside these and reads nothing of it.
WITHOUT_OPTIONS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean ...?"`` with the known word most like ``word``, or nothing if none is."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


class Scan(HfArgumentParser):
    """A parser that raises what it would say after pages of usage."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}; --help lists the flags")


def given_flags(dataclasses: Sequence[Any], argv: Sequence[str]) -> tuple[argparse.Namespace, frozenset[str]]:
    """Scan a command line without the defaults of its flags.

    Args:
        dataclasses: those whose fields are the flags.
        argv: the command line.

    Returns:
        The values, ``NOT_GIVEN`` where there is none, and the names of the flags that were given.

    Raises:
        RecipeError: for unknown flags and values of the wrong type.
    """
    flags = [flag.name for dataclass_type in dataclasses for flag in fields(dataclass_type) if flag.init]
    scan = Scan(dataclasses, add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.set_defaults(**dict.fromkeys(flags, NOT_GIVEN))
    try:
        known, unknown = scan.parse_known_args(argv)
    except argparse.ArgumentError as error:
        name = f"{error.argument_name}: " if error.argument_name else ""
        raise RecipeError(f"{name}{with_nearest_choice(error.message)}") from error
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise RecipeError(f"unknown argument {flag}{nearest(flag, [f'--{name}' for name in flags])}")
    return known, frozenset(name for name, value in vars(known).items() if value is not NOT_GIVEN)


def with_nearest_choice(message: str) -> str:
    """Replace argparse's list of all choices by the one most like what was given, if there is one."""
    problem, _, choices = message.partition(" (choose from ")
    word = problem.rpartition(": ")[2].strip("'")
    near = nearest(word, choices.rstrip(")").replace("'", "").split(", "))
    return f"{problem}{near}" if near else message


def check_length_and_seeds(arguments: argparse.Namespace, given: Collection[str]) -> None:
    """Refuse a run without a step, intervals without one, and seeds that numpy does not take.

    Raises:
        RecipeError: naming the flag and its range.
    """
    if "max_steps" in given and arguments.max_steps < 1:
        raise RecipeError(
            f"--max_steps is {arguments.max_steps}; it must be at least 1, or leave it out and give --num_train_epochs"
        )
    if not 0 < arguments.num_train_epochs < float("inf"):
        raise RecipeError(f"--num_train_epochs is {arguments.num_train_epochs}; it must be finite and above 0")
    for name in ("logging_steps", "eval_steps", "save_steps"):
        if name in given and not getattr(arguments, name) > 0:
            raise RecipeError(
                f"--{name} is {getattr(arguments, name)}; it must be above 0 (below 1 it is a part of the run), or "
                f"give --{name.replace('steps', 'strategy')} no"
            )
    for name in ("seed", "data_seed"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value < 2**32:
            raise RecipeError(f"--{name} is {value}; it must be in [0, 2**32)")


def check_optim_args(optim: str, optim_args: str | None) -> None:
    """Refuse options that the optimizer does not have, or would not read.

    Raises:
        RecipeError: naming them.
    """
    name = str(getattr(optim, "value", optim))
    if optim_args and name in WITHOUT_OPTIONS:
        raise RecipeError(f"--optim_args {optim_args}: --optim {name} reads no options; leave the flag out")
    if name in OPTIMIZER_NAMES:
        try:
            parse_options(name, split_optim_args(optim_args))
        except ValueError as error:
            raise RecipeError(f"--optim {name}: {error}") from error


def check_one_gpu(training: TrainingArguments, program: str) -> None:
    """Refuse several GPUs for one process, which would be torch's DataParallel.

    Raises:
        RecipeError: saying how to start one for each.
    """
    if training.n_gpu > 1:
        raise RecipeError(
            f"one process sees {training.n_gpu} GPUs: start one for each (torchrun --nproc_per_node {training.n_gpu} "
            f"{program} ...), or set CUDA_VISIBLE_DEVICES=0"
        )


def exit_status(
    run: Callable[[], object],
    stopped: str = "stopped; --resume_from_checkpoint auto goes on from the last checkpoint, if any",
) -> int:
    """Run a program; returns its exit status: 2 for what was refused, said in one line, 130 if it was ``stopped``."""
    try:
        run()
    except RecipeError as error:
        print("error:", *str(error).split(), file=sys.stderr)  # on one line
        return 2
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    return 0

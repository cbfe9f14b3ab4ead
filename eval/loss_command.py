"""What the commands of held-out losses share: flags, results kept while their key holds, errors in one line."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints import Checkpoint
from eval_error import EvalError
from jobs import device_name, versions
from result_files import is_done, read_result, write_result
from run import DTYPES, positive


def command_parser(script: str, description: str | None, *, batched: str) -> argparse.ArgumentParser:
    """Return a parser of the flags that all have.

    Args:
        script: name of the file, without its suffix.
        description: the script's docstring.
        batched: what a batch is made of.
    """
    parser = argparse.ArgumentParser(
        prog=f"python eval/{script}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", nargs="+", required=True, help="folders, globs or names on the Hub")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer, for checkpoints without one")
    parser.add_argument("--output", type=Path, default=Path("out/eval"), help="folder of results (%(default)s)")
    parser.add_argument("--batch-size", type=positive, default=16, help=f"{batched} in a batch (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as saved")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: cuda if there is one)")
    return parser


def run_command(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, work: Callable[[argparse.Namespace], str]
) -> int:
    """Print what the work returns, or its error in one line; return the exit status."""
    arguments = parser.parse_args(argv)
    try:
        if arguments.tokenizer and not arguments.tokenizer.is_dir():
            raise EvalError(f"--tokenizer {arguments.tokenizer}: no such folder")
        printed = work(arguments)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(printed)
    return 0


def kept_or_computed(
    path: Path,
    key: Mapping[str, Any],
    checkpoint: Checkpoint,
    about: Mapping[str, Any],
    device: str,
    compute: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """Return a checkpoint's result: the one that is there if it has the key, else a new one, written.

    Args:
        path: of the result.
        key: what the result depends on.
        checkpoint: which.
        about: what else to write down.
        device: as torch names it.
        compute: makes the result.
    """
    if is_done(path, key):
        result = read_result(path)
        assert result is not None
        return result
    result = {
        "key": key,
        "checkpoint": {"name": checkpoint.name, "label": checkpoint.label, "file_stem": checkpoint.file_stem},
        **about,
        "device": device_name(device),
        "versions": versions(),
        **compute(),
    }
    write_result(path, result)
    return result

"""Compare training runs: losses, tokens and seconds to a loss, throughput.

    python recipes/compare.py RUN_FOLDER... [--sweep RUN_FOLDER...] [--output_dir out/comparison]

A run folder is what a recipe or the study wrote (``run.json`` and ``log.jsonl``), finished or not. Runs of the same
optimizer and learning rate are seeds of one group; --sweep adds a table of learning rates. Writes ``report.md``,
``curves.png`` and ``metrics.json``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recipe_error import RecipeError
from study_comparison import compare, sweeps_of
from study_metrics import load_run
from study_report import REPORT_FILE, check_report_folder, report, write_report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--output_dir", type=Path, default=Path("out/comparison"))
    parser.add_argument("--baseline", help="optimizer to measure against (default: the best AdamW, else the first)")
    parser.add_argument(
        "--targets", help="validation perplexities (losses for images), comma-separated, for the table of seconds"
    )
    parser.add_argument(
        "--sweep", nargs="+", type=Path, default=[], metavar="RUN_FOLDER", help="by which learning rates were found"
    )
    arguments = parser.parse_args(argv)
    try:
        targets = numbers(arguments.targets, "--targets")
        check_report_folder(arguments.output_dir)
        runs, swept = ([load_run(folder) for folder in folders] for folders in (arguments.runs, arguments.sweep))
        sweeps = sweeps_of(swept, runs)
        comparison = compare(runs, baseline=arguments.baseline, targets=targets, sweeps=sweeps)
        write_report(comparison, arguments.output_dir)
    except RecipeError as error:
        print("error:", *str(error).split(), file=sys.stderr)  # on one line
        return 2
    print(f"{report(comparison)}\n{arguments.output_dir / REPORT_FILE}")
    return 0


def numbers(text: str | None, flag: str) -> list[float] | None:
    """Parse comma-separated positive numbers.

    Raises:
        RecipeError: naming the flag and what is no number.
    """
    if text is None:
        return None
    values = []
    for part in text.split(","):
        try:
            values.append(float(part))
        except ValueError as error:
            raise RecipeError(f"{flag} {text}: {part!r} is no number") from error
        if not 0 < values[-1] < float("inf"):
            raise RecipeError(f"{flag} {text}: {part} must be above 0")
    return values


if __name__ == "__main__":
    sys.exit(main())

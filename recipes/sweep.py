"""Find the learning rate of each optimizer of the demo: short runs over a grid, one table.

    python recipes/sweep.py [--optim adamw_torch_fused,muon] [--learning_rate 1e-3,2e-3] [--table TABLE.md]

Every run is the demo's own training at another learning rate, with one evaluation at the end. A finished run in
``--output_dir`` is not made again, so a sweep can be stopped, continued and widened; the table shows all there are.
"""

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo import CONTENDERS, STEPS, run_one
from recipe_error import RecipeError
from run_folder import commit, read_run

ADAMW_GRID = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
MATRIX_GRID = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def finished_run(folder: Path, learning_rate: float) -> dict[str, Any] | None:
    """Return a folder's run if it ended with results of the demo's training at this learning rate, else None."""
    run = read_run(folder)
    if run is None or "results" not in run:
        return None
    settings = run["training_arguments"]
    is_same = settings["learning_rate"] == learning_rate and run["plan"]["steps"] == STEPS
    return run if is_same else None


def sweep_table(runs: Sequence[dict[str, Any]], date: datetime.date) -> str:
    """Format a sweep as a Markdown page: a row for each optimizer, a column for each learning rate, the best bold."""
    losses: dict[str, dict[float, float]] = {}
    for run in runs:
        rates = losses.setdefault(run["identity"]["optim"], {})
        rates[run["training_arguments"]["learning_rate"]] = run["results"]["eval_loss"]
    columns = sorted({rate for rates in losses.values() for rate in rates})
    lines = [
        "| optimizer | " + " | ".join(f"{rate:g}" for rate in columns) + " | best | bracketed |",
        "| --- |" + " --- |" * (len(columns) + 2),
    ]
    for optim, rates in losses.items():
        best = min(rates, key=rates.__getitem__)
        cells = [
            "" if rate not in rates else f"**{rates[rate]:.3f}**" if rate == best else f"{rates[rate]:.3f}"
            for rate in columns
        ]
        is_bracketed = min(rates) < best < max(rates)
        lines.append(f"| {optim} | {' | '.join(cells)} | {best:g} | {'yes' if is_bracketed else 'no, at an end'} |")
    run = runs[0]
    versions, hardware, plan = run["versions"], run["hardware"], run["plan"]
    return f"""# Learning rates of the demo

Last validation loss (nats a token) of Qwen2.5 form `tiny` ({run["parameters"]:,} parameters) after {plan["steps"]}
steps of {plan["tokens_per_step"]:,} tokens of the bundled novels, by learning rate. Same weights, batches, warm-up and
cosine in every run; one seed.

{chr(10).join(lines)}

{date.isoformat()}, seed {run["identity"]["seed"]}, {hardware["cpu"]}, {hardware["torch_threads"]} threads,
Python {versions["python"]}, torch {versions["torch"]}, transformers {versions["transformers"]}, commit
{commit() or "none"}. Made by `python recipes/sweep.py`.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", default=",".join(contender.optim for contender in CONTENDERS))
    parser.add_argument("--learning_rate", help="comma-separated; default: the grid of each optimizer")
    parser.add_argument("--output_dir", type=Path, default=Path("out/sweep"))
    parser.add_argument("--table", type=Path, help="Markdown file to write; printed in any case")
    arguments = parser.parse_args()
    known = {contender.optim: contender for contender in CONTENDERS}
    try:
        for optim in arguments.optim.split(","):
            grid: tuple[float, ...] = ADAMW_GRID if optim.startswith("adamw") else MATRIX_GRID
            if arguments.learning_rate is not None:
                grid = tuple(map(float, arguments.learning_rate.split(",")))
            for rate in grid:
                folder = arguments.output_dir / f"{optim}-{rate:g}"
                if finished_run(folder, rate) is None:
                    run_one(optim, rate, folder, ["--eval_steps", str(STEPS), "--logging_steps", "20"])
        order = list(known)
        runs = [run for folder in arguments.output_dir.iterdir() if (run := read_run(folder)) and "results" in run]
        runs = [run for run in runs if run["plan"]["steps"] == STEPS]
        runs.sort(key=lambda run: (order.index(run["identity"]["optim"]), run["training_arguments"]["learning_rate"]))
    except (RecipeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    page = sweep_table(runs, datetime.date.today())
    print(page)
    if arguments.table is not None:
        arguments.table.parent.mkdir(parents=True, exist_ok=True)
        arguments.table.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

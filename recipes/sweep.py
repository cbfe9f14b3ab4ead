"""Find the learning rate of each optimizer of the demo: short runs over a grid, one table for each model.

    python recipes/sweep.py [--model qwen2_5,esm2] [--optim adamw_torch_fused,muon] [--learning_rate 1e-3,2e-3]
                            [--table TABLE.md]

Every run is the demo's own training at another learning rate, with one evaluation at the end. A finished run in
``--output_dir`` is not made again, so a sweep can be stopped, continued and widened; the tables show all there are.
"""

import argparse
import datetime
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare import numbers
from demo import MODELS, OPTIMIZERS, DemoModel, run_one
from flag_checks import nearest
from recipe_error import RecipeError
from run_folder import check_writable, commit, read_run


def finished_run(model: DemoModel, folder: Path) -> dict[str, Any] | None:
    """Return a folder's run if it ended with results of the demo's training, else None."""
    run = read_run(folder)
    if run is None or "results" not in run:
        return None
    return run if run["identity"]["recipe"] == model.recipe and run["plan"]["steps"] == model.steps else None


def sweep_table(runs: Sequence[dict[str, Any]]) -> str:
    """Format a model's sweep as a Markdown table: a row for each optimizer, a column for each rate, the best bold."""
    losses: dict[str, dict[float, float]] = {}
    for run in runs:
        rates = losses.setdefault(run["identity"]["optim"], {})
        loss = run["results"]["eval_loss"]
        rates[run["training_arguments"]["learning_rate"]] = float("inf") if loss is None else loss
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
    return "\n".join(lines)


def sweep_page(sweeps: Mapping[DemoModel, Sequence[dict[str, Any]]], date: datetime.date) -> str:
    """Write the page: a section for each model, then how it was made."""
    page = "# Learning rates of the demo\n"
    for model, runs in sweeps.items():
        plan = runs[0]["plan"]
        page += f"""
## {model.label}

Last validation loss (nats a token) of {model.label} form `tiny` ({runs[0]["parameters"]:,} parameters) after
{plan["steps"]} steps of {plan["tokens_per_step"]:,} tokens of the bundled sample, by learning rate.

{sweep_table(runs)}
"""
    run = next(iter(sweeps.values()))[0]
    versions, hardware = run["versions"], run["hardware"]
    return f"""{page}
Same weights, batches, warm-up and cosine in every run of a model; one seed.

{date.isoformat()}, seed {run["identity"]["seed"]}, {hardware["cpu"]}, {hardware["torch_threads"]} threads,
Python {versions["python"]}, torch {versions["torch"]}, transformers {versions["transformers"]}, commit
{commit() or "none"}. Made by `python recipes/sweep.py`.
"""


def check(arguments: argparse.Namespace) -> tuple[list[str], list[str], list[float] | None]:
    """Check a command line before the first run; returns the recipes, the optimizers and the rates, if given.

    Raises:
        RecipeError: naming the flag and the value.
    """
    recipes, optimizers = arguments.model.split(","), arguments.optim.split(",")
    known_recipes = [model.recipe for model in MODELS]
    for flag, names, known in (("--model", recipes, known_recipes), ("--optim", optimizers, list(OPTIMIZERS))):
        for name in names:
            if name not in known:
                raise RecipeError(f"{flag} {name}: it is of {', '.join(known)}{nearest(name, known)}")
    rates = numbers(arguments.learning_rate, "--learning_rate")
    check_writable(arguments.output_dir)
    if arguments.table is not None:
        if arguments.table.is_dir():
            raise RecipeError(f"--table {arguments.table} is a folder; name a file in it")
        check_writable(arguments.table.parent, "--table in")
    return recipes, optimizers, rates


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=",".join(model.recipe for model in MODELS))
    parser.add_argument("--optim", default=",".join(OPTIMIZERS))
    parser.add_argument("--learning_rate", help="comma-separated; default: the grid of each optimizer")
    parser.add_argument("--output_dir", type=Path, default=Path("out/sweep"))
    parser.add_argument("--table", type=Path, help="Markdown file to write; printed in any case")
    arguments = parser.parse_args(argv)
    sweeps: dict[DemoModel, list[dict[str, Any]]] = {}
    try:
        recipes, optimizers, rates = check(arguments)
        for model in MODELS:
            folder = arguments.output_dir / model.recipe
            for optim in optimizers if model.recipe in recipes else ():
                grid = model.adamw_grid if optim.startswith("adamw") else model.matrix_grid
                for rate in rates or grid:
                    if finished_run(model, folder / f"{optim}-{rate:g}") is None:
                        flags = ["--eval_steps", str(model.steps), "--logging_steps", "20"]
                        run_one(model, optim, rate, folder / f"{optim}-{rate:g}", flags)
            folders = sorted(folder.iterdir()) if folder.is_dir() else []
            if runs := [run for each in folders if (run := finished_run(model, each)) is not None]:
                order = list(OPTIMIZERS)
                runs.sort(key=lambda run: order.index(run["identity"]["optim"]))
                sweeps[model] = runs
    except RecipeError as error:
        print("error:", *str(error).split(), file=sys.stderr)  # on one line
        return 2
    page = sweep_page(sweeps, datetime.date.today())
    print(page)
    if arguments.table is not None:
        arguments.table.parent.mkdir(parents=True, exist_ok=True)
        arguments.table.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

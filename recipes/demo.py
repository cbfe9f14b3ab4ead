"""Train a tiny Qwen2.5 and a tiny ESM-2 with each optimizer on the bundled samples and draw the curves: ``make demo``.

    python recipes/demo.py [--output_dir out/demo]

All runs of a model have the same initial weights and the same batches; each has its own learning rate, the best of a
sweep (``sweep.py``, its tables in ``recipes/results/demo_sweep.md``). Writes ``loss.png``, ``results.md`` and a folder
for each run.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from pretrain import pretrain
from recipe_arguments import parse_arguments
from recipe_error import RecipeError
from run_folder import check_writable
from run_log import read_log

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend: no display is needed


@dataclass(frozen=True, eq=False)
class DemoModel:
    """A recipe whose preset ``tiny`` the demo trains.

    Attributes:
        label: its name in tables and pictures.
        recipe: module with the presets.
        steps: length of a run.
        sample: what it is trained on, for the page.
        learning_rates: of each optimizer, the best of the sweep.
        adamw_grid, matrix_grid: the rates that the sweep tries.
    """

    label: str
    recipe: str
    steps: int
    sample: str
    learning_rates: Mapping[str, float]
    adamw_grid: tuple[float, ...]
    matrix_grid: tuple[float, ...]


OPTIMIZERS = {
    "adamw_torch_fused": "AdamW",
    "muon": "Muon",
    "adamuon": "AdaMuon",
    "adamuon_v1": "AdaMuon v1",
    "mud": "MUD",
}
MODELS = (
    DemoModel(
        "Qwen2.5",
        "qwen2_5",
        320,
        "0.86 MB of novels, validation on novels that are not in training",
        {"adamw_torch_fused": 4e-3, "muon": 8e-3, "adamuon": 8e-3, "adamuon_v1": 8e-3, "mud": 8e-3},
        (2e-3, 4e-3, 8e-3),
        (4e-3, 8e-3, 1.6e-2),
    ),
    DemoModel(
        "ESM-2",
        "esm2",
        150,
        "1 MB of proteins, validation on proteins of other families",
        {"adamw_torch_fused": 1e-3, "muon": 2e-3, "adamuon": 2e-3, "adamuon_v1": 2e-3, "mud": 2e-3},
        (5e-4, 1e-3, 2e-3),
        (1e-3, 2e-3, 4e-3),
    ),
)


@dataclass(frozen=True)
class Curves:
    """What a run logged: (step, loss) of training and of validation, and the contents of its ``run.json``."""

    optim: str
    learning_rate: float
    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    run: dict[str, Any]

    @property
    def label(self) -> str:
        """Name of the optimizer."""
        return OPTIMIZERS[self.optim]


def run_one(
    model: DemoModel, optim: str, learning_rate: float, folder: Path, flags: Sequence[str] = ()
) -> dict[str, Any]:
    """Train ``tiny`` once, replacing an earlier run in ``folder``; returns the contents of its ``run.json``."""
    argv = ["--preset", "tiny", "--max_steps", str(model.steps), "--save_strategy", "no", "--seed", "0"]
    argv += ["--optim", optim, "--learning_rate", str(learning_rate), "--output_dir", str(folder)]
    presets = importlib.import_module(model.recipe).PRESETS
    return pretrain(model.recipe, *parse_arguments(model.recipe, presets, [*argv, *flags, "--overwrite_output_dir"]))


def read_curves(optim: str, learning_rate: float, folder: Path, run: dict[str, Any]) -> Curves:
    """Read the loss curves of a finished run from its log; points that are not finite are left out."""
    curves: dict[str, list[tuple[int, float]]] = {"train": [], "eval": []}
    for record in read_log(folder):
        if record["loss"] is not None:
            curves[record["kind"]].append((record["step"], record["loss"]))
    return Curves(optim, learning_rate, curves["train"], curves["eval"], run)


def steps_to_reach(curve: Sequence[tuple[int, float]], loss: float) -> float | None:
    """Return the first step at which a curve, linear between its points, is down at ``loss``; None if it never is."""
    for (step, value), (next_step, next_value) in pairwise(curve):
        if value <= loss:
            return float(step)
        if next_value <= loss:
            return step + (next_step - step) * (value - loss) / (value - next_value)
    return float(curve[-1][0]) if curve and curve[-1][1] <= loss else None


def results_table(runs: Sequence[Curves]) -> str:
    """Format the results of a model as a Markdown table; the others are measured against its first run."""
    target = runs[0].validation[-1][1]
    lines = [
        f"| optimizer | learning rate | validation loss (nats a token) | perplexity | steps to {runs[0].label}'s last "
        "loss | training seconds | tokens a second |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for curves in runs:
        results = curves.run["results"]
        steps = steps_to_reach(curves.validation, target)
        lines.append(
            f"| {curves.label} | {curves.learning_rate:g} | {results['eval_loss']:.3f} | "
            f"{results['eval_perplexity']:.2f} | {'not reached' if steps is None else f'{steps:.0f}'} | "
            f"{results['train_seconds']:.0f} | {results['tokens_per_second']:,.0f} |"
        )
    return "\n".join(lines)


def results_page(models: Mapping[DemoModel, Sequence[Curves]], wall_seconds: float) -> str:
    """Write the page around the tables: what was trained, on what, and how to read it."""
    page = f"# Demo: {len(models)} models, {len(OPTIMIZERS)} optimizers\n"
    for model, runs in models.items():
        run = runs[0].run
        plan = run["plan"]
        page += f"""
## {model.label}

{results_table(runs)}

{model.label} form, {run["parameters"]:,} parameters, from scratch on {model.sample}: {plan["steps"]} steps of
{plan["tokens_per_step"]:,} tokens, {plan["steps"] / plan["steps_per_pass"]:.1f} passes.
"""
    run = next(iter(models.values()))[0].run
    versions, hardware = run["versions"], run["hardware"]
    gpus = "".join(f", {name}" for name in hardware["gpus"])
    return f"""{page}
All runs of a model start from the same weights and see the same batches (seed {run["identity"]["seed"]}); warm-up and
cosine are the same, the learning rate is each optimizer's best of `recipes/results/demo_sweep.md`. One seed and
tiny models: a smoke test, not evidence. Steps to a loss are read off the validation curve, linear between evaluations,
along a schedule that ends for all at the last step.

{hardware["cpu"]}, {hardware["torch_threads"]} threads{gpus};
torch {versions["torch"]}, transformers {versions["transformers"]}; {wall_seconds:.0f} seconds in all.
"""


def draw_curves(models: Mapping[DemoModel, Sequence[Curves]], path: Path) -> None:
    """Draw training and validation loss against training tokens: a row for each model, a line for each optimizer."""
    figure, rows = plt.subplots(
        len(models), 2, figsize=(12, 4.5 * len(models)), sharey="row", squeeze=False, layout="constrained"
    )
    for (model, runs), axes in zip(models.items(), rows, strict=True):
        for axis, part in zip(axes, ("train", "validation"), strict=True):
            for curves in runs:
                points = getattr(curves, part)
                tokens_per_step = curves.run["plan"]["tokens_per_step"]
                axis.plot(
                    [step * tokens_per_step / 1000 for step, _ in points],
                    [loss for _, loss in points],
                    label=f"{curves.label} (learning rate {curves.learning_rate:g})",
                    linewidth=1.6,
                    marker="o" if part == "validation" else None,
                    markersize=4,
                )
            axis.set_title(f"{model.label}: {'training batches' if part == 'train' else 'validation'}")
            axis.set_xlabel("training tokens (thousands)")
            axis.grid(alpha=0.3)
        first = runs[0].run["plan"]["steps"] / 8
        at_first = [loss for curves in runs for step, loss in curves.train if step >= first]
        lowest = min(loss for curves in runs for _, loss in curves.train + curves.validation)
        margin = 0.05 * (max(at_first) - lowest)
        axes[0].set_ylim(lowest - margin, max(at_first) + margin)
        axes[0].set_ylabel("loss (nats per token)")
        axes[1].legend(frameon=False)
    figure.suptitle("Tiny models from scratch: same weights and batches, each optimizer at its own learning rate")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def check_demo_folder(folder: Path) -> None:
    """Refuse a folder whose files the demo could replace, unless it holds runs of an earlier one.

    Raises:
        RecipeError: naming it.
    """
    check_writable(folder)
    is_own = any((folder / model.recipe).is_dir() for model in MODELS)
    if not is_own and folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(f"--output_dir {folder} holds files that no demo wrote: give another folder")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("out/demo"))
    output_dir = parser.parse_args(argv).output_dir
    start = time.perf_counter()
    models: dict[DemoModel, list[Curves]] = {}
    jobs = [(model, optim) for model in MODELS for optim in OPTIMIZERS]
    try:
        check_demo_folder(output_dir)
        for number, (model, optim) in enumerate(jobs, start=1):
            print(f"\n[{number}/{len(jobs)}] {model.label}, {OPTIMIZERS[optim]}", flush=True)
            folder, rate = output_dir / model.recipe / optim, model.learning_rates[optim]
            every = str(model.steps // 8)
            run = run_one(model, optim, rate, folder, ["--eval_steps", every, "--logging_steps", "10"])
            models.setdefault(model, []).append(read_curves(optim, rate, folder, run))
    except RecipeError as error:
        print("error:", *str(error).split(), file=sys.stderr)  # on one line
        return 2
    draw_curves(models, output_dir / "loss.png")
    (output_dir / "results.md").write_text(results_page(models, time.perf_counter() - start), encoding="utf-8")
    for model, runs in models.items():
        print(f"\n{model.label}\n{results_table(runs)}")
    print(f"\n{output_dir / 'results.md'}\n{output_dir / 'loss.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

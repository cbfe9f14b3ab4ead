"""Pretrain ``tiny`` with each optimizer on the bundled novels and draw the loss curves: ``make demo``.

    python recipes/demo.py [--output_dir out/demo]

All runs have the same initial weights and the same batches; each has its own learning rate, the best of a sweep
(``sweep.py``, its table in ``recipes/results/demo_sweep.md``). Writes ``loss.png``, ``results.md`` and a folder for
each run.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from pretrain import pretrain
from qwen2_5 import PRESETS
from recipe_arguments import parse_arguments
from recipe_error import RecipeError

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend: no display is needed

STEPS = 320
TRAINING = ["--preset", "tiny", "--max_steps", str(STEPS), "--save_strategy", "no", "--seed", "0"]


@dataclass(frozen=True)
class Contender:
    """An optimizer of the demo with the learning rate the sweep chose for it."""

    label: str
    optim: str
    learning_rate: float


CONTENDERS = (
    Contender("AdamW", "adamw_torch_fused", 4e-3),
    Contender("Muon", "muon", 8e-3),
    Contender("AdaMuon", "adamuon", 8e-3),
    Contender("AdaMuon v1", "adamuon_v1", 8e-3),
    Contender("MUD", "mud", 8e-3),
)


@dataclass(frozen=True)
class Curves:
    """What a run logged: (step, loss) of training and of validation, and the contents of its ``run.json``."""

    contender: Contender
    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    run: dict[str, Any]


def run_one(optim: str, learning_rate: float, folder: Path, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Train ``tiny`` once, replacing an earlier run in ``folder``; returns the contents of its ``run.json``."""
    argv = [*TRAINING, "--optim", optim, "--learning_rate", str(learning_rate), "--output_dir", str(folder), *flags]
    return pretrain("qwen2_5", *parse_arguments("qwen2_5", PRESETS, [*argv, "--overwrite_output_dir"]))


def read_curves(contender: Contender, folder: Path, run: dict[str, Any]) -> Curves:
    """Read the loss curves of a finished run from the Trainer's own log."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return Curves(
        contender,
        [(log["step"], log["loss"]) for log in history if "loss" in log],
        [(log["step"], log["eval_loss"]) for log in history if "eval_loss" in log],
        run,
    )


def steps_to_reach(curve: Sequence[tuple[int, float]], loss: float) -> float | None:
    """Return the first step at which a curve, linear between its points, is down at ``loss``; None if it never is."""
    for (step, value), (next_step, next_value) in pairwise(curve):
        if value <= loss:
            return float(step)
        if next_value <= loss:
            return step + (next_step - step) * (value - loss) / (value - next_value)
    return float(curve[-1][0]) if curve and curve[-1][1] <= loss else None


def results_table(runs: Sequence[Curves]) -> str:
    """Format the results as a Markdown table; the first run is the one the others are measured against."""
    target = runs[0].validation[-1][1]
    name = runs[0].contender.label
    lines = [
        f"| optimizer | learning rate | validation loss (nats a token) | perplexity | steps to {name}'s last loss | "
        "training seconds | tokens a second |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for curves in runs:
        results = curves.run["results"]
        steps = steps_to_reach(curves.validation, target)
        lines.append(
            f"| {curves.contender.label} | {curves.contender.learning_rate:g} | {results['eval_loss']:.3f} | "
            f"{results['eval_perplexity']:.1f} | {'not reached' if steps is None else f'{steps:.0f}'} | "
            f"{results['train_seconds']:.0f} | {results['tokens_per_second']:,.0f} |"
        )
    return "\n".join(lines)


def results_page(runs: Sequence[Curves], wall_seconds: float) -> str:
    """Write the page around the table: what was trained, on what, and how to read it."""
    run = runs[0].run
    versions, hardware, plan = run["versions"], run["hardware"], run["plan"]
    return f"""# Demo: one model, {len(runs)} optimizers

{results_table(runs)}

Qwen2.5 form, {run["parameters"]:,} parameters, from scratch on 0.86 MB of novels: {plan["steps"]} steps of
{plan["tokens_per_step"]:,} tokens ({plan["steps"] / plan["steps_per_pass"]:.1f} passes), validation on novels that are
not in training. All runs start from the same weights and see the same batches (seed {run["identity"]["seed"]});
warm-up and cosine are the same, the learning rate is each optimizer's best of `recipes/results/demo_sweep.md`. One
seed and a tiny model: a smoke test, not evidence. Steps to a loss are read off the validation curve, linear between
evaluations, along a schedule that ends for all at the last step.

{hardware["cpu"]}, {hardware["torch_threads"]} threads{", " + ", ".join(hardware["gpus"]) if hardware["gpus"] else ""};
torch {versions["torch"]}, transformers {versions["transformers"]}; {wall_seconds:.0f} seconds in all.
"""


def draw_curves(runs: Sequence[Curves], path: Path) -> None:
    """Draw training and validation loss against training tokens, one line for each optimizer."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axis, part in zip(axes, ("train", "validation"), strict=True):
        for curves in runs:
            points = getattr(curves, part)
            tokens_per_step = curves.run["plan"]["tokens_per_step"]
            contender = curves.contender
            axis.plot(
                [step * tokens_per_step / 1000 for step, _ in points],
                [loss for _, loss in points],
                label=f"{contender.label} (learning rate {contender.learning_rate:g})",
                linewidth=1.6,
                marker="o" if part == "validation" else None,
                markersize=4,
            )
        axis.set_title("training batches" if part == "train" else "validation novels")
        axis.set_xlabel("training tokens (thousands)")
        axis.grid(alpha=0.3)
    at_first = [loss for curves in runs for step, loss in curves.train if step >= curves.run["plan"]["steps"] / 8]
    lowest = min(loss for curves in runs for _, loss in curves.train + curves.validation)
    axes[0].set_ylim(lowest - 0.1, max(at_first) + 0.1)
    axes[0].set_ylabel("loss (nats per token)")
    axes[1].legend(frameon=False)
    figure.suptitle(
        "Qwen2.5 form, tiny, from scratch: same weights and batches, each optimizer at its own learning rate"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("out/demo"))
    output_dir = parser.parse_args().output_dir
    start = time.perf_counter()
    runs = []
    try:
        for number, contender in enumerate(CONTENDERS, start=1):
            print(f"\n[{number}/{len(CONTENDERS)}] {contender.label}", flush=True)
            folder = output_dir / contender.optim
            run = run_one(
                contender.optim, contender.learning_rate, folder, ["--eval_steps", "40", "--logging_steps", "10"]
            )
            runs.append(read_curves(contender, folder, run))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draw_curves(runs, output_dir / "loss.png")
    (output_dir / "results.md").write_text(results_page(runs, time.perf_counter() - start), encoding="utf-8")
    print(f"\n{results_table(runs)}\n\n{output_dir / 'results.md'}\n{output_dir / 'loss.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

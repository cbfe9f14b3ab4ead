"""The report of a comparison: ``report.md``, ``curves.png`` and ``metrics.json``."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe_error import RecipeError
from run_folder import check_writable
from study_comparison import Comparison, Sweep
from study_curves import draw_curves
from study_metrics import (
    WINDOW,
    has_horizon,
)

REPORT_FILE, CURVES_FILE, METRICS_FILE = "report.md", "curves.png", "metrics.json"
NOT_REACHED = "not reached"
UNSTEADY = 0.1  # deviation of the speed over its mean above which times are doubted


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [f"| {' | '.join(header)} |", "| --- |" + " --- |" * (len(header) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def cell(spread: Mapping[str, Any], form: str, factor: float = 1.0, missing: str = "") -> str:
    """Format a mean with its deviation, and how many of the runs have a value where not all do."""
    if not spread["count"]:
        return missing
    text = format(factor * spread["mean"], form)
    if spread["deviation"] is not None:
        text += f" ± {format(factor * spread['deviation'], form.replace('+', ''))}"
    return text if spread["count"] == spread["runs"] else f"{text} ({spread['count']} of {spread['runs']})"


def loss_cell(measured: Mapping[str, Any], key: str) -> str:
    """Format a loss; a group of which all runs diverged says so."""
    return cell(measured[key], ".4f", missing="diverged" if measured["diverged"] else "")


def perplexity_cell(measured: Mapping[str, Any]) -> str:
    """Format the perplexity of the mean loss."""
    mean = measured["validation_loss"]["mean"]
    return "" if mean is None else f"{math.exp(min(mean, 700)):.2f}"


def saving_cells(needed: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Format tokens to the baseline's loss, and the part of its own that they save."""
    part = cell(saved, "+.1f", 100)
    return [cell(needed, ",.0f", missing=NOT_REACHED), f"{part} %" if part else ""]


def losses_table(comparison: Comparison) -> str:
    """Final losses, and tokens to the baseline's (the form of the AdaMuon paper's comparison)."""
    name = comparison.baseline.label
    header = ["optimizer", "learning rate", "seeds", "training loss", "validation loss", f"less {name}'s"]
    header += ["perplexity"] if comparison.perplexity else []
    has_accuracy = any(measured["accuracy"]["count"] for measured in comparison.measured)
    header += ["accuracy"] if has_accuracy else []
    header += [f"{comparison.unit} to {name}'s training loss", "saved"]
    has_validation = any(measured["validation_loss"]["count"] for measured in comparison.measured)
    header += [f"{comparison.unit} to its validation loss", "saved"] if has_validation else []
    rows = []
    for measured in comparison.measured:
        row = [measured["label"], f"{measured['learning_rate']:g}", str(len(measured["seeds"]))]
        row += [loss_cell(measured, "training_loss"), loss_cell(measured, "validation_loss")]
        row += [cell(measured["validation_loss_difference"], "+.4f")]
        row += [perplexity_cell(measured)] if comparison.perplexity else []
        row += [cell(measured["accuracy"], ".2f", 100) + " %"] if has_accuracy else []
        row += saving_cells(measured["tokens_to_baseline_loss"], measured["token_saving"])
        if has_validation:
            row += saving_cells(measured["tokens_to_baseline_validation_loss"], measured["validation_token_saving"])
        rows.append(row)
    return table(header, rows)


def times_table(comparison: Comparison) -> str:
    """Training seconds to validation values, and the speed-up (the form of the MUD paper's comparison)."""
    word = "perplexity" if comparison.perplexity else "loss"
    header = ["optimizer"]
    for target in comparison.targets:
        header += [f"seconds to {word} {target:.4g}", "speed-up"]
    rows = []
    for measured in comparison.measured:
        row = [measured["label"]]
        for reached in measured["time_to"]:
            row += [cell(reached["seconds"], ",.1f", missing=NOT_REACHED), cell(reached["speedup"], ".2f")]
        rows.append(row)
    return table(header, rows)


def throughput_table(comparison: Comparison) -> str:
    """Speed of training and the optimizer's part in it."""
    reference = next(m for m in comparison.measured if m["label"] == comparison.baseline.label)
    header = ["optimizer", f"{comparison.unit} a second", "relative", "optimizer ms a step", "its share", "MFU"]
    has_memory = any(measured["peak_memory_bytes"]["count"] for measured in comparison.measured)
    header += ["peak GiB"] if has_memory else []
    rows = []
    for measured in comparison.measured:
        speed, base = measured["tokens_per_second"]["mean"], reference["tokens_per_second"]["mean"]
        share = cell(measured["optimizer_share"], ".1f", 100)
        mfu = cell(measured["mfu"], ".1f", 100)
        rows.append(
            [
                measured["label"],
                cell(measured["tokens_per_second"], ",.0f"),
                f"{speed / base:.2f}" if speed and base else "",
                cell(measured["optimizer_ms_per_step"], ".2f"),
                f"{share} %" if share else "",
                f"{mfu} %" if mfu else "",
                *([cell(measured["peak_memory_bytes"], ".2f", 1 / 2**30)] if has_memory else []),
            ]
        )
    return table(header, rows)


def sweep_table(sweeps: Sequence[Sweep]) -> str:
    """Final loss by learning rate, the best of each optimizer bold."""
    rates = sorted({rate for sweep in sweeps for rate in sweep.losses})
    rows = []
    for sweep in sweeps:
        cells = []
        for rate in rates:
            loss = sweep.losses.get(rate)
            text = "" if loss is None else "diverged" if math.isinf(loss) else f"{loss:.4f}"
            cells.append(f"**{text}**" if rate == sweep.best and text else text)
        rows.append([sweep.optimizer, *cells, f"{sweep.best:g}", "yes" if sweep.is_bracketed else "no, at an end"])
    return table(["optimizer", *(f"{rate:g}" for rate in rates), "best", "bracketed"], rows)


def notes(comparison: Comparison) -> list[str]:
    """Say what the numbers can and cannot show."""
    found = []
    if not comparison.optimizers_are_tuned:
        found.append(
            "Not every optimizer has its learning rate from a sweep of its own that brackets it (`--sweep_lr`): these "
            "are measurements of runs, not a comparison of optimizers."
        )
    if any(has_horizon(group.runs[0]) for group in comparison.groups):
        found.append(
            "The schedule has a horizon: a run cut short would have decayed earlier, so tokens and seconds to a value "
            "say less than the final losses. A schedule without one (`--schedule warmup_stable --decay 0`) is fair."
        )
    if any(sweep.steps for sweep in comparison.sweeps):
        steps = ", ".join(sorted({f"{sweep.steps:,}" for sweep in comparison.sweeps if sweep.steps}))
        found.append(f"Learning rates are the best of runs of {steps} steps; longer runs may want lower ones.")
    plan = comparison.baseline.runs[0].record["plan"]
    if plan.get("steps_per_pass") and (passes := plan["steps"] / plan["steps_per_pass"]) > 1:
        found.append(
            f"The runs pass over their data {passes:.1f} times, and training losses fall at the start of each pass: "
            "the validation loss says how much was learned."
        )
    if (preset := str(comparison.baseline.runs[0].record["identity"].get("preset"))) == "tiny":
        found.append(f"The preset `{preset}` is a smoke test, not evidence.")
    if (seeds := min(len(group.runs) for group in comparison.groups)) < 3:
        found.append(f"Only {seeds} seed{'s' if seeds > 1 else ''} for some optimizer: the spread is not known well.")
    for measured in comparison.measured:
        for seed, step in measured["diverged"].items():
            found.append(f"{measured['label']}, seed {seed}: diverged, the loss was not finite at step {step:,}.")
        speed = measured["tokens_per_second"]
        if speed["deviation"] and speed["deviation"] > UNSTEADY * speed["mean"]:
            found.append(
                f"{measured['label']}: tokens a second vary by {speed['deviation'] / speed['mean']:.0%} between "
                "seeds; something else used the machine, so seconds do not compare."
            )
        if measured["unfinished"]:
            seeds_left = ", ".join(map(str, measured["unfinished"]))
            found.append(f"{measured['label']}: not finished, seed {seeds_left}.")
    return found + [f"Not the same in all runs: {difference}." for difference in comparison.differences]


def report(comparison: Comparison) -> str:
    """Write the report as Markdown."""
    record = comparison.baseline.runs[0].record
    identity, plan, versions, machine = (record[key] for key in ("identity", "plan", "versions", "hardware"))
    schedule = identity.get("schedule") or {}
    devices = ", ".join(machine.get("gpus") or []) or f"{machine.get('cpu')}, {machine.get('torch_threads')} threads"
    seeds = sorted({run.seed for group in comparison.groups for run in group.runs})
    value = "perplexity" if comparison.perplexity else "loss"
    rate = f"{schedule.get('lr_scheduler_type', 'unknown')}, {schedule.get('warmup_steps', 0):g} steps of warm-up"
    name = comparison.baseline.label
    parts = [
        f"# {identity['recipe']} {identity['preset']}: {', '.join(group.label for group in comparison.groups)}",
        f"{record.get('parameters', 0):,} parameters; {plan['steps']:,} steps of {plan['tokens_per_step']:,} "
        f"{comparison.unit}; schedule {rate}; seeds {', '.join(map(str, seeds))}. Measured against {name}.",
        "## Losses",
        losses_table(comparison),
        f"Losses in nats; training losses are rolling means of {WINDOW} logged values; differences are between runs "
        "with the same seed. "
        f"{comparison.unit.capitalize()} to the last loss of {name} with the same seed, linear between logs; "
        "saved is (a - b) / a of its own. Mean ± standard deviation over seeds; (2 of 3) counts the runs that have a "
        "value.",
    ]
    if comparison.targets:
        parts += [
            f"## Time to {value}",
            times_table(comparison),
            f"Training seconds (without evaluation, saving and the first compilation) to a validation {value}, linear "
            f"between evaluations; speed-up is {name}'s seconds by those of the run with the same seed.",
        ]
    parts += ["## Throughput", throughput_table(comparison)]
    if comparison.sweeps:
        parts += ["## Learning rates", sweep_table(comparison.sweeps)]
    if found := notes(comparison):
        parts += ["## Read with care", "\n".join(f"- {note}" for note in found)]
    parts += [
        f"![Curves]({CURVES_FILE})",
        f"{devices}; {record.get('world_size', 1)} process(es); {identity.get('precision', '')}. "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        + f"; commit {record.get('commit') or 'unknown'}.",
    ]
    return "\n\n".join(parts) + "\n"


def check_report_folder(folder: Path) -> None:
    """Refuse a folder whose files a report could replace, unless it holds an earlier one.

    Raises:
        RecipeError: naming it.
    """
    check_writable(folder)
    try:
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        metrics = None
    is_own = isinstance(metrics, dict) and {"baseline", "rolling_mean", "optimizers"} <= metrics.keys()
    if not is_own and folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(f"--output_dir {folder} holds files that no comparison wrote: give another folder")


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write the report, the picture and the metrics into a folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {
        "baseline": comparison.baseline.label,
        "targets": list(comparison.targets),
        "target_is_perplexity": comparison.perplexity,
        "rolling_mean": WINDOW,
        "optimizers": list(comparison.measured),
        "sweeps": {
            sweep.optimizer: {
                "losses": {f"{rate:g}": None if math.isinf(loss) else loss for rate, loss in sweep.losses.items()},
                "best": sweep.best,
                "bracketed": sweep.is_bracketed,
            }
            for sweep in comparison.sweeps
        },
        "tuned": comparison.optimizers_are_tuned,
        "differences": list(comparison.differences),
    }
    # the metrics first: by them `check_report_folder` knows its own
    contents = {METRICS_FILE: json.dumps(metrics, indent=2, allow_nan=False) + "\n", REPORT_FILE: report(comparison)}
    for name, text in contents.items():
        partial = folder / f".{name}"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / name)
    draw_curves(comparison, folder / CURVES_FILE)

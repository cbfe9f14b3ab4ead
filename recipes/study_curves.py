"""The picture of a comparison: loss over tokens, validation over time, speed-up over the validation value."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from study_comparison import Comparison
from study_metrics import WINDOW, Curve, Group, first_reached

SPEEDUP_POINTS = 60


def mean_curve(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return x, and the mean, lowest and highest y of several curves where all of them have values."""
    known = [curve for curve in curves if curve.x]
    if not known:
        return (np.empty(0),) * 4
    low, high = max(curve.x[0] for curve in known), min(curve.x[-1] for curve in known)
    x = np.unique(np.concatenate([curve.x for curve in known]))
    x = x[(x >= low) & (x <= high)]
    values = np.stack([np.interp(x, curve.x, curve.y) for curve in known])
    return x, values.mean(0), values.min(0), values.max(0)


def speedup_curve(group: Group, baseline: Group, *, perplexity: bool) -> Curve:
    """Return the speed-up over validation values, mean over the seeds, where all seeds of both reach the value."""
    pairs = [
        tuple(one.validation("train_seconds", perplexity=perplexity) for one in (run, base))
        for run in group.runs
        if (base := baseline.of_seed(run.seed)) is not None
    ]
    pairs = [pair for pair in pairs if all(curve.y for curve in pair)]
    if not pairs:
        return Curve((), ())
    high = min(curve.y[0] for pair in pairs for curve in pair)
    low = max(min(curve.y) for pair in pairs for curve in pair)
    points = []
    for target in np.linspace(high, low, SPEEDUP_POINTS) if low < high < math.inf else ():
        factors = [
            reference / seconds
            for run, base in pairs
            if (seconds := first_reached(run, target)) and (reference := first_reached(base, target)) is not None
        ]
        if len(factors) == len(pairs):
            points.append((float(target), sum(factors) / len(factors)))
    return Curve(tuple(x for x, _ in points), tuple(y for _, y in points))


def draw_curves(comparison: Comparison, path: Path) -> None:
    """Draw loss over tokens (bands span the seeds), validation over seconds, speed-up over the validation value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    value = "perplexity" if comparison.perplexity else "loss"
    figure, axes = plt.subplots(1, 3, figsize=(18, 5.2), layout="constrained")
    highest = []
    for group in comparison.groups:
        label = f"{group.runs[0].optimizer} (lr {group.learning_rate:g})"
        x, mean, low, high = mean_curve([run.training() for run in group.runs])
        (line,) = axes[0].plot(x, mean, label=label, linewidth=1.6)
        color = line.get_color()
        axes[0].fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        highest.append((axes[0], x, mean))
        for number, run in enumerate(group.runs):  # seconds differ between seeds: no mean over them
            times = run.validation("train_seconds", perplexity=comparison.perplexity)
            axes[1].plot(*times, color=color, label=None if number else label, linewidth=1.2, marker="o", markersize=2)
            highest.append((axes[1], *map(np.asarray, times)))
        curve = speedup_curve(group, comparison.baseline, perplexity=comparison.perplexity)
        axes[2].plot(*curve, color=color, label=label, linewidth=1.6)
    data = comparison.baseline.runs[0].record.get("data") or {}
    if entropy := (data.get("train") or {}).get("unigram_entropy"):
        axes[0].axhline(entropy, color="gray", linestyle=":", linewidth=1, label="unigram entropy")
    axes[0].set(
        xlabel=f"training {comparison.unit}", ylabel="loss (nats)", title=f"training, rolling mean of {WINDOW}"
    )
    axes[1].set(xlabel="training seconds", ylabel=f"validation {value}", title=f"validation {value} over time")
    axes[2].set(
        xlabel=f"validation {value}", ylabel="times faster", title=f"speed-up over {comparison.baseline.label}"
    )
    axes[2].invert_xaxis()
    for axis in axes[:2]:
        crop_start(axis, [(x, y) for one, x, y in highest if one is axis])
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=9)
    record = comparison.baseline.runs[0].record
    figure.suptitle(f"{record['identity']['recipe']} {record['identity']['preset']}")
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)
    os.replace(partial, path)


def crop_start(axis: Any, curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Leave the steep start of curves out of the picture, so that their differences later can be seen."""
    later = [y[x >= x[0] + (x[-1] - x[0]) / 10] for x, y in curves if len(x)]
    values = np.concatenate([y[np.isfinite(y)] for y in later]) if later else np.empty(0)
    if len(values) > 2 and values.min() < values.max():
        margin = 0.05 * (values.max() - values.min())
        axis.set_ylim(values.min() - margin, values.max() + margin)

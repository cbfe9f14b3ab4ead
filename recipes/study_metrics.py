"""What a comparison of optimizers measures, from the folders of their runs.

A value that was not reached is None, never 0; a run whose loss is not finite has diverged and reaches nothing from
there on. Runs are paired by seed with those of the baseline.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from recipe_error import RecipeError
from run_folder import read_run
from run_log import read_log

WINDOW = 7  # of the rolling mean, in logged values (MUD, figures)
# What must be the same for a difference between two runs to be the optimizer's; learning rates are each one's own.
SHARED = (
    "recipe",
    "preset",
    "model",
    "tokenizer",
    "data",
    "block_size",
    "tokens_per_step",
    "schedule",
    "precision",
    "weight_decay",
    "max_grad_norm",
)


class Curve(NamedTuple):
    """Values along a run, such as losses over tokens; ``x`` rises."""

    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One run folder: its ``run.json`` and its log."""

    folder: Path
    record: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]

    @property
    def optimizer(self) -> str:
        """Name of the optimizer, with its options and clipping if it was given any."""
        identity = self.record["identity"]
        clip = f"clip={identity['clip']}" if identity.get("clip") else None
        options = ", ".join(filter(None, (identity.get("optim_args"), clip)))
        return f"{identity['optim']} ({options})" if options else str(identity["optim"])

    @property
    def seed(self) -> int:
        return int(self.record["identity"]["seed"])

    @property
    def learning_rate(self) -> float:
        return float(self.record["training_arguments"]["learning_rate"])

    @property
    def is_finished(self) -> bool:
        return "results" in self.record

    @cached_property
    def diverged_at(self) -> int | None:
        """The first step whose logged loss is not finite, None if there is none."""
        return next((record["step"] for record in self.log if record["loss"] is None), None)

    def curve(self, kind: str, x: str, y: str = "loss") -> Curve:
        """Return one quantity of the log over another, up to the step at which the run diverged."""
        end = math.inf if self.diverged_at is None else self.diverged_at
        points = [
            (float(record[x]), float(record[y]))
            for record in self.log
            if record["kind"] == kind and record["step"] < end and record.get(y) is not None
        ]
        return Curve(tuple(point[0] for point in points), tuple(point[1] for point in points))

    def training(self, x: str = "tokens") -> Curve:
        """Return the training loss, rolling mean of `WINDOW` logged values, over ``x``."""
        curve = self.curve("train", x)
        return Curve(curve.x, rolling_mean(curve.y))

    def validation(self, x: str, *, perplexity: bool) -> Curve:
        """Return the validation loss or its perplexity over ``x``."""
        curve = self.curve("eval", x)
        return Curve(curve.x, tuple(map(safe_exp, curve.y))) if perplexity else curve

    def final_training_loss(self) -> float | None:
        """Return the last training loss, smoothed; None if the run diverged."""
        return None if self.diverged_at is not None else last(self.training())

    def final_validation_loss(self) -> float | None:
        """Return the last validation loss; None if the run diverged or was not evaluated."""
        return None if self.diverged_at is not None else last(self.curve("eval", "tokens"))

    def tokens_per_second(self) -> float | None:
        """Return the median over the intervals between training records, without the first."""
        speeds = [
            (b["tokens"] - a["tokens"]) / (b["train_seconds"] - a["train_seconds"])
            for a, b in pairwise(record for record in self.log if record["kind"] == "train")
            if b["train_seconds"] > a["train_seconds"]
        ]
        return statistics.median(speeds) if speeds else None

    def optimizer_share(self) -> tuple[float | None, float | None]:
        """Return the optimizer's milliseconds a step and its share of the training seconds, if they were measured."""
        timed = [record for record in self.log if record["kind"] == "train" and record.get("optimizer_seconds")]
        if len(timed) < 2:
            return None, None
        first, final = timed[0], timed[-1]
        seconds = final["optimizer_seconds"] - first["optimizer_seconds"]
        steps, total = final["step"] - first["step"], final["train_seconds"] - first["train_seconds"]
        return (1000 * seconds / steps, seconds / total) if steps > 0 and total > 0 else (None, None)


def safe_exp(value: float) -> float:
    """Return e to the ``value``, infinity where that is too large."""
    return math.exp(value) if value < 700 else math.inf


def last(curve: Curve) -> float | None:
    """Return a curve's last value, None if it has none."""
    return curve.y[-1] if curve.y else None


def rolling_mean(values: Sequence[float], window: int = WINDOW) -> tuple[float, ...]:
    """Return the mean of each value and those before it, ``window`` in all; of as many as there are at the start."""
    return tuple(statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1))


def first_reached(curve: Curve, target: float) -> float | None:
    """Return where a curve, linear between its points, is first down at ``target``; None if it never is."""
    for index, (x, y) in enumerate(zip(*curve, strict=True)):
        if y <= target:
            if index == 0:
                return x
            before_x, before_y = curve.x[index - 1], curve.y[index - 1]
            if math.isinf(before_y):
                return x
            return before_x + (x - before_x) * (before_y - target) / (before_y - y)
    return None


def load_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        RecipeError: if it is none, or its log is missing or damaged.
    """
    record = read_run(folder)
    if record is None:
        raise RecipeError(f"{folder} has no run.json: it is not the folder of a run")
    return Run(folder, record, read_log(folder))


class Spread(NamedTuple):
    """Mean and sample standard deviation of the runs that have a value, how many these are, and how many runs."""

    mean: float | None
    deviation: float | None
    count: int
    runs: int


def spread_of(values: Sequence[float | None]) -> Spread:
    """Summarise one value of each run; None is a run that has none."""
    known = [value for value in values if value is not None]
    return Spread(
        statistics.fmean(known) if known else None,
        statistics.stdev(known) if len(known) > 1 else None,
        len(known),
        len(values),
    )


@dataclass(frozen=True)
class Group:
    """The runs of one optimizer at one learning rate, one for each seed."""

    label: str
    runs: tuple[Run, ...]

    @property
    def learning_rate(self) -> float:
        return self.runs[0].learning_rate

    @property
    def is_adamw(self) -> bool:
        return self.runs[0].optimizer.startswith("adamw")

    def of_seed(self, seed: int) -> Run | None:
        return next((run for run in self.runs if run.seed == seed), None)

    def loss(self) -> float:
        """Return the mean final validation loss (training loss without validation), infinite if any run diverged."""
        losses = [
            run.final_validation_loss() if run.curve("eval", "tokens").y else run.final_training_loss()
            for run in self.runs
        ]
        return statistics.fmean(math.inf if loss is None else loss for loss in losses)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs by optimizer and learning rate, in the order they come.

    The learning rate is in the label where an optimizer has several.

    Raises:
        RecipeError: if two runs have the same optimizer, learning rate and seed.
    """
    groups: dict[tuple[str, float], dict[int, Run]] = {}
    for run in runs:
        members = groups.setdefault((run.optimizer, run.learning_rate), {})
        if run.seed in members:
            raise RecipeError(
                f"{members[run.seed].folder} and {run.folder} are runs of {run.optimizer} at learning rate "
                f"{run.learning_rate:g} with the same seed: name one of them"
            )
        members[run.seed] = run
    optimizers = [optimizer for optimizer, _ in groups]
    return [
        Group(
            optimizer if optimizers.count(optimizer) == 1 else f"{optimizer}, {rate:g}",
            tuple(members[seed] for seed in sorted(members)),
        )
        for (optimizer, rate), members in groups.items()
    ]


def choose_baseline(groups: Sequence[Group], label: str | None) -> Group:
    """Return the group to measure against: the one named, else the best AdamW, else the first.

    Raises:
        RecipeError: if there is no group of that name.
    """
    if label is not None:
        for group in groups:
            if label in (group.label, group.runs[0].optimizer):
                return group
        raise RecipeError(f"--baseline {label}: there are {', '.join(group.label for group in groups)}")
    adamw = [group for group in groups if group.is_adamw]
    return min(adamw, key=Group.loss) if adamw else groups[0]


def unequal_settings(runs: Sequence[Run], keys: Sequence[str] = SHARED) -> list[str]:
    """Name the settings among ``keys`` that are not the same in all runs."""
    found = []
    for key in keys:
        values = {str(run.record["identity"].get(key)) for run in runs}
        if len(values) > 1:
            shown = " / ".join(sorted(values)) if max(map(len, values)) < 60 else f"{len(values)} kinds"
            found.append(f"{key}: {shown}")
    return found


def differences(runs: Sequence[Run]) -> list[str]:
    """Name what differs between runs besides the optimizer, its learning rate and the seed."""
    found = unequal_settings(runs)
    for key, name in (("initial_weights_sha256", "initial weights"), ("first_batch_sha256", "first batch")):
        by_seed: dict[int, set[str]] = {}
        for run in runs:
            by_seed.setdefault(run.seed, set()).add(str(run.record.get(key)))
        if unequal := sorted(seed for seed, hashes in by_seed.items() if len(hashes) > 1):
            found.append(f"{name}: not the same for seed {', '.join(map(str, unequal))}")
    kinds = {tuple(run.record["hardware"].get("gpus") or [run.record["hardware"].get("cpu")]) for run in runs}
    if len(kinds) > 1:
        found.append(f"hardware, so seconds do not compare: {' / '.join(sorted(map(str, kinds)))}")
    return found


def final_difference(run: Run, baseline: Run) -> float | None:
    """Return a run's last validation loss less the baseline's; None if one has none."""
    loss, reference = run.final_validation_loss(), baseline.final_validation_loss()
    return None if loss is None or reference is None else loss - reference


def token_saving(run: Run, baseline: Run, kind: str = "train") -> tuple[float | None, float | None]:
    """Return the tokens a run needs to the baseline's final loss, and the part it saves.

    The saving is (a - b) / a with a the baseline's tokens to that loss and b the run's; negative if it needs more.

    Args:
        run, baseline: of the same seed.
        kind: "train" for the smoothed training loss, "eval" for the validation loss.
    """
    target = baseline.final_training_loss() if kind == "train" else baseline.final_validation_loss()
    if target is None:
        return None, None
    curve, base = (one.training() if kind == "train" else one.curve("eval", "tokens") for one in (run, baseline))
    needed, reference = first_reached(curve, target), first_reached(base, target)
    assert reference is not None
    return needed, None if needed is None else (reference - needed) / reference


def speedup(run: Run, baseline: Run, target: float, *, perplexity: bool) -> tuple[float | None, float | None]:
    """Return the training seconds a run needs to a validation value, and how many times faster than the baseline."""
    seconds, reference = (
        first_reached(one.validation("train_seconds", perplexity=perplexity), target) for one in (run, baseline)
    )
    return seconds, reference / seconds if seconds and reference is not None else None


def targets_of(baseline: Group, *, perplexity: bool) -> list[float]:
    """Return validation values for a table of times: the baseline's after 1/2, 3/4 and all of its tokens."""
    targets = []
    for part in (0.5, 0.75, 1.0):
        values = []
        for run in baseline.runs:
            curve = run.validation("tokens", perplexity=perplexity)
            end = part * curve.x[-1] if curve.x else 0
            if reached := [y for x, y in zip(*curve, strict=True) if x <= end and math.isfinite(y)]:
                values.append(min(reached))
        if values:
            targets.append(max(values))  # so that every seed of the baseline reaches it
    return list(dict.fromkeys(targets))


def has_horizon(run: Run) -> bool:
    """Tell whether the learning rate of a step depends on the length of the run."""
    schedule = run.record["identity"].get("schedule")
    return not isinstance(schedule, Mapping) or schedule.get("steps") is not None


def compare_groups(
    groups: Sequence[Group], baseline: Group, targets: Sequence[float], *, perplexity: bool
) -> list[dict[str, Any]]:
    """Measure every group against the baseline, seed by seed; plain data for ``metrics.json``.

    Args:
        groups: the baseline among them.
        baseline: what is measured against; a run whose seed it lacks is paired with none.
        targets: validation perplexities, or losses.
        perplexity: whether targets are perplexities.
    """
    measured = []
    for group in groups:
        pairs = [(run, baseline.of_seed(run.seed)) for run in group.runs]
        savings, of_validation = (
            [(None, None) if base is None else token_saving(run, base, kind) for run, base in pairs]
            for kind in ("train", "eval")
        )
        times = {
            target: [
                (None, None) if base is None else speedup(run, base, target, perplexity=perplexity)
                for run, base in pairs
            ]
            for target in targets
        }
        shares = [run.optimizer_share() for run in group.runs]
        measured.append(
            {
                "label": group.label,
                "optimizer": group.runs[0].optimizer,
                "learning_rate": group.learning_rate,
                "seeds": [run.seed for run in group.runs],
                "folders": [str(run.folder) for run in group.runs],
                "unfinished": [run.seed for run in group.runs if not run.is_finished],
                "diverged": {str(run.seed): run.diverged_at for run in group.runs if run.diverged_at is not None},
                "training_loss": spread_of([run.final_training_loss() for run in group.runs])._asdict(),
                "validation_loss": spread_of([run.final_validation_loss() for run in group.runs])._asdict(),
                "validation_loss_difference": spread_of(
                    [None if base is None else final_difference(run, base) for run, base in pairs]
                )._asdict(),
                "accuracy": spread_of([last(run.curve("eval", "tokens", "accuracy")) for run in group.runs])._asdict(),
                "tokens_to_baseline_loss": spread_of([needed for needed, _ in savings])._asdict(),
                "token_saving": spread_of([saving for _, saving in savings])._asdict(),
                "tokens_to_baseline_validation_loss": spread_of([needed for needed, _ in of_validation])._asdict(),
                "validation_token_saving": spread_of([saving for _, saving in of_validation])._asdict(),
                "time_to": [
                    {
                        "target": target,
                        "seconds": spread_of([seconds for seconds, _ in reached])._asdict(),
                        "speedup": spread_of([factor for _, factor in reached])._asdict(),
                    }
                    for target, reached in times.items()
                ],
                "tokens_per_second": spread_of([run.tokens_per_second() for run in group.runs])._asdict(),
                "optimizer_ms_per_step": spread_of([milliseconds for milliseconds, _ in shares])._asdict(),
                "optimizer_share": spread_of([share for _, share in shares])._asdict(),
                "mfu": spread_of([run.record.get("results", {}).get("mfu") for run in group.runs])._asdict(),
                "peak_memory_bytes": spread_of(
                    [run.record.get("results", {}).get("peak_memory_bytes") for run in group.runs]
                )._asdict(),
            }
        )
    return measured

"""Runs of several optimizers measured against one of them, and the sweeps that found their learning rates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipe_error import RecipeError
from study_metrics import (
    SHARED,
    Group,
    Run,
    choose_baseline,
    compare_groups,
    differences,
    group_runs,
    targets_of,
    unequal_settings,
)


@dataclass(frozen=True)
class Sweep:
    """One optimizer's learning rates that were tried, with the loss of each, infinite where a run diverged.

    Attributes:
        optimizer: with its options, as in the tables.
        losses: last loss by learning rate.
        steps: of each of these runs, where they were shorter than the runs compared.
    """

    optimizer: str
    losses: Mapping[float, float]
    steps: int | None = None

    @property
    def best(self) -> float:
        return min(self.losses, key=self.losses.__getitem__)

    @property
    def is_bracketed(self) -> bool:
        """Whether a lower and a higher learning rate were worse."""
        return min(self.losses) < self.best < max(self.losses)


def sweeps_of(runs: Sequence[Run], compared: Sequence[Run]) -> list[Sweep]:
    """Read sweeps off the runs they were made of, one for each optimizer.

    Args:
        runs: at several learning rates; the mean of those at the same rate counts.
        compared: those whose learning rates were found so; they may be of another length.

    Raises:
        RecipeError: if one is not finished, they differ in length, settings or seeds, or two have the same optimizer,
            learning rate and seed.
    """
    for run in runs:
        if not run.is_finished and run.diverged_at is None:
            raise RecipeError(f"{run.folder}, a run of the sweep, is not finished: resume it, or leave it out")
    steps = {run.record["plan"]["steps"] for run in runs}
    if len(steps) > 1:
        raise RecipeError(f"the runs of the sweep have {', '.join(map(str, sorted(steps)))} steps: give those of one")
    of_all = [key for key in SHARED if key != "schedule"]  # which may depend on the length
    found = unequal_settings(runs, ["schedule"]) + unequal_settings([*runs, *compared], of_all) if runs else []
    if found:
        raise RecipeError(f"the runs of the sweep, or they and those compared, are not alike: {'; '.join(found)}")
    by_optimizer: dict[str, list[Group]] = {}
    for group in group_runs(runs):
        by_optimizer.setdefault(group.runs[0].optimizer, []).append(group)
    sweeps = []
    for optimizer, groups in by_optimizer.items():
        if len({tuple(run.seed for run in group.runs) for group in groups}) > 1:
            raise RecipeError(f"the sweep of {optimizer} has not the same seeds at all learning rates")
        losses = {group.learning_rate: group.loss() for group in groups}
        is_shorter = not steps <= {run.record["plan"]["steps"] for run in compared}
        sweeps.append(Sweep(optimizer, dict(sorted(losses.items())), min(steps) if is_shorter else None))
    return sweeps


@dataclass(frozen=True)
class Comparison:
    """Groups of runs measured against one of them."""

    groups: Sequence[Group]
    baseline: Group
    perplexity: bool
    targets: Sequence[float]
    measured: Sequence[Mapping[str, Any]]
    differences: Sequence[str]
    sweeps: Sequence[Sweep] = ()

    @property
    def unit(self) -> str:
        """What the log counts as tokens."""
        return str(self.baseline.runs[0].record.get("unit", "tokens"))

    @property
    def optimizers_are_tuned(self) -> bool:
        """Whether every optimizer has the best learning rate of a sweep that brackets it."""
        swept = {(sweep.optimizer, sweep.best) for sweep in self.sweeps if sweep.is_bracketed}
        return all((group.runs[0].optimizer, group.learning_rate) in swept for group in self.groups)


def compare(
    runs: Sequence[Run],
    *,
    baseline: str | None = None,
    targets: Sequence[float] | None = None,
    sweeps: Sequence[Sweep] = (),
) -> Comparison:
    """Measure runs against the baseline among them.

    Args:
        runs: of at least one optimizer.
        baseline: name of an optimizer; None takes the best AdamW, else the first.
        targets: validation perplexities (losses where there is no perplexity) for the table of times; None takes the
            baseline's own at half, three quarters and the end.
        sweeps: how the learning rates were found.

    Raises:
        RecipeError: if there are no runs, or two of the same optimizer, learning rate and seed.
    """
    if not runs:
        raise RecipeError("there are no runs to compare")
    groups = group_runs(runs)
    reference = choose_baseline(groups, baseline)
    perplexity = any("perplexity" in record for run in runs for record in run.log if record["kind"] == "eval")
    chosen = list(targets) if targets is not None else targets_of(reference, perplexity=perplexity)
    measured = compare_groups(groups, reference, chosen, perplexity=perplexity)
    return Comparison(groups, reference, perplexity, chosen, measured, differences(runs), sweeps)

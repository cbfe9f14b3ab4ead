"""Runs of several optimizers measured against one of them, and the sweeps that found their learning rates."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipe_error import RecipeError
from study_metrics import Group, Run, choose_baseline, compare_groups, differences, group_runs, targets_of


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


def sweeps_of(runs: Sequence[Run], lengths: Collection[int]) -> list[Sweep]:
    """Read sweeps off the runs they were made of, one for each optimizer.

    Args:
        runs: at several learning rates; the mean of those at the same rate counts.
        lengths: steps of the runs that are compared.

    Raises:
        RecipeError: if they differ in length, or two have the same optimizer, learning rate and seed.
    """
    by_optimizer: dict[str, dict[float, float]] = {}
    for group in group_runs(runs):
        by_optimizer.setdefault(group.runs[0].optimizer, {})[group.learning_rate] = group.loss()
    steps = {run.record["plan"]["steps"] for run in runs}
    if len(steps) > 1:
        raise RecipeError(f"the runs of the sweep have {', '.join(map(str, sorted(steps)))} steps: give those of one")
    return [
        Sweep(optimizer, dict(sorted(losses.items())), None if steps <= {*lengths} else min(steps))
        for optimizer, losses in by_optimizer.items()
    ]


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
        """Whether every optimizer has its learning rate from a sweep that brackets it."""
        swept = {sweep.optimizer for sweep in self.sweeps if sweep.is_bracketed}
        return all(group.runs[0].optimizer in swept for group in self.groups)


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

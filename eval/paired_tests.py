"""Which differences between two models on the same questions mean something."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scoring_statistics import mean, standard_error


@dataclass(frozen=True)
class PairedDifference:
    """Model a minus model b on the same questions.

    Attributes:
        difference: of the mean scores, in [-1, 1].
        standard_error: of that difference, over questions, paired; NaN for a single one.
        wins: questions that a has right and b wrong.
        losses: questions that a has wrong and b right.
        p: of McNemar's exact test, two-sided.
    """

    difference: float
    standard_error: float
    wins: int
    losses: int
    p: float


def paired_difference(a: Sequence[float], b: Sequence[float]) -> PairedDifference:
    """Compare scores in {0, 1}, question by question.

    Args:
        a: score of each question.
        b: the same questions, in the same order.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return PairedDifference(mean(differences), standard_error(differences), wins, losses, mcnemar(wins, losses))


def mcnemar(wins: int, losses: int) -> float:
    """Return the two-sided p of McNemar's exact test: discordant pairs are fair coin flips if nothing differs."""
    flips = wins + losses
    tail = sum(math.comb(flips, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**flips) if flips else 1.0


def holm(ps: Sequence[float]) -> list[float]:
    """Return p values adjusted for the number of tests (Holm, step-down), in the order given."""
    adjusted = [0.0] * len(ps)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = highest
    return adjusted


def average(values: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Return the unweighted mean of columns and its standard error, the columns being independent."""
    return mean(values), math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)

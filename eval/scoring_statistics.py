"""The mean, the ratio of sums and their standard errors, as used for every score."""

import math
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean, with n - 1; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def ratio_of_sums(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """Return a mean over tokens, which come in units such as proteins or windows, and its standard error over units.

    Tokens of a unit are alike, so the error is the linearised one of a ratio of sums, with n - 1.

    Args:
        sums: of each unit's values.
        counts: of each unit's tokens; units without any do not count.

    Returns:
        sum(sums) / sum(counts), and its error; NaN for fewer than two units.
    """
    total = math.fsum(counts)
    ratio = math.fsum(sums) / total
    spread = [value - ratio * count for value, count in zip(sums, counts, strict=True) if count]
    if len(spread) < 2:
        return ratio, math.nan
    squares = math.fsum(value**2 for value in spread)
    return ratio, math.sqrt(len(spread) / (len(spread) - 1) * squares) / total


def finite(value: float) -> float | None:
    """Return a number as JSON has it: None for NaN and infinities."""
    return value if math.isfinite(value) else None

"""A plan of owners as a table for people."""

import math
from collections import defaultdict
from dataclasses import dataclass


@dataclass(frozen=True)
class MatrixRow:
    """Which rank maps a matrix.

    Attributes:
        name: of its parameter, with its place in it where it holds several.
        fans: (fan_out, fan_in).
        axis: that is cut, of these two; None if none is.
        owner: in words.
        bytes: of its elements.
        operations: of its map, up to a factor.
        ranks: among which it is shared out: those with the shards of a copy, and those with the copies.
    """

    name: str
    fans: tuple[int, int]
    axis: int | None
    owner: str
    bytes: int
    operations: float
    ranks: tuple[tuple[int, ...], tuple[int, ...]]


def table_of(rows: list[MatrixRow]) -> str:
    """Markdown: a row for each matrix, and how evenly the operations are shared out."""
    work: dict[tuple[tuple[int, ...], ...], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        work[row.ranks][row.owner] += row.operations
    header = ("matrix", "shape", "cut along", "mapped by", "bytes", "share of the operations")
    cells = [header, ("---",) * 4 + ("---:",) * 2]
    for row in rows:
        cut = "" if row.axis is None else ("rows", "columns")[row.axis]
        share = f"{row.operations / sum(work[row.ranks].values()):.2%}"
        cells.append((row.name, f"{row.fans[0]} x {row.fans[1]}", cut, row.owner, f"{row.bytes:,}", share))
    lines = [f"| {' | '.join(line)} |" for line in cells]
    for ranks, loads in work.items():
        count = math.prod(map(len, ranks))
        mean, largest = sum(loads.values()) / count, max(loads.values())
        lines += ["", f"{count} ranks share these out; the largest load is {largest / mean:.3f} times the mean."]
    return "\n".join(lines)
